// Attention policies as data: which blocks of keys the rows of a block look at, for every layer and head.
//
// All threads go through `prepare` and a barrier (where it `prepares`), `choose` and a barrier; then the
// lists of the layer lie there.
#pragma once
#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "cache.h"
#include "estimate.h"
#include "labels.h"

namespace gossamer {

enum PolicyKind : int64_t {
    kLookAtAll = 0,
    kLookStatic = 1,  // the first `sink` blocks, `window` before the row's own, every `stride`-th one
    kLookPooled = 2,  // `count` blocks whose mean key the rows' mean query likes best
    kLookAcross = 3,  // `vertical` blocks and `slash` distances that the last rows give the most weight
    kLookTree = 4,    // `count` blocks found by halving ranges; `sink` and `window` as well
    kLookLabels = 5,  // steps only: `count` blocks that labels rate highest; `sink` and `window` as well
};

// Of one head. Numbers are of blocks; what a kind does not name is 0.
struct HeadPolicy {
    int64_t kind;
    int64_t steps;  // whether one row by itself (a step after the prompt) looks by it too, not at all
    int64_t sink, window, stride, offset, count, vertical, slash;
    int64_t gate;  // of kLookPooled: the gate that the mean query goes through, from 1 on; 0: none
};

constexpr int kPolicyNumbers = sizeof(HeadPolicy) / sizeof(int64_t);
constexpr int kLast = 64;  // rows that stand for all of a call, where the kind is kLookAcross

// Queries and keys of one layer, after `AttentionOps::place_*`.
struct PolicyRows {
    const Cache& cache;
    const EstimateOps& ops;
    int64_t layer, start, rows;
    int64_t window;        // positions that a row sees, its own among them; 0: all
    const float* q;        // [row][head][dim], rotated
    const void* queries;   // [head][row][wide], as place_query left them
    int64_t query_stride;  // bytes of one
};

// The policy of a sequence, and what it remembers of its keys: their means over whole blocks, which depend on
// nothing but what lies in the cache.
class Policy {
  public:
    // `gates`: [number - 1][gate_dim][gate_dim], by which a mean query is multiplied from the left.
    Policy(int64_t layers, int64_t heads, std::vector<HeadPolicy> of_heads, Labels labels,
           std::vector<float> gates = {}, int64_t gate_dim = 0);
    Policy(const Policy&) = delete;

    // An empty string, or what is wrong with it.
    std::string check() const;
    int64_t layers() const { return layers_; }
    int64_t heads() const { return heads_; }

    // Whether it is for such a cache.
    bool suits(const Cache& cache) const {
        return heads_ % cache.kv_heads() == 0 && labels_.suit(cache) &&
               (!gate_dim_ || gate_dim_ == cache.head_dim());
    }
    int64_t bytes() const { return labels_.bytes(); }  // of what it keeps of keys besides the cache

    // Makes room before `rows` tokens are appended; `step`: they are one that comes by itself, not what is
    // left of a prompt. Throws std::bad_alloc.
    void begin(const Cache& cache, int64_t rows, bool step, int threads);
    void end(const Cache& cache) {
        if (pools_act_) known_ = cache.length() / kBlock;
        if (labels_act_) labels_.end();
    }

    bool acts(int64_t layer) const { return acts_[size_t(layer)]; }
    bool prepares() const { return prepares_; }  // else there is nothing to prepare, nor to wait for
    void prepare(const PolicyRows& r, int worker);
    void choose(const PolicyRows& r, int worker);

    // Blocks, ascending, for the rows of a head whose positions lie in the n-th block that rows lie in.
    struct List {
        const int32_t* blocks;
        int64_t count;
    };
    List list(int64_t head, int64_t n) const {
        const size_t at = size_t(head * row_blocks_ + n);
        return {lists_.data() + int64_t(at) * room_, counts_[at]};
    }

    // Blocks that were looked at so far, and those that dense attention would have looked at.
    int64_t looked() const { return looked_; }
    int64_t there() const { return there_; }

  private:
    // What a head looks by in this run.
    int64_t kind_of(const HeadPolicy& p) const {
        return (p.kind == kLookLabels ? step_ : p.steps || !step_) ? p.kind : int64_t(kLookAtAll);
    }
    const HeadPolicy& of(int64_t layer, int64_t head) const {
        return of_heads_[size_t(layer * heads_ + head)];
    }
    float* means_of(const PolicyRows& r, int64_t kv_head) {
        return means_[size_t(r.layer * r.cache.kv_heads() + kv_head)].data();
    }
    float* numbers_of(int worker) { return numbers_.data() + worker * of_worker_; }
    void weigh(const PolicyRows& r, int64_t head, int64_t part, float* scores);
    void choose_some(const PolicyRows& r, int64_t head, int64_t n, int worker);
    void pooled(const PolicyRows& r, const HeadPolicy& p, int64_t head, int64_t n, int worker);
    void across(const HeadPolicy& p, int64_t head, int64_t own, int worker);
    void tree(const PolicyRows& r, const HeadPolicy& p, int64_t head, int64_t n, int worker);
    void rated(const HeadPolicy& p, int64_t head, int64_t own, int worker);
    void mean_query(const PolicyRows& r, int64_t head, int64_t n, float* mean) const;
    void keep_best(const float* scores, int64_t from, int64_t to, int64_t count, int worker);

    const int64_t layers_, heads_;
    const std::vector<HeadPolicy> of_heads_;
    Labels labels_;
    const std::vector<float> gates_;
    const int64_t gate_dim_;  // 0: there are no gates
    std::vector<char> acts_;
    std::vector<std::vector<float>> means_;  // [layer][kv_head]: [block][dim], where a head is pooled
    int64_t known_ = 0;                      // blocks whose means are there
    bool pools_act_ = false;                 // whether a run makes those of all layers that want them

    // of a run
    int threads_ = 1;
    bool step_ = false, prepares_ = false, labels_act_ = false;
    int64_t row_blocks_ = 0, room_ = 0, of_worker_ = 0;  // room_: blocks of all positions
    std::vector<int32_t> lists_;                         // [head][row block][room]
    std::vector<int64_t> counts_;
    std::vector<float> numbers_;  // [worker]: scratch
    std::vector<float> weights_;  // [head][part of the last rows][blocks, distances][room]
    std::vector<char> chosen_;    // [worker][room]
    std::vector<int32_t> order_;  // [worker][room]
    std::vector<char> ranges_;    // [worker]: scratch of the tree
    std::atomic<int64_t> looked_{0}, there_{0};
};

}  // namespace gossamer
