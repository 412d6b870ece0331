// Vector operations of AVX2 with FMA, F16C and BMI2; simd_portable.h says what each does. A 64-byte register
// is a pair of 32-byte ones.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "simd_shared.h"

namespace gossamer {
namespace {

constexpr int kRegisters = 8;

struct Bytes {
    __m256i a, b;
};
struct Ints {
    __m256i a, b;
};
struct Floats {
    __m256 a, b;
};

// ---- bytes and codes

GOSSAMER_INLINE Bytes load(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}

GOSSAMER_INLINE void store(void* p, Bytes v) {
    _mm256_storeu_si256((__m256i*)p, v.a);
    _mm256_storeu_si256((__m256i*)p + 1, v.b);
}

GOSSAMER_INLINE Bytes bits_of(Bytes v, int kept) {
    __m256i mask = _mm256_set1_epi8(char(kept));
    return {_mm256_and_si256(v.a, mask), _mm256_and_si256(v.b, mask)};
}

GOSSAMER_INLINE Bytes low_nibbles(Bytes v) { return bits_of(v, 15); }
GOSSAMER_INLINE Bytes high_nibbles(Bytes v) {
    return bits_of({_mm256_srli_epi16(v.a, 4), _mm256_srli_epi16(v.b, 4)}, 15);
}

GOSSAMER_INLINE Bytes two_bits(Bytes v, int j) {
    switch (j) {  // shifts want a constant
        case 1:
            return bits_of({_mm256_srli_epi16(v.a, 2), _mm256_srli_epi16(v.b, 2)}, 3);
        case 2:
            return bits_of({_mm256_srli_epi16(v.a, 4), _mm256_srli_epi16(v.b, 4)}, 3);
        case 3:
            return bits_of({_mm256_srli_epi16(v.a, 6), _mm256_srli_epi16(v.b, 6)}, 3);
        default:
            return bits_of(v, 3);
    }
}

// 4 in each byte whose bit is set: every byte meets the byte of `bits` that holds its bit.
GOSSAMER_INLINE __m256i fours(uint32_t bits) {
    const __m256i byte = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(int(bits)), byte);
    __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    return _mm256_and_si256(set, _mm256_set1_epi8(4));
}

GOSSAMER_INLINE Bytes add_high_bit(Bytes v, uint64_t bits) {
    return {_mm256_add_epi8(v.a, fours(uint32_t(bits))), _mm256_add_epi8(v.b, fours(uint32_t(bits >> 32)))};
}

GOSSAMER_INLINE Bytes repeat16(const uint8_t* p) {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
    return {both, both};
}
GOSSAMER_INLINE Bytes look_up(Bytes table, Bytes codes) {
    return {_mm256_shuffle_epi8(table.a, codes.a), _mm256_shuffle_epi8(table.a, codes.b)};
}

GOSSAMER_INLINE uint64_t eight(const uint8_t* p) {
    uint64_t word;
    __builtin_memcpy(&word, p, 8);
    return word;
}

// For each mask of eight elements, which stored one each takes: its rank among the set bits, or nothing
// (a high bit gives zero). Byte shuffles take `bytes`, for the lower or upper eight of a register, or
// `pairs`.
struct Ranks {
    uint64_t bytes[2][256];
    uint64_t pairs[256][2];
    constexpr Ranks() : bytes(), pairs() {
        for (int mask = 0; mask < 256; mask++) {
            int rank = 0;
            for (int i = 0; i < 8; i++) {
                bool kept = mask >> i & 1;
                uint64_t byte = kept ? rank : 0x80, pair = kept ? 0x0100 + 0x0202 * rank : 0x8080;
                bytes[0][mask] |= byte << 8 * i;
                bytes[1][mask] |= (byte + (kept ? 8 : 0)) << 8 * i;
                pairs[mask][i / 4] |= pair << 16 * (i % 4);
                rank += kept;
            }
        }
    }
};
constexpr Ranks kRanks{};

GOSSAMER_INLINE __m128i halves(const void* low, const void* high) {
    __m128d first = _mm_castsi128_pd(_mm_loadl_epi64((const __m128i*)low));
    return _mm_castpd_si128(_mm_loadh_pd(first, (const double*)high));
}

// The stored bytes at p, xor `flip`, over 16 places; p moves past those taken. Reads 8 bytes at a time.
GOSSAMER_INLINE __m128i spread16(const uint8_t*& p, uint32_t low, uint32_t high, __m128i flip) {
    const uint8_t* q = p + __builtin_popcount(low);
    __m128i from = halves(p, q), rank = halves(&kRanks.bytes[0][low], &kRanks.bytes[1][high]);
    p = q + __builtin_popcount(high);
    return _mm_shuffle_epi8(_mm_xor_si128(from, flip), rank);
}

// A shuffle leaves zero where nothing is kept: codes are flipped by the zero code before and after it.
GOSSAMER_INLINE Bytes expand8(const uint8_t* p, uint64_t mask, uint8_t zero) {
    const __m256i flip = _mm256_set1_epi8(char(zero));
    __m128i part[4];
    GOSSAMER_UNROLL(4)
    for (int i = 0; i < 4; i++)
        part[i] = spread16(p, uint32_t(mask >> 16 * i & 255), uint32_t(mask >> (16 * i + 8) & 255),
                           _mm256_castsi256_si128(flip));
    return {_mm256_xor_si256(_mm256_set_m128i(part[1], part[0]), flip),
            _mm256_xor_si256(_mm256_set_m128i(part[3], part[2]), flip)};
}

GOSSAMER_INLINE __m128i spread_pairs(const uint8_t* p, uint32_t mask) {
    return _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)p),
                            _mm_loadu_si128((const __m128i*)kRanks.pairs[mask]));
}

