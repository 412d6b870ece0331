#include "cache.h"

#include <cmath>
#include <cstring>
#include <new>

#include "compress.h"
#include "halves.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gossamer {
namespace {

constexpr int64_t kHuge = 2 << 20;  // bytes of a huge page

// Chunks of more than a huge page lie on huge pages where the system gives them: a token reads all of them,
// and 4 KiB pages cost it as much as the reading.
uint8_t* chunk_memory(int64_t bytes) {
    const int64_t unit = bytes > kHuge ? kHuge : 64;
    const int64_t whole = (bytes + unit - 1) / unit * unit;
    void* memory = std::aligned_alloc(size_t(unit), size_t(whole));
#if defined(__linux__)
    if (memory && unit == kHuge) madvise(memory, size_t(whole), MADV_HUGEPAGE);
#endif
    return static_cast<uint8_t*>(memory);
}

int64_t bytes_of_part(int64_t dim, CacheType type, const Compression& how, bool keys) {
    if (type != kCachePacked) return part_bytes(dim, type);
    return kChunk / kBlock * packed_block(how, kBlock, wide_of(dim), keys).bytes;
}

Compression with_rank(Compression how, int64_t rank) {
    how.low.rank = int((rank + 15) / 16 * 16);
    return how;
}

void copy_block(const WholeBlocks& from, const WholeBlocks& to, int64_t block, int64_t bytes) {
    std::memcpy(to.keys + block % to.slots * bytes, from.keys + block % from.slots * bytes, size_t(bytes));
    std::memcpy(to.values + block % to.slots * bytes, from.values + block % from.slots * bytes,
                size_t(bytes));
}

}  // namespace

Cache::Cache(int64_t layers, int64_t kv_heads, int64_t head_dim, CacheType type, const Compression& how,
             std::vector<float> start, const KeyBasis& basis)
    : layers_(layers),
      kv_heads_(kv_heads),
      head_dim_(head_dim),
      type_(type),
      how_(with_rank(how, basis.rank)),
      start_(std::move(start)),
      key_bytes_(bytes_of_part(head_dim, type, how_, true)),
      value_bytes_(bytes_of_part(head_dim, type, how_, false)),
      layer_bytes_((how_.low.rank ? 1 : kv_heads) * key_bytes_ + kv_heads * value_bytes_),
      chunk_bytes_(layers * layer_bytes_) {
    if (!basis.rank) return;
    const int64_t rank = how_.low.rank, half = head_dim / 2;
    vectors_.resize(size_t(layers * kv_heads * head_dim * rank));
    for (size_t i = 0; i < basis.vectors.size(); i++)
        vectors_[i / size_t(basis.rank) * size_t(rank) + i % size_t(basis.rank)] =
            bfloat16_of(basis.vectors[i]);
    frequencies_ = basis.frequencies;
    rotates_ = basis.rotates;
    turns_.resize(size_t(half * 2 * kBlock));
    for (int64_t i = 0; i < half; i++)
        for (int64_t p = 0; p < kBlock; p++) {
            const float angle = float(p) * frequencies_[size_t(i)];
            turns_[size_t(i * 2 * kBlock + p)] = std::cos(angle) * basis.scale;
            turns_[size_t((i * 2 + 1) * kBlock + p)] = std::sin(angle) * basis.scale;
        }
}

Compression Cache::how(int64_t layer, int64_t head) const {
    Compression how = how_;
    if (how.low.rank) {
        how.low.vectors = vectors_.data() + (layer * kv_heads_ + head) * head_dim_ * how.low.rank;
        how.low.starts = rotates_[size_t(layer)] ? starts_.data() : nullptr;
        how.low.turns = turns_.data();
    }
    return how;
}

int64_t Cache::place_in_chunk(int64_t layer, int64_t head, bool keys) const {
    const int64_t at = layer * layer_bytes_;
    if (how_.low.rank) return at + (keys ? 0 : key_bytes_ + head * value_bytes_);
    return at + head * (key_bytes_ + value_bytes_) + (keys ? 0 : key_bytes_);
}

void Cache::truncate(int64_t length) {
    length = std::min(length_, std::max<int64_t>(0, length));
    if (packed() && length > 0 && length < length_) {
        const int64_t last = (length - 1) / kBlock, kept = (length_ - 1) / kBlock - kTail + 1;
        for (int64_t block = std::max<int64_t>(0, last - kTail + 1); block < std::min(kept, last + 1);
             block++)
            for (int64_t i = 0; i < layers_ * kv_heads_; i++) {
                const int64_t layer = i / kv_heads_, head = i % kv_heads_;
                const WholeBlocks tail = tail_of(layer, head);
                const int64_t at = block % tail.slots * whole_bytes(head_dim_);
                for (bool keys : {true, false})
                    open_block(how(layer, head), keys, head_dim_, block,
                               compressed_at(layer, head, keys, block),
                               (keys ? tail.keys : tail.values) + at);
            }
    }
    length_ = length;
    compressed_ = std::min(compressed_, length / kBlock);
    chunks_.resize(size_t((length_ + kChunk - 1) / kChunk));
}

void Cache::fill(int64_t length) {
    length_ = length;
    if (packed()) compressed_ = std::max(compressed_, due(length));
}

