// Vector operations of AVX-512 (F, BW, VL, DQ, VBMI, VBMI2, VNNI); simd_portable.h says what each does.
// With BF16 too, its instructions multiply bfloat16; else pairs are opened into float32.
#pragma once
#include <immintrin.h>
#include <stdint.h>

namespace gossamer {
namespace {

constexpr int kRegisters = 32;

using Bytes = __m512i;
using Ints = __m512i;
using Floats = __m512;

// ---- bytes and codes

GOSSAMER_INLINE Bytes load(const void* p) { return _mm512_loadu_si512(p); }
GOSSAMER_INLINE void store(void* p, Bytes b) { _mm512_storeu_si512(p, b); }

GOSSAMER_INLINE Bytes low_nibbles(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
GOSSAMER_INLINE Bytes high_nibbles(Bytes b) { return low_nibbles(_mm512_srli_epi16(b, 4)); }

GOSSAMER_INLINE Bytes two_bits(Bytes b, int j) {
    switch (j) {  // shifts want a constant
        case 1:
            b = _mm512_srli_epi16(b, 2);
            break;
        case 2:
            b = _mm512_srli_epi16(b, 4);
            break;
        case 3:
            b = _mm512_srli_epi16(b, 6);
            break;
        default:
            break;
    }
    return _mm512_and_si512(b, _mm512_set1_epi8(3));
}

GOSSAMER_INLINE Bytes add_high_bit(Bytes b, uint64_t bits) {
    return _mm512_mask_add_epi8(b, bits, b, _mm512_set1_epi8(4));
}

GOSSAMER_INLINE Bytes repeat16(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
}
GOSSAMER_INLINE Bytes look_up(Bytes table, Bytes codes) { return _mm512_shuffle_epi8(table, codes); }

GOSSAMER_INLINE Bytes expand8(const uint8_t* p, uint64_t mask, uint8_t zero) {
    return _mm512_mask_expand_epi8(_mm512_set1_epi8(char(zero)), mask, load(p));
}

// Zero that the compiler cannot recognise: it would make the zeroing form of expand, which Zen 5 runs only
// after the last writer of its target register (2.3 cycles instead of 0.9, measured).
GOSSAMER_INLINE Bytes opaque_zero() {
    Bytes zero = _mm512_setzero_si512();
    __asm__("" : "+v"(zero));
    return zero;
}

GOSSAMER_INLINE Bytes expand16(const uint8_t* p, uint32_t mask) {
    return _mm512_mask_expand_epi16(opaque_zero(), mask, load(p));
}
GOSSAMER_INLINE Bytes expand32(const uint8_t* p, uint32_t mask) {
    return _mm512_mask_expand_epi32(opaque_zero(), __mmask16(mask), load(p));
}

GOSSAMER_INLINE void interleave(Bytes a, Bytes b, Bytes c, Bytes d, Bytes (&to)[4]) {
    Bytes low_ab = _mm512_unpacklo_epi8(a, b), high_ab = _mm512_unpackhi_epi8(a, b);
    Bytes low_cd = _mm512_unpacklo_epi8(c, d), high_cd = _mm512_unpackhi_epi8(c, d);
    to[0] = _mm512_unpacklo_epi16(low_ab, low_cd);
    to[1] = _mm512_unpackhi_epi16(low_ab, low_cd);
    to[2] = _mm512_unpacklo_epi16(high_ab, high_cd);
    to[3] = _mm512_unpackhi_epi16(high_ab, high_cd);
}

// ---- dot products

template <bool>
GOSSAMER_INLINE Ints dot8(Ints sum, Bytes w, const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(four));
}

GOSSAMER_INLINE Floats as_floats(Bytes b) { return _mm512_castsi512_ps(b); }
GOSSAMER_INLINE Floats lower_halves(Bytes b) { return as_floats(_mm512_slli_epi32(b, 16)); }
GOSSAMER_INLINE Floats upper_halves(Bytes b) {
    return as_floats(_mm512_and_si512(b, _mm512_set1_epi32(int(0xffff0000))));
}

// The instruction takes subnormal numbers for zero.
GOSSAMER_INLINE Floats dot_pairs(Floats sum, Bytes w, Bytes x) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
#else
    sum = _mm512_fmadd_ps(lower_halves(w), lower_halves(x), sum);
    return _mm512_fmadd_ps(upper_halves(w), upper_halves(x), sum);
#endif
}
GOSSAMER_INLINE Floats dot16(Floats sum, Bytes w, const uint16_t* x) {
    int64_t four;
    __builtin_memcpy(&four, x, 8);
    return dot_pairs(sum, w, _mm512_set1_epi64(four));
}

GOSSAMER_INLINE Floats dot32(Floats sum, Bytes w, const float* x) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_broadcast_f32x4(_mm_loadu_ps(x)), sum);
}

GOSSAMER_INLINE Bytes pair(const uint16_t* x) {
    int32_t two;
    __builtin_memcpy(&two, x, 4);
    return _mm512_set1_epi32(two);
}

// ---- integers and floats

GOSSAMER_INLINE Ints ints(int32_t value) { return _mm512_set1_epi32(value); }
GOSSAMER_INLINE Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
GOSSAMER_INLINE Floats floats(float value) { return _mm512_set1_ps(value); }
GOSSAMER_INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
GOSSAMER_INLINE Floats mul_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
GOSSAMER_INLINE Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }

