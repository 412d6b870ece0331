#include "mixture.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace gossamer {
namespace {

bool as_needy(const Linear& a, const Linear& b) {
    const auto same = [](const Term& one, const Term& other) {
        return one.w.values == other.w.values && one.w.layout == other.w.layout &&
               one.w.groups == other.w.groups;
    };
    const Terms some = a.program.terms(), others = b.program.terms();
    return std::equal(some.begin(), some.end(), others.begin(), others.end(), same);
}

}  // namespace

void Mixture::add(Expert expert) {
    for (const Linear* one : {&expert.inner, &expert.down}) {
        row_ready = std::max(row_ready, activation_bytes(*one, 1));
        row_room = std::max(row_room, room_bytes(*one, 1));
        const auto known = [&](const Linear& kind) { return as_needy(kind, *one); };
        if (std::none_of(kinds_.begin(), kinds_.end(), known)) kinds_.push_back(*one);
    }
    experts.push_back(std::move(expert));
}

int64_t Mixture::scratch_bytes(int64_t padded, int64_t block) const {
    int64_t bytes = 0;
    for (const Linear& kind : kinds_) bytes = std::max(bytes, gossamer::scratch_bytes(kind, padded, block));
    return bytes;
}

std::string Mixture::check(int64_t hidden, const std::string& of) const {
    const int64_t count = int64_t(experts.size());
    if (each < 1 || each > count)
        return std::to_string(each) + " experts of " + std::to_string(count) + " cannot be chosen" + of;
    std::string fault = fits(router, count, hidden, "the router" + of);
    if (fault.empty() && !experts[0].down.program.terms().size())
        fault = "an expert" + of + " has no weights";
    for (int64_t e = 0; e < count && fault.empty(); e++) {
        const std::string which = " of expert " + std::to_string(e) + of;
        fault = fits(experts[size_t(e)].inner, 2 * width(), hidden, "gate and up" + which);
        if (fault.empty()) fault = fits(experts[size_t(e)].down, hidden, width(), "down" + which);
        if (fault.empty() && (experts[size_t(e)].inner.inner() || experts[size_t(e)].down.inner()))
            fault = "a product of weights" + which;
    }
    return fault;
}

Routed::Routed(const Mixture& mixture, const RowSizes& sizes, uint8_t* memory) : m_(mixture), s_(sizes) {
    const int64_t experts = int64_t(m_.experts.size()), chosen = s_.rows * m_.each;
    const int64_t slots = chosen + std::min(experts, chosen) * (s_.block - 1), width = m_.width();
    const auto take = [&](auto** place, int64_t bytes) {
        *place = reinterpret_cast<std::remove_reference_t<decltype(*place)>>(
            reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes_));
        bytes_ += aligned(bytes);
    };
    take(&scores_, 4 * s_.padded * experts);
    take(&weights_, 4 * chosen);
    take(&chosen_, 4 * chosen);
    take(&slots_, 4 * chosen);
    take(&sources_, 4 * slots);
    take(&begins_, 8 * (experts + 1));
    take(&next_, 8 * experts);
    take(&given_, 4 * slots * s_.hidden);
    take(&inner_, 4 * slots * 2 * width);
    take(&activated_, 4 * slots * width);
    // a row's own bytes are whole cache lines: several rows need no more than as many times as much
    take(&ready_, slots * m_.row_ready);
    take(&room_, slots * m_.row_room);
}

// The experts of a row, highest score first, of equal ones the first; and their weights.
void Routed::choose(int64_t row) const {
    const int64_t experts = int64_t(m_.experts.size());
    float* scores = scores_ + row * experts;
    int32_t* chosen = chosen_ + row * m_.each;
    float* weights = weights_ + row * m_.each;
    const float highest = *std::max_element(scores, scores + experts);
    float all = 0;
    for (int64_t e = 0; e < experts; e++) all += scores[e] = std::exp(scores[e] - highest);
    float sum = 0;
    for (int64_t i = 0; i < m_.each; i++) {
        int64_t best = -1;
        for (int64_t e = 0; e < experts; e++) {
            if (std::find(chosen, chosen + i, int32_t(e)) != chosen + i) continue;
            if (best < 0 || scores[e] > scores[best]) best = e;
        }
        chosen[i] = int32_t(best);
        sum += weights[i] = scores[best];
    }
    for (int64_t i = 0; i < m_.each; i++) weights[i] /= m_.normalised ? sum : all;
}

