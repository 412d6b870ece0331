#include "block_attention.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "halves.h"
#include "ready.h"
#include "threads.h"
#include "workspace.h"

namespace gossamer {
namespace {

// Row `row` of an array as float32: where it lies, or in `room`.
const float* floats_of(const void* array, int dtype, int64_t row, int64_t dim, float* room) {
    if (dtype == kF32) return static_cast<const float*>(array) + row * dim;
    const uint16_t* from = static_cast<const uint16_t*>(array) + row * dim;
    for (int64_t i = 0; i < dim; i++) room[i] = float_of_bfloat16(from[i]);
    return room;
}

}  // namespace

void attend_blocks(const BlockAttention& a, const Tier& tier, int threads) {
    const AttentionOps& ops = *tier.attention;
    const int type = a.dtype == kF32 ? kCacheF32 : kCacheBF16;
    const int64_t part = part_bytes(a.dim, type), chunks = (a.positions + kChunk - 1) / kChunk;
    const int64_t of_query = query_bytes(a.dim, type);
    const int64_t state = state_size(a.dim);
    const int64_t of_scratch = aligned(ops.scratch_bytes(a.dim, type)),
                  of_states = aligned(4 * kQueries * state);
    const int64_t of_worker = of_scratch + of_states + aligned(kQueries * of_query);
    const int64_t parts = a.kv_heads * chunks;

    static thread_local Workspace packed, scratch;
    uint8_t* const at = packed.get(2 * parts * part + 2 * parts * int64_t(sizeof(uint8_t*)));
    uint8_t** const tables =
        reinterpret_cast<uint8_t**>(at + 2 * parts * part);  // [keys, values][head][chunk]
    for (int64_t i = 0; i < 2 * parts; i++) tables[i] = at + i * part;
    uint8_t* const workers = scratch.get(threads * of_worker);

    parallel_ranges(threads, parts, 1, [&](int, int64_t begin, int64_t end) {
        float key[kMostHead], value[kMostHead];
        for (int64_t i = begin; i < end; i++) {
            const int64_t head = i / chunks, first = i % chunks * kChunk;
            const int64_t last = std::min(a.positions, first + kChunk) - 1;
            for (int64_t p = first; p <= last; p++)
                ops.place_position(floats_of(a.keys, a.dtype, head * a.positions + p, a.dim, key),
                                   floats_of(a.values, a.dtype, head * a.positions + p, a.dim, value), a.dim,
                                   type, p - first, p == last, tables[i], tables[parts + i]);
        }
    });

    // late rows see the most: the last tiles come first
    const int64_t start = a.start(), first_tile = start / kQueries;
    const int64_t tiles = (a.positions - 1) / kQueries - first_tile + 1;
    parallel_ranges(threads, tiles * a.heads, 1, [&](int worker, int64_t begin, int64_t end) {
        uint8_t* const mine = workers + worker * of_worker;
        float* const states = reinterpret_cast<float*>(mine + of_scratch);
        uint8_t* const queries = mine + of_scratch + of_states;
        for (int64_t item = begin; item < end; item++) {
            const int64_t tile = first_tile + tiles - 1 - item / a.heads, head = item % a.heads;
            const int64_t low = std::max(start, tile * kQueries);
            const int64_t high = std::min(a.positions, (tile + 1) * kQueries);
            Attention one{};
            one.count = int(high - low);
            one.dim = a.dim;
            one.type = type;
            one.keys = tables + head / (a.heads / a.kv_heads) * chunks;
            one.values = one.keys + parts;
            one.queries = queries;
            one.many = a.rows > kFewRows;
            one.states = states;
            one.scratch = mine;
            for (int64_t p = low; p < high; p++) {
                const int64_t i = p - low;
                float room[kMostHead];
                ops.place_query(floats_of(a.queries, a.dtype, head * a.rows + p - start, a.dim, room), a.dim,
                                a.scaling, type, queries + i * of_query);
                one.last[i] = p;
                one.first[i] = a.window ? std::max<int64_t>(0, p - a.window + 1) : 0;
                open_state(states + i * state, a.dim);
            }
            if (a.offsets) {
                const int64_t list = head * a.row_blocks() + low / kBlock - start / kBlock;
                one.blocks = a.blocks;
                one.block_begin = a.offsets[list];
                one.block_end = a.offsets[list + 1];
            } else {
                one.block_begin = one.first[0] / kBlock;
                one.block_end = (high - 1) / kBlock + 1;
            }
            ops.attend(&one);
            for (int64_t p = low; p < high; p++) {
                const int64_t at_output = ((p - start) * a.heads + head) * a.dim;
                const float* from = states + (p - low) * state;
                float row[kMostHead] = {};
                if (from[wide_of(a.dim) + 1] != 0) ops.finish(from, a.dim, row);  // else it saw nothing
                if (a.dtype == kF32) {
                    std::memcpy(static_cast<float*>(a.outputs) + at_output, row, size_t(a.dim) * 4);
                } else {
                    uint16_t* to = static_cast<uint16_t*>(a.outputs) + at_output;
                    for (int64_t i = 0; i < a.dim; i++) to[i] = bfloat16_of(row[i]);
                }
            }
        }
    });
}

}  // namespace gossamer
