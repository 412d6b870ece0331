// Sixteen-bit floats, one at a time. For units of no instruction set of their own: those have simd.h.
#pragma once
#include <stdint.h>

#include <cmath>
#include <cstring>

namespace gossamer {

inline float float_of_bfloat16(uint16_t half) {
    const uint32_t bits = uint32_t(half) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// To nearest, ties to even.
inline uint16_t bfloat16_of(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return f != f ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float float_of_half(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float magnitude = exponent == 0    ? std::ldexp(float(fraction), -24)
                            : exponent == 31 ? (fraction ? NAN : INFINITY)
                                             : std::ldexp(float(1024 + fraction), exponent - 25);
    return half >> 15 ? -magnitude : magnitude;
}

}  // namespace gossamer
