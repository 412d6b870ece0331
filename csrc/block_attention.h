// Attention of many rows over keys and values that lie as PyTorch has them: they are packed into parts, and
// every tile of rows looks at the blocks of keys that a list names.
#pragma once
#include <cstdint>

#include "dispatch.h"

namespace gossamer {

// Causal: row r stands at position `positions - rows + r`, and sees [.., its own]. Arrays are row-major.
struct BlockAttention {
    int64_t heads, kv_heads, rows, positions, dim;
    int dtype;            // of queries, keys, values and outputs: kF32 or kBF16
    const void* queries;  // [heads][rows][dim]
    const void* keys;     // [kv_heads][positions][dim]
    const void* values;   // the same
    void* outputs;        // [rows][heads][dim]
    float scaling;
    int64_t window;  // positions that a row sees, its own among them; 0: all

    // Blocks of kBlock positions: of each head and each block of rows (those whose positions lie in one
    // block), list [offsets[i], offsets[i + 1]) of `blocks`, ascending. Null: all.
    const int64_t* offsets;
    const int32_t* blocks;

    int64_t start() const { return positions - rows; }
    int64_t row_blocks() const { return (positions - 1) / kBlock - start() / kBlock + 1; }
};

// Rows that see nothing become zeros. Throws std::bad_alloc.
void attend_blocks(const BlockAttention& a, const Tier& tier, int threads);

}  // namespace gossamer
