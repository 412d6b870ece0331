// Attention, for the instruction set this unit is compiled for. Products of bfloat16 and int8 caches meet
// bfloat16 queries and weights, with sums in float32; int8 blocks are opened into bfloat16 first.
#include "attention.h"

#include "elementary.h"
#include "packed.h"
#include "simd.h"

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

// Keys and values of a block, and what their codes stand for.
template <class T>
struct Block {
    const T *keys, *values;
    const float *key_scales, *value_scales;    // or null
    const uint8_t *values_ahead, *keys_ahead;  // what memory is asked for meanwhile
    int64_t start;                             // its first position
    int count;                                 // positions that anyone sees
};

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
    }
    store_weights(weights, s[0], s[1]);
    store_weights(weights + 32, s[2], s[3]);
    return first_of(fade);
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

// ---- a walk over blocks

// What some queries gather in one chunk.
struct Part {
    float* states;  // [count][state_size]: sums, the largest score
    float* sums;    // [count][16]: of weights, a lane each
};

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
    return 4 * kQueries * (state_size(dim) + 16) + (type == kCacheI8 ? 4 * kBlock * wide_of(dim) : 0);
}

// Codes, or numbers, of one block in a part.
const uint8_t* at_block(const Attention& a, const uint8_t* const* parts, int64_t number) {
    const int64_t start = number * kBlock, size = a.type == kCacheF32 ? 4 : a.type == kCacheBF16 ? 2 : 1;
    return parts[start / kChunk] + start % kChunk * wide_of(a.dim) * size;
}

const float* scales_of(const Attention& a, const uint8_t* part, int64_t start) {
    return (const float*)(part + int64_t(kChunk) * wide_of(a.dim)) + start % kChunk;
}

// Block `number`, as it lies or opened; `next`: the one that is looked at after it.
template <class T>
Block<T> open_block(const Attention& a, const Scratch& scratch, int64_t number, int64_t next, int count) {
    const uint8_t *keys = at_block(a, a.keys, number), *values = at_block(a, a.values, number);
    const int64_t start = number * kBlock;
    const uint8_t* next_keys = at_block(a, a.keys, next);
    if constexpr (sizeof(T) == 2) {
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

template <class T>
void attend_blocks(const Attention& a) {
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
        meet_all(a, block, scratch.part);
    }
    close();
}

void attend(const Attention* a) {
    if (a->type == kCacheF32)
        attend_blocks<float>(*a);
    else
        attend_blocks<uint16_t>(*a);
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
                                                           gossamer::attend,
                                                           gossamer::merge,
                                                           gossamer::finish};
}
