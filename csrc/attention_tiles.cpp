// Attention of many rows by the tiles of AMX: 16 queries meet 16 positions, or 16 numbers of values, at once,
// in bfloat16 with sums in float32. float32 caches, and calls of few rows, go on by the AVX-512 unit.
//
//   scores   A | 16 queries x 32 numbers  |   B | a block of 16 keys: row i: | p0 2i 2i+1 | p1 2i 2i+1 | ...
//   | sums     A | 16 queries x 32 weights  |   B | 32 positions of values: row i, positions 2i and 2i+1 of
//   16
//                                                 numbers |
//   both     C | 16 queries x 16 float32  |
//
// Both B lie so in the cache. Where a head's numbers are not whole tiles of 32, a last tile of 16 follows.
// A query's sums depend on what it sees alone: those of the other queries in its tiles lie in other rows.
#include <immintrin.h>

#include "attention_walk.h"
#include "tile_config.h"

extern "C" {
extern const gossamer::AttentionOps gossamer_attention_avx512;
}

namespace gossamer {
namespace {

constexpr int kTile = 16;                  // queries, positions or numbers of a tile
constexpr int kHalves = kQueries / kTile;  // tiles of queries

// Tiles: C 0, 1 (queries)   A 4, last 5 (16 numbers)   B 6, last 7
void shape(TileConfig& tiles) {
    for (int i = 0; i < 8; i++) tiles.set(i, i == 7 ? 8 : 16, i == 5 ? 32 : 64);
}

// What tiles need besides: queries and values in whole tiles, scores, weights.
struct TileScratch {
    uint16_t *queries, *values, *weights;
    float* scores;

