// Rows of activations made ready for one packed weight, and their product with some of its panels: what every
// way of walking weights is put together from.
#pragma once
#include <algorithm>

#include "dispatch.h"
#include "program.h"

namespace gossamer {

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

inline const Family& family(const Tier& tier, const Packed& w) {
    return w.values == kFloat32 || w.values == kBFloat16 ? *tier.floats : *tier.ints;
}

// Bytes of the activations of one block, made ready: those of every layout, and the lists of columns.
struct Sizes {
    int64_t codes, scales, negatives, ends = 0, inputs = 0, values = 0;

    Sizes(const Packed& w, int64_t padded)
        : codes(padded * row_bytes(w)),
          scales(aligned(padded * w.groups * 4)),
          negatives(aligned(padded * w.groups * negatives_of(w) * 4)) {
        if (w.layout != kColumns) return;
        const int64_t listed = padded * active_room(w.groups);
        ends = aligned(padded * w.groups * w.parts * 4);
        inputs = aligned(listed * 4);
        values = aligned(listed * (w.values >= kInt8 ? 1 : 4));
    }
    int64_t all() const { return codes + scales + negatives + ends + inputs + values; }
    static int64_t row_bytes(const Packed& w) { return w.groups * kGroup * element_bytes(w.values); }
};

inline int64_t activation_bytes(const Packed& w, int64_t padded) { return Sizes(w, padded).all(); }

// `block`: of rows, kMaxRowBlock or what a tier asks for.
inline Activations activations_at(uint8_t* memory, const Packed& w, int64_t rows,
                                  int64_t block = kMaxRowBlock) {
    const int64_t padded = padded_rows(rows, block);
    const Sizes sizes(w, padded);
    uint8_t* scales = memory + sizes.codes;
    uint8_t* negatives = scales + sizes.scales;
    uint8_t* ends = negatives + sizes.negatives;
    uint8_t* inputs = ends + sizes.ends;
    const Active active{reinterpret_cast<int32_t*>(ends), reinterpret_cast<int32_t*>(inputs),
                        inputs + sizes.inputs};
    return {rows,   padded, memory, reinterpret_cast<float*>(scales), reinterpret_cast<int32_t*>(negatives),
            active, block};
}

// Makes rows [begin, end) of `x`, float32 or bfloat16 and row_width(w) wide, ready. `room`: of as many rows
// of w.in numbers, where the weight has a list of inputs.
inline void make_ready(const Tier& tier, const Selected& w, const void* x, int dtype, int64_t begin,
                       int64_t end, const Activations& to, void* room) {
    if (w.inputs) {
        select_rows(w, x, dtype == kF32 ? 4 : 2, begin, end, room);
        x = room;
    }
    family(tier, w).prepare(&w, x, dtype, begin, end, &to);
    if (w.layout == kColumns) tier.columns->prepare(&w, nullptr, dtype, begin, end, &to);
}

// Bytes of the room that make_ready needs for `rows` rows.
inline int64_t room_bytes(const Selected& w, int64_t rows) { return w.inputs ? aligned(4 * w.in * rows) : 0; }

// Bytes of a thread's scratch for any of the terms; with up to four rows only some layouts need any.
inline int64_t scratch_bytes(const Terms& terms, int64_t padded, int64_t block) {
    int64_t bytes = 0;
    for (const Term& term : terms)
        if (padded > 4 || term.w.layout == kColumns)
            bytes = std::max(bytes, aligned(scratch_bytes(term.w, padded, block)));
    return bytes;
}

// Panels of 16 outputs that a stage is split by: the most of any of its terms.
inline int64_t unit_of(const Stage& stage) {
    int64_t unit = 1;
    for (const Term& term : stage.terms) unit = std::max(unit, unit_of(term.w.layout));
    return unit;
}

// Multiplies panels [begin, end) of a weight, whole units of its layout.
inline void multiply(const Tier& tier, const Packed& w, const Activations& x, const Output& out,
                     int64_t begin, int64_t end, uint8_t* scratch) {
    const int64_t unit = unit_of(w.layout);
    const Family& kernels = w.layout == kColumns ? *tier.columns : family(tier, w);
    kernels.multiply(&w, &x, &out, begin / unit, end / unit, scratch);
}

}  // namespace gossamer