GOSSAMER_INLINE Bytes expand16(const uint8_t* p, uint32_t mask) {
    __m128i part[4];
    GOSSAMER_UNROLL(4)
    for (int i = 0; i < 4; i++) {
        uint32_t kept = mask >> 8 * i & 255;
        part[i] = spread_pairs(p, kept);
        p += 2 * __builtin_popcount(kept);
    }
    return {_mm256_set_m128i(part[1], part[0]), _mm256_set_m128i(part[3], part[2])};
}

// Eight lanes: each takes the element of its rank; a negative rank takes nothing.
GOSSAMER_INLINE __m256i spread_lanes(const uint8_t* p, uint32_t mask) {
    __m256i rank = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)&kRanks.bytes[0][mask]));
    __m256i taken = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)p), rank);
    return _mm256_andnot_si256(_mm256_srai_epi32(rank, 31), taken);
}

GOSSAMER_INLINE Bytes expand32(const uint8_t* p, uint32_t mask) {
    uint32_t low = mask & 255;
    return {spread_lanes(p, low), spread_lanes(p + 4 * __builtin_popcount(low), mask >> 8 & 255)};
}

GOSSAMER_INLINE void interleave_half(__m256i a, __m256i b, __m256i c, __m256i d, __m256i (&to)[4]) {
    __m256i low_ab = _mm256_unpacklo_epi8(a, b), high_ab = _mm256_unpackhi_epi8(a, b);
    __m256i low_cd = _mm256_unpacklo_epi8(c, d), high_cd = _mm256_unpackhi_epi8(c, d);
    to[0] = _mm256_unpacklo_epi16(low_ab, low_cd);
    to[1] = _mm256_unpackhi_epi16(low_ab, low_cd);
    to[2] = _mm256_unpacklo_epi16(high_ab, high_cd);
    to[3] = _mm256_unpackhi_epi16(high_ab, high_cd);
}

GOSSAMER_INLINE void interleave(Bytes a, Bytes b, Bytes c, Bytes d, Bytes (&to)[4]) {
    __m256i first[4], second[4];
    interleave_half(a.a, b.a, c.a, d.a, first);
    interleave_half(a.b, b.b, c.b, d.b, second);
    GOSSAMER_UNROLL(4)
    for (int r = 0; r < 4; r++) to[r] = {first[r], second[r]};
}

// ---- dot products

// AVX-VNNI sums four products at once. Without it two fit 16 bits while codes have 7; the eighth bit is
// multiplied apart.
template <bool kWide>
GOSSAMER_INLINE __m256i dot8_half(__m256i sum, __m256i w, __m256i x) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, w, x);
#else
    const __m256i ones = _mm256_set1_epi16(1);
    if (!kWide) return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones));
    __m256i low = _mm256_and_si256(w, _mm256_set1_epi8(127));
    __m256i high = _mm256_and_si256(_mm256_srli_epi16(w, 7), _mm256_set1_epi8(1));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(low, x), ones));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(high, x), _mm256_set1_epi16(128)));
#endif
}

template <bool kWide>
GOSSAMER_INLINE Ints dot8(Ints sum, Bytes w, const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    __m256i all = _mm256_set1_epi32(four);
    return {dot8_half<kWide>(sum.a, w.a, all), dot8_half<kWide>(sum.b, w.b, all)};
}

// bfloat16 is the upper half of a float32: even ones move up, odd ones stay.
GOSSAMER_INLINE __m256 even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
GOSSAMER_INLINE __m256 odd(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))));
}

GOSSAMER_INLINE Floats dot16(Floats sum, Bytes w, const uint16_t* x) {
    __m256i four = _mm256_set1_epi64x(int64_t(eight((const uint8_t*)x)));
    __m256 x_even = even(four), x_odd = odd(four);
    return {_mm256_fmadd_ps(odd(w.a), x_odd, _mm256_fmadd_ps(even(w.a), x_even, sum.a)),
            _mm256_fmadd_ps(odd(w.b), x_odd, _mm256_fmadd_ps(even(w.b), x_even, sum.b))};
}