    TileScratch(uint8_t* at, int64_t dim) {
        const int wide = wide_of(dim);
        queries = (uint16_t*)at;
        values = queries + kQueries * wide;
        weights = values + kBlock * wide;
        scores = (float*)(weights + kQueries * kBlock);
    }
    static int64_t bytes(int64_t dim) {
        return 2 * (kQueries + kBlock) * wide_of(dim) + kQueries * kBlock * 6;
    }
};

int64_t of_walk(int64_t dim, int type) { return (attention_scratch(dim, type) + 63) / 64 * 64; }

int64_t tile_scratch(int64_t dim, int type) {
    return type == kCacheF32 ? gossamer_attention_avx512.scratch_bytes(dim, type)
                             : of_walk(dim, type) + TileScratch::bytes(dim);
}

// scores [query][kBlock] of H tiles of queries.
template <int H>
GOSSAMER_INLINE void score(const uint16_t* queries, int wide, const uint16_t* keys, float* scores) {
    const int64_t apart = kTile * wide;  // from one tile of queries, or of keys, to the next
    for (int p = 0; p < kBlock / kTile; p++, keys += apart, scores += kTile) {
        _tile_zero(0);
        if constexpr (H == 2) _tile_zero(1);
        int i = 0;
        for (; i + 32 <= wide; i += 32) {
            _tile_loadd(6, keys + i * kTile, 64);
            _tile_loadd(4, queries + i, 2 * wide);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (H == 2) {
                _tile_loadd(4, queries + apart + i, 2 * wide);
                _tile_dpbf16ps(1, 4, 6);
            }
        }
        if (i < wide) {
            _tile_loadd(7, keys + i * kTile, 64);
            _tile_loadd(5, queries + i, 2 * wide);
            _tile_dpbf16ps(0, 5, 7);
            if constexpr (H == 2) {
                _tile_loadd(5, queries + apart + i, 2 * wide);
                _tile_dpbf16ps(1, 5, 7);
            }
        }
        _tile_stored(0, scores, 4 * kBlock);
        if constexpr (H == 2) _tile_stored(1, scores + kTile * kBlock, 4 * kBlock);
    }
}

// sums [query][size] += weights times values, of H tiles of queries.
template <int H>
GOSSAMER_INLINE void gather(const uint16_t* weights, const uint16_t* values, int wide, float* sums,
                            int size) {
    for (int i = 0; i < wide; i += kTile) {
        _tile_loadd(0, sums + i, 4 * size);
        if constexpr (H == 2) _tile_loadd(1, sums + kTile * size + i, 4 * size);
        for (int p = 0; p < kBlock; p += 32) {
            _tile_loadd(6, values + p * wide + 2 * i, 4 * wide);
            _tile_loadd(4, weights + p, 2 * kBlock);
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (H == 2) {
                _tile_loadd(4, weights + kTile * kBlock + p, 2 * kBlock);
                _tile_dpbf16ps(1, 4, 6);
            }
        }
        _tile_stored(0, sums + i, 4 * size);
        if constexpr (H == 2) _tile_stored(1, sums + kTile * size + i, 4 * size);
    }
}

template <int H>
void meet(const Attention& a, const TileScratch& scratch, const Block<uint16_t>& block, const Part& part) {
    const int wide = wide_of(a.dim), size = state_size(a.dim);
    const uint16_t* values = block.values;
    if (block.count < kBlock) {  // nobody knows what lies behind, and zero times that need not be zero
        const int64_t some = (block.count + 1) / 2 * 2 * wide;
        __builtin_memcpy(scratch.values, values, size_t(2 * some));
        __builtin_memset(scratch.values + some, 0, size_t(2 * (kBlock * wide - some)));
        values = scratch.values;
    }
    finish(values);
    score<H>(scratch.queries, wide, block.keys, scratch.scores);
    finish(scratch.scores);
    for (int n = 0; n < a.count; n++) {
        float* state = part.states + n * size;
        const float fade = soften<uint16_t>(block, a.first[n], a.last[n], scratch.scores + n * kBlock,
                                            state + wide, part.sums + 16 * n, scratch.weights + n * kBlock);
        for (int i = 0; i < wide; i += 16)
            store_floats(state + i, mul(load_floats(state + i, 16), floats(fade)), 16);
    }
    finish(scratch.weights), finish(part.states);
    gather<H>(scratch.weights, values, wide, part.states, size);
    finish(part.states);
}

void attend(const Attention* a) {
    if (a->type == kCacheF32 || !a->many) return gossamer_attention_avx512.attend(a);
    const TileScratch scratch(a->scratch + of_walk(a->dim, a->type), a->dim);
    const int64_t numbers = int64_t(a->count) * wide_of(a->dim);
    __builtin_memcpy(scratch.queries, a->queries, size_t(2 * numbers));
    __builtin_memset(scratch.queries + numbers, 0, size_t(2 * (kQueries * wide_of(a->dim) - numbers)));
    TileConfig config;
    shape(config);
    const Tiles tiles(config);
    if (a->count > kTile)
        walk<uint16_t>(
            *a, [&](const Block<uint16_t>& block, const Part& part) { meet<2>(*a, scratch, block, part); });
    else
        walk<uint16_t>(
            *a, [&](const Block<uint16_t>& block, const Part& part) { meet<1>(*a, scratch, block, part); });
}

void place_query(const float* query, int64_t dim, float scaling, int type, void* to) {
    gossamer_attention_avx512.place_query(query, dim, scaling, type, to);
}

void place_position(const float* key, const float* value, int64_t dim, int type, int64_t in_chunk, bool final,
                    uint8_t* keys, uint8_t* values) {
    gossamer_attention_avx512.place_position(key, value, dim, type, in_chunk, final, keys, values);
}

void open_block(const Compression* how, bool keys, int64_t dim, int64_t number, const uint8_t* from,
                uint8_t* to) {
    gossamer_attention_avx512.open(how, keys, dim, number, from, to);
}

void merge_states(const float* from, int64_t dim, float* into) {
    gossamer_attention_avx512.merge(from, dim, into);
}

void finish_state(const float* state, int64_t dim, float* to) {
    gossamer_attention_avx512.finish(state, dim, to);
}

}  // namespace
}  // namespace gossamer

extern "C" {
extern const gossamer::AttentionOps GOSSAMER_EXPORT(attention);
const gossamer::AttentionOps GOSSAMER_EXPORT(attention) = {
    gossamer::tile_scratch, gossamer::place_query,  gossamer::place_position, gossamer::open_block,
    gossamer::attend,       gossamer::merge_states, gossamer::finish_state};
}
