// One product with a program of packed weights: chunks of rows, made ready and multiplied panel by panel on
// all threads.
#pragma once
#include "dispatch.h"
#include "program.h"

namespace gossamer {

// y (rows, out) = x (rows, in) Wᵀ; x and y are row-major arrays of `dtype`. The program must have passed its
// check. Throws std::bad_alloc.
void matmul(const Program& program, const Tier& tier, const void* x, int64_t rows, int dtype, void* y,
            int threads);

}  // namespace gossamer
