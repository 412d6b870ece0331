// Estimates of attention policies, for the instruction set this unit is compiled for.
#include "estimate.h"

#include "elementary.h"
#include "expand.h"
#include "simd.h"

namespace gossamer {
namespace {

void dots(const float* x, const float* rows, int64_t count, int64_t dim, float* scores) {
    for (int64_t row = 0; row < count; row++) {
        Floats sum = floats(0);
        for (int64_t i = 0; i < dim; i += 16) {
            const int some = dim - i < 16 ? int(dim - i) : 16;
            sum = mul_add(load_floats(x + i, some), load_floats(rows + row * dim + i, some), sum);
        }
        scores[row] = sum_of(sum);
    }
}

GOSSAMER_INLINE Floats load_words(const float* p) { return load_floats(p, 16); }
GOSSAMER_INLINE Bytes load_words(const uint16_t* p) { return load(p); }
GOSSAMER_INLINE Floats dot(const Floats& sum, const Floats& k, const float* x) {
    return mul_add(k, floats(*x), sum);
}
GOSSAMER_INLINE Floats dot(const Floats& sum, const Bytes& k, const uint16_t* x) {
    return dot_pairs(sum, k, pair(x));
}

// Scores of kWeighed queries (the last one stands for those that are missing) and 16 keys.
template <class T>
GOSSAMER_INLINE void score(const Weighing& w, const T* keys, const float* scales, int64_t at) {
    constexpr int kWord = sizeof(T) == 4 ? 1 : 2;
    const int wide = wide_of(w.dim);
    const T* x[kWeighed];
    Floats sum[kWeighed];
    GOSSAMER_UNROLL(8)
    for (int n = 0; n < kWeighed; n++) {
        x[n] = (const T*)w.queries + int64_t(n < w.count ? n : w.count - 1) * wide;
        sum[n] = floats(0);
    }
    for (int i = 0; i < wide; i += kWord) {
        const auto k = load_words(keys + 16 * i);
        GOSSAMER_UNROLL(8)
        for (int n = 0; n < kWeighed; n++) sum[n] = dot(sum[n], k, x[n] + i);
    }
    const Floats scale = scales ? load_floats(scales, 16) : floats(1);
    GOSSAMER_UNROLL(8)
    for (int n = 0; n < kWeighed; n++) store_floats(w.scores + n * w.room + at, mul(sum[n], scale), 16);
}

// Of a packed cache.
void score_packed(const Weighing& w) {
    const int wide = wide_of(w.dim);
    const int64_t bytes = packed_block(w.how, kBlock, wide, true).bytes;
    alignas(64) uint16_t opened[kBlock * kMostHead];
    for (int64_t block = 0; block * kBlock < w.first + w.count; block++) {
        const uint16_t* keys = (const uint16_t*)(w.whole.keys + block % w.whole.slots * whole_bytes(w.dim));
        if (block < w.compressed) {
            open_packed(w.how, true, int(w.dim), block,
                        w.keys[block * kBlock / kChunk] + block % (kChunk / kBlock) * bytes, opened);
            keys = opened;
        }
        for (int64_t i = 0; i < kBlock && block * kBlock + i < w.first + w.count; i += 16)
            score<uint16_t>(w, keys + i * wide, nullptr, block * kBlock + i);
    }
}

template <class T>
void score_all(const Weighing& w) {
    const int wide = wide_of(w.dim);
    for (int64_t at = 0; at < w.first + w.count; at += 16) {
        const uint8_t* part = w.keys[at / kChunk];
        const int64_t number = at % kChunk * wide;
        if (w.type == kCacheI8) {
            alignas(64) uint16_t opened[16 * kMostHead];
            const int8_t* codes = (const int8_t*)part + number;
            for (int i = 0; i < 16 * wide; i += 32)
                store_pairs(opened + i, to_floats(load_codes(codes + i)),
                            to_floats(load_codes(codes + i + 16)));
            score<T>(w, (const T*)opened, (const float*)(part + int64_t(kChunk) * wide) + at % kChunk, at);
        } else {
            score<T>(w, (const T*)part + number, nullptr, at);
        }
    }
}

// Sum of numbers [from, to).
GOSSAMER_INLINE float sum_some(const float* x, int64_t from, int64_t to) {
    Floats sum = floats(0);
    for (int64_t i = from; i < to; i += 16)
        sum = plus(sum, load_floats(x + i, to - i < 16 ? int(to - i) : 16));
    return sum_of(sum);
}

// Scores of the query at `position` become weights.
void soften(float* s, int64_t position) {
    const int64_t end = position + 1, whole = (end + 15) / 16 * 16;
    for (int64_t i = end; i < whole; i++) s[i] = -__builtin_inff();
    Floats most = floats(kLowest), sum = floats(0);
    for (int64_t i = 0; i < whole; i += 16) most = larger(most, load_floats(s + i, 16));
    const Floats below = floats(-largest_of(most));
    for (int64_t i = 0; i < whole; i += 16) {
        const Floats e = exps(plus(load_floats(s + i, 16), below));
        sum = plus(sum, e);
        store_floats(s + i, e, 16);
    }
    const Floats inverse = floats(1.0f / sum_of(sum));
    for (int64_t i = 0; i < whole; i += 16) store_floats(s + i, mul(load_floats(s + i, 16), inverse), 16);
}

void weigh(const Weighing* w) {
    if (w->type == kCachePacked)
        score_packed(*w);
    else if (w->type == kCacheF32)
        score_all<float>(*w);
    else
        score_all<uint16_t>(*w);
    for (int n = 0; n < w->count; n++) {
        float* s = w->scores + n * w->room;
        const int64_t end = w->first + n + 1;
        soften(s, end - 1);
        for (int64_t b = 0; b * kBlock < end; b++) {
            const int64_t from = b * kBlock, far = end - from;  // the same number of keys, from either side
            w->of_blocks[b] += sum_some(s, from, from + kBlock < end ? from + kBlock : end);
            w->of_distances[b] += sum_some(s, far > kBlock ? far - kBlock : 0, far);
        }
    }
}

// Blocks for N neighbouring queries.
template <int N>
void rate_some(const Rating& r, int from) {
    const uint16_t* keys = r.keys;
    for (int64_t b = 0; b < r.blocks; b++) {
        Floats most[N];
        GOSSAMER_UNROLL(4)
        for (int n = 0; n < N; n++) most[n] = floats(kLowest);
        for (int j = 0; j < kBlock / 16; j++, keys += 16 * r.labels) {
            Floats sum[N];
            GOSSAMER_UNROLL(4)
            for (int n = 0; n < N; n++) sum[n] = floats(0);
            for (int i = 0; i < r.labels; i += 2) {
                const Bytes k = load(keys + 16 * i);
                GOSSAMER_UNROLL(4)
                for (int n = 0; n < N; n++)
                    sum[n] = dot_pairs(sum[n], k, pair(r.queries + (from + n) * r.labels + i));
            }
            GOSSAMER_UNROLL(4)
            for (int n = 0; n < N; n++) most[n] = larger(most[n], sum[n]);
        }
        GOSSAMER_UNROLL(4)
        for (int n = 0; n < N; n++) r.best[(from + n) * r.room + b] = largest_of(most[n]);
    }
}

void rate(const Rating* r) {
    int from = 0;
    for (; from + 4 <= r->count; from += 4) rate_some<4>(*r, from);
    switch (r->count - from) {
        case 1:
            return rate_some<1>(*r, from);
        case 2:
            return rate_some<2>(*r, from);
        case 3:
            return rate_some<3>(*r, from);
        default:
            return;
    }
}

}  // namespace
}  // namespace gossamer

extern "C" {
extern const gossamer::EstimateOps GOSSAMER_EXPORT(estimate);
const gossamer::EstimateOps GOSSAMER_EXPORT(estimate) = {gossamer::dots, gossamer::weigh, gossamer::rate};
}
