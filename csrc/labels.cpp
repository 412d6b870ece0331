// How labels are copied from the cache and rated.
#include "labels.h"

#include <algorithm>
#include <cstring>

namespace gossamer {
namespace {

constexpr int64_t kSlices = 4;  // of the blocks of a head, shared out to workers

uint16_t bfloat16_of(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return f != f ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Channels of the keys at [start, start + kBlock) of a part, each made bfloat16 by `number`.
template <class T, class F>
void copy_channels(const T* part, int word, int64_t wide, int64_t start, const int32_t* channels,
                   int64_t count, uint16_t* to, const F& number) {
    for (int64_t i = 0; i < count; i++) {
        const int64_t c = channels[i];
        const T* from = part + start * wide + c / word * 16 * word + c % word;
        uint16_t* label = to + i / 2 * 32 + i % 2;
        for (int64_t p = 0; p < kBlock; p++)
            label[p / 16 * 16 * count + p % 16 * 2] = number(from[p / 16 * 16 * wide + p % 16 * word], p);
    }
}

}  // namespace

Labels::Labels(int64_t layers, int64_t kv_heads, std::vector<int32_t> channels)
    : layers_(layers),
      kv_heads_(kv_heads),
      channels_(std::move(channels)),
      count_(layers * kv_heads > 0 ? int64_t(channels_.size()) / (layers * kv_heads) : 0),
      labels_(size_t(std::max<int64_t>(0, layers * kv_heads))) {}

std::string Labels::check() const {
    if (empty()) return "";
    if (layers_ < 1 || kv_heads_ < 1 || int64_t(channels_.size()) != layers_ * kv_heads_ * count_ ||
        count_ % 2 || count_ > kMostHead)
        return "each head of keys has the same even number of labels";
    for (int32_t channel : channels_)
        if (channel < 0 || channel >= kMostHead) return "a label is no channel of a head";
    return "";
}

bool Labels::suit(const Cache& cache) const {
    return empty() || (cache.layers() == layers_ && cache.kv_heads() == kv_heads_ &&
                       *std::max_element(channels_.begin(), channels_.end()) < cache.head_dim());
}

int64_t Labels::bytes() const {
    int64_t bytes = 0;
    for (const auto& one : labels_) bytes += int64_t(one.capacity()) * 2;
    return bytes;
}

void Labels::forget(int64_t length) { known_ = std::min(known_, length / kBlock); }

void Labels::begin(const Cache& cache, int64_t heads) {
    heads_ = heads;
    blocks_ = cache.length() / kBlock;
    for (auto& one : labels_) one.resize(size_t(blocks_ * kBlock * count_));
    rates_.resize(size_t(heads * blocks_));
}

// [position / 16][channel / 2][16][2]
void Labels::keep(const Cache& cache, int64_t layer, int64_t kv_head, int64_t block) {
    const int64_t of = layer * kv_heads_ + kv_head, start = block * kBlock;
    const int32_t* channels = channels_.data() + of * count_;
    const uint8_t* part = cache.keys_of(layer, kv_head)[start / kChunk];
    uint16_t* to = labels_[size_t(of)].data() + start * count_;
    const int64_t wide = wide_of(cache.head_dim()), at = start % kChunk;
    if (cache.packed()) {
        float keys[kBlock * kMostHead];
        for (int64_t p = 0; p < kBlock; p++)
            cache.read_key(layer, kv_head, start + p, keys + p * cache.head_dim());
        for (int64_t i = 0; i < count_; i++)
            for (int64_t p = 0; p < kBlock; p++)
                to[p / 16 * 16 * count_ + i / 2 * 32 + p % 16 * 2 + i % 2] =
                    bfloat16_of(keys[p * cache.head_dim() + channels[i]]);
    } else if (cache.type() == kCacheF32) {
        copy_channels(reinterpret_cast<const float*>(part), 1, wide, at, channels, count_, to,
                      [](float x, int64_t) { return bfloat16_of(x); });
    } else if (cache.type() == kCacheBF16) {
        copy_channels(reinterpret_cast<const uint16_t*>(part), 2, wide, at, channels, count_, to,
                      [](uint16_t x, int64_t) { return x; });
    } else {
        const float* scales = reinterpret_cast<const float*>(part + int64_t(kChunk) * wide) + at;
        copy_channels(reinterpret_cast<const int8_t*>(part), 2, wide, at, channels, count_, to,
                      [=](int8_t x, int64_t p) { return bfloat16_of(scales[p] * float(x)); });
    }
}

void Labels::rate(const Cache& cache, const EstimateOps& ops, int64_t layer, const float* q, int worker,
                  int workers) {
    const int64_t group = heads_ / kv_heads_, dim = cache.head_dim(), items = kv_heads_ * kSlices;
    alignas(64) uint16_t queries[kWeighed * kMostHead];
    for (int64_t item = items * worker / workers; item < items * (worker + 1) / workers; item++) {
        const int64_t kv_head = item / kSlices, slice = item % kSlices, of = layer * kv_heads_ + kv_head;
        const int64_t from = blocks_ * slice / kSlices, to = blocks_ * (slice + 1) / kSlices;
        for (int64_t block = std::max(from, known_); block < to; block++) keep(cache, layer, kv_head, block);
        for (int64_t first = 0; first < group; first += kWeighed) {
            const int64_t head = kv_head * group + first;
            Rating r{};
            r.count = int(std::min<int64_t>(kWeighed, group - first));
            r.labels = int(count_);
            for (int64_t n = 0; n < r.count; n++)
                for (int64_t i = 0; i < count_; i++)
                    queries[n * count_ + i] =
                        bfloat16_of(q[(head + n) * dim + channels_[size_t(of * count_ + i)]]);
            r.queries = queries;
            r.keys = labels_[size_t(of)].data() + from * kBlock * count_;
            r.blocks = to - from;
            r.best = rates_.data() + head * blocks_ + from;
            r.room = blocks_;
            ops.rate(&r);
        }
    }
}

void Labels::rates_of(int64_t head, float* rates) const {
    const int64_t group = heads_ / kv_heads_, begin = head / group * group;
    std::fill(rates, rates + blocks_, kLowest);
    for (int64_t one = begin; one < begin + group; one++) {
        const float* mine = rates_.data() + one * blocks_;
        float best = kLowest;
        for (int64_t b = 0; b < blocks_; b++) best = mine[b] > best ? mine[b] : best;
        for (int64_t b = 0; b < blocks_; b++) rates[b] = std::max(rates[b], mine[b] - best);
    }
}

}  // namespace gossamer
