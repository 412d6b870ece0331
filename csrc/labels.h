// Labels: a copy of a few channels of keys, which a step reads of every position to find the blocks that are
// worth reading whole (Yang et al. 2024, Double Sparsity).
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "cache.h"
#include "estimate.h"

namespace gossamer {

// Of one sequence: bfloat16 labels of whole blocks, as `Rating` has them, and how a step's queries rate
// these.
class Labels {
  public:
    // channels: [layer][kv_head][count], count even; none of it: no labels.
    Labels(int64_t layers, int64_t kv_heads, std::vector<int32_t> channels);

    // An empty string, or what is wrong with them.
    std::string check() const;
    bool suit(const Cache& cache) const;
    bool empty() const { return channels_.empty(); }
    int64_t bytes() const;

    // Before one token is appended to the cache; throws std::bad_alloc.
    void begin(const Cache& cache, int64_t heads);
    void forget(int64_t length);  // what was labelled of later positions
    void end() { known_ = blocks_; }

    // Labels blocks that became whole, and rates those before the step's own. All workers of a team call it.
    void rate(const Cache& cache, const EstimateOps& ops, int64_t layer, const float* q, int worker,
              int workers);
    // After that and a barrier: how the heads that share keys with `head` rate the blocks before the step's
    // own: each by how far it is from its best one, the best of them counts.
    void rates_of(int64_t head, float* rates) const;

  private:
    void keep(const Cache& cache, int64_t layer, int64_t kv_head, int64_t block);

    const int64_t layers_, kv_heads_;
    const std::vector<int32_t> channels_;
    const int64_t count_;
    std::vector<std::vector<uint16_t>> labels_;  // [layer][kv_head]: blocks
    int64_t known_ = 0, blocks_ = 0;             // that are labelled, and that lie before a step's own
    int64_t heads_ = 0;
    std::vector<float> rates_;  // [head][blocks_]
};

}  // namespace gossamer
