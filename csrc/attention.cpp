// Attention, for the instruction set this unit is compiled for. Products of bfloat16 and int8 caches meet
// bfloat16 queries and weights, with sums in float32; int8 blocks are opened into bfloat16 first.
#include "attention_walk.h"
#include "packed.h"

namespace gossamer {
namespace {

constexpr bool kRoomy = kRegisters == 32;
constexpr int kTogether = kRoomy ? 6 : 4;  // queries whose sums lie in registers at once
constexpr int kSide = kRoomy ? 4 : 1;      // registers of positions, or of numbers, that each of them meets

// ---- words of one or two numbers

template <class T>
constexpr int kWord = sizeof(T) == 4 ? 1 : 2;

GOSSAMER_INLINE Floats spread(const float* x) { return floats(*x); }
GOSSAMER_INLINE Bytes spread(const uint16_t* x) { return pair(x); }

GOSSAMER_INLINE Floats load_words(const float* p) { return load_floats(p, 16); }
GOSSAMER_INLINE Bytes load_words(const uint16_t* p) { return load(p); }

GOSSAMER_INLINE Floats dot(const Floats& sum, const Floats& w, const Floats& x) { return mul_add(w, x, sum); }
GOSSAMER_INLINE Floats dot(const Floats& sum, const Bytes& w, const Bytes& x) { return dot_pairs(sum, w, x); }

// ---- a block and some queries

template <class T, int N>
__attribute__((noinline)) void score(const T* queries, int wide, const T* keys, float* scores,
                                     const uint8_t* ahead) {
    const int words = wide / kWord<T>;
    for (int j = 0; j < kBlock / 16; j += kSide) {
        Floats sum[N][kSide];
        GOSSAMER_UNROLL(6)
        for (int n = 0; n < N; n++) {
            GOSSAMER_UNROLL(4)
            for (int m = 0; m < kSide; m++) sum[n][m] = floats(0);
        }
        const T* from = keys + int64_t(j) * 16 * wide;
        for (int w = 0; w < words; w++) {
            decltype(load_words(from)) k[kSide];
            GOSSAMER_UNROLL(4)
            for (int m = 0; m < kSide; m++) {
                k[m] = load_words(from + (int64_t(m) * words + w) * 16 * kWord<T>);
                __builtin_prefetch(ahead + 64 * (int64_t(j) * words + w * kSide + m));
            }
            GOSSAMER_UNROLL(6)
            for (int n = 0; n < N; n++) {
                const auto x = spread(queries + n * wide + w * kWord<T>);
                GOSSAMER_UNROLL(4)
                for (int m = 0; m < kSide; m++) sum[n][m] = dot(sum[n][m], k[m], x);
            }
        }
        GOSSAMER_UNROLL(6)
        for (int n = 0; n < N; n++) {
            GOSSAMER_UNROLL(4)
            for (int m = 0; m < kSide; m++) store_floats(scores + n * kBlock + 16 * (j + m), sum[n][m], 16);
        }
    }
}

// sums = sums * fade + weights * values, for numbers [from, from + 16 J) of the head.
template <class T, int N, int J>
GOSSAMER_INLINE void gather_some(const T* weights, const T* values, int words, int wide, int from,
                                 const float* fade, float* sums, int size, const uint8_t* ahead) {
    Floats sum[N][J];
    GOSSAMER_UNROLL(6)
    for (int n = 0; n < N; n++) {
        GOSSAMER_UNROLL(4)
        for (int j = 0; j < J; j++)
            sum[n][j] = mul(load_floats(sums + n * size + from + 16 * j, 16), floats(fade[n]));
    }
    for (int w = 0; w < words; w++) {
        decltype(load_words(values)) v[J];
        GOSSAMER_UNROLL(4)
        for (int j = 0; j < J; j++)
            v[j] = load_words(values + (int64_t(w) * wide + from + 16 * j) * kWord<T>);
        GOSSAMER_UNROLL(4)
        for (int j = 0; j < J; j++) __builtin_prefetch(ahead + 64 * (int64_t(w) * wide / 16 + from / 16 + j));
        GOSSAMER_UNROLL(6)
        for (int n = 0; n < N; n++) {
            const auto x = spread(weights + n * kBlock + w * kWord<T>);
            GOSSAMER_UNROLL(4)
            for (int j = 0; j < J; j++) sum[n][j] = dot(sum[n][j], v[j], x);
        }
    }
    GOSSAMER_UNROLL(6)
    for (int n = 0; n < N; n++) {
        GOSSAMER_UNROLL(4)
        for (int j = 0; j < J; j++) store_floats(sums + n * size + from + 16 * j, sum[n][j], 16);
    }
}

template <class T, int N>
__attribute__((noinline)) void gather(const T* weights, const T* values, int words, int wide,
                                      const float* fade, float* sums, const uint8_t* ahead) {
    const int size = state_size(wide);
    int from = 0;
    for (; from + 16 * kSide <= wide; from += 16 * kSide)
        gather_some<T, N, kSide>(weights, values, words, wide, from, fade, sums, size, ahead);
    for (; from < wide; from += 16)
        gather_some<T, N, 1>(weights, values, words, wide, from, fade, sums, size, ahead);
}

template <class T, int N>
void meet(const Attention& a, const Block<T>& block, int from, const Part& part) {
    alignas(64) float scores[N * kBlock];
    alignas(64) T weights[N * kBlock];
    float fade[N];
    const int wide = wide_of(a.dim), size = state_size(a.dim);
    float* states = part.states + from * size;
    score<T, N>((const T*)a.queries + from * wide, wide, block.keys, scores, block.values_ahead);
    for (int n = 0; n < N; n++)
        fade[n] = soften<T>(block, a.first[from + n], a.last[from + n], scores + n * kBlock,
                            states + n * size + wide, part.sums + 16 * (from + n), weights + n * kBlock);
    gather<T, N>(weights, block.values, (block.count + kWord<T> - 1) / kWord<T>, wide, fade, states,
                 block.keys_ahead);
}

template <class T>
void meet_all(const Attention& a, const Block<T>& block, const Part& part) {
    int from = 0;
    for (; from + kTogether <= a.count; from += kTogether) meet<T, kTogether>(a, block, from, part);
    switch (a.count - from) {
        case 1:
            return meet<T, 1>(a, block, from, part);
        case 2:
            return meet<T, 2>(a, block, from, part);
        case 3:
            return meet<T, 3>(a, block, from, part);
        case 4:
            if constexpr (kTogether > 4) return meet<T, 4>(a, block, from, part);
            return;
        case 5:
            if constexpr (kTogether > 4) return meet<T, 5>(a, block, from, part);
            return;
        default:
            return;
    }
}

template <class T>
void attend_blocks(const Attention& a) {
    walk<T>(a, [&](const Block<T>& block, const Part& part) { meet_all(a, block, part); });
}

void attend(const Attention* a) {
    if (a->type == kCacheF32)
        attend_blocks<float>(*a);
    else
        attend_blocks<uint16_t>(*a);
}

void open(const Compression* how, bool keys, int64_t dim, int64_t number, const uint8_t* from, uint8_t* to) {
    open_packed(*how, keys, int(dim), number, from, (uint16_t*)to);
}

void finish(const float* state, int64_t dim, float* to) {
    const Floats inverse = floats(1.0f / state[wide_of(dim) + 1]);
    for (int64_t i = 0; i < dim; i += 16)
        store_floats(to + i, mul(load_floats(state + i, 16), inverse), dim - i < 16 ? int(dim - i) : 16);
}

// ---- into the cache

// Numbers i of `x`, up to `wide`: those of the head, then zeros.
GOSSAMER_INLINE Floats some_of(const float* x, int64_t dim, int64_t i) {
    const int64_t left = dim - i;
    return load_floats(x + (left > 0 ? i : 0), left < 0 ? 0 : left < 16 ? int(left) : 16);
}

void place_query(const float* query, int64_t dim, float scaling, int type, void* to) {
    for (int64_t i = 0; i < wide_of(dim); i += 16) {
        const Floats x = mul(some_of(query, dim, i), floats(scaling));
        if (type == kCacheF32)
            store_floats((float*)to + i, x, 16);
        else
            store_bfloat16((uint16_t*)to + i, x, 16);
    }
}

// A row of T among its neighbours: keys by words of neighbouring numbers, values by words of neighbouring
// positions.
template <class T, int P>
GOSSAMER_INLINE void place(const T* key, const T* value, int wide, int64_t in_chunk, bool final, T* keys,
                           T* values) {
    T* k = keys + in_chunk / 16 * 16 * wide + in_chunk % 16 * P;
    for (int i = 0; i < wide; i += P)
        for (int p = 0; p < P; p++) k[16 * i + p] = key[i + p];
    const int64_t at = in_chunk % P;
    T* v = values + in_chunk / P * P * wide + at;
    for (int i = 0; i < wide; i++) v[P * i] = value[i];
    if (P == 2 && at == 0 && final)
        for (int i = 0; i < wide; i++) v[P * i + 1] = 0;
}

// int8 codes of a head's numbers; returns their scale (of NaN: NaN).
float encode(const float* x, int64_t dim, int8_t* codes) {
    float top = 0;
    for (int64_t i = 0; i < dim; i += 64) {
        const Floats v[4] = {some_of(x, dim, i), some_of(x, dim, i + 16), some_of(x, dim, i + 32),
                             some_of(x, dim, i + 48)};
        const float some = largest(v);
        if (!(some <= top)) top = some;
    }
    float inverse = 127.0f / top;
    if (!(inverse <= __FLT_MAX__)) inverse = 0;  // all zero, too small to invert, or NaN
    for (int64_t i = 0; i < wide_of(dim); i += 16)
        store_codes(codes + i, mul(some_of(x, dim, i), floats(inverse)));
    return top * float(1.0 / 127.0);
}

void place_position(const float* key, const float* value, int64_t dim, int type, int64_t in_chunk, bool final,
                    uint8_t* keys, uint8_t* values) {
    const int wide = wide_of(dim);
    if (type == kCacheF32) {
        alignas(64) float k[kMostHead], v[kMostHead];
        for (int i = 0; i < wide; i += 16) {
            store_floats(k + i, some_of(key, dim, i), 16);
            store_floats(v + i, some_of(value, dim, i), 16);
        }
        place<float, 1>(k, v, wide, in_chunk, final, (float*)keys, (float*)values);
    } else if (type == kCacheBF16) {
        alignas(64) uint16_t k[kMostHead], v[kMostHead];
        for (int i = 0; i < wide; i += 16) {
            store_bfloat16(k + i, some_of(key, dim, i), 16);
            store_bfloat16(v + i, some_of(value, dim, i), 16);
        }
        place<uint16_t, 2>(k, v, wide, in_chunk, final, (uint16_t*)keys, (uint16_t*)values);
    } else {
        alignas(64) int8_t k[kMostHead], v[kMostHead];
        float* key_scales = (float*)(keys + int64_t(kChunk) * wide);
        float* value_scales = (float*)(values + int64_t(kChunk) * wide);
        key_scales[in_chunk] = encode(key, dim, k);
        value_scales[in_chunk] = encode(value, dim, v);
        if (in_chunk % 2 == 0 && final) value_scales[in_chunk + 1] = 0;
        place<int8_t, 2>(k, v, wide, in_chunk, final, (int8_t*)keys, (int8_t*)values);
    }
}

}  // namespace
}  // namespace gossamer

extern "C" {
extern const gossamer::AttentionOps GOSSAMER_EXPORT(attention);
const gossamer::AttentionOps GOSSAMER_EXPORT(attention) = {gossamer::attention_scratch,
                                                           gossamer::place_query,
                                                           gossamer::place_position,
                                                           gossamer::open,
                                                           gossamer::attend,
                                                           gossamer::merge,
                                                           gossamer::finish};
}
