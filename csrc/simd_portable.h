// Vector operations in plain C++: the twin of every other instruction set, and the definition of the answer.
#pragma once
#include <stdint.h>

#include "simd_shared.h"

namespace gossamer {
namespace {

constexpr int kRegisters = 32;  // 64-byte registers that a block of rows may fill

struct Bytes {
    uint8_t v[64];
};
struct Ints {
    int32_t v[16];
};
struct Floats {
    float v[16];
};

GOSSAMER_INLINE float float_of_bits(uint32_t bits) {
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
}

GOSSAMER_INLINE uint32_t bits_of_float(float f) {
    uint32_t bits;
    __builtin_memcpy(&bits, &f, 4);
    return bits;
}

GOSSAMER_INLINE float float_of_bfloat16(uint16_t h) { return float_of_bits(uint32_t(h) << 16); }

GOSSAMER_INLINE uint16_t bfloat16_of_float(float f) {
    uint32_t bits = bits_of_float(f);
    if (f != f) return 0x7fc0;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

GOSSAMER_INLINE float float_of_half(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 31) return float_of_bits(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0) return float_of_bits(sign | bits_of_float(float(fraction) * 0x1p-24f));
    return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

// ---- bytes and codes

GOSSAMER_INLINE Bytes load(const void* p) {
    Bytes r;
    __builtin_memcpy(&r, p, 64);
    return r;
}

GOSSAMER_INLINE void store(void* p, const Bytes& b) { __builtin_memcpy(p, &b, 64); }

GOSSAMER_INLINE Bytes low_nibbles(const Bytes& b) {
    Bytes r;
    for (int i = 0; i < 64; i++) r.v[i] = b.v[i] & 15;
    return r;
}

GOSSAMER_INLINE Bytes high_nibbles(const Bytes& b) {
    Bytes r;
    for (int i = 0; i < 64; i++) r.v[i] = b.v[i] >> 4;
    return r;
}

// Field j of every byte cut into four.
GOSSAMER_INLINE Bytes two_bits(const Bytes& b, int j) {
    Bytes r;
    for (int i = 0; i < 64; i++) r.v[i] = b.v[i] >> (2 * j) & 3;
    return r;
}

// Adds 4 to the codes whose bit is set.
GOSSAMER_INLINE Bytes add_high_bit(const Bytes& b, uint64_t bits) {
    Bytes r;
    for (int i = 0; i < 64; i++) r.v[i] = uint8_t(b.v[i] + ((bits >> i & 1) << 2));
    return r;
}

// 16 bytes, four times.
GOSSAMER_INLINE Bytes repeat16(const uint8_t* p) {
    Bytes r;
    for (int i = 0; i < 64; i++) r.v[i] = p[i % 16];
    return r;
}

// Of a table made by repeat16, the entries that codes below 16 name.
GOSSAMER_INLINE Bytes look_up(const Bytes& table, const Bytes& codes) {
    Bytes r;
    for (int i = 0; i < 64; i++) r.v[i] = table.v[codes.v[i] & 15];
    return r;
}

// Spreads the elements at p over the set bits of a mask; the others become `zero`. Up to 64 bytes are read.
GOSSAMER_INLINE Bytes expand8(const uint8_t* p, uint64_t mask, uint8_t zero) {
    Bytes r;
    __builtin_memset(&r, zero, 64);
    for (; mask; mask &= mask - 1) r.v[__builtin_ctzll(mask)] = *p++;
    return r;
}

GOSSAMER_INLINE Bytes expand16(const uint8_t* p, uint32_t mask) {
    Bytes r{};
    for (; mask; mask &= mask - 1, p += 2) __builtin_memcpy(r.v + 2 * __builtin_ctz(mask), p, 2);
    return r;
}

GOSSAMER_INLINE Bytes expand32(const uint8_t* p, uint32_t mask) {
    Bytes r{};
    for (; mask; mask &= mask - 1, p += 4) __builtin_memcpy(r.v + 4 * __builtin_ctz(mask), p, 4);
    return r;
}

// Four registers side by side, byte by byte: 4 n + k of each 16 bytes of to[r] is byte 4 r + n of those of
// the k-th.
GOSSAMER_INLINE void interleave(const Bytes& a, const Bytes& b, const Bytes& c, const Bytes& d,
                                Bytes (&to)[4]) {
    for (int r = 0; r < 4; r++)
        for (int i = 0; i < 16; i++) {
            const int from = i / 4 * 16 + 4 * r + i % 4;
            to[r].v[4 * i] = a.v[from];
            to[r].v[4 * i + 1] = b.v[from];
            to[r].v[4 * i + 2] = c.v[from];
            to[r].v[4 * i + 3] = d.v[from];
        }
}

// ---- dot products: each lane meets four (or its share of the four) activations of the step

// kWide: codes use all 8 bits.
template <bool kWide>
GOSSAMER_INLINE Ints dot8(Ints sum, const Bytes& w, const int8_t* x) {
    for (int o = 0; o < 16; o++)
        for (int k = 0; k < 4; k++) sum.v[o] += int32_t(w.v[4 * o + k]) * x[k];
    return sum;
}

GOSSAMER_INLINE Floats dot16(Floats sum, const Bytes& w, const uint16_t* x) {
    uint32_t pairs[16], of_x[2];
    __builtin_memcpy(pairs, &w, 64);
    __builtin_memcpy(of_x, x, 8);
    for (int i = 0; i < 16; i++) sum.v[i] += float_of_bits(pairs[i] << 16) * float_of_bits(of_x[i & 1] << 16);
    for (int i = 0; i < 16; i++)
        sum.v[i] += float_of_bits(pairs[i] & 0xffff0000) * float_of_bits(of_x[i & 1] & 0xffff0000);
    return sum;
}

GOSSAMER_INLINE Floats dot32(Floats sum, const Bytes& w, const float* x) {
    float f[16];
    __builtin_memcpy(f, &w, 64);
    for (int i = 0; i < 16; i++) sum.v[i] += f[i] * x[i & 3];
    return sum;
}

// Both products of a pair of bfloat16 in each lane.
GOSSAMER_INLINE Floats dot_pairs(Floats sum, const Bytes& w, const Bytes& x) {
    uint32_t of_w[16], of_x[16];
    __builtin_memcpy(of_w, &w, 64);
    __builtin_memcpy(of_x, &x, 64);
    for (int i = 0; i < 16; i++) sum.v[i] += float_of_bits(of_w[i] << 16) * float_of_bits(of_x[i] << 16);
    for (int i = 0; i < 16; i++)
        sum.v[i] += float_of_bits(of_w[i] & 0xffff0000) * float_of_bits(of_x[i] & 0xffff0000);
    return sum;
}

// Two bfloat16 in every lane.
GOSSAMER_INLINE Bytes pair(const uint16_t* x) {
    Bytes r;
    for (int i = 0; i < 16; i++) __builtin_memcpy(r.v + 4 * i, x, 4);
    return r;
}

// ---- integers and floats

GOSSAMER_INLINE Ints ints(int32_t value) {
    Ints r;
    for (int i = 0; i < 16; i++) r.v[i] = value;
    return r;
}

GOSSAMER_INLINE Ints add(Ints a, const Ints& b) {
    for (int i = 0; i < 16; i++) a.v[i] += b.v[i];
    return a;
}

GOSSAMER_INLINE Floats floats(float value) {
    Floats r;
    for (int i = 0; i < 16; i++) r.v[i] = value;
    return r;
}

GOSSAMER_INLINE Floats mul(Floats a, const Floats& b) {
    for (int i = 0; i < 16; i++) a.v[i] *= b.v[i];
    return a;
}

// a * b + c, fused where the instruction set has it.
GOSSAMER_INLINE Floats mul_add(const Floats& a, const Floats& b, Floats c) {
    for (int i = 0; i < 16; i++) c.v[i] += a.v[i] * b.v[i];
    return c;
}

GOSSAMER_INLINE Floats to_floats(const Ints& a) {
    Floats r;
    for (int i = 0; i < 16; i++) r.v[i] = float(a.v[i]);
    return r;
}

// The smaller and the larger of two; b where one is NaN.
GOSSAMER_INLINE Floats smaller(Floats a, const Floats& b) {
    for (int i = 0; i < 16; i++) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return a;
}
GOSSAMER_INLINE Floats larger(Floats a, const Floats& b) {
    for (int i = 0; i < 16; i++) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
}

GOSSAMER_INLINE Floats quotient(Floats a, const Floats& b) {
    for (int i = 0; i < 16; i++) a.v[i] /= b.v[i];
    return a;
}

// 2^n of 1.5 * 2^23 + n, n from -127 (of which 0 is made) to 127.
GOSSAMER_INLINE Floats two_to(const Floats& a) {
    Floats r;
    for (int i = 0; i < 16; i++) r.v[i] = float_of_bits((bits_of_float(a.v[i]) - (0x4b400000 - 127)) << 23);
    return r;
}

GOSSAMER_INLINE float first_of(const Floats& a) { return a.v[0]; }

GOSSAMER_INLINE float largest_of(const Floats& a) {
    float top = a.v[0];
    for (int i = 1; i < 16; i++) top = a.v[i] > top ? a.v[i] : top;
    return top;
}

// Sums of neighbours: 8 of `a`, then 8 of `b`.
GOSSAMER_INLINE Floats pair_sums(const Floats& a, const Floats& b) {
    Floats r;
    for (int i = 0; i < 8; i++) r.v[i] = a.v[2 * i] + a.v[2 * i + 1];
    for (int i = 0; i < 8; i++) r.v[8 + i] = b.v[2 * i] + b.v[2 * i + 1];
    return r;
}

GOSSAMER_INLINE Floats load_halves(const uint16_t* p) {
    Floats r;
    for (int i = 0; i < 16; i++) r.v[i] = float_of_half(p[i]);
    return r;
}

GOSSAMER_INLINE Floats as_floats(const Bytes& b) {
    Floats r;
    __builtin_memcpy(&r, &b, 64);
    return r;
}

// 16 bfloat16 in the lower, or upper, halves of words.
GOSSAMER_INLINE Floats lower_halves(const Bytes& b) {
    uint32_t words[16];
    __builtin_memcpy(words, &b, 64);
    Floats r;
    for (int i = 0; i < 16; i++) r.v[i] = float_of_bits(words[i] << 16);
    return r;
}

GOSSAMER_INLINE Floats upper_halves(const Bytes& b) {
    uint32_t words[16];
    __builtin_memcpy(words, &b, 64);
    Floats r;
    for (int i = 0; i < 16; i++) r.v[i] = float_of_bits(words[i] & 0xffff0000);
    return r;
}

// The first n (0..16) floats at p, then zeros; nothing past them is read.
GOSSAMER_INLINE Floats load_floats(const float* p, int n) {
    Floats r;
    for (int i = 0; i < 16; i++) r.v[i] = i < n ? p[i] : 0.0f;
    return r;
}

GOSSAMER_INLINE Ints load_ints(const int32_t* p, int n) {
    Ints r;
    for (int i = 0; i < 16; i++) r.v[i] = i < n ? p[i] : 0;
    return r;
}

GOSSAMER_INLINE void store_ints(int32_t* p, const Ints& a) { __builtin_memcpy(p, &a, 64); }

GOSSAMER_INLINE Floats load_bfloat16(const uint16_t* p, int n) {
    Floats r;
    for (int i = 0; i < 16; i++) r.v[i] = i < n ? float_of_bfloat16(p[i]) : 0.0f;
    return r;
}

GOSSAMER_INLINE void store_floats(float* p, const Floats& a, int n) {
    for (int i = 0; i < n; i++) p[i] = a.v[i];
}

GOSSAMER_INLINE void store_bfloat16(uint16_t* p, const Floats& a, int n) {
    for (int i = 0; i < n; i++) p[i] = bfloat16_of_float(a.v[i]);
}

// 32 numbers as bfloat16; subnormal ones may become zeros.
GOSSAMER_INLINE void store_pairs(uint16_t* p, const Floats& a, const Floats& b) {
    store_bfloat16(p, a, 16);
    store_bfloat16(p + 16, b, 16);
}

GOSSAMER_INLINE Ints load_codes(const int8_t* p) {
    Ints r;
    for (int i = 0; i < 16; i++) r.v[i] = p[i];
    return r;
}

// 16 pairs of a and b as bfloat16; subnormal ones may become zeros.
GOSSAMER_INLINE void store_mixed(uint16_t* p, const Floats& a, const Floats& b) {
    for (int i = 0; i < 16; i++) {
        p[2 * i] = bfloat16_of_float(a.v[i]);
        p[2 * i + 1] = bfloat16_of_float(b.v[i]);
    }
}
// 16 bytes, and bits [shift, shift + count) of each number.
GOSSAMER_INLINE Ints load_bytes(const uint8_t* p) {
    Ints r;
    for (int i = 0; i < 16; i++) r.v[i] = p[i];
    return r;
}
GOSSAMER_INLINE Ints field(const Ints& a, int shift, int count) {
    Ints r;
    for (int i = 0; i < 16; i++) r.v[i] = a.v[i] >> shift & ((1 << count) - 1);
    return r;
}

// Largest magnitude of 64 values; NaN if any is NaN (as bits, NaN is the largest).
GOSSAMER_INLINE float largest(const Floats (&x)[4]) {
    uint32_t top = 0;
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 16; i++) {
            uint32_t bits = bits_of_float(x[j].v[i]) & 0x7fffffff;
            top = bits > top ? bits : top;
        }
    return float_of_bits(top);
}

// Rounds half to even into 16 int8 codes (NaN gives 0), and returns them.
GOSSAMER_INLINE Ints store_codes(int8_t* p, const Floats& a) {
    Ints codes;
    for (int i = 0; i < 16; i++) {
        float v = a.v[i] == a.v[i] ? a.v[i] : 0.0f;
        codes.v[i] = int32_t((v + 12582912.0f) - 12582912.0f);  // 1.5 * 2^23: adding it rounds
        p[i] = int8_t(codes.v[i]);
    }
    return codes;
}

GOSSAMER_INLINE int32_t total(const Ints& a) {
    int32_t sum = 0;
    for (int i = 0; i < 16; i++) sum += a.v[i];
    return sum;
}

// The four codes of each step in `kept`, one after the other, then zeros: 64 bytes.
GOSSAMER_INLINE void gather_steps(const int8_t* codes, uint32_t kept, int8_t* to) {
    __builtin_memset(to, 0, 64);
    for (; kept; kept &= kept - 1, to += 4) __builtin_memcpy(to, codes + 4 * __builtin_ctz(kept), 4);
}

// The sum of 64 codes.
GOSSAMER_INLINE int32_t sum_codes(const int8_t* codes) {
    int32_t sum = 0;
    for (int i = 0; i < 64; i++) sum += codes[i];
    return sum;
}

}  // namespace
}  // namespace gossamer
