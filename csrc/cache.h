// Keys and values of one sequence in all layers of a model.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "attention.h"

namespace gossamer {

// Chunks of kChunk positions, each with the parts of all layers and heads. It grows by chunks, and nothing
// that lies in it ever moves.
class Cache {
  public:
    Cache(int64_t layers, int64_t kv_heads, int64_t head_dim, CacheType type);
    Cache(const Cache&) = delete;

    int64_t layers() const { return layers_; }
    int64_t kv_heads() const { return kv_heads_; }
    int64_t head_dim() const { return head_dim_; }
    CacheType type() const { return type_; }
    int64_t length() const { return length_; }  // positions that are filled
    int64_t bytes() const { return int64_t(chunks_.size()) * chunk_bytes_; }

    // Makes room for `length` positions; throws std::bad_alloc, and is as before then.
    void grow(int64_t length);
    void fill(int64_t length) { length_ = length; }  // positions up to here now hold something
    void truncate(int64_t length);                   // forgets what comes after

    // Of each chunk, the part that holds the keys of one head; the values follow at `values_of`.
    uint8_t* const* keys_of(int64_t layer, int64_t head) const {
        return parts_.data() + number(layer, head, 0);
    }
    uint8_t* const* values_of(int64_t layer, int64_t head) const {
        return parts_.data() + number(layer, head, 1);
    }

  private:
    int64_t number(int64_t layer, int64_t head, int which) const {
        return ((layer * kv_heads_ + head) * 2 + which) * room_;
    }
    struct Free {
        void operator()(uint8_t* p) const { std::free(p); }
    };

    const int64_t layers_, kv_heads_, head_dim_;
    const CacheType type_;
    const int64_t part_bytes_, chunk_bytes_;
    int64_t length_ = 0;
    std::vector<std::unique_ptr<uint8_t[], Free>> chunks_;
    std::vector<uint8_t*> parts_;  // [layer][head][keys, values][chunk of room_]
    int64_t room_ = 0;
};

}  // namespace gossamer
