// Functions of sixteen numbers at a time that simd.h's operations are put together to.
#pragma once
#include "simd.h"

namespace gossamer {
namespace {

GOSSAMER_INLINE Floats plus(const Floats& a, const Floats& b) { return mul_add(a, floats(1), b); }

GOSSAMER_INLINE float sum_of(const Floats& a) {
    float v[16];
    store_floats(v, a, 16);
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; i++) v[i] += v[i + width];
    return v[0];
}

// exp(x) to about two units in the last place: powers of two and a polynomial. 0 below -87.7, and from 88 on
// what 88 gives.
GOSSAMER_INLINE Floats exps(const Floats& x) {
    const Floats v = smaller(floats(88.0f), larger(floats(-88.0f), x));
    const Floats magic = floats(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
    const Floats whole = mul_add(v, floats(1.44269504f), magic);
    const Floats n = plus(whole, floats(-12582912.0f));
    const Floats r = mul_add(n, floats(-1.42860677e-6f), mul_add(n, floats(-0.693145752f), v));
    Floats p = floats(1.9875691500e-4f);
    p = mul_add(p, r, floats(1.3981999507e-3f));
    p = mul_add(p, r, floats(8.3334519073e-3f));
    p = mul_add(p, r, floats(4.1665795894e-2f));
    p = mul_add(p, r, floats(1.6666665459e-1f));
    p = mul_add(p, r, floats(5.0000001201e-1f));
    p = plus(mul_add(p, mul(r, r), r), floats(1));
    return mul(p, two_to(whole));
}

}  // namespace
}  // namespace gossamer
