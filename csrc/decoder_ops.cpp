// Norms, rotations and gates of a decoder, for the instruction set this unit is compiled for.
#include "decoder_ops.h"

#include <math.h>

#include "elementary.h"
#include "simd.h"

namespace gossamer {
namespace {

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

GOSSAMER_INLINE Floats silu_of(Floats x) { return quotient(x, plus(exps(mul(x, floats(-1))), floats(1))); }

void gate(float* gate, const float* up, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        const int some = n - i < 16 ? int(n - i) : 16;
        store_floats(gate + i, mul(silu_of(load_floats(gate + i, some)), load_floats(up + i, some)), some);
    }
}

void silu(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        const int some = n - i < 16 ? int(n - i) : 16;
        store_floats(x + i, silu_of(load_floats(x + i, some)), some);
    }
}

// Left to the compiler, who makes vectors of it.
int64_t drop(const float* x, const float* importance, float threshold, int64_t n, float* y) {
    int32_t dropped = 0;
    if (importance) {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; i++) {
            const bool gone = __builtin_fabsf(x[i]) * importance[i] <= threshold;
            y[i] = gone ? 0.0f : x[i];
            dropped += gone;
        }
    } else {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; i++) {
            const bool gone = __builtin_fabsf(x[i]) <= threshold;
            y[i] = gone ? 0.0f : x[i];
            dropped += gone;
        }
    }
    return dropped;
}

}  // namespace
}  // namespace gossamer

extern "C" {
extern const gossamer::DecoderOps GOSSAMER_EXPORT(decoder);
const gossamer::DecoderOps GOSSAMER_EXPORT(decoder) = {gossamer::rms_norm, gossamer::rotate, gossamer::gate,
                                                       gossamer::silu, gossamer::drop};
}
