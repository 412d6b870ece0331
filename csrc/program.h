// Sums and products of packed weights, as the driver runs them in one call, and the decoder in each layer.
//
//   Sum(Product(A, B), C)     stage 0:  s0 = B x
//                             stage 1:  y  = A s0 + C x
#pragma once
#include <string>
#include <vector>

#include "selected.h"

namespace gossamer {

// A packed weight (out, in) times what `source` names: an earlier stage, or the activations (-1). With
// several blocks it stands for a block-diagonal matrix (out, blocks * in): its first out / blocks outputs see
// the first `in` inputs only, the next ones the next inputs, and so on.
struct Term {
    Selected w;
    int64_t blocks;
    int64_t source;
};

struct Terms {
    const Term *first, *last;
    const Term* begin() const { return first; }
    const Term* end() const { return last; }
    size_t size() const { return size_t(last - first); }
};

// The sum of its terms, added in order in float32.
struct Stage {
    Terms terms;
    int64_t out;
    int64_t before;  // outputs of all stages before it
    bool last;       // its sum is the result
};

// Stages in an order in which they can run.
class Program {
  public:
    void begin_stage();
    void add_term(const Selected& w, int64_t blocks, int64_t source);  // to the stage begun last

    // An empty string, or a sentence saying which term does not fit. Nothing else may reach the driver. The
    // weights themselves must have been checked.
    std::string check() const;

    int64_t stages() const { return int64_t(starts_.size()); }
    Stage stage(int64_t number) const;
    Terms terms() const { return {terms_.data(), terms_.data() + terms_.size()}; }  // of all stages
    Selected& weight(size_t term) { return terms_[term].w; }
    int64_t in() const { return row_width(terms_.front().w) * terms_.front().blocks; }  // of the activations
    int64_t out() const { return stage(stages() - 1).out; }

  private:
    // Flat, of trivial types: what the standard library instantiates for others is exported.
    struct Start {
        size_t term;
        int64_t before;
    };
    std::vector<Term> terms_;
    std::vector<Start> starts_;  // of each stage
};

}  // namespace gossamer
