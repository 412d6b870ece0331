// Keys and values of one sequence in all layers of a model.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "attention.h"

namespace gossamer {

constexpr int64_t kMostRows = 512;  // that are appended together, at fixed positions

// Orthonormal vectors in which the keys of all heads of a layer, before rotation, lie nearly; and how they
// are rotated.
struct KeyBasis {
    int64_t rank = 0;                // 0: there is none
    std::vector<float> vectors;      // [layer][head][number][rank]
    std::vector<float> frequencies;  // [head_dim / 2]
    float scale = 1;
    std::vector<char> rotates;  // [layer]
};

// Chunks of kChunk positions, each with the parts of all layers and heads. It grows by chunks, and nothing
// that lies in it ever moves.
//
// A packed cache has besides the last kTail blocks of each head as they are. A block is compressed from them
// when the first row comes that sees it so: kWhole + 1 blocks later. Rows that come together are staged:
// `take_in`, place, `compress` what is `due`, look, `give_back`, each shared out to threads with barriers
// between.
class Cache {
  public:
    // how, start (compress.h), and the basis of low-rank keys: of a packed cache.
    Cache(int64_t layers, int64_t kv_heads, int64_t head_dim, CacheType type, const Compression& how = {},
          std::vector<float> start = {}, const KeyBasis& basis = {});
    Cache(const Cache&) = delete;

    int64_t layers() const { return layers_; }
    int64_t kv_heads() const { return kv_heads_; }
    int64_t head_dim() const { return head_dim_; }
    CacheType type() const { return type_; }
    int64_t length() const { return length_; }  // positions that are filled
    int64_t bytes() const { return int64_t(chunks_.size()) * chunk_bytes_ + (tail_ ? tail_bytes() : 0); }
    double token_bytes() const { return double(chunk_bytes_) / kChunk; }  // of one position, but for the tail
    bool packed() const { return type_ == kCachePacked; }
    Compression how(int64_t layer, int64_t head) const;

    // Makes room for `length` positions; throws std::bad_alloc, and is as before then.
    void grow(int64_t length);
    void fill(int64_t length);  // positions up to here now hold something
    // Forgets what comes after. What a packed cache no longer has as it was it opens again, as compression
    // left it.
    void truncate(int64_t length);

    // Of each chunk, the part that holds the keys of one head; the values follow at `values_of`.
    uint8_t* const* keys_of(int64_t layer, int64_t head) const {
        return parts_.data() + number(layer, head, 0);
    }
    uint8_t* const* values_of(int64_t layer, int64_t head) const {
        return parts_.data() + number(layer, head, 1);
    }

    // The key of one head at a position: [dim]; as it is where it still lies so.
    void read_key(int64_t layer, int64_t head, int64_t position, float* to) const;

    // ---- of a packed cache

    // Blocks of a head as they are: the tail, or while many rows are staged (all from `take_in` on) those.
    WholeBlocks whole_of(int64_t layer, int64_t head) const;
    // Memory for a layer of rows that come together, kMostRows at most; null: the next row comes alone.
    int64_t stage_bytes() const { return packed() ? 2 * kv_heads_ * kStaged * whole_bytes(head_dim_) : 0; }
    void stage(uint8_t* memory) { staged_ = memory; }
    void take_in(int64_t layer, int64_t head) const;
    void give_back(int64_t layer, int64_t head, int64_t length);  // now `length` positions
    // Blocks [due_from, due(length)) are to be compressed before the row of position length - 1 looks.
    int64_t due_from() const { return compressed_; }
    static int64_t due(int64_t length) { return std::max<int64_t>(0, (length - 1) / kBlock - kWhole); }
    void compress(int64_t layer, int64_t head, bool keys, int64_t block) const;
    uint8_t* compressed_at(int64_t layer, int64_t head, bool keys, int64_t block) const;

  private:
    static constexpr int64_t kTail = kWhole + 2;
    static constexpr int64_t kStaged = kMostRows / kBlock + kWhole + 1;

    // In low rank: of all heads' keys, the positions that are this one's to do.
    void compress_keys(int64_t layer, int64_t head, int64_t block) const;
    void turn_starts(int64_t blocks);  // low-rank keys: of so many, at least
    int64_t place_in_chunk(int64_t layer, int64_t head, bool keys) const;
    int64_t tail_bytes() const { return 2 * layers_ * kv_heads_ * kTail * whole_bytes(head_dim_); }
    WholeBlocks tail_of(int64_t layer, int64_t head) const;
    int64_t number(int64_t layer, int64_t head, int which) const {
        return ((layer * kv_heads_ + head) * 2 + which) * room_;
    }
    struct Free {
        void operator()(uint8_t* p) const { std::free(p); }
    };

    const int64_t layers_, kv_heads_, head_dim_;
    const CacheType type_;
    const Compression how_;
    const std::vector<float> start_;
    std::vector<uint16_t> vectors_;  // of low-rank keys: [layer][head][number][rank] bfloat16
    std::vector<float> frequencies_, turns_, starts_;  // compression.h
    std::vector<char> rotates_;
    const int64_t key_bytes_, value_bytes_, layer_bytes_, chunk_bytes_;  // of parts, and of a chunk
    int64_t length_ = 0;
    int64_t compressed_ = 0;                 // blocks that are
    std::unique_ptr<uint8_t[], Free> tail_;  // [layer][head][keys, values][slot]
    uint8_t* staged_ = nullptr;              // [head][keys, values][slot]
    std::vector<std::unique_ptr<uint8_t[], Free>> chunks_;
    std::vector<uint8_t*> parts_;  // [layer][head][keys, values][chunk of room_]
    int64_t room_ = 0;
};

}  // namespace gossamer
