// What a decoder does beside products with weights and attention: norms, rotations and gates, as one table of
// functions for each instruction set. All numbers are float32.
//
// This header is included by units of every instruction set: nothing in it may have external linkage.
#pragma once
#include <stdint.h>

namespace gossamer {

struct DecoderOps {
    // y = x / rms(x) * w
    void (*rms_norm)(const float* x, const float* w, int64_t n, float eps, float* y);
    // Halves of a head rotate against each other.
    void (*rotate)(float* x, const float* cos, const float* sin, int64_t half);
    // gate = silu(gate) * up
    void (*gate)(float* gate, const float* up, int64_t n);
    // x = silu(x)
    void (*silu)(float* x, int64_t n);
    // y = x, or 0 where |x| * importance (null: 1) is at most the threshold; returns how many. NaN stays.
    int64_t (*drop)(const float* x, const float* importance, float threshold, int64_t n, float* y);
};

}  // namespace gossamer
