// What a decoder does beside products with weights: norms, rotations, gates and attention, as one table of
// functions for each instruction set. All numbers are float32, but for the cache.
//
// Cache: `keys` and `values` of one head lie in chunks of kChunk positions, float32 or bfloat16:
//
//   keys      [block of 16 positions][dim][16]     so that one register meets 16 positions
//   values    [position][dim]
//
// This header is included by units of every instruction set: nothing in it may have external linkage.
#pragma once
#include <stdint.h>

namespace gossamer {

constexpr int kChunk = 256;     // positions of a chunk: softmax is summed chunk by chunk
constexpr int kQueries = 4;     // that attend together
constexpr int kMostHead = 256;  // numbers of a head

// Some queries of one head of keys and values.
struct Attention {
    int count;                       // 1 .. kQueries
    const float* queries[kQueries];  // dim numbers each, scaled
    float* outputs[kQueries];        // dim numbers each
    int64_t first[kQueries];         // the positions that each one sees: [first, last]
    int64_t last[kQueries];
    const uint8_t* const* keys;  // of each chunk
    const uint8_t* const* values;
    int dim;
    int dtype;  // of the cache: kF32 or kBF16
};

struct DecoderOps {
    // y = x / rms(x) * w
    void (*rms_norm)(const float* x, const float* w, int64_t n, float eps, float* y);
    // Halves of a head rotate against each other.
    void (*rotate)(float* x, const float* cos, const float* sin, int64_t half);
    // gate = silu(gate) * up
    void (*gate)(float* gate, const float* up, int64_t n);
    void (*attend)(const Attention* a);
    // One position of one head: into the chunks that hold it.
    void (*store_position)(const float* key, const float* value, int dim, int dtype, int64_t in_chunk,
                           uint8_t* keys, uint8_t* values);
};

}  // namespace gossamer
