// Gates of activations: which of them are dropped before they meet a weight. What is dropped becomes zero,
// which the layout columns does not read.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "decoder_ops.h"

namespace gossamer {

// An activation scores |x_j| * importance_j; NaN is never dropped.
struct Gate {
    bool on = false;
    float threshold = 0;                // scores up to it are dropped,
    int64_t pruned = -1;                // or, where not negative, so many of a row; of equal scores the first
    const float* importance = nullptr;  // null: 1

    bool operator==(const Gate& other) const {
        return on == other.on && threshold == other.threshold && pruned == other.pruned &&
               importance == other.importance;
    }
};

// Drops from a row of `n` numbers, which may be written in place; returns how many were dropped.
int64_t drop(const DecoderOps& ops, const Gate& gate, const float* x, int64_t n, float* y);

// Where a layer is gated: what its weights read, or what the MLP's activation gives.
enum Site : int { kAtQ, kAtK, kAtV, kAtO, kAtGate, kAtUp, kAtDown, kAtActivated, kSites };

// Those of a decoder, and what they have dropped; several sequences may run with them at the same time.
class Gates {
  public:
    explicit Gates(int64_t layers)
        : gates_(size_t(layers * kSites)), dropped_(new std::atomic<int64_t>[size_t(layers * kSites)]()) {}

    int64_t layers() const { return int64_t(gates_.size()) / kSites; }
    void set(int64_t layer, Site site, const Gate& gate) { gates_[at(layer, site)] = gate; }
    const Gate& of(int64_t layer, Site site) const { return gates_[at(layer, site)]; }

    void count(int64_t layer, Site site, int64_t dropped) const {
        dropped_[at(layer, site)].fetch_add(dropped, std::memory_order_relaxed);
    }
    void count_tokens(int64_t tokens) const { tokens_.fetch_add(tokens, std::memory_order_relaxed); }
    int64_t dropped(int64_t layer, Site site) const { return dropped_[at(layer, site)]; }
    int64_t tokens() const { return tokens_; }

  private:
    static size_t at(int64_t layer, Site site) { return size_t(layer * kSites + site); }
    std::vector<Gate> gates_;
    std::unique_ptr<std::atomic<int64_t>[]> dropped_;
    mutable std::atomic<int64_t> tokens_{0};
};

}  // namespace gossamer
