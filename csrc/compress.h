// Blocks of a cache are compressed, and single numbers of them read (compression.h says how they lie).
#pragma once
#include "attention.h"

namespace gossamer {

// The keys, or the values, of one head in a block of bfloat16. `start`: [rank][dim], where power iteration
// begins.
void compress_block(const Compression& how, bool keys, int64_t dim, const uint8_t* whole, const float* start,
                    uint8_t* to);

// What the key of one head at position `p` of block `number` adds to its factors, [low.rank].
void add_factors(const LowRankKeys& low, int64_t dim, int64_t number, int64_t p, const uint8_t* whole,
                 float* factors);
void keep_factors(const LowRankKeys& low, int64_t p, const float* factors, uint8_t* to);

// Back again, as compression left it; `number`: of the block.
void open_block(const Compression& how, bool keys, int64_t dim, int64_t number, const uint8_t* from,
                uint8_t* whole);

// The key at position `p` of a block that is compressed, or whole: [dim].
void read_packed_key(const Compression& how, int64_t dim, int64_t number, const uint8_t* from, int64_t p,
                     float* to);
void read_whole_key(int64_t dim, const uint8_t* whole, int64_t p, float* to);

}  // namespace gossamer
