// Compressed blocks (compression.h) opened into bfloat16, in the order in which attention reads them.
#pragma once
#include "attention.h"
#include "simd.h"

namespace gossamer {
namespace {

GOSSAMER_INLINE void open_halves(const uint8_t* from, int count, float* to) {
    for (int i = 0; i < count; i += 16) store_floats(to + i, load_halves((const uint16_t*)from + i), 16);
}

GOSSAMER_INLINE void open_bfloat16(const uint8_t* from, int count, float* to) {
    for (int i = 0; i < count; i += 16)
        store_floats(to + i, load_bfloat16((const uint16_t*)from + i, 16), 16);
}

// Of group `g` of 16 pairs, what their codes stand for and the low-rank part: numbers `first` of each pair
// have one scale, low, and factor of each rank; those of `second` others; `other` holds the factors across.
template <int B, int R>
GOSSAMER_INLINE void open_pairs(const uint8_t* codes, int g, const float* scale, const float* low,
                                const float* factors, int apart, const Floats (&other)[R + 1], uint16_t* to) {
    const Ints bytes = load_bytes(codes + (B == 4 ? 16 * g : g / 2 * 16));
    const int shift = B == 4 ? 0 : g % 2 * 4;
    Floats a = mul_add(to_floats(field(bytes, shift, B)), floats(scale[0]), floats(low[0]));
    Floats b = mul_add(to_floats(field(bytes, shift + B, B)), floats(scale[1]), floats(low[1]));
    GOSSAMER_UNROLL(4)
    for (int r = 0; r < R; r++) {
        a = mul_add(other[r], floats(factors[r * apart]), a);
        b = mul_add(other[r], floats(factors[r * apart + 1]), b);
    }
    store_mixed(to, a, b);
}

template <int B, int R>
void open_keys(const PackedBlock& at, int wide, const uint8_t* from, uint16_t* to) {
    alignas(64) float scales[kMostHead], lows[kMostHead], right[(R ? R : 1) * kMostHead];
    open_halves(from + at.scales, wide, scales);
    open_halves(from + at.lows, wide, lows);
    open_bfloat16(from + at.right, R * wide, right);
    for (int j = 0; j < kBlock / 16; j++) {
        Floats left[R + 1];
        for (int r = 0; r < R; r++)
            left[r] = load_bfloat16((const uint16_t*)(from + at.left) + r * kBlock + 16 * j, 16);
        for (int w = 0; w < wide / 2; w++) {
            const int g = j * wide / 2 + w;
            open_pairs<B, R>(from, g, scales + 2 * w, lows + 2 * w, right + 2 * w, wide, left, to + 32 * g);
        }
    }
    const uint16_t* outliers = (const uint16_t*)(from + at.outliers);
    const uint8_t* places = from + at.places;
    for (int n = 0; n < at.count; n++, outliers += wide, places += wide)
        for (int c = 0; c < wide; c++) {
            const unsigned p = places[c];
            to[p / 16 * 16 * unsigned(wide) + p % 16 * 2 + unsigned(c / 2 * 32 + c % 2)] = outliers[c];
        }
}

template <int B, int R>
void open_values(const PackedBlock& at, int wide, const uint8_t* from, uint16_t* to) {
    alignas(64) float scales[kBlock], lows[kBlock], left[(R ? R : 1) * kBlock];
    open_halves(from + at.scales, kBlock, scales);
    open_halves(from + at.lows, kBlock, lows);
    open_bfloat16(from + at.left, R * kBlock, left);
    for (int i = 0; i < wide; i += 16) {
        Floats right[R + 1];
        for (int r = 0; r < R; r++)
            right[r] = load_bfloat16((const uint16_t*)(from + at.right) + r * wide + i, 16);
        for (int p = 0; p < kBlock; p += 2) {
            const int g = (p / 2 * wide + i) / 16;
            open_pairs<B, R>(from, g, scales + p, lows + p, left + p, kBlock, right, to + 32 * g);
        }
    }
    const uint16_t* outliers = (const uint16_t*)(from + at.outliers);
    const uint8_t* places = from + at.places;
    for (int n = 0; n < at.count; n++, outliers += kBlock, places += kBlock)
        for (int p = 0; p < kBlock; p++) to[(p / 2 * wide + places[p]) * 2 + p % 2] = outliers[p];
}

template <int B, int R>
GOSSAMER_INLINE void open_either(bool keys, const PackedBlock& at, int wide, const uint8_t* from,
                                 uint16_t* to) {
    if (keys)
        open_keys<B, R>(at, wide, from, to);
    else
        open_values<B, R>(at, wide, from, to);
}

template <int B>
GOSSAMER_INLINE void open_bits(int rank, bool keys, const PackedBlock& at, int wide, const uint8_t* from,
                               uint16_t* to) {
    switch (rank) {
        case 0:
            return open_either<B, 0>(keys, at, wide, from, to);
        case 1:
            return open_either<B, 1>(keys, at, wide, from, to);
        case 2:
            return open_either<B, 2>(keys, at, wide, from, to);
        case 3:
            return open_either<B, 3>(keys, at, wide, from, to);
        default:
            return open_either<B, 4>(keys, at, wide, from, to);
    }
}

// Sums to [N][kBlock] of factors times N of the vectors.
template <int N>
GOSSAMER_INLINE void sum_up(const uint16_t* vectors, int rank, const uint16_t* factors, float* to) {
    for (int j = 0; j < kBlock / 16; j++, factors += 16 * rank) {
        Floats sum[N];
        GOSSAMER_UNROLL(8)
        for (int n = 0; n < N; n++) sum[n] = floats(0);
        for (int r = 0; r < rank; r += 2) {
            const Bytes some = load(factors + 16 * r);
            GOSSAMER_UNROLL(8)
            for (int n = 0; n < N; n++) sum[n] = dot_pairs(sum[n], some, pair(vectors + n * rank + r));
        }
        GOSSAMER_UNROLL(8)
        for (int n = 0; n < N; n++) store_floats(to + n * kBlock + 16 * j, sum[n], 16);
    }
}

// Numbers i and half + i of the positions of a block turn against each other.
GOSSAMER_INLINE void turn_block(const LowRankKeys& low, int half, int64_t number, float* x) {
    const float* start = low.starts + number * 2 * half;
    for (int i = 0; i < half; i++) {
        const Floats c = floats(start[i]), s = floats(start[half + i]), minus = floats(-start[half + i]);
        for (int p = 0; p < kBlock; p += 16) {
            float *low_half = x + i * kBlock + p, *high_half = low_half + half * kBlock;
            const float* turn = low.turns + i * 2 * kBlock + p;
            const Floats tc = load_floats(turn, 16), ts = load_floats(turn + kBlock, 16);
            const Floats cos = mul_add(minus, ts, mul(c, tc)), sin = mul_add(c, ts, mul(s, tc));
            const Floats a = load_floats(low_half, 16), b = load_floats(high_half, 16);
            store_floats(low_half, mul_add(mul(b, floats(-1)), sin, mul(a, cos)), 16);
            store_floats(high_half, mul_add(a, sin, mul(b, cos)), 16);
        }
    }
}

void open_low_rank(const LowRankKeys& low, int dim, int64_t number, const uint8_t* from, uint16_t* to) {
    constexpr int kSome = kRegisters == 32 ? 8 : 4;
    alignas(64) float x[kMostHead * kBlock];
    const int wide = wide_of(dim);
    int c = 0;
    for (; c + kSome <= dim; c += kSome)
        sum_up<kSome>(low.vectors + c * low.rank, low.rank, (const uint16_t*)from, x + c * kBlock);
    for (; c < dim; c++)
        sum_up<1>(low.vectors + c * low.rank, low.rank, (const uint16_t*)from, x + c * kBlock);
    for (int i = dim * kBlock; i < wide * kBlock; i += 16) store_floats(x + i, floats(0), 16);
    if (low.starts) turn_block(low, dim / 2, number, x);
    for (int j = 0; j < kBlock / 16; j++)
        for (int w = 0; w < wide / 2; w++, to += 32) {
            const float* both = x + 2 * w * kBlock + 16 * j;
            store_mixed(to, load_floats(both, 16), load_floats(both + kBlock, 16));
        }
}

// The keys, or the values, of one head in block `number`.
void open_packed(const Compression& how, bool keys, int dim, int64_t number, const uint8_t* from,
                 uint16_t* to) {
    if (keys && how.low.rank) return open_low_rank(how.low, dim, number, from, to);
    const int wide = wide_of(dim);
    const PackedBlock at = packed_block(how, kBlock, wide, keys);
    if (how.bits == 4)
        open_bits<4>(how.rank, keys, at, wide, from, to);
    else
        open_bits<2>(how.rank, keys, at, wide, from, to);
}

}  // namespace
}  // namespace gossamer
