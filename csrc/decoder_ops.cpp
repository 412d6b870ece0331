// Norms, rotations, gates and attention of a decoder, for the instruction set this unit is compiled for.
#include "decoder_ops.h"

#include <math.h>

#include "packed.h"
#include "simd.h"

namespace gossamer {
namespace {

GOSSAMER_INLINE Floats plus(Floats a, Floats b) { return mul_add(a, floats(1), b); }

GOSSAMER_INLINE float sum_of(Floats a) {
    float v[16];
    store_floats(v, a, 16);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; i++) v[i] += v[i + width];
    return v[0];
}

GOSSAMER_INLINE float largest_of(Floats a) {
    float v[16];
    store_floats(v, a, 16);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; i++) v[i] = v[i] > v[i + width] ? v[i] : v[i + width];
    return v[0];
}

// exp(x) to about two units in the last place, by halves of powers of two and a polynomial; from -87 down it
// is 0, above 88 it stays there.
GOSSAMER_INLINE void exps(const float* x, float* y) {
    for (int i = 0; i < 16; i++) {
        float v = x[i] < 88.0f ? x[i] : 88.0f;
        v = v > -87.0f ? v : -87.0f;
        const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to whole numbers
        const float whole = v * 1.44269504f + magic;
        const float n = whole - magic;
        const float r = (v - n * 0.693145752f) - n * 1.42860677e-6f;
        float p = 1.9875691500e-4f;
        p = p * r + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * r * r + r + 1.0f;
        int32_t bits;
        __builtin_memcpy(&bits, &whole, 4);
        bits = (bits - 0x4b400000 + 127) << 23;
        float power;
        __builtin_memcpy(&power, &bits, 4);
        y[i] = x[i] > -87.0f ? p * power : x[i] == x[i] ? 0.0f : x[i];
    }
}

void rms_norm(const float* x, const float* w, int64_t n, float eps, float* y) {
    Floats sum[2] = {floats(0), floats(0)};
    for (int64_t i = 0; i < n; i += 16) {
        const int some = n - i < 16 ? int(n - i) : 16;
        const Floats v = load_floats(x + i, some);
        sum[i / 16 & 1] = mul_add(v, v, sum[i / 16 & 1]);
    }
    const Floats scale = floats(1.0f / sqrtf(sum_of(plus(sum[0], sum[1])) / float(n) + eps));
    for (int64_t i = 0; i < n; i += 16) {
        const int some = n - i < 16 ? int(n - i) : 16;
        store_floats(y + i, mul(load_floats(w + i, some), mul(load_floats(x + i, some), scale)), some);
    }
}

void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    for (int64_t i = 0; i < half; i += 16) {
        const int some = half - i < 16 ? int(half - i) : 16;
        const Floats a = load_floats(x + i, some), b = load_floats(x + half + i, some);
        const Floats c = load_floats(cos + i, some), s = load_floats(sin + i, some);
        store_floats(x + i, mul_add(mul(b, floats(-1)), s, mul(a, c)), some);
        store_floats(x + half + i, mul_add(a, s, mul(b, c)), some);
    }
}

void gate(float* gate, const float* up, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        const int some = n - i < 16 ? int(n - i) : 16;
        float g[16], e[16];
        store_floats(g, mul(load_floats(gate + i, some), floats(-1)), 16);
        exps(g, e);
        for (int j = 0; j < 16; j++) e[j] = -g[j] / (1.0f + e[j]);
        store_floats(gate + i, mul(load_floats(e, 16), load_floats(up + i, some)), some);
    }
}

// ---- attention

template <class T>
GOSSAMER_INLINE Floats load_cached(const T* p, int n);
template <>
GOSSAMER_INLINE Floats load_cached<float>(const float* p, int n) {
    return load_floats(p, n);
}
template <>
GOSSAMER_INLINE Floats load_cached<uint16_t>(const uint16_t* p, int n) {
    return load_bfloat16(p, n);
}

// Scores of N queries for the 16 positions of each block [0, blocks).
template <class T, int N>
__attribute__((noinline)) void score(const Attention& a, const T* keys, int blocks, float (*scores)[kChunk]) {
    for (int b = 0; b < blocks; b++, keys += 16 * a.dim) {
        Floats sum[N];
        GOSSAMER_UNROLL(4)
        for (int q = 0; q < N; q++) sum[q] = floats(0);
        for (int i = 0; i < a.dim; i++) {
            const Floats k = load_cached(keys + 16 * i, 16);
            GOSSAMER_UNROLL(4)
            for (int q = 0; q < N; q++) sum[q] = mul_add(k, floats(a.queries[q][i]), sum[q]);
        }
        GOSSAMER_UNROLL(4)
        for (int q = 0; q < N; q++) store_floats(scores[q] + 16 * b, sum[q], 16);
    }
}

