// What attention policies estimate from keys, for each instruction set: how much weight some queries give to
// blocks of keys, and at which distances.
//
// This header is included by units of every instruction set: nothing in it may have external linkage.
#pragma once
#include <stdint.h>

#include "attention.h"

namespace gossamer {

constexpr int kWeighed = 8;  // most queries that are weighed together

// Queries of one head, at neighbouring positions, over all keys up to their own.
struct Weighing {
    int count;  // 1 .. kWeighed
    int64_t dim;
    int type;                    // of the cache
    const uint8_t* const* keys;  // parts of chunk 0, 1, ...
    const void* queries;         // [count][wide], as AttentionOps::place_query left them
    int64_t first;               // the position of the first one
    int64_t room;                // a multiple of kBlock, past the last one's position
    float* scores;               // scratch: [kWeighed][room]
    // Softmax weights of all queries are added: by blocks of keys, and by distances of whole blocks.
    float* of_blocks;     // [room / kBlock]
    float* of_distances;  // the same
};

struct EstimateOps {
    // scores[i] = x · rows[i], rows of `dim` numbers
    void (*dots)(const float* x, const float* rows, int64_t count, int64_t dim, float* scores);
    void (*weigh)(const Weighing* w);
};

}  // namespace gossamer