GOSSAMER_INLINE Floats dot32(Floats sum, Bytes w, const float* x) {
    __m256 four = _mm256_broadcast_ps((const __m128*)x);
    return {_mm256_fmadd_ps(_mm256_castsi256_ps(w.a), four, sum.a),
            _mm256_fmadd_ps(_mm256_castsi256_ps(w.b), four, sum.b)};
}

// ---- integers and floats

GOSSAMER_INLINE Bytes pair(const uint16_t* x) {
    int32_t two;
    __builtin_memcpy(&two, x, 4);
    return {_mm256_set1_epi32(two), _mm256_set1_epi32(two)};
}
GOSSAMER_INLINE Floats dot_pairs(Floats sum, Bytes w, Bytes x) {
    return {_mm256_fmadd_ps(odd(w.a), odd(x.a), _mm256_fmadd_ps(even(w.a), even(x.a), sum.a)),
            _mm256_fmadd_ps(odd(w.b), odd(x.b), _mm256_fmadd_ps(even(w.b), even(x.b), sum.b))};
}

GOSSAMER_INLINE Ints ints(int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
GOSSAMER_INLINE Ints add(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
GOSSAMER_INLINE Floats floats(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
GOSSAMER_INLINE Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
GOSSAMER_INLINE Floats mul_add(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
GOSSAMER_INLINE Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

GOSSAMER_INLINE Floats smaller(Floats x, Floats y) {
    return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)};
}
GOSSAMER_INLINE Floats larger(Floats x, Floats y) {
    return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
GOSSAMER_INLINE Floats quotient(Floats x, Floats y) {
    return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
GOSSAMER_INLINE __m256 two_to_half(__m256 x) {
    const __m256i n = _mm256_sub_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(0x4b400000 - 127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(n, 23));
}
GOSSAMER_INLINE Floats two_to(Floats x) { return {two_to_half(x.a), two_to_half(x.b)}; }
GOSSAMER_INLINE float first_of(Floats x) { return _mm256_cvtss_f32(x.a); }
GOSSAMER_INLINE float largest_of(Floats x) {
    const __m256 eight = _mm256_max_ps(x.a, x.b);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

GOSSAMER_INLINE __m256 pairs_of(__m256 x, __m256 y) {
    __m256d mixed = _mm256_castps_pd(_mm256_hadd_ps(x, y));  // x x y y | x x y y
    return _mm256_castpd_ps(_mm256_permute4x64_pd(mixed, 0xd8));
}

GOSSAMER_INLINE Floats pair_sums(Floats x, Floats y) { return {pairs_of(x.a, x.b), pairs_of(y.a, y.b)}; }

GOSSAMER_INLINE Floats load_halves(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}

GOSSAMER_INLINE Floats as_floats(Bytes v) { return {_mm256_castsi256_ps(v.a), _mm256_castsi256_ps(v.b)}; }
GOSSAMER_INLINE Floats lower_halves(Bytes v) { return {even(v.a), even(v.b)}; }
GOSSAMER_INLINE Floats upper_halves(Bytes v) { return {odd(v.a), odd(v.b)}; }

// All ones in the first n of eight lanes.
GOSSAMER_INLINE __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}

GOSSAMER_INLINE Floats load_floats(const float* p, int n) {
    return {_mm256_maskload_ps(p, first(n)), _mm256_maskload_ps(p + 8, first(n - 8))};
}

GOSSAMER_INLINE Ints load_ints(const int32_t* p, int n) {
    return {_mm256_maskload_epi32(p, first(n)), _mm256_maskload_epi32(p + 8, first(n - 8))};
}

GOSSAMER_INLINE void store_ints(int32_t* p, Ints v) {
    _mm256_storeu_si256((__m256i*)p, v.a);
    _mm256_storeu_si256((__m256i*)p + 1, v.b);
}

GOSSAMER_INLINE void store_floats(float* p, Floats v, int n) {
    _mm256_maskstore_ps(p, first(n), v.a);
    _mm256_maskstore_ps(p + 8, first(n - 8), v.b);
}

GOSSAMER_INLINE Floats load_bfloat16(const uint16_t* p, int n) {
    uint16_t some[16] = {};
    if (n < 16) {
        for (int i = 0; i < n; i++) some[i] = p[i];
        p = some;
    }
    __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + 1));
    return {even(low), even(high)};
}

GOSSAMER_INLINE __m256i rounded_bfloat16(__m256 v) {
    __m256i bits = _mm256_castps_si256(v);
    __m256i to_even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), to_even);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
}

