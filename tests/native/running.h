// Running a product natively, with inputs and results in buffers of exact size.
#pragma once
#include <string>
#include <vector>

#include "driver.h"
#include "weight.h"

namespace testing {

// (rows, in) or (rows, out), float32.
using Rows = std::vector<float>;

// x Wᵀ of rows [first, first + rows) of `x` on one instruction set. With kBF16, x is rounded to bfloat16
// first, and the result is given in float32.
Rows run(const gossamer::Packed& w, const gossamer::Tier& tier, const Rows& x, int64_t first, int64_t rows,
         int dtype, int threads, Random& random);
Rows run(const gossamer::Program& program, const gossamer::Tier& tier, const Rows& x, int64_t first,
         int64_t rows, int dtype, int threads, Random& random);

// Rows [0, rows) as float32, by calls of at most kFewRows.
Rows by_few(const gossamer::Program& program, const gossamer::Tier& tier, const Rows& x, int64_t rows,
            Random& random);
Rows by_few(const gossamer::Packed& w, const gossamer::Tier& tier, const Rows& x, int64_t rows,
            Random& random);

// Random rows, among them such of zeros alone or partly, -0.0, subnormal, huge, infinite and NaN inputs.
Rows random_rows(Random& random, int64_t rows, int64_t in);

// Equal bits, or both NaN: which NaN is not part of the contract.
bool same(float a, float b);

// Fails unless rows [first, first + rows) of `a` are those of `b` from `other` on.
void check_same(const Rows& a, int64_t first, const Rows& b, int64_t other, int64_t rows, int64_t out,
                const char* what);

// Whether the bfloat16 kernel of a tier and layout takes subnormal numbers for zero.
bool flushes(const gossamer::Tier& tier, const Plain& w);

// One of gossamer::tiers(), or null.
const gossamer::Tier* tier_called(const char* name);

// Whether a tier multiplies many rows by tiles, emulated or not.
bool has_tiles(const gossamer::Tier& tier);

// Whether bits of a row may depend on whether there are more than kFewRows rows: bfloat16 by tiles.
bool two_ways(const gossamer::Tier& tier, const Plain& w);

#if defined(GOSSAMER_X86)
// The tier amx on emulated tiles; not one of gossamer::tiers().
const gossamer::Tier& emulated_tiles();
#endif

}  // namespace testing
