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

// The keys, or the values, of one head in a block.
void open_packed(const Compression& how, bool keys, int wide, const uint8_t* from, uint16_t* to) {
    const PackedBlock at = packed_block(how, kBlock, wide, keys);
    if (how.bits == 4)
        open_bits<4>(how.rank, keys, at, wide, from, to);
    else
        open_bits<2>(how.rank, keys, at, wide, from, to);
}

}  // namespace
}  // namespace gossamer
