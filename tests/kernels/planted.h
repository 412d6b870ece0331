// Wrong results to order. Tests compile the kernels with this header in front of them (-include): it wraps
// operations of simd.h, each of which goes wrong while `planted_fault` names it, and mostly only a little: in
// one lane, in a tail, at a tie. The library's own build never sees it.
#pragma once
#include "simd.h"

// clang-format off
#define PLANTED_FAULTS(F)                                                                         \
    F(low_nibbles) F(high_nibbles) F(two_bits) F(add_high_bit) F(expand8) F(expand16) F(expand32) \
    F(dot8) F(dot16) F(dot32) F(pair_sums) F(load_halves) F(load_floats) F(load_bfloat16)         \
    F(store_floats) F(store_bfloat16) F(largest) F(store_codes) F(total) F(interleave)            \
    F(list_active) F(lower_halves) F(upper_halves) F(as_floats)
// clang-format on

#define PLANTED_NUMBER(name) kFault_##name,
enum PlantedFault { kNoFault, PLANTED_FAULTS(PLANTED_NUMBER) };
#undef PLANTED_NUMBER

extern "C" int planted_fault;

namespace gossamer {
namespace {

#define PLANTED(name) (planted_fault == kFault_##name)

// One bit of byte i is flipped.
GOSSAMER_INLINE Bytes flipped(Bytes bytes, int i, int bit) {
    uint8_t b[64];
    store(b, bytes);
    b[i] ^= uint8_t(1 << bit);
    return load(b);
}

GOSSAMER_INLINE Bytes planted_low_nibbles(Bytes b) {
    return PLANTED(low_nibbles) ? flipped(low_nibbles(b), 63, 0) : low_nibbles(b);
}

GOSSAMER_INLINE Bytes planted_high_nibbles(Bytes b) {
    return PLANTED(high_nibbles) ? flipped(high_nibbles(b), 0, 0) : high_nibbles(b);
}

GOSSAMER_INLINE Bytes planted_two_bits(Bytes b, int j) {
    return PLANTED(two_bits) && j == 3 ? flipped(two_bits(b, j), 0, 0) : two_bits(b, j);
}

GOSSAMER_INLINE Bytes planted_add_high_bit(Bytes b, uint64_t bits) {
    return add_high_bit(b, PLANTED(add_high_bit) ? bits & ~(uint64_t(1) << 40) : bits);
}

// The last element that is kept.
GOSSAMER_INLINE Bytes planted_expand8(const uint8_t* p, uint64_t mask, uint8_t zero) {
    Bytes b = expand8(p, mask, zero);
    return PLANTED(expand8) && mask ? flipped(b, 63 - __builtin_clzll(mask), 0) : b;
}

GOSSAMER_INLINE Bytes planted_expand16(const uint8_t* p, uint32_t mask) {
    Bytes b = expand16(p, mask);
    return PLANTED(expand16) && mask ? flipped(b, 2 * (31 - __builtin_clz(mask)) + 1, 7) : b;
}

GOSSAMER_INLINE Bytes planted_expand32(const uint8_t* p, uint32_t mask) {
    Bytes b = expand32(p, mask);
    return PLANTED(expand32) && mask ? flipped(b, 4 * (31 - __builtin_clz(mask)) + 3, 7) : b;
}

// The last input of a step is forgotten.
template <class T>
struct ButOne {
    T x[4];
    GOSSAMER_INLINE explicit ButOne(const T* four) : x{four[0], four[1], four[2], 0} {}
};

template <bool kWide>
GOSSAMER_INLINE Ints planted_dot8(Ints sum, Bytes w, const int8_t* x) {
    return PLANTED(dot8) ? dot8<kWide>(sum, w, ButOne<int8_t>(x).x) : dot8<kWide>(sum, w, x);
}

GOSSAMER_INLINE Floats planted_dot16(Floats sum, Bytes w, const uint16_t* x) {
    return PLANTED(dot16) ? dot16(sum, w, ButOne<uint16_t>(x).x) : dot16(sum, w, x);
}

GOSSAMER_INLINE Floats planted_dot32(Floats sum, Bytes w, const float* x) {
    return PLANTED(dot32) ? dot32(sum, w, ButOne<float>(x).x) : dot32(sum, w, x);
}

GOSSAMER_INLINE Floats planted_pair_sums(Floats a, Floats b) {
    return PLANTED(pair_sums) ? pair_sums(b, a) : pair_sums(a, b);
}

// Subnormal scales are taken for zero.
GOSSAMER_INLINE Floats planted_load_halves(const uint16_t* p) {
    uint16_t normal[16];
    for (int i = 0; i < 16; i++) normal[i] = p[i] & 0x7c00 ? p[i] : 0;
    return load_halves(PLANTED(load_halves) ? normal : p);
}

// The last input of a tail is not read.
GOSSAMER_INLINE Floats planted_load_floats(const float* p, int n) {
    return load_floats(p, PLANTED(load_floats) && 0 < n && n < 16 ? n - 1 : n);
}

GOSSAMER_INLINE Floats planted_load_bfloat16(const uint16_t* p, int n) {
    return load_bfloat16(p, PLANTED(load_bfloat16) && 0 < n && n < 16 ? n - 1 : n);
}

// The last output of a tail is zero.
GOSSAMER_INLINE void planted_store_floats(float* p, Floats a, int n) {
    store_floats(p, a, n);
    if (PLANTED(store_floats) && n < 16) p[n - 1] = 0;
}

// Cut off, not rounded.
GOSSAMER_INLINE void planted_store_bfloat16(uint16_t* p, Floats a, int n) {
    if (!PLANTED(store_bfloat16)) return store_bfloat16(p, a, n);
    uint32_t bits[16];
    store_floats((float*)bits, a, 16);
    for (int i = 0; i < n; i++) p[i] = uint16_t(bits[i] >> 16);
}

// The last of the 64 is forgotten.
GOSSAMER_INLINE float planted_largest(const Floats (&x)[4]) {
    float last[16];
    store_floats(last, x[3], 16);
    last[15] = 0;
    const Floats but_one[4] = {x[0], x[1], x[2], load_floats(last, 16)};
    return PLANTED(largest) ? largest(but_one) : largest(x);
}

// Ties are rounded up, not to even.
GOSSAMER_INLINE Ints planted_store_codes(int8_t* p, Floats a) {
    float up[16];
    store_floats(up, a, 16);
    for (int i = 0; i < 16; i++) up[i] = __builtin_floorf(up[i] + 0.5f);
    return store_codes(p, PLANTED(store_codes) ? load_floats(up, 16) : a);
}

GOSSAMER_INLINE int32_t planted_total(Ints a) { return total(a) + PLANTED(total); }

GOSSAMER_INLINE void planted_interleave(Bytes a, Bytes b, Bytes c, Bytes d, Bytes (&to)[4]) {
    interleave(a, b, c, d, to);
    if (PLANTED(interleave)) to[0] = flipped(to[0], 1, 0);
}

// The last of those that are not zero is forgotten.
template <class T>
GOSSAMER_INLINE int planted_list_active(const T* x, int32_t first, int32_t* inputs, T* values) {
    int count = list_active(x, first, inputs, values);
    return count - (PLANTED(list_active) && count > 0);
}

GOSSAMER_INLINE Floats planted_lower_halves(Bytes b) {
    return lower_halves(PLANTED(lower_halves) ? flipped(b, 1, 7) : b);
}

GOSSAMER_INLINE Floats planted_upper_halves(Bytes b) {
    return upper_halves(PLANTED(upper_halves) ? flipped(b, 3, 7) : b);
}

GOSSAMER_INLINE Floats planted_as_floats(Bytes b) {
    return as_floats(PLANTED(as_floats) ? flipped(b, 3, 7) : b);
}

}  // namespace
}  // namespace gossamer

#define low_nibbles planted_low_nibbles
#define high_nibbles planted_high_nibbles
#define two_bits planted_two_bits
#define add_high_bit planted_add_high_bit
#define expand8 planted_expand8
#define expand16 planted_expand16
#define expand32 planted_expand32
#define dot8 planted_dot8
#define dot16 planted_dot16
#define dot32 planted_dot32
#define pair_sums planted_pair_sums
#define load_halves planted_load_halves
#define load_floats planted_load_floats
#define load_bfloat16 planted_load_bfloat16
#define store_floats planted_store_floats
#define store_bfloat16 planted_store_bfloat16
#define largest planted_largest
#define store_codes planted_store_codes
#define total planted_total
#define interleave planted_interleave
#define list_active planted_list_active
#define lower_halves planted_lower_halves
#define upper_halves planted_upper_halves
#define as_floats planted_as_floats