GOSSAMER_INLINE Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
GOSSAMER_INLINE Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
GOSSAMER_INLINE Floats quotient(Floats a, Floats b) { return _mm512_div_ps(a, b); }
GOSSAMER_INLINE Floats two_to(Floats a) {
    const __m512i n = _mm512_sub_epi32(_mm512_castps_si512(a), _mm512_set1_epi32(0x4b400000 - 127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(n, 23));
}
GOSSAMER_INLINE float first_of(Floats a) { return _mm512_cvtss_f32(a); }
GOSSAMER_INLINE float largest_of(Floats a) { return _mm512_reduce_max_ps(a); }

GOSSAMER_INLINE Floats pair_sums(Floats a, Floats b) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return _mm512_add_ps(_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b));
}

GOSSAMER_INLINE Floats load_halves(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}

GOSSAMER_INLINE __mmask16 first(int n) { return __mmask16((1u << n) - 1); }

GOSSAMER_INLINE Floats load_floats(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }

GOSSAMER_INLINE Ints load_ints(const int32_t* p, int n) { return _mm512_maskz_loadu_epi32(first(n), p); }
GOSSAMER_INLINE void store_ints(int32_t* p, Ints a) { _mm512_storeu_si512(p, a); }

GOSSAMER_INLINE Floats load_bfloat16(const uint16_t* p, int n) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

GOSSAMER_INLINE void store_floats(float* p, Floats a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }

// By integers, since the conversion instruction would flush subnormal numbers to zero.
GOSSAMER_INLINE __m256i rounded_bfloat16(Floats a) {
    __m512i bits = _mm512_castps_si512(a);
    __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even);
    __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(rounded);
}
GOSSAMER_INLINE void store_bfloat16(uint16_t* p, Floats a, int n) {
    _mm256_mask_storeu_epi16(p, first(n), rounded_bfloat16(a));
}

GOSSAMER_INLINE Bytes side_by_side(Floats a, Floats b) {
#if defined(__AVX512BF16__)
    return (__m512i)_mm512_cvtne2ps_pbh(b, a);
#else
    return _mm512_inserti64x4(_mm512_castsi256_si512(rounded_bfloat16(a)), rounded_bfloat16(b), 1);
#endif
}
GOSSAMER_INLINE void store_pairs(uint16_t* p, Floats a, Floats b) { store(p, side_by_side(a, b)); }
GOSSAMER_INLINE Ints load_codes(const int8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
}

GOSSAMER_INLINE void store_mixed(uint16_t* p, Floats a, Floats b) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                        21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                        11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    store(p, _mm512_permutexvar_epi16(load(kOrder), side_by_side(a, b)));
}
GOSSAMER_INLINE Ints load_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
}
GOSSAMER_INLINE Ints field(Ints a, int shift, int count) {
    return _mm512_and_si512(_mm512_srl_epi32(a, _mm_cvtsi32_si128(shift)),
                            _mm512_set1_epi32((1 << count) - 1));
}

GOSSAMER_INLINE float largest(const Floats (&x)[4]) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i top = _mm512_setzero_si512();
    for (int j = 0; j < 4; j++)
        top = _mm512_max_epu32(top, _mm512_and_si512(_mm512_castps_si512(x[j]), magnitude));
    uint32_t bits = _mm512_reduce_max_epu32(top);
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
}

GOSSAMER_INLINE Ints store_codes(int8_t* p, Floats a) {
    __mmask16 number = _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q);
    __m512i codes = _mm512_maskz_cvt_roundps_epi32(number, a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(codes));
    return codes;
}

GOSSAMER_INLINE void list_inputs(__mmask16 active, int32_t first, int32_t* inputs) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    store(inputs, _mm512_maskz_compress_epi32(active, _mm512_add_epi32(lane, _mm512_set1_epi32(first))));
}

GOSSAMER_INLINE int list_active(const int8_t* x, int32_t first, int32_t* inputs, int8_t* values) {
    __m128i codes = _mm_loadu_si128((const __m128i*)x);
    __mmask16 active = _mm_test_epi8_mask(codes, codes);
    list_inputs(active, first, inputs);
    _mm_storeu_si128((__m128i*)values, _mm_maskz_compress_epi8(active, codes));
    return __builtin_popcount(active);
}

GOSSAMER_INLINE int list_active(const float* x, int32_t first, int32_t* inputs, float* values) {
    __m512 v = _mm512_loadu_ps(x);
    __mmask16 active = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    list_inputs(active, first, inputs);
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(active, v));
    return __builtin_popcount(active);
}

GOSSAMER_INLINE int32_t total(Ints a) { return _mm512_reduce_add_epi32(a); }

GOSSAMER_INLINE void gather_steps(const int8_t* codes, uint32_t kept, int8_t* to) {
    store(to, _mm512_maskz_compress_epi32(__mmask16(kept), load(codes)));
}

GOSSAMER_INLINE int32_t sum_codes(const int8_t* codes) {
    const Bytes ones = _mm512_set1_epi8(1);
    return _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, load(codes)));
}

}  // namespace
}  // namespace gossamer
