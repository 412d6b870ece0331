// A mixture of experts: each token goes to a few of many MLPs.
//
//   scores = router(n)                            a number for each expert
//   weights = softmax(scores) of the `each` highest; where `normalised`, made to add up to 1
//   x += sum of weight * down(silu(gate(n)) * up(n))    over those experts
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "linear.h"
#include "threads.h"

namespace gossamer {

struct Expert {
    Linear inner;  // outputs of the gate, then as many up
    Linear down;
};

struct Mixture {
    Mixture(Linear router_, int64_t each_, bool normalised_)
        : router(std::move(router_)), each(each_), normalised(normalised_) {}

    Linear router;
    int64_t each;
    bool normalised;
    std::vector<Expert> experts;

    // Puts an expert behind the others.
    void add(Expert expert);

    // An empty string, or which part does not fit; `of` says of what.
    std::string check(int64_t hidden, const std::string& of) const;

    // Numbers between the two products of an expert.
    int64_t width() const { return experts[0].down.program.in(); }

    // The most that any expert needs: bytes of a row made ready, and of what weights select of it.
    int64_t row_ready = 0, row_room = 0;

    // Bytes of a thread's scratch.
    int64_t scratch_bytes(int64_t padded, int64_t block) const;

  private:
    std::vector<Linear> kinds_;  // weights that need scratch of their own size, one of each kind
};

struct RowSizes {
    int64_t hidden, rows, padded, block;
};

// Rows on their way through the experts of a layer; all threads walk it side by side. The rows of an expert
// lie together in slots, padded as rows are. What experts give to a row is added up in the order of their
// weights: the same bits whatever came with it.
class Routed {
  public:
    // `memory`: of bytes(), the same for all threads; null: to ask how many these are.
    Routed(const Mixture& mixture, const RowSizes& sizes, uint8_t* memory);
    int64_t bytes() const { return bytes_; }
    float* scores() const { return scores_; }  // [padded row][expert]: where the router's outputs go

    // x += what experts give. Scores and rows of `normed`, which experts read, are there. Ends with a
    // barrier.
    void run(const Tier& tier, Barrier& barrier, int worker, int workers, const float* normed, float* x,
             uint8_t* scratch) const;

  private:
    void choose(int64_t row) const;
    void place() const;
    int64_t count(int64_t expert) const { return begins_[expert + 1] - begins_[expert]; }
    uint8_t* ready_of(int64_t expert) const { return ready_ + begins_[expert] * m_.row_ready; }

    // f(expert, rows) for this worker's blocks of the slots that experts have: rows counted from an expert's
    // first.
    template <class F>
    void each_block(int worker, int workers, const F& f) const;
    // f(expert, units) for its share of one of the products of all experts.
    template <class F>
    void each_unit(const Linear Expert::* product, int worker, int workers, const F& f) const;

    const Mixture& m_;
    const RowSizes s_;
    float* scores_;
    float* weights_;    // [row][each]
    int32_t* chosen_;   // [row][each]: experts
    int32_t* slots_;    // [row][each]
    int32_t* sources_;  // [slot]: its row, or -1
    int64_t* begins_;   // [expert + 1]: their first slots
    int64_t* next_;     // [expert]: where its next row goes
    float* given_;      // [slot][hidden]: what an expert reads, and then what it gives
    float* inner_;      // [slot][2 * width]
    float* activated_;  // [slot][width]
    uint8_t *ready_, *room_;
    int64_t bytes_ = 0;
};

}  // namespace gossamer