GOSSAMER_INLINE void store_bfloat16(uint16_t* p, Floats v, int n) {
    __m256i mixed = _mm256_packus_epi32(rounded_bfloat16(v.a), rounded_bfloat16(v.b));
    __m256i all = _mm256_permute4x64_epi64(mixed, 0xd8);
    if (n == 16) {
        _mm256_storeu_si256((__m256i*)p, all);
        return;
    }
    uint16_t some[16];
    _mm256_storeu_si256((__m256i*)some, all);
    for (int i = 0; i < n; i++) p[i] = some[i];
}

GOSSAMER_INLINE void store_pairs(uint16_t* p, Floats x, Floats y) {
    store_bfloat16(p, x, 16);
    store_bfloat16(p + 16, y, 16);
}
GOSSAMER_INLINE Ints load_codes(const int8_t* p) {
    return {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)),
            _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}

GOSSAMER_INLINE void store_mixed(uint16_t* p, Floats x, Floats y) {
    const __m256i low = _mm256_or_si256(rounded_bfloat16(x.a), _mm256_slli_epi32(rounded_bfloat16(y.a), 16));
    const __m256i high = _mm256_or_si256(rounded_bfloat16(x.b), _mm256_slli_epi32(rounded_bfloat16(y.b), 16));
    _mm256_storeu_si256((__m256i*)p, low);
    _mm256_storeu_si256((__m256i*)p + 1, high);
}
GOSSAMER_INLINE Ints load_bytes(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
GOSSAMER_INLINE Ints field(Ints x, int shift, int count) {
    const __m128i by = _mm_cvtsi32_si128(shift);
    const __m256i mask = _mm256_set1_epi32((1 << count) - 1);
    return {_mm256_and_si256(_mm256_srl_epi32(x.a, by), mask),
            _mm256_and_si256(_mm256_srl_epi32(x.b, by), mask)};
}

GOSSAMER_INLINE float largest(const Floats (&x)[4]) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i top = _mm256_setzero_si256();
    for (int j = 0; j < 4; j++) {
        top = _mm256_max_epu32(top, _mm256_and_si256(_mm256_castps_si256(x[j].a), magnitude));
        top = _mm256_max_epu32(top, _mm256_and_si256(_mm256_castps_si256(x[j].b), magnitude));
    }
    __m128i four = _mm_max_epu32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(four));
}

GOSSAMER_INLINE __m256i rounded_codes(__m256 v) {
    __m256 number = _mm256_and_ps(v, _mm256_cmp_ps(v, v, _CMP_ORD_Q));
    return _mm256_cvtps_epi32(_mm256_round_ps(number, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

GOSSAMER_INLINE Ints store_codes(int8_t* p, Floats v) {
    Ints codes{rounded_codes(v.a), rounded_codes(v.b)};
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(codes.a, codes.b), 0xd8);
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i*)p, bytes);
    return codes;
}

GOSSAMER_INLINE int32_t total(Ints v) {
    __m256i eight_sums = _mm256_add_epi32(v.a, v.b);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight_sums), _mm256_extracti128_si256(eight_sums, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return _mm_cvtsi128_si32(four);
}

// Where each kept one of eight words comes from.
struct Places {
    uint64_t of[256];
    constexpr Places() : of() {
        for (int mask = 0; mask < 256; mask++)
            for (int i = 0, rank = 0; i < 8; i++)
                if (mask >> i & 1) of[mask] |= uint64_t(i) << 8 * rank++;
    }
};
constexpr Places kPlaces{};

GOSSAMER_INLINE __m256i gather_words(const int8_t* codes, uint32_t kept) {
    const __m256i order = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i place = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&kPlaces.of[kept]));
    const __m256i words = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)codes), place);
    return _mm256_and_si256(words, _mm256_cmpgt_epi32(_mm256_set1_epi32(__builtin_popcount(kept)), order));
}

GOSSAMER_INLINE void gather_steps(const int8_t* codes, uint32_t kept, int8_t* to) {
    const uint32_t low = kept & 255;
    _mm256_storeu_si256((__m256i*)to, gather_words(codes, low));
    _mm256_storeu_si256((__m256i*)to + 1, _mm256_setzero_si256());
    int8_t* at = to + 4 * __builtin_popcount(low);
    _mm256_storeu_si256((__m256i*)at, gather_words(codes + 32, kept >> 8 & 255));
}

GOSSAMER_INLINE int32_t sum_codes(const int8_t* codes) {
    const __m256i ones = _mm256_set1_epi8(1), two = _mm256_set1_epi16(1);
    const __m256i low = _mm256_maddubs_epi16(ones, _mm256_loadu_si256((const __m256i*)codes));
    const __m256i high = _mm256_maddubs_epi16(ones, _mm256_loadu_si256((const __m256i*)codes + 1));
    return total({_mm256_madd_epi16(low, two), _mm256_madd_epi16(high, two)});
}

}  // namespace
}  // namespace gossamer