void Cache::read_key(int64_t layer, int64_t head, int64_t position, float* to) const {
    const int64_t wide = wide_of(head_dim_), p = position % kChunk, block = position / kBlock;
    if (packed()) {
        const WholeBlocks whole = whole_of(layer, head);
        if (block >= due(length_))
            read_whole_key(head_dim_, whole.keys + block % whole.slots * whole_bytes(head_dim_), p % kBlock,
                           to);
        else
            read_packed_key(how(layer, head), head_dim_, block, compressed_at(layer, head, true, block),
                            p % kBlock, to);
        return;
    }
    const uint8_t* part = keys_of(layer, head)[position / kChunk];
    const int word = type_ == kCacheF32 ? 1 : 2;
    const float scale =
        type_ == kCacheI8 ? reinterpret_cast<const float*>(part + int64_t(kChunk) * wide)[p] : 1;
    for (int64_t i = 0; i < head_dim_; i++) {
        const int64_t at = p / 16 * 16 * wide + i / word * 16 * word + p % 16 * word + i % word;
        if (type_ == kCacheF32)
            to[i] = reinterpret_cast<const float*>(part)[at];
        else if (type_ == kCacheBF16)
            to[i] = float_of_bfloat16(reinterpret_cast<const uint16_t*>(part)[at]);
        else
            to[i] = scale * float(reinterpret_cast<const int8_t*>(part)[at]);
    }
}

WholeBlocks Cache::tail_of(int64_t layer, int64_t head) const {
    const int64_t bytes = kTail * whole_bytes(head_dim_);
    uint8_t* at = tail_.get() + (layer * kv_heads_ + head) * 2 * bytes;
    return {at, at + bytes, kTail};
}

WholeBlocks Cache::whole_of(int64_t layer, int64_t head) const {
    if (!staged_) return tail_of(layer, head);
    const int64_t bytes = kStaged * whole_bytes(head_dim_);
    uint8_t* at = staged_ + head * 2 * bytes;
    return {at, at + bytes, kStaged};
}

uint8_t* Cache::compressed_at(int64_t layer, int64_t head, bool keys, int64_t block) const {
    const int64_t chunk = block * kBlock / kChunk, of = block % (kChunk / kBlock);
    return (keys ? keys_of(layer, head) : values_of(layer, head))[chunk] +
           of * (keys ? key_bytes_ : value_bytes_) / (kChunk / kBlock);
}

void Cache::take_in(int64_t layer, int64_t head) const {
    const int64_t last = (length_ - 1) / kBlock;
    for (int64_t block = std::max<int64_t>(0, last - kWhole); block <= last && length_ > 0; block++)
        copy_block(tail_of(layer, head), whole_of(layer, head), block, whole_bytes(head_dim_));
}

void Cache::give_back(int64_t layer, int64_t head, int64_t length) {
    const int64_t last = (length - 1) / kBlock;
    for (int64_t block = std::max(length_ / kBlock, last - kTail + 1); block <= last; block++)
        copy_block(whole_of(layer, head), tail_of(layer, head), block, whole_bytes(head_dim_));
}

void Cache::compress_keys(int64_t layer, int64_t head, int64_t block) const {
    for (int64_t p = kBlock * head / kv_heads_; p < kBlock * (head + 1) / kv_heads_; p++) {
        float factors[kMostKeyRank] = {};
        for (int64_t one = 0; one < kv_heads_; one++) {
            const WholeBlocks whole = whole_of(layer, one);
            add_factors(how(layer, one).low, head_dim_, block, p,
                        whole.keys + block % whole.slots * whole_bytes(head_dim_), factors);
        }
        keep_factors(how_.low, p, factors, compressed_at(layer, 0, true, block));
    }
}

void Cache::compress(int64_t layer, int64_t head, bool keys, int64_t block) const {
    if (keys && how_.low.rank) return compress_keys(layer, head, block);
    const WholeBlocks whole = whole_of(layer, head);
    compress_block(how_, keys, head_dim_,
                   (keys ? whole.keys : whole.values) + block % whole.slots * whole_bytes(head_dim_),
                   start_.data(), compressed_at(layer, head, keys, block));
}

void Cache::turn_starts(int64_t blocks) {
    const int64_t half = head_dim_ / 2;
    int64_t block = int64_t(starts_.size()) / head_dim_;
    if (block < blocks) starts_.resize(size_t(blocks * head_dim_));
    for (; block < blocks; block++)
        for (int64_t i = 0; i < half; i++) {
            const float angle = float(block * kBlock) * frequencies_[size_t(i)];
            starts_[size_t(block * head_dim_ + i)] = std::cos(angle);
            starts_[size_t(block * head_dim_ + half + i)] = std::sin(angle);
        }
}

void Cache::grow(int64_t length) {
    const int64_t wanted = (length + kChunk - 1) / kChunk, had = int64_t(chunks_.size());
    if (wanted <= had) return;
    try {
        if (packed() && !tail_) {
            tail_.reset(chunk_memory(tail_bytes()));
            if (!tail_) throw std::bad_alloc();
        }
        if (how_.low.rank) turn_starts(wanted * kChunk / kBlock);
        while (int64_t(chunks_.size()) < wanted) {
            chunks_.emplace_back(chunk_memory(chunk_bytes_));
            if (!chunks_.back()) throw std::bad_alloc();
        }
        const int64_t parts = layers_ * kv_heads_ * 2;
        const bool moved = wanted > room_;
        if (moved) {
            const int64_t room = std::max<int64_t>(wanted, 2 * room_);
            parts_.resize(size_t(parts * room));
            room_ = room;
        }
        for (int64_t part = 0; part < parts; part++)
            for (int64_t c = moved ? 0 : had; c < wanted; c++)
                parts_[size_t(part * room_ + c)] =
                    chunks_[size_t(c)].get() +
                    place_in_chunk(part / 2 / kv_heads_, part / 2 % kv_heads_, part % 2 == 0);
    } catch (...) {
        truncate(length_);
        throw;
    }
}

}  // namespace gossamer
