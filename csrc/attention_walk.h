// What every way to attend has in common: how blocks are walked and chunks merged, and how scores become
// weights.
#pragma once
#include <stddef.h>

#include "attention.h"
#include "elementary.h"
#include "expand.h"
#include "simd.h"

namespace gossamer {
namespace {

// Keys and values of a block, and what their codes stand for.
template <class T>
struct Block {
    const T *keys, *values;
    const float *key_scales, *value_scales;    // or null
    const uint8_t *values_ahead, *keys_ahead;  // what memory is asked for meanwhile
    int64_t start;                             // its first position
    int count;                                 // positions that anyone sees
};

GOSSAMER_INLINE void store_weights(float* to, const Floats& a, const Floats& b) {
    store_floats(to, a, 16);
    store_floats(to + 16, b, 16);
}
GOSSAMER_INLINE void store_weights(uint16_t* to, const Floats& a, const Floats& b) { store_pairs(to, a, b); }

// Scores of one query become weights, of which `sums` holds one a lane; returns what earlier ones fade by.
template <class T>
GOSSAMER_INLINE float soften(const Block<T>& block, int64_t first, int64_t last, float* scores, float* most,
                             float* sums, T* weights) {
    Floats s[4];
    GOSSAMER_UNROLL(4)
    for (int j = 0; j < 4; j++) {
        s[j] = load_floats(scores + 16 * j, 16);
        if (block.key_scales) s[j] = mul(s[j], load_floats(block.key_scales + 16 * j, 16));
    }
    const int64_t low = first - block.start, high = last - block.start;
    if (low > 0 || high < kBlock - 1) {
        GOSSAMER_UNROLL(4)
        for (int j = 0; j < 4; j++) store_floats(scores + 16 * j, s[j], 16);
        for (int p = 0; p < kBlock; p++)
            if (p < low || p > high) scores[p] = -__builtin_inff();
        GOSSAMER_UNROLL(4)
        for (int j = 0; j < 4; j++) s[j] = load_floats(scores + 16 * j, 16);
    }
    const float here = largest_of(larger(larger(s[0], s[1]), larger(s[2], s[3])));
    const float top = here > *most ? here : *most;
    const Floats fade = exps(floats(*most - top)), below = floats(-top);
    *most = top;
    GOSSAMER_UNROLL(4)
    for (int j = 0; j < 4; j++) s[j] = exps(plus(s[j], below));
    store_floats(sums, mul_add(load_floats(sums, 16), fade, plus(plus(s[0], s[1]), plus(s[2], s[3]))), 16);
    if (block.value_scales) {
        GOSSAMER_UNROLL(4)
        for (int j = 0; j < 4; j++) s[j] = mul(s[j], load_floats(block.value_scales + 16 * j, 16));
        if (block.count <
            kBlock) {  // scales behind them may be anything, and zero times that need not be zero
            GOSSAMER_UNROLL(4)
            for (int j = 0; j < 4; j++) store_floats(scores + 16 * j, s[j], 16);
            for (int p = block.count; p < kBlock; p++) scores[p] = 0;
            GOSSAMER_UNROLL(4)
            for (int j = 0; j < 4; j++) s[j] = load_floats(scores + 16 * j, 16);
        }
    }
    store_weights(weights, s[0], s[1]);
    store_weights(weights + 32, s[2], s[3]);
    return first_of(fade);
}

// ---- a walk over blocks

// What some queries gather in one chunk.
struct Part {
    float* states;  // [count][state_size]: sums, the largest score
    float* sums;    // [count][16]: of weights, a lane each
};

void merge(const float* from, int64_t dim, float* into) {
    const int wide = wide_of(dim);
    const float top = from[wide] > into[wide] ? from[wide] : into[wide];
    const Floats old = exps(floats(into[wide] - top)), more = exps(floats(from[wide] - top));
    for (int i = 0; i < wide; i += 16)
        store_floats(into + i, mul_add(load_floats(from + i, 16), more, mul(load_floats(into + i, 16), old)),
                     16);
    into[wide] = top;
    into[wide + 1] = into[wide + 1] * first_of(old) + from[wide + 1] * first_of(more);
}

// int8 codes of a block as bfloat16, in their order.
void open_codes(const int8_t* codes, int64_t count, uint16_t* to) {
    for (int64_t i = 0; i < count; i += 32)
        store_pairs(to + i, to_floats(load_codes(codes + i)), to_floats(load_codes(codes + i + 16)));
}

// Scratch: what a chunk gathers, and a block that was opened.
struct Scratch {
    Part part;
    uint16_t *keys, *values;

