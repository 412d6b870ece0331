// A packed weight that reads some of the activations only: those of a list, put side by side before they are
// made ready, so that groups and scales are of what is read alone. What kernels see is a packed weight.
#pragma once
#include <string>

#include "packed.h"

namespace gossamer {

struct Selected : Packed {
    const int32_t* inputs = nullptr;  // rising, as many as the weight has inputs; null: it reads all
    int64_t width = 0;                // activations of a row, where there is a list

    Selected() : Packed{} {}
    Selected(const Packed& w) : Packed(w) {}
    Selected(const Packed& w, const int32_t* inputs_, int64_t width_)
        : Packed(w), inputs(inputs_), width(width_) {}
};

// Activations of a row that it is given.
inline int64_t row_width(const Selected& w) { return w.inputs ? w.width : w.in; }

// An empty string, or what is wrong with the list. It must have as many entries as the weight has inputs.
inline std::string check_inputs(const Selected& w) {
    if (!w.inputs) return {};
    int64_t before = -1;
    for (int64_t i = 0; i < w.in; before = w.inputs[i++])
        if (w.inputs[i] <= before || w.inputs[i] >= w.width)
            return "input " + std::to_string(w.inputs[i]) + " comes after " + std::to_string(before) +
                   ", of " + std::to_string(w.width);
    return {};
}

// Rows [begin, end) of `x`, an array of numbers of `bytes` (2 or 4), to the same rows of `to`: what is read.
inline void select_rows(const Selected& w, const void* x, int bytes, int64_t begin, int64_t end, void* to) {
    const auto copy = [&](auto* from, auto* into) {
        from += begin * w.width;
        into += begin * w.in;
        for (int64_t row = begin; row < end; row++, from += w.width, into += w.in)
            for (int64_t i = 0; i < w.in; i++) into[i] = from[w.inputs[i]];
    };
    if (bytes == 4)
        copy(static_cast<const float*>(x), static_cast<float*>(to));
    else
        copy(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(to));
}

}  // namespace gossamer
