// How each kind of policy chooses blocks (dynamic/attention/ says from which papers, and the same in
// PyTorch).
#include "policy.h"

#include <algorithm>
#include <cmath>

#include "threads.h"

namespace gossamer {
namespace {

constexpr int64_t kParts = kLast / kWeighed;

int64_t blocks_of(int64_t positions) { return (positions + kBlock - 1) / kBlock; }

// Blocks [low, high), and how the key in their middle does.
struct Range {
    int64_t low, high;
    float score;
};

}  // namespace

Policy::Policy(int64_t layers, int64_t heads, std::vector<HeadPolicy> of_heads, Labels labels,
               std::vector<float> gates, int64_t gate_dim)
    : layers_(layers),
      heads_(heads),
      of_heads_(std::move(of_heads)),
      labels_(std::move(labels)),
      gates_(std::move(gates)),
      gate_dim_(gate_dim) {}

std::string Policy::check() const {
    if (layers_ < 1 || heads_ < 1 || int64_t(of_heads_.size()) != layers_ * heads_)
        return "a policy says what each head of each layer looks at";
    for (size_t i = 0; i < of_heads_.size(); i++) {
        const HeadPolicy& p = of_heads_[i];
        const std::string at = " of head " + std::to_string(int64_t(i) % heads_) + " of layer " +
                               std::to_string(int64_t(i) / heads_);
        if (p.kind < kLookAtAll || p.kind > kLookLabels) return "the kind" + at + " is none that there is";
        for (int64_t number : {p.sink, p.window, p.stride, p.offset, p.count, p.vertical, p.slash})
            if (number < 0 || number > INT32_MAX) return "a number" + at + " is out of range";
        if (p.gate < 0 || p.gate * gate_dim_ * gate_dim_ > int64_t(gates_.size()) || (p.gate && !gate_dim_))
            return "there is no such gate" + at;
        if ((p.kind == kLookPooled || p.kind == kLookTree) && p.count < 1)
            return "the count" + at + " is below 1";
        if (p.kind == kLookLabels && labels_.empty()) return "there are no labels" + at;
    }
    return labels_.check();
}

void Policy::begin(const Cache& cache, int64_t rows, bool step, int threads) {
    const int64_t start = cache.length(), end = start + rows;
    threads_ = threads;
    step_ = step;
    row_blocks_ = (end - 1) / kBlock - start / kBlock + 1;
    room_ = blocks_of(end);
    known_ = std::min(known_, start / kBlock);
    acts_.assign(size_t(layers_), 0);
    means_.resize(size_t(layers_ * cache.kv_heads()));
    labels_.forget(start);
    labels_act_ = false;
    bool weighs = false, any_pools = false;
    pools_act_ = true;
    for (int64_t layer = 0; layer < layers_; layer++) {
        bool pools = false;
        for (int64_t head = 0; head < heads_; head++) {
            const HeadPolicy& p = of(layer, head);
            if (kind_of(p) != kLookAtAll) acts_[size_t(layer)] = 1;
            labels_act_ = labels_act_ || kind_of(p) == kLookLabels;
            pools = pools || p.kind == kLookPooled;
            weighs = weighs || (p.kind == kLookAcross && (p.steps || !step_));
        }
        for (int64_t head = 0; head < cache.kv_heads() && pools; head++)
            means_[size_t(layer * cache.kv_heads() + head)].resize(size_t(end / kBlock * cache.head_dim()));
        any_pools = any_pools || pools;
        pools_act_ = pools_act_ && (!pools || acts_[size_t(layer)]);
    }
    if (labels_act_) labels_.begin(cache, heads_);
    prepares_ = weighs || labels_act_ || (any_pools && end / kBlock > known_);
    of_worker_ = std::max(room_, weighs ? kWeighed * room_ * kBlock : 0) + 2 * kMostHead;
    numbers_.resize(size_t(threads * of_worker_));
    chosen_.resize(size_t(threads * room_));
    order_.resize(size_t(threads * room_));
    ranges_.resize(size_t(threads * 2 * (room_ + 1)) * sizeof(Range));
    lists_.resize(size_t(heads_ * row_blocks_ * room_));
    counts_.resize(size_t(heads_ * row_blocks_));
    weights_.resize(weighs ? size_t(heads_ * kParts * 2 * room_) : 0);
}

// ---- what is the same for all rows: means of blocks that became whole, and the weights of the last rows

void Policy::prepare(const PolicyRows& r, int worker) {
    if (!means_[size_t(r.layer * r.cache.kv_heads())].empty()) {
        const int64_t dim = r.cache.head_dim(), fresh = (r.start + r.rows) / kBlock - known_;
        const Share mine = share_of(fresh * r.cache.kv_heads(), worker, threads_);
        float key[kMostHead];
        for (int64_t i = mine.begin; i < mine.end; i++) {
            const int64_t head = i / fresh, block = known_ + i % fresh;
            float* mean = means_of(r, head) + block * dim;
            std::fill(mean, mean + dim, 0.0f);
            for (int64_t p = block * kBlock; p < (block + 1) * kBlock; p++) {
                r.cache.read_key(r.layer, head, p, key);
                for (int64_t j = 0; j < dim; j++) mean[j] += key[j];
            }
            for (int64_t j = 0; j < dim; j++) mean[j] *= 1.0f / kBlock;
        }
    }
    if (labels_act_) labels_.rate(r.cache, r.ops, r.layer, r.q, worker, threads_);
    const Share mine = share_of(heads_ * kParts, worker, threads_);
    for (int64_t i = mine.begin; i < mine.end; i++) {
        const HeadPolicy& p = of(r.layer, i / kParts);
        if (p.kind == kLookAcross && (p.steps || !step_))
            weigh(r, i / kParts, i % kParts, numbers_of(worker));
    }
}

void Policy::weigh(const PolicyRows& r, int64_t head, int64_t part, float* scores) {
    float* sums = weights_.data() + (head * kParts + part) * 2 * room_;
    std::fill(sums, sums + 2 * room_, 0.0f);
    const int64_t first = std::max<int64_t>(0, r.rows - kLast) + part * kWeighed;
    if (first >= r.rows) return;
    Weighing w{};
    w.count = int(std::min<int64_t>(kWeighed, r.rows - first));
    w.dim = r.cache.head_dim();
    w.type = r.cache.type();
    const int64_t kv_head = head / (heads_ / r.cache.kv_heads());
    w.keys = r.cache.keys_of(r.layer, kv_head);
    if (r.cache.packed()) {
        w.how = r.cache.how(r.layer, kv_head);
        w.compressed = r.cache.due(r.start);
        w.whole = r.cache.whole_of(r.layer, kv_head);
    }
    w.queries = static_cast<const uint8_t*>(r.queries) + (head * r.rows + first) * r.query_stride;
    w.first = r.start + first;
    w.room = room_ * kBlock;
    w.scores = scores;
    w.of_blocks = sums;
    w.of_distances = sums + room_;
    r.ops.weigh(&w);
}

// ---- lists

void Policy::choose(const PolicyRows& r, int worker) {
    const Share mine = share_of(heads_ * row_blocks_, worker, threads_);
    for (int64_t i = mine.begin; i < mine.end; i++) choose_some(r, i / row_blocks_, i % row_blocks_, worker);
}

void Policy::choose_some(const PolicyRows& r, int64_t head, int64_t n, int worker) {
    const HeadPolicy& p = of(r.layer, head);
    const int64_t own = r.start / kBlock + n;
    char* chosen = chosen_.data() + worker * room_;
    std::fill(chosen, chosen + room_, char(0));
    switch (kind_of(p)) {
        case kLookPooled:
            pooled(r, p, head, n, worker);
            break;
        case kLookAcross:
            across(p, head, own, worker);
            break;
        case kLookTree:
        case kLookLabels:
            if (p.kind == kLookTree) tree(r, p, head, n, worker);
            if (p.kind == kLookLabels) rated(p, head, own, worker);
            [[fallthrough]];
        case kLookStatic:
            for (int64_t block = 0; block <= own; block++)
                if (block < p.sink || block >= own - p.window ||
                    (p.stride && (block + p.offset) % p.stride == 0))
                    chosen[block] = 1;
            break;
        default:
            std::fill(chosen, chosen + own + 1, char(1));
    }
    chosen[own] = 1;
    const int64_t row = std::max(r.start, own * kBlock);  // the first one, which sees the earliest
    const int64_t first = r.window ? std::max<int64_t>(0, row - r.window + 1) / kBlock : 0;
    int64_t count = 0;
    int32_t* list = lists_.data() + (head * row_blocks_ + n) * room_;
    for (int64_t block = first; block <= own; block++)
        if (chosen[block]) list[count++] = int32_t(block);
    counts_[size_t(head * row_blocks_ + n)] = count;
    looked_.fetch_add(count, std::memory_order_relaxed);
    there_.fetch_add(own + 1 - first, std::memory_order_relaxed);
}

// Mean of the rows in a block.
void Policy::mean_query(const PolicyRows& r, int64_t head, int64_t n, float* mean) const {
    const int64_t dim = r.cache.head_dim(), own = r.start / kBlock + n;
    const int64_t from = std::max(r.start, own * kBlock) - r.start;
    const int64_t to = std::min(r.start + r.rows, (own + 1) * kBlock) - r.start;
    std::fill(mean, mean + dim, 0.0f);
    for (int64_t row = from; row < to; row++)
        for (int64_t j = 0; j < dim; j++) mean[j] += r.q[(row * heads_ + head) * dim + j];
    for (int64_t j = 0; j < dim; j++) mean[j] /= float(to - from);
}

// Chooses the `count` largest scores of [from, to), ties by number; not a number is the least.
void Policy::keep_best(const float* scores, int64_t from, int64_t to, int64_t count, int worker) {
    char* chosen = chosen_.data() + worker * room_;
    if (count >= to - from) {
        if (to > from) std::fill(chosen + from, chosen + to, char(1));
        return;
    }
    int32_t* order = order_.data() + worker * room_;
    for (int64_t i = from; i < to; i++) order[i] = int32_t(i);
    const auto value = [&](int32_t i) { return scores[i] == scores[i] ? scores[i] : -INFINITY; };
    std::nth_element(order + from, order + from + count, order + to, [&](int32_t a, int32_t b) {
        return value(a) > value(b) || (value(a) == value(b) && a < b);
    });
    for (int64_t i = from; i < from + count; i++) chosen[order[i]] = 1;
}

void Policy::pooled(const PolicyRows& r, const HeadPolicy& p, int64_t head, int64_t n, int worker) {
    const int64_t own = r.start / kBlock + n, dim = r.cache.head_dim();
    float *mean = numbers_of(worker), *scores = mean + kMostHead;
    mean_query(r, head, n, mean);
    if (p.gate) {
        const float* gate = gates_.data() + (p.gate - 1) * dim * dim;
        float gated[kMostHead] = {};
        for (int64_t i = 0; i < dim; i++)
            for (int64_t j = 0; j < dim; j++) gated[j] += mean[i] * gate[i * dim + j];
        std::copy(gated, gated + dim, mean);
    }
    const float* means = means_of(r, head / (heads_ / r.cache.kv_heads()));
    r.ops.dots(mean, means, own, dim, scores);
    // the rows' own block is one of them, and the first one too where there is room
    const bool first = p.count > 1 && own > 0;
    if (first) chosen_[size_t(worker * room_)] = 1;
    keep_best(scores, first ? 1 : 0, own, p.count - 1 - (first ? 1 : 0), worker);
}

void Policy::across(const HeadPolicy& p, int64_t head, int64_t own, int worker) {
    // each worker adds the parts up and finds the best again for every list, which is less than to wait once
    // more
    float *blocks = numbers_of(worker), *distances = blocks + room_;
    std::fill(blocks, blocks + 2 * room_, 0.0f);
    for (int64_t part = 0; part < kParts; part++) {
        const float* some = weights_.data() + (head * kParts + part) * 2 * room_;
        for (int64_t i = 0; i < 2 * room_; i++) blocks[i] += some[i];
    }
    blocks[0] = distances[0] = INFINITY;  // what a prompt begins with, and what is near
    char* chosen = chosen_.data() + worker * room_;
    keep_best(distances, 0, room_, p.slash, worker);
    // a diagonal at a distance crosses two blocks of keys for each block of rows
    for (int64_t away = own; away >= 0; away--)
        if (!chosen[away] && away > 0 && chosen[away - 1]) chosen[away] = 1;
    std::reverse(chosen, chosen + own + 1);
    std::fill(chosen + own + 1, chosen + room_, char(0));
    keep_best(blocks, 0, room_, p.vertical, worker);
}

void Policy::rated(const HeadPolicy& p, int64_t head, int64_t own, int worker) {
    float* rates = numbers_of(worker);
    labels_.rates_of(head, rates);
    const int64_t to = std::max<int64_t>(0, own - p.window);
    keep_best(rates, std::min(p.sink, to), to, p.count, worker);
}

void Policy::tree(const PolicyRows& r, const HeadPolicy& p, int64_t head, int64_t n, int worker) {
    const int64_t own = r.start / kBlock + n, dim = r.cache.head_dim(), last = r.start + r.rows - 1;
    const int64_t kv_head = head / (heads_ / r.cache.kv_heads());
    float *mean = numbers_of(worker), *key = mean + kMostHead;
    mean_query(r, head, n, mean);
    Range* ranges = reinterpret_cast<Range*>(ranges_.data()) + worker * 2 * (room_ + 1);
    int64_t count = 0, longest = 0;
    for (int64_t i = 0; i < p.count; i++) {
        const Range one{i * (own + 1) / p.count, (i + 1) * (own + 1) / p.count, 0};
        if (one.low == one.high) continue;
        ranges[count++] = one;
        longest = std::max(longest, one.high - one.low);
    }
    while (longest > 1) {
        int64_t halves = count;
        for (int64_t i = 0; i < count; i++) {
            const int64_t middle = (ranges[i].low + ranges[i].high + 1) / 2;
            if (middle < ranges[i].high) ranges[halves++] = {middle, ranges[i].high, 0};
            ranges[i].high = middle;
        }
        for (int64_t i = 0; i < halves; i++) {
            r.cache.read_key(r.layer, kv_head, std::min((ranges[i].low + ranges[i].high) * kBlock / 2, last),
                             key);
            r.ops.dots(mean, key, 1, dim, &ranges[i].score);
            if (!(ranges[i].score == ranges[i].score)) ranges[i].score = -INFINITY;
        }
        count = std::min(p.count, halves);
        std::nth_element(ranges, ranges + count - 1, ranges + halves, [](const Range& a, const Range& b) {
            return a.score > b.score || (a.score == b.score && a.low < b.low);
        });
        longest = 0;
        for (int64_t i = 0; i < count; i++) longest = std::max(longest, ranges[i].high - ranges[i].low);
    }
    for (int64_t i = 0; i < count; i++) chosen_[size_t(worker * room_ + ranges[i].low)] = 1;
}

}  // namespace gossamer
