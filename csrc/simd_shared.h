// Operations for which several instruction sets have nothing better than plain C++. Nothing here may have
// external linkage (simd.h).
#pragma once
#include <stdint.h>

namespace gossamer {
namespace {

// Lists those of 16 numbers that are not zero (NaN is not), which stand for inputs `first`.. on, and returns
// how many; room for 16 is written.
template <class T>
GOSSAMER_INLINE int list_active(const T* x, int32_t first, int32_t* inputs, T* values) {
    int count = 0;
    for (int i = 0; i < 16; i++) {
        inputs[count] = first + i;
        values[count] = x[i];
        count += x[i] != 0;
    }
    return count;
}

}  // namespace
}  // namespace gossamer