// Gives each row a slot for each of its experts.
void Routed::place() const {
    const int64_t experts = int64_t(m_.experts.size()), all = s_.rows * m_.each;
    std::fill(begins_, begins_ + experts + 1, 0);
    for (int64_t i = 0; i < all; i++) begins_[chosen_[i] + 1]++;
    for (int64_t e = 0; e < experts; e++) begins_[e + 1] = begins_[e] + padded_rows(begins_[e + 1], s_.block);
    std::fill(sources_, sources_ + begins_[experts], -1);
    std::copy(begins_, begins_ + experts, next_);
    for (int64_t i = 0; i < all; i++) {
        slots_[i] = int32_t(next_[chosen_[i]]++);
        sources_[slots_[i]] = int32_t(i / m_.each);
    }
}

template <class F>
void Routed::each_block(int worker, int workers, const F& f) const {
    const int64_t experts = int64_t(m_.experts.size());
    const Share mine = share_of(begins_[experts], worker, workers);
    for (int64_t e = 0; e < experts; e++) {
        const auto clipped = [&](int64_t slot) {
            const int64_t row = (slot - begins_[e] + kMaxRowBlock - 1) / kMaxRowBlock * kMaxRowBlock;
            return std::min(count(e), std::max<int64_t>(0, row));
        };
        const Share rows{clipped(mine.begin), clipped(mine.end)};
        if (rows.begin < rows.end) f(e, rows);
    }
}

template <class F>
void Routed::each_unit(const Linear Expert::* product, int worker, int workers, const F& f) const {
    const int64_t experts = int64_t(m_.experts.size());
    int64_t all = 0, before = 0;
    for (int64_t e = 0; e < experts; e++) all += count(e) * units_of(m_.experts[size_t(e)].*product);
    const Share mine = share_of(all, worker, workers);
    for (int64_t e = 0; e < experts; e++) {
        const int64_t rows = count(e), units = units_of(m_.experts[size_t(e)].*product);
        if (!rows) continue;
        const auto clipped = [&](int64_t at) {
            return std::min(units, std::max<int64_t>(0, (at - before + rows - 1) / rows));
        };
        const Share some{clipped(mine.begin), clipped(mine.end)};
        if (some.begin < some.end) f(e, some);
        before += rows * units;
    }
}

void Routed::run(const Tier& tier, Barrier& barrier, int worker, int workers, const float* normed, float* x,
                 uint8_t* scratch) const {
    const int64_t hidden = s_.hidden, width = m_.width();
    const auto room_of = [&](int64_t e) { return room_ + begins_[e] * m_.row_room; };
    const Share own = share_of(s_.rows, worker, workers);
    for (int64_t r = own.begin; r < own.end; r++) choose(r);
    barrier.wait();
    if (worker == 0) place();
    barrier.wait();
    each_block(worker, workers, [&](int64_t e, Share rows) {
        for (int64_t r = rows.begin; r < rows.end; r++) {
            const int32_t source = sources_[begins_[e] + r];
            float* to = given_ + (begins_[e] + r) * hidden;
            if (source < 0)
                std::memset(to, 0, size_t(hidden) * 4);
            else
                std::memcpy(to, normed + source * hidden, size_t(hidden) * 4);
        }
        make_ready(tier, m_.experts[size_t(e)].inner, given_ + begins_[e] * hidden, rows, count(e), s_.block,
                   ready_of(e), room_of(e));
    });
    barrier.wait();
    each_unit(&Expert::inner, worker, workers, [&](int64_t e, Share units) {
        multiply(tier, m_.experts[size_t(e)].inner, ready_of(e), count(e), s_.block,
                 inner_ + begins_[e] * 2 * width, nullptr, units, scratch);
    });
    barrier.wait();
    each_block(worker, workers, [&](int64_t e, Share rows) {
        for (int64_t r = begins_[e] + rows.begin; r < begins_[e] + rows.end; r++) {
            float* gate = inner_ + r * 2 * width;
            tier.decoder->gate(gate, gate + width, width);
            std::memcpy(activated_ + r * width, gate, size_t(width) * 4);
        }
        make_ready(tier, m_.experts[size_t(e)].down, activated_ + begins_[e] * width, rows, count(e),
                   s_.block, ready_of(e), room_of(e));
    });
    barrier.wait();
    each_unit(&Expert::down, worker, workers, [&](int64_t e, Share units) {
        multiply(tier, m_.experts[size_t(e)].down, ready_of(e), count(e), s_.block,
                 given_ + begins_[e] * hidden, nullptr, units, scratch);
    });
    barrier.wait();
    for (int64_t r = own.begin; r < own.end; r++)
        for (int64_t i = r * m_.each; i < (r + 1) * m_.each; i++) {
            const float* given = given_ + slots_[i] * hidden;
            const float weight = weights_[i];
            for (int64_t j = 0; j < hidden; j++) x[r * hidden + j] += weight * given[j];
        }
    barrier.wait();
}

}  // namespace gossamer
