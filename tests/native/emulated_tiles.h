// The tile instructions of AMX as functions, so that csrc/tiles.cpp runs where there is no AMX: put in front
// of it (-include). Written from the "Operation" sections of Intel's manual (Software Developer's Manual,
// volume 2; LDTILECFG, STTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE, TDPBSSD, TDPBF16PS). What
// would raise #GP or #UD stops the process with a sentence, and so does what only our kernels promise
// ("ours"). The library's own build never sees it.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// While not zero, tile products are wrong in one place: 1 TDPBSSD, 2 TDPBF16PS.
extern "C" int emulated_fault;

namespace emulated {
namespace {

struct Registers {
    bool configured;
    int rows[8], colsb[8];  // colsb: bytes of a row
    uint8_t data[8][16][64];
};

thread_local Registers tiles;

inline void need(bool condition, const char* what) {
    if (condition) return;
    fprintf(stderr, "emulated tiles: %s\n", what);
    abort();
}

inline void need_tile(int t) {
    need(tiles.configured, "#UD: tiles are not configured");
    need(t >= 0 && t < 8 && tiles.rows[t] > 0 && tiles.colsb[t] > 0, "#UD: this tile is not configured");
}

// palette, start row, 14 zeros; colsb of 8 tiles in 16 bits each, 16 zeros; rows of 8 tiles, 8 zeros
inline void load_config(const void* p) {
    uint8_t bytes[64];
    memcpy(bytes, p, 64);
    need(!tiles.configured, "configured twice: the last multiplication did not release its tiles");  // ours
    memset(&tiles, 0, sizeof tiles);
    need(bytes[0] <= 1, "#GP: no such palette");
    if (bytes[0] == 0) return;
    need(bytes[1] == 0, "a start row is for resuming after a fault");
    for (int i = 2; i < 64; i++)
        if (i < 16 || (i >= 32 && i < 48) || i >= 56) need(bytes[i] == 0, "#GP: a reserved byte is not zero");
    for (int t = 0; t < 8; t++) {
        tiles.colsb[t] = bytes[16 + 2 * t] | bytes[17 + 2 * t] << 8;
        tiles.rows[t] = bytes[48 + t];
        need(tiles.colsb[t] <= 64 && tiles.rows[t] <= 16, "#GP: a tile is too large");
        need((tiles.colsb[t] == 0) == (tiles.rows[t] == 0), "#GP: a tile has rows or columns only");
    }
    tiles.configured = true;
}

inline void store_config(void* p) {
    uint8_t bytes[64] = {};
    bytes[0] = tiles.configured;
    for (int t = 0; t < 8; t++) {
        bytes[16 + 2 * t] = uint8_t(tiles.colsb[t]);
        bytes[48 + t] = uint8_t(tiles.rows[t]);
    }
    memcpy(p, bytes, 64);
}

inline void release() { memset(&tiles, 0, sizeof tiles); }

inline void zero(int t) {
    need_tile(t);
    memset(tiles.data[t], 0, sizeof tiles.data[t]);
}

inline void load(int t, const void* base, int64_t stride) {
    zero(t);
    for (int row = 0; row < tiles.rows[t]; row++)
        memcpy(tiles.data[t][row], (const uint8_t*)base + row * stride, size_t(tiles.colsb[t]));
}

inline void store(int t, void* base, int64_t stride) {
    need_tile(t);
    for (int row = 0; row < tiles.rows[t]; row++)
        memcpy((uint8_t*)base + row * stride, tiles.data[t][row], size_t(tiles.colsb[t]));
}

inline void need_product(int c, int a, int b) {
    need_tile(c), need_tile(a), need_tile(b);
    need(c != a && c != b && a != b, "#UD: a product of a tile and itself");
    need(tiles.colsb[c] % 4 == 0 && tiles.colsb[a] % 4 == 0 && tiles.colsb[b] % 4 == 0, "#UD: no dwords");
    need(tiles.rows[c] == tiles.rows[a], "#UD: C and A have other rows");
    need(tiles.colsb[a] / 4 == tiles.rows[b], "#UD: B has not as many rows as A has columns");
    need(tiles.colsb[c] == tiles.colsb[b], "#UD: C and B have other columns");
}

// The sum wraps around, as the instruction's does.
inline void dpbssd(int c, int a, int b) {
    need_product(c, a, b);
    for (int m = 0; m < tiles.rows[c]; m++)
        for (int n = 0; n < tiles.colsb[c] / 4; n++) {
            uint32_t sum;
            memcpy(&sum, tiles.data[c][m] + 4 * n, 4);
            for (int k = 0; k < tiles.colsb[a]; k++)
                sum += uint32_t(int8_t(tiles.data[a][m][k]) * int8_t(tiles.data[b][k / 4][4 * n + k % 4]));
            if (emulated_fault == 1 && m == 13 && n == 5) sum ^= 1;
            memcpy(tiles.data[c][m] + 4 * n, &sum, 4);
        }
}

// Subnormal numbers are zeros of their sign. (A result that only rounding to a subnormal lifts to the
// smallest normal number stays here, and may be zero in hardware.)
inline float flush(float f) { return fabsf(f) < 0x1p-126f ? copysignf(0, f) : f; }

inline float number(const uint8_t* bfloat16) {
    uint32_t bits = uint32_t(bfloat16[0]) << 16 | uint32_t(bfloat16[1]) << 24;
    float f;
    memcpy(&f, &bits, 4);
    return flush(f);
}

// Fused products and sums in float32, to nearest even, inputs and outputs flushed: sums of the even and of
// the odd inputs of this product by themselves, then both added, then added to C.
inline void dpbf16ps(int c, int a, int b) {
    need_product(c, a, b);
    const int columns = tiles.colsb[c] / 4, depth = tiles.colsb[a] / 4;
    for (int m = 0; m < tiles.rows[c]; m++) {
        float even[16] = {}, odd[16] = {};
        for (int k = 0; k < depth; k++) {
            const float x0 = number(tiles.data[a][m] + 4 * k), x1 = number(tiles.data[a][m] + 4 * k + 2);
            for (int n = 0; n < columns; n++) {
                const uint8_t* pair = tiles.data[b][k] + 4 * n;
                even[n] = flush(fmaf(x0, number(pair), even[n]));
                odd[n] = flush(fmaf(x1, number(pair + 2), odd[n]));
            }
        }
        for (int n = 0; n < columns; n++) {
            float sum;
            memcpy(&sum, tiles.data[c][m] + 4 * n, 4);
            sum = flush(flush(sum) + flush(even[n] + odd[n]));
            if (emulated_fault == 2 && m == 13 && n == 5) sum *= 1.001f;
            memcpy(tiles.data[c][m] + 4 * n, &sum, 4);
        }
    }
}

}  // namespace
}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated::load_config
#define _tile_storeconfig emulated::store_config
#define _tile_release emulated::release
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_zero emulated::zero
#define _tile_dpbssd emulated::dpbssd
#define _tile_dpbf16ps emulated::dpbf16ps
