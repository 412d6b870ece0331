// Plain reading of memory: what kernels that are bound by it are held against.
#pragma once
#include <cstdint>

namespace gossamer {

// The sum of `words` words at p, read by `threads` threads, each one part from end to end.
uint64_t sum_words(const uint64_t* p, int64_t words, int threads);

}  // namespace gossamer
