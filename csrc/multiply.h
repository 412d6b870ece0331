// How panels and rows are walked, for every kernel: few rows decode as they go, many rows expand a panel
// first.
//
// A kernel is a class with
//     kValues, kRowBlock     its value type, and the most rows at once
//     kSums                  registers of running sums a row
//     add<R>(reader, w, x, panel, row, begin, end, sums)    groups [begin, end) of a panel for R rows
//     result(sums)           16 outputs of one row
// Both ways run the same add<R>, which adds in the same order for every R; sums that wait in memory between
// two calls are kept as they are. So a row's result does not depend on how many rows there are.
#pragma once
#include "readers.h"

namespace gossamer {
namespace {

struct Output {
    void* y;
    int dtype;
};

// Groups [begin, end) of a panel; sums wait in `carry` (kSums registers a row) until the last group is in.
// kWhole: all groups at once, without a carry.
template <class Kernel, int R, bool kWhole, class Reader>
GOSSAMER_INLINE void panel_rows(Reader& reader, const Packed& w, const Activations& x, const Output& out,
                                int64_t panel, int64_t row, int64_t begin, int64_t end, float* carry) {
    constexpr int S = Kernel::kSums;
    Floats sums[R][S];
    GOSSAMER_UNROLL(8)
    for (int r = 0; r < R; r++) {
        GOSSAMER_UNROLL(4)
        for (int i = 0; i < S; i++)
            sums[r][i] = kWhole || begin == 0 ? floats(0) : load_floats(carry + 16 * (S * (row + r) + i), 16);
    }
    Kernel::template add<R>(reader, w, x, panel, row, begin, end, sums);
    if (!kWhole && end < w.groups) {
        GOSSAMER_UNROLL(8)
        for (int r = 0; r < R; r++) {
            GOSSAMER_UNROLL(4)
            for (int i = 0; i < S; i++) store_floats(carry + 16 * (S * (row + r) + i), sums[r][i], 16);
        }
        return;
    }
    int64_t left = w.out - panel * kPanel;
    int n = left < kPanel ? int(left) : kPanel;
    GOSSAMER_UNROLL(8)
    for (int r = 0; r < R; r++) {
        if (row + r >= x.rows) break;  // padding
        int64_t at = (row + r) * w.out + panel * kPanel;
        if (out.dtype == kF32)
            store_floats((float*)out.y + at, Kernel::result(sums[r]), n);
        else
            store_bfloat16((uint16_t*)out.y + at, Kernel::result(sums[r]), n);
    }
}

// ---- few rows

template <class Kernel, int R, class Reader>
__attribute__((noinline)) void decode(const Packed& w, const Activations& x, const Output& out, int64_t begin,
                                      int64_t end) {
    Storage storage;
    Reader reader(w, begin, end, storage);
    for (int64_t panel = begin; panel < end; panel++)
        panel_rows<Kernel, R, true>(reader, w, x, out, panel, 0, 0, w.groups, nullptr);
}

// ---- many rows

// What a sweep works on: some groups of one panel, expanded, and where its rows' sums wait.
struct Span {
    int64_t panel, begin, end;
    const uint8_t* weights;
    float* carry;
};

template <class Kernel, int R, class Swept>
__attribute__((noinline)) void block(const Packed& w, const Activations& x, const Output& out,
                                     const Span& span, int64_t row) {
    Swept reader(span.weights, w, span.panel, span.begin);
    panel_rows<Kernel, R, false>(reader, w, x, out, span.panel, row, span.begin, span.end, span.carry);
}

template <class Kernel, class Swept>
void sweep(const Packed& w, const Activations& x, const Output& out, const Span& span) {
    constexpr int kBlock = Kernel::kRowBlock;
    int64_t row = 0;
    for (; row + kBlock <= x.padded; row += kBlock) block<Kernel, kBlock, Swept>(w, x, out, span, row);
    int64_t rest = x.padded - row;  // 0, 1, 2 or 4: padded_rows
    if (rest == 4)
        block<Kernel, 4, Swept>(w, x, out, span, row);
    else if (rest == 2)
        block<Kernel, 2, Swept>(w, x, out, span, row);
    else if (rest == 1)
        block<Kernel, 1, Swept>(w, x, out, span, row);
}

// `scratch`: the expanded groups, then the carry. In place: dense weights that are stored as they are
// multiplied.
template <class Kernel, class Reader, bool kInPlace>
__attribute__((noinline)) void expand_and_sweep(const Packed& w, const Activations& x, const Output& out,
                                                int64_t begin, int64_t end, uint8_t* scratch) {
    constexpr int kBytes = 64 * kPieces<Kernel::kValues>;  // of an expanded panel-group
    const int64_t span = span_groups(w);
    float* carry = (float*)(scratch + (kInPlace ? 0 : span * kBytes));
    Storage storage;
    Reader reader(w, begin, end, storage);
    for (int64_t panel = begin; panel < end; panel++) {
        for (int64_t from = 0; from < w.groups; from += span) {
            const int64_t to = from + span < w.groups ? from + span : w.groups;
            const uint8_t* weights = scratch;
            if (kInPlace) {
                weights = w.data + (panel * w.groups + from) * kBytes;
            } else {
                uint8_t* piece = scratch;
                for (int64_t g = from; g < to; g++) {
                    reader.next();
                    if constexpr (Reader::kBySteps) {
                        const int pieces = kBytes / 64 / kSteps * __builtin_popcount(reader.steps());
                        for (int i = 0; i < pieces; i++, piece += 64) store(piece, reader.take());
                    } else {
                        GOSSAMER_UNROLL(64)
                        for (int i = 0; i < kBytes / 64; i++, piece += 64) store(piece, reader.piece(i));
                    }
                }
            }
            sweep<Kernel, typename Reader::Swept>(w, x, out, Span{panel, from, to, weights, carry});
        }
    }
}

template <class Kernel, class Reader, bool kInPlace>
void multiply_layout(const Packed& w, const Activations& x, const Output& out, int64_t begin, int64_t end,
                     uint8_t* scratch) {
    if (x.padded == 1)
        decode<Kernel, 1, Reader>(w, x, out, begin, end);
    else if (x.padded == 2)
        decode<Kernel, 2, Reader>(w, x, out, begin, end);
    else if (x.padded == 4)
        decode<Kernel, 4, Reader>(w, x, out, begin, end);
    else if (x.padded == Kernel::kRowBlock)
        decode<Kernel, Kernel::kRowBlock, Reader>(w, x, out, begin, end);
    else
        expand_and_sweep<Kernel, Reader, kInPlace>(w, x, out, begin, end, scratch);
}

template <class Kernel>
void multiply_values(const Packed& w, const Activations& x, const Output& out, int64_t begin, int64_t end,
                     uint8_t* scratch) {
    constexpr int V = Kernel::kValues;
    if (w.layout == kDense)
        multiply_layout<Kernel, Dense<V>, V != kInt4 && V != kInt3>(w, x, out, begin, end, scratch);
    else if (w.layout == kBitmap)
        multiply_layout<Kernel, Sparse<V, true>, false>(w, x, out, begin, end, scratch);
    else if (w.layout == kBalanced)
        multiply_layout<Kernel, Sparse<V, false>, false>(w, x, out, begin, end, scratch);
    else
        multiply_layout<Kernel, Steps<V>, false>(w, x, out, begin, end, scratch);
}

template <class... Kernels>
void multiply(const Packed* w, const Activations* x, void* y, int dtype, int64_t begin, int64_t end,
              uint8_t* scratch) {
    const Output out{y, dtype};
    ((w->values == Kernels::kValues ? multiply_values<Kernels>(*w, *x, out, begin, end, scratch) : void()),
     ...);
}

}  // namespace
}  // namespace gossamer
