// How a program is put together, and what it must hold to.
#include "program.h"

namespace gossamer {

void Program::begin_stage() {
    int64_t before = 0;
    if (!starts_.empty()) {
        const Stage last = stage(stages() - 1);
        before = last.before + last.out;
    }
    starts_.push_back({terms_.size(), before});
}

void Program::add_term(const Selected& w, int64_t blocks, int64_t source) {
    if (starts_.empty()) begin_stage();
    terms_.push_back(Term{w, blocks, source});
}

Stage Program::stage(int64_t number) const {
    const Start& start = starts_[size_t(number)];
    const bool last = number + 1 == stages();
    const Terms terms{terms_.data() + start.term,
                      terms_.data() + (last ? terms_.size() : starts_[size_t(number) + 1].term)};
    return {terms, terms.size() ? terms.first->w.out : 0, start.before, last};
}

std::string Program::check() const {
    if (starts_.empty()) return "it has no stage";
    for (int64_t s = 0; s < stages(); s++) {
        const Stage stage = this->stage(s);
        if (stage.terms.size() == 0) return "stage " + std::to_string(s) + " has no terms";
        for (size_t t = 0; t < stage.terms.size(); t++) {
            const Term& term = stage.terms.first[t];
            const Selected& w = term.w;
            const std::string who = "term " + std::to_string(t) + " of stage " + std::to_string(s);
            const int64_t unit = unit_of(w.layout), outputs = kPanel * unit;
            if (term.blocks < 1 || (term.blocks > 1 && (w.out % outputs || w.panels / unit % term.blocks)))
                return who + " has " + std::to_string(w.out) + " outputs, which are not " +
                       std::to_string(term.blocks) + " blocks of a multiple of " + std::to_string(outputs);
            if (w.out != stage.out)
                return who + " gives " + std::to_string(w.out) + " outputs, the first one " +
                       std::to_string(stage.out);
            if (w.inputs && term.blocks > 1) return who + " has blocks, and a list of inputs";
            if (term.source < -1 || term.source >= s)
                return who + " multiplies stage " + std::to_string(term.source) +
                       ", which does not come before";
            const int64_t wanted = term.source < 0 ? in() : this->stage(term.source).out;
            const int64_t width = row_width(w);
            if (width > wanted / term.blocks || width * term.blocks != wanted)
                return who + " takes " + std::to_string(term.blocks) + " x " + std::to_string(width) +
                       " inputs where there are " + std::to_string(wanted);
        }
    }
    return "";
}

}  // namespace gossamer