// outputs = outputs * fade + sum of scores[q][p] * values[p] over positions [0, count).
template <class T, int N>
__attribute__((noinline)) void gather(const Attention& a, const T* values, int count, float (*scores)[kChunk],
                                      const float* fade) {
    constexpr int kWide = 4;  // registers of a head at a time
    for (int from = 0; from < a.dim; from += 16 * kWide) {
        Floats sum[N][kWide];
        int some[kWide];
        for (int j = 0; j < kWide; j++) {
            const int left = a.dim - from - 16 * j;
            some[j] = left < 0 ? 0 : left < 16 ? left : 16;
        }
        GOSSAMER_UNROLL(4)
        for (int q = 0; q < N; q++) {
            GOSSAMER_UNROLL(4)
            for (int j = 0; j < kWide; j++)
                sum[q][j] =
                    mul(load_floats(a.outputs[q] + from + (some[j] ? 16 * j : 0), some[j]), floats(fade[q]));
        }
        const bool whole = some[kWide - 1] == 16;
        for (int p = 0; p < count; p++) {
            const T* value = values + int64_t(p) * a.dim + from;
            GOSSAMER_UNROLL(4)
            for (int j = 0; j < kWide; j++) {
                const Floats v = whole ? load_cached(value + 16 * j, 16)
                                       : load_cached(value + (some[j] ? 16 * j : 0), some[j]);
                GOSSAMER_UNROLL(4)
                for (int q = 0; q < N; q++) sum[q][j] = mul_add(v, floats(scores[q][p]), sum[q][j]);
            }
        }
        GOSSAMER_UNROLL(4)
        for (int q = 0; q < N; q++) {
            GOSSAMER_UNROLL(4)
            for (int j = 0; j < kWide; j++)
                if (some[j]) store_floats(a.outputs[q] + from + 16 * j, sum[q][j], some[j]);
        }
    }
}

template <class T, int N>
void attend_some(const Attention& a) {
    constexpr float kNever = -3e38f;
    alignas(64) float scores[N][kChunk];
    float most[N], total[N], fade[N];
    int64_t first = a.first[0], last = a.last[0];
    for (int q = 0; q < N; q++) {
        most[q] = kNever;
        total[q] = 0;
        for (int i = 0; i < a.dim; i++) a.outputs[q][i] = 0;
        first = a.first[q] < first ? a.first[q] : first;
        last = a.last[q] > last ? a.last[q] : last;
    }
    for (int64_t chunk = first / kChunk; chunk <= last / kChunk; chunk++) {
        const int64_t start = chunk * kChunk;
        const int count = last - start + 1 < kChunk ? int(last - start + 1) : kChunk;
        const int blocks = (count + 15) / 16;
        score<T, N>(a, (const T*)a.keys[chunk], blocks, scores);
        for (int q = 0; q < N; q++) {
            const int64_t low = a.first[q] - start, high = a.last[q] - start;  // those that are seen
            if (low > 0)
                for (int p = 0; p < 16 * blocks && p < low; p++) scores[q][p] = kNever;
            for (int p = int(high + 1 > 0 ? high + 1 : 0); p < 16 * blocks; p++) scores[q][p] = kNever;
            float top = most[q];
            for (int b = 0; b < blocks; b++) {
                const float one = largest_of(load_floats(scores[q] + 16 * b, 16));
                top = one > top ? one : top;
            }
            float power[16];
            for (int i = 0; i < 16; i++) power[i] = most[q] - top;
            exps(power, power);
            fade[q] = power[0];
            most[q] = top;
            Floats sum = floats(0);
            for (int b = 0; b < blocks; b++) {
                float* s = scores[q] + 16 * b;
                float shifted[16];
                for (int i = 0; i < 16; i++) shifted[i] = s[i] == kNever ? -1e30f : s[i] - top;
                exps(shifted, s);
                sum = plus(load_floats(s, 16), sum);
            }
            total[q] = total[q] * fade[q] + sum_of(sum);
        }
        gather<T, N>(a, (const T*)a.values[chunk], count, scores, fade);
    }
    for (int q = 0; q < N; q++) {
        const float inverse = 1.0f / total[q];
        for (int i = 0; i < a.dim; i++) a.outputs[q][i] *= inverse;
    }
}

template <class T>
void attend_all(const Attention& a) {
    if (a.count == 1)
        attend_some<T, 1>(a);
    else if (a.count == 2)
        attend_some<T, 2>(a);
    else if (a.count == 3)
        attend_some<T, 3>(a);
    else
        attend_some<T, 4>(a);
}

void attend(const Attention* a) {
    if (a->dtype == kF32)
        attend_all<float>(*a);
    else
        attend_all<uint16_t>(*a);
}

void store_position(const float* key, const float* value, int dim, int dtype, int64_t in_chunk, uint8_t* keys,
                    uint8_t* values) {
    const int64_t block = in_chunk / 16, lane = in_chunk % 16;
    if (dtype == kF32) {
        float* k = (float*)keys + block * 16 * dim + lane;
        for (int i = 0; i < dim; i++) k[16 * i] = key[i];
        __builtin_memcpy((float*)values + in_chunk * dim, value, size_t(dim) * 4);
        return;
    }
    uint16_t rounded[kMostHead];
    for (int i = 0; i < dim; i += 16) {
        const int some = dim - i < 16 ? dim - i : 16;
        store_bfloat16(rounded + i, load_floats(key + i, some), some);
        store_bfloat16((uint16_t*)values + in_chunk * dim + i, load_floats(value + i, some), some);
    }
    uint16_t* k = (uint16_t*)keys + block * 16 * dim + lane;
    for (int i = 0; i < dim; i++) k[16 * i] = rounded[i];
}

}  // namespace
}  // namespace gossamer

extern "C" {
extern const gossamer::DecoderOps GOSSAMER_EXPORT(decoder);
const gossamer::DecoderOps GOSSAMER_EXPORT(decoder) = {gossamer::rms_norm, gossamer::rotate, gossamer::gate,
                                                       gossamer::attend, gossamer::store_position};
}
