// One product on one packed weight: chunks of rows, made ready and multiplied panel by panel on all threads.
#pragma once
#include "dispatch.h"

namespace gossamer {

// y (rows, out) = x (rows, in) Wᵀ; x and y are row-major arrays of `dtype`. Throws std::bad_alloc.
void matmul(const Packed& w, const Tier& tier, const void* x, int64_t rows, int dtype, void* y, int threads);

}  // namespace gossamer