    Scratch(uint8_t* at, int64_t dim) {
        part.states = (float*)at;
        part.sums = part.states + kQueries * state_size(dim);
        keys = (uint16_t*)(part.sums + kQueries * 16);
        values = keys + kBlock * wide_of(dim);
    }
};

int64_t attention_scratch(int64_t dim, int type) {
    return 4 * kQueries * (state_size(dim) + 16) +
           (type == kCacheI8 || type == kCachePacked ? 4 * kBlock * wide_of(dim) : 0);
}

// Codes, or numbers, of one block in a part.
const uint8_t* at_block(const Attention& a, const uint8_t* const* parts, int64_t number) {
    if (a.type == kCachePacked) {
        const int64_t bytes = packed_block(a.how, kBlock, wide_of(a.dim), parts == a.keys).bytes;
        return parts[number * kBlock / kChunk] + number % (kChunk / kBlock) * bytes;
    }
    const int64_t start = number * kBlock, size = a.type == kCacheF32 ? 4 : a.type == kCacheBF16 ? 2 : 1;
    return parts[start / kChunk] + start % kChunk * wide_of(a.dim) * size;
}

const float* scales_of(const Attention& a, const uint8_t* part, int64_t start) {
    return (const float*)(part + int64_t(kChunk) * wide_of(a.dim)) + start % kChunk;
}

// Keys or values of block `number` of a packed cache: as they are, or opened.
const uint16_t* seen_packed(const Attention& a, bool keys, int64_t number, uint16_t* room) {
    const bool whole = number >= a.last[0] / kBlock - kWhole;
    const WholeBlocks& blocks = whole ? a.whole : a.opened;
    if (blocks.keys)
        return (const uint16_t*)((keys ? blocks.keys : blocks.values) +
                                 number % blocks.slots * whole_bytes(a.dim));
    open_packed(a.how, keys, int(a.dim), number, at_block(a, keys ? a.keys : a.values, number), room);
    return room;
}

// Block `number`, as it lies or opened; `next`: the one that is looked at after it.
template <class T>
Block<T> open_block(const Attention& a, const Scratch& scratch, int64_t number, int64_t next, int count) {
    const uint8_t *keys = at_block(a, a.keys, number), *values = at_block(a, a.values, number);
    const int64_t start = number * kBlock;
    const uint8_t* next_keys = at_block(a, a.keys, next);
    if constexpr (sizeof(T) == 2) {
        if (a.type == kCachePacked)
            return {seen_packed(a, true, number, scratch.keys),
                    seen_packed(a, false, number, scratch.values),
                    nullptr,
                    nullptr,
                    at_block(a, a.values, next),
                    next_keys,
                    start,
                    count};
        if (a.type == kCacheI8) {
            const int wide = wide_of(a.dim);
            open_codes((const int8_t*)keys, kBlock * wide, scratch.keys);
            open_codes((const int8_t*)values, (count + 1) / 2 * 2 * wide, scratch.values);
            return {scratch.keys,
                    scratch.values,
                    scales_of(a, a.keys[start / kChunk], start),
                    scales_of(a, a.values[start / kChunk], start),
                    at_block(a, a.values, next),
                    next_keys,
                    start,
                    count};
        }
    }
    return {(const T*)keys, (const T*)values, nullptr, nullptr, values, next_keys, start, count};
}

// Calls meet(block, part) for every block that some query sees, from the first on.
template <class T, class Meet>
GOSSAMER_INLINE void walk(const Attention& a, const Meet& meet) {
    const Scratch scratch(a.scratch, a.dim);
    const int size = state_size(a.dim), wide = wide_of(a.dim);
    int64_t first = a.first[0], last = a.last[0];
    for (int n = 1; n < a.count; n++) {
        first = a.first[n] < first ? a.first[n] : first;
        last = a.last[n] > last ? a.last[n] : last;
    }
    int64_t open = -1;  // the chunk that is gathered
    const auto close = [&] {
        for (int n = 0; n < a.count && open >= 0; n++) {
            float* state = scratch.part.states + n * size;
            state[wide + 1] = sum_of(load_floats(scratch.part.sums + 16 * n, 16));
            merge(state, a.dim, a.states + n * size);
        }
    };
    for (int64_t i = a.block_begin; i < a.block_end; i++) {
        const int64_t number = a.blocks ? a.blocks[i] : i, start = number * kBlock, chunk = start / kChunk;
        if (start > last || start + kBlock <= first) continue;
        if (chunk != open) {
            close();
            open = chunk;
            for (int n = 0; n < a.count; n++) open_state(scratch.part.states + n * size, a.dim);
            __builtin_memset(scratch.part.sums, 0, size_t(a.count) * 64);
        }
        const int64_t later = i + 1 < a.block_end ? a.blocks ? a.blocks[i + 1] : i + 1 : number;
        const int count = last - start + 1 < kBlock ? int(last - start + 1) : kBlock;
        const Block<T> block =
            open_block<T>(a, scratch, number, later * kBlock > last ? number : later, count);
        meet(block, scratch.part);
    }
    close();
}

}  // namespace
}  // namespace gossamer
