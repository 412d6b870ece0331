// How panels and rows are walked, for every kernel: few rows decode as they go, many rows expand a tile of
// weights first.
//
// A kernel is a class with
//     kValues, kRowBlock     its value type, and the most rows that decode at once
//     kSums                  registers of running sums an output panel and row
//     kSweepPanels, sweep_rows(panels)   panels, and rows of so many panels, that a sweep multiplies at once
//     add<Q, R>(readers, w, x, row, begin, end, sums)    groups [begin, end) of Q panels for R rows
//     result(sums)           16 outputs of one row
// All ways run the same add, which adds in the same order for every Q and R; sums that wait in memory between
// two calls are kept as they are. So a row's result does not depend on how many rows there are.
#pragma once
#include "outputs.h"
#include "readers.h"

namespace gossamer {
namespace {

template <class Kernel>
GOSSAMER_INLINE void write(const Output& out, const Packed& w, int64_t row, int64_t panel,
                           const Floats (&sums)[Kernel::kSums]) {
    const int64_t left = w.out - panel * kPanel, at = row * w.out + panel * kPanel;
    const int n = left < kPanel ? int(left) : kPanel;
    store_outputs(out, at, Kernel::result(sums), n);
}

// ---- few rows

template <class Kernel, int R, class Reader>
__attribute__((noinline)) void decode(const Packed& w, const Activations& x, const Output& out, int64_t begin,
                                      int64_t end) {
    Storage storage;
    Reader reader[] = {Reader(w, begin, end, storage)};
    for (int64_t panel = begin; panel < end; panel++) {
        Floats sums[1][R][Kernel::kSums];
        GOSSAMER_UNROLL(8)
        for (int r = 0; r < R; r++) {
            GOSSAMER_UNROLL(4)
            for (int i = 0; i < Kernel::kSums; i++) sums[0][r][i] = floats(0);
        }
        Kernel::template add<1, R>(reader, w, x, panel, 0, 0, w.groups, sums);
        GOSSAMER_UNROLL(8)
        for (int r = 0; r < R; r++)
            if (r < x.rows) write<Kernel>(out, w, r, panel, sums[0][r]);
    }
}

// ---- many rows

// What a sweep works on: groups [begin, end) of panels from `panel` on, expanded.
struct Tile {
    int64_t panel, begin, end;
    const uint8_t* weights[kTilePanels];  // of each panel
    float* carry;                         // where sums wait for the next tile of these panels
};

template <class Kernel, class Swept, int Q, int R>
__attribute__((noinline)) void block(const Packed& w, const Activations& x, const Output& out,
                                     const Tile& tile, int64_t row) {
    constexpr int S = Kernel::kSums;
    float* carry = tile.carry + 16 * S * Q * row;  // of panel q and row r: S * (R * q + r) registers on
    Swept readers[Q];
    GOSSAMER_UNROLL(2)
    for (int q = 0; q < Q; q++) readers[q] = Swept(tile.weights[q], w, tile.panel + q, tile.begin);
    Floats sums[Q][R][S];
    GOSSAMER_UNROLL(2)
    for (int q = 0; q < Q; q++) {
        GOSSAMER_UNROLL(8)
        for (int r = 0; r < R; r++) {
            GOSSAMER_UNROLL(4)
            for (int i = 0; i < S; i++)
                sums[q][r][i] =
                    tile.begin == 0 ? floats(0) : load_floats(carry + 16 * (S * (R * q + r) + i), 16);
        }
    }
    Kernel::template add<Q, R>(readers, w, x, tile.panel, row, tile.begin, tile.end, sums);
    const bool whole = tile.end == w.groups;
    GOSSAMER_UNROLL(2)
    for (int q = 0; q < Q; q++) {
        GOSSAMER_UNROLL(8)
        for (int r = 0; r < R; r++) {
            if (whole) {
                if (row + r < x.rows) write<Kernel>(out, w, row + r, tile.panel + q, sums[q][r]);
                continue;
            }
            GOSSAMER_UNROLL(4)
            for (int i = 0; i < S; i++) store_floats(carry + 16 * (S * (R * q + r) + i), sums[q][r][i], 16);
        }
    }
}

template <class Kernel, class Swept, int Q>
void sweep(const Packed& w, const Activations& x, const Output& out, const Tile& tile) {
    constexpr int R = Kernel::sweep_rows(Q);
    int64_t row = 0;
    for (; row + R <= x.padded; row += R) block<Kernel, Swept, Q, R>(w, x, out, tile, row);
    const int64_t rest = x.padded - row;  // 0, 1, 2 or 4: padded_rows
    if (R > 4 && rest == 4) block < Kernel, Swept, Q, R<4 ? R : 4>(w, x, out, tile, row);
    if (R > 2 && rest == 2) block < Kernel, Swept, Q, R<2 ? R : 2>(w, x, out, tile, row);
    if (R > 1 && rest == 1) block<Kernel, Swept, Q, 1>(w, x, out, tile, row);
}

// The next `groups` of a panel.
template <class Kernel, class Reader>
GOSSAMER_INLINE void expand(Reader& reader, int64_t groups, uint8_t* to, StepList* list) {
    constexpr int kAll = kPieces<Kernel::kValues>;
    int32_t count = 0;
    for (int64_t g = 0; g < groups; g++) {
        reader.next();
        if constexpr (Reader::kBySteps) {
            for (uint32_t kept = reader.steps(); kept; kept &= kept - 1) {
                list->at[count++] = uint16_t(kSteps * g + __builtin_ctz(kept));
                for (int i = 0; i < kAll / kSteps; i++, to += 64) store(to, reader.take());
            }
        } else {
            GOSSAMER_UNROLL(64)
            for (int i = 0; i < kAll; i++, to += 64) store(to, reader.piece(i));
        }
    }
    list->count = count;
}

// Walks panels [panel, panel + Q) by tiles: `expand(reader, groups, to, list)` the next groups of each panel,
// then `sweep(tile)`. `scratch`: the expanded tile, the list of its steps, and the carry. In place: dense
// weights that are stored as they are multiplied.
template <class Kernel, class Reader, bool kInPlace, int Q, class Expand, class Sweep>
GOSSAMER_INLINE void walk_tiles(const Packed& w, int64_t panel, uint8_t* scratch, Storage* storage,
                                const Expand& expand, const Sweep& sweep) {
    constexpr int kBytes = 64 * kPieces<Kernel::kValues>;  // of an expanded panel-group
    const int64_t most = tile_groups(w);
    Tile tile;
    tile.panel = panel;
    tile.carry = (float*)(scratch + kTileBytes + kListBytes);
    StepList* list = (StepList*)(scratch + kTileBytes);
    Reader readers[] = {Reader(w, panel, panel + 1, storage[0]),
                        Reader(w, panel + Q - 1, panel + Q, storage[Q - 1])};
    for (tile.begin = 0; tile.begin < w.groups; tile.begin = tile.end) {
        tile.end = tile.begin + most < w.groups ? tile.begin + most : w.groups;
        for (int q = 0; q < Q; q++) {
            uint8_t* to = scratch + q * most * kBytes;
            if (!kInPlace) expand(readers[q], tile.end - tile.begin, to, list);
            tile.weights[q] = kInPlace ? w.data + ((panel + q) * w.groups + tile.begin) * kBytes : to;
        }
        sweep(tile);
    }
}

template <class Kernel, class Reader, bool kInPlace, int Q>
void expand_and_sweep(const Packed& w, const Activations& x, const Output& out, int64_t panel,
                      uint8_t* scratch, Storage* storage) {
    walk_tiles<Kernel, Reader, kInPlace, Q>(
        w, panel, scratch, storage, expand<Kernel, Reader>,
        [&](const Tile& tile) { sweep<Kernel, typename Reader::Swept, Q>(w, x, out, tile); });
}

// Whether panels keep the same steps, as in blocks of 32 outputs.
GOSSAMER_INLINE bool same_steps(const Packed& w, int64_t panel, int panels) {
    const uint16_t* first = (const uint16_t*)w.masks + panel * w.groups;
    return __builtin_memcmp(first, first + w.groups, size_t(2 * w.groups * (panels - 1))) == 0;
}

template <class Kernel, class Reader, bool kInPlace>
__attribute__((noinline)) void many_rows(const Packed& w, const Activations& x, const Output& out,
                                         int64_t panel, int64_t end, uint8_t* scratch) {
    constexpr int Q = Kernel::kSweepPanels;
    Storage storage[Q];
    while (panel < end) {
        if (panel + Q <= end && (!Reader::kBySteps || same_steps(w, panel, Q))) {
            expand_and_sweep<Kernel, Reader, kInPlace, Q>(w, x, out, panel, scratch, storage);
            panel += Q;
        } else {
            expand_and_sweep<Kernel, Reader, kInPlace, 1>(w, x, out, panel, scratch, storage);
            panel++;
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
        many_rows<Kernel, Reader, kInPlace>(w, x, out, begin, end, scratch);
}

template <class Kernel>
void multiply_values(const Packed& w, const Activations& x, const Output& out, int64_t begin, int64_t end,
                     uint8_t* scratch) {
    constexpr int V = Kernel::kValues;
    if (w.layout == kDense)
        multiply_layout<Kernel, Dense<V>, !kSmallCodes<V>>(w, x, out, begin, end, scratch);
    else if (w.layout == kBitmap)
        multiply_layout<Kernel, Sparse<V, true>, false>(w, x, out, begin, end, scratch);
    else if (w.layout == kBalanced)
        multiply_layout<Kernel, Sparse<V, false>, false>(w, x, out, begin, end, scratch);
    else
        multiply_layout<Kernel, Steps<V>, false>(w, x, out, begin, end, scratch);
}

template <class... Kernels>
void multiply(const Packed* w, const Activations* x, const Output* out, int64_t begin, int64_t end,
              uint8_t* scratch) {
    ((w->values == Kernels::kValues ? multiply_values<Kernels>(*w, *x, *out, begin, end, scratch) : void()),
     ...);
}

}  // namespace
}  // namespace gossamer
