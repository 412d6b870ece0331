// Attention over keys and values that lie in chunks, block by block: dense attention looks at all blocks that
// a query may see, a sparse policy at a list of them. The same blocks give the same bits, whoever else is
// asked along, and whether one pass walks all chunks or several passes one each.
//
// A part holds the keys, or the values, of one head for kChunk positions. `wide` numbers a position (the
// head's, and zeros up to a multiple of 16), P of them in a word: 1 float32, or 2 bfloat16 or int8:
//
//   keys      [block of 16 positions][wide / P][16][P]     one register meets 16 positions
//   values    [kChunk / P][wide][P]                        one register meets 16 numbers of P positions
//   scales    [kChunk] float32                             (int8) one a position
//
// A part of a packed cache holds compressed blocks (compression.h). Rows look at the block that they lie in
// and at kWhole before it as they are, in bfloat16, and at earlier ones as compression left them, whenever
// they come.
//
// This header is included by units of every instruction set: nothing in it may have external linkage.
#pragma once
#include <stdint.h>

#include "compression.h"

namespace gossamer {

constexpr int kChunk = 256;     // positions of a part: sums of one chunk are finished before they are merged
constexpr int kBlock = 64;      // positions of a block
constexpr int kQueries = 32;    // most that attend together
constexpr int kMostHead = 256;  // numbers of a head

constexpr int kWhole = 1;  // blocks before their own that rows of a packed cache see as they are

enum CacheType : int { kCacheF32 = 0, kCacheBF16 = 1, kCacheI8 = 2, kCachePacked = 3 };

static inline int wide_of(int64_t dim) { return int((dim + 15) / 16 * 16); }

// Bytes of the keys, or of the values, of one head in a chunk that is not packed: a multiple of 64.
static inline int64_t part_bytes(int64_t dim, int type) {
    const int64_t numbers = int64_t(kChunk) * wide_of(dim);
    return type == kCacheF32 ? 4 * numbers : type == kCacheBF16 ? 2 * numbers : numbers + 4 * kChunk;
}

// Bytes of a query, as place_query leaves it.
static inline int64_t query_bytes(int64_t dim, int type) {
    return wide_of(dim) * (type == kCacheF32 ? 4 : 2);
}

// What a query has seen so far: `wide` sums of values, the largest score, the sum of all weights, and 14
// numbers of nothing.
static inline int state_size(int64_t dim) { return wide_of(dim) + 16; }

constexpr float kLowest = -3e38f;  // the largest of no scores

static inline void open_state(float* state, int64_t dim) {
    for (int i = 0; i < state_size(dim); i++) state[i] = 0;
    state[wide_of(dim)] = kLowest;
}

// Bytes of the keys, or of the values, of one head in a block of bfloat16.
static inline int64_t whole_bytes(int64_t dim) { return 2 * int64_t(kBlock) * wide_of(dim); }

// Blocks of one head as they are, in bfloat16: block b lies in slot b % slots.
struct WholeBlocks {
    uint8_t *keys, *values;
    int64_t slots;
};

// Queries of one head of keys.
struct Attention {
    int count;                   // 1 .. kQueries
    int64_t dim;                 // numbers of a head
    int type;                    // of the cache
    const uint8_t* const* keys;  // parts of chunk 0, 1, ...
    const uint8_t* const* values;
    Compression how;          // of a packed cache, whose queries lie in one block
    WholeBlocks whole;        // its blocks that are seen as they are
    WholeBlocks opened;       // and all others, where several rows share them; or null
    const void* queries;      // [count][wide], as place_query left them
    int64_t first[kQueries];  // the positions that each one sees: [first, last]
    int64_t last[kQueries];
    const int32_t* blocks;           // those that are looked at, in order; or null:
    int64_t block_begin, block_end;  // all of [begin, end), or of this part of the list
    bool many;                       // whether these are some of more than kFewRows rows of a call (packed.h)
    float* states;                   // [count][state_size]
    uint8_t* scratch;                // scratch_bytes
};

struct AttentionOps {
    int64_t (*scratch_bytes)(int64_t dim, int type);
    // to [wide]: scaled, in float32 or bfloat16.
    void (*place_query)(const float* query, int64_t dim, float scaling, int type, void* to);
    // One position of one head into the parts that hold it. `final`: the next one is not there yet, and what
    // shares a word with it becomes zeros.
    void (*place_position)(const float* key, const float* value, int64_t dim, int type, int64_t in_chunk,
                           bool final, uint8_t* keys, uint8_t* values);
    // The keys, or the values, of one head in compressed block `number`, into bfloat16.
    void (*open)(const Compression* how, bool keys, int64_t dim, int64_t number, const uint8_t* from,
                 uint8_t* to);
    void (*attend)(const Attention* a);
    void (*merge)(const float* from, int64_t dim, float* into);  // of chunks in order
    void (*finish)(const float* state, int64_t dim, float* to);  // to [dim]
};

}  // namespace gossamer
