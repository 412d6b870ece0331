#include "cache.h"

#include <algorithm>
#include <new>

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

}  // namespace

Cache::Cache(int64_t layers, int64_t kv_heads, int64_t head_dim, CacheType type)
    : layers_(layers),
      kv_heads_(kv_heads),
      head_dim_(head_dim),
      type_(type),
      part_bytes_(part_bytes(head_dim, type)),
      chunk_bytes_(layers * kv_heads * 2 * part_bytes_) {}

void Cache::truncate(int64_t length) {
    length_ = std::min(length_, std::max<int64_t>(0, length));
    chunks_.resize(size_t((length_ + kChunk - 1) / kChunk));
}

void Cache::grow(int64_t length) {
    const int64_t wanted = (length + kChunk - 1) / kChunk, had = int64_t(chunks_.size());
    if (wanted <= had) return;
    try {
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
                parts_[size_t(part * room_ + c)] = chunks_[size_t(c)].get() + part * part_bytes_;
    } catch (...) {
        truncate(length_);
        throw;
    }
}

}  // namespace gossamer
