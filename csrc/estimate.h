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
    Compression how;             // of a packed cache: its first blocks
    int64_t compressed;          // so many are; others are
    WholeBlocks whole;           // as they are
    const void* queries;         // [count][wide], as AttentionOps::place_query left them
    int64_t first;               // the position of the first one
    int64_t room;                // a multiple of kBlock, past the last one's position
    float* scores;               // scratch: [kWeighed][room]
    // Softmax weights of all queries are added: by blocks of keys, and by distances of whole blocks.
    float* of_blocks;     // [room / kBlock]
    float* of_distances;  // the same
};

// Queries at one position over the labels of whole blocks (labels.h).
struct Rating {
    int count;                // 1 .. kWeighed
    int labels;               // of a query and of a key: even
    const uint16_t* queries;  // [count][labels] bfloat16
    const uint16_t* keys;     // [block][kBlock / 16][labels / 2][16][2] bfloat16
    int64_t blocks;
    float* best;   // [count] rows: the largest product of a query with a label in each block
    int64_t room;  // from one row to the next
};

struct EstimateOps {
    // scores[i] = x · rows[i], rows of `dim` numbers
    void (*dots)(const float* x, const float* rows, int64_t count, int64_t dim, float* scores);
    void (*weigh)(const Weighing* w);
    void (*rate)(const Rating* r);
};

}  // namespace gossamer
