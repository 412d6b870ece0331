// How every kernel writes what it has summed.
#pragma once
#include "packed.h"
#include "simd.h"

namespace gossamer {
namespace {

// The first n of 16 outputs of one row, from index `at` of the result on.
GOSSAMER_INLINE void store_outputs(const Output& out, int64_t at, Floats sums, int n) {
    if (out.base) sums = mul_add(sums, floats(1), load_floats(out.base + at, n));  // one rounding
    if (out.dtype == kF32)
        store_floats((float*)out.y + at, sums, n);
    else
        store_bfloat16((uint16_t*)out.y + at, sums, n);
}

}  // namespace
}  // namespace gossamer
