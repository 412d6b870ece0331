// A packed weight as kernels see it: plain data and the table of functions of one instruction set.
//
//   weight (out, in)            panels of 16 outputs, groups of 64 inputs; sections are panel-major
//
//   values   | panel 0: group 0 | group 1 | ... | panel 1: group 0 | ...            | 0 to 64 bytes |
//   masks    | 16 words         | 16 words| ...   word s, bit 4o + k: is e = 64s + 4o + k kept?
//            | 16 bits          | 16 bits | ...   (16x4) bit s: is step s kept?
//   scales   | 64/group x 16 f16| ...             one float16 an output and part of a group
//   offsets  | byte where panel 0 starts in values | panel 1 | ... | end |          (bitmap, 16x4)
//
//   inside a panel-group, weight (output o, input 4s + k) has index e = 64s + 4o + k:
//
//   step s:  | o0 k0 k1 k2 k3 | o1 k0 k1 k2 k3 | ... | o15 k0 k1 k2 k3 |   64 codes, one register
//
// This header is included by units of every instruction set: nothing in it may have external linkage.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace gossamer {

constexpr int kPanel = 16;          // outputs of a panel
constexpr int kGroup = 64;          // inputs of a group
constexpr int kSteps = kGroup / 4;  // dot-product steps of a panel-group
constexpr int kWeights = 16 * 64;   // weights of a panel-group
constexpr int kSlack = 128;         // bytes that may be read past the end of a panel-group's values
constexpr int kMaxRowBlock = 8;     // most rows that one pass over a panel serves
constexpr int kTileRows = 16;       // rows that tiles serve at once (tiles.cpp)
constexpr int kFewRows = 16;        // calls of more rows may be multiplied by tiles

// Bytes ahead that readers prefetch. On two threads of a Zen 5, beside none: 32:64 int4 1.16 times as fast,
// 32:64 bfloat16 2.4 times; beside 1 KiB 1.14 and 1.08 times; 8 KiB is no better.
constexpr int kPrefetch = 4096;

// Layout columns (columns.cpp): panels of so many outputs; padded, and split between threads, by units of
// 128.
constexpr int kColumnPanel = 256;
constexpr int kColumnUnit = 128 / kPanel;  // in panels of 16
constexpr int kAhead = 128;                // most inputs ahead that are prefetched
constexpr int kColumnSpan = 4;             // groups that many rows meet expanded: 32 KiB of 128 outputs

// The gate: of a row with more than this share of inputs that are not zero, all are read. Memory gives what
// lies in a row about twice as fast as what lies scattered; measured on a Zen 5
// (benchmarks.activation_sparse).
constexpr double kMostActive = 0.5;

enum Layout : int { kDense = 0, kBitmap = 1, kBalanced = 2, kBySteps = 3, kColumns = 4 };
enum Values : int { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kInt4 = 3, kInt3 = 4, kNl4 = 5, kNl3 = 6 };
enum Dtype : int { kF32 = 0, kBF16 = 1 };

// nl4, nl3: codes stand for the levels of a table, here plus kLevelZero, so that they are unsigned and fit
// seven bits (docs/architecture.md, "Values"). Padded to 16, as registers look them up.
constexpr int kLevelZero = 64;
alignas(16) constexpr uint8_t kLevels[2][16] = {
    {2, 16, 25, 33, 40, 47, 53, 59, 64, 70, 76, 83, 90, 98, 108, 122},
    {34, 45, 53, 59, 64, 70, 77, 87, 64, 64, 64, 64, 64, 64, 64, 64},
};

// Bits of a stored code; 0 for floats.
static constexpr int code_bits(int values) {
    return values == kInt8                             ? 8
           : values == kInt4 || values == kNl4         ? 4
           : values == kFloat32 || values == kBFloat16 ? 0
                                                       : 3;
}

static constexpr bool has_levels(int values) { return values >= kNl4; }

// What is multiplied in place of zero.
static constexpr int zero_of(int values) {
    return has_levels(values) ? kLevelZero : code_bits(values) ? 1 << (code_bits(values) - 1) : 0;
}

struct Packed {
    int64_t out, in, panels, groups;
    int layout, values;
    int keep;   // n of n:64
    int parts;  // scales an output and panel-group: 64 / group
    const uint8_t* data;
    const uint8_t* data_end;
    const uint64_t* masks;
    const uint16_t* scales;
    const int64_t* offsets;
};

// Input rows made ready, in blocks of 8 (the last of 1, 2, 4 or 8), so that a block is read as one stream;
// for tiles in whole blocks of 16:
//
//     codes      [block][group][row of block][64]     int8, bfloat16 or float32; zeros past the inputs
//     scales     [block][group][row of block]         (integer values)
//     negatives  [block][group][part][row of block]   minus zero_code * sum(codes); 16x4: a step, not a part
//
// Layout columns: also the inputs that are read, in order: those that are not zero, or, where most are not,
// all.
struct Active {
    int32_t* ends;    // [row][group][part]      where each part's end in the row's list
    int32_t* inputs;  // [row][active_room()]    whole quads in each part (integer values)
    void* values;     // [row][active_room()]    their int8 codes, or float32
};

struct Activations {
    int64_t rows, padded;  // padded: rows that the blocks have room for
    void* codes;
    float* scales;
    int32_t* negatives;
    Active active{};
    int64_t block = kMaxRowBlock;  // rows of a block, or kTileRows
};

// Where outputs go: `y`, a row-major array of `dtype`. Where `base` is not null, the float32 numbers there,
// which lie as those of `y` do and may be the same, are added before rounding.
struct Output {
    void* y;
    int dtype;
    const float* base;
};

// The kernels of one value family in one instruction set; those of the layout columns list what the family's
// own prepare() made ready, and count panels in units of kColumnUnit.
struct Family {
    // Fills rows [begin, end) of `to` from row-major `x`, an array of `dtype`.
    void (*prepare)(const Packed* w, const void* x, int dtype, int64_t begin, int64_t end,
                    const Activations* to);
    // Writes outputs of panels [begin, end) for all rows of `x`. `scratch`: scratch_bytes(), aligned to 64.
    void (*multiply)(const Packed* w, const Activations* x, const Output* out, int64_t begin, int64_t end,
                     uint8_t* scratch);
};

// Bytes of one activation, and of one expanded weight.
static inline int element_bytes(int values) { return values == kFloat32 ? 4 : values == kBFloat16 ? 2 : 1; }

// Bytes of `count` stored values of a panel-group (docs/architecture.md, "Values").
static inline int64_t stored_bytes(int values, int64_t count) {
    switch (values) {
        case kFloat32:
            return 4 * count;
        case kBFloat16:
            return 2 * count;
        case kInt8:
            return count;
        case kInt4:
        case kNl4:
            return count / 128 * 64 + (count % 128 + 1) / 2;
        default:
            return count / 256 * 64 + (count % 256 + 3) / 4 + (count + 7) / 8;
    }
}

// Bytes of the masks of a whole weight, without padding.
static inline int64_t mask_bytes(const Packed& w) {
    return w.layout == kDense || w.layout == kColumns
               ? 0
               : w.panels * w.groups * (w.layout == kBySteps ? kSteps : kWeights) / 8;
}

// Entries of `negatives` for a row and group.
static inline int64_t negatives_of(const Packed& w) { return w.layout == kBySteps ? kSteps : w.parts; }

// Many rows sweep over a tile of weights at a time: some groups of a few panels, expanded, so few that they
// stay in the first-level cache.
constexpr int kTilePanels = 2;  // at most
constexpr int64_t kTileBytes = 32 << 10;
constexpr int64_t kListBytes = 1 << 10;  // 16x4: which steps a tile has

static inline int64_t tile_groups(const Packed& w) {
    int64_t most = kTileBytes / (kTilePanels * kWeights * element_bytes(w.values));
    int64_t tiles = (w.groups + most - 1) / most;
    return (w.groups + tiles - 1) / tiles;
}

// tiles.cpp sweeps over larger ones, which stay in the second-level cache: some groups of kSweptPanels.
constexpr int kSweptPanels = 8;
constexpr int64_t kSweptBytes = 64 << 10;  // of each of them

static inline int64_t swept_groups(const Packed& w) {
    int64_t most = kSweptBytes / (kWeights * element_bytes(w.values));
    int64_t sweeps = (w.groups + most - 1) / most;
    return (w.groups + sweeps - 1) / sweeps;
}

// Whether tiles multiply rows that lie in blocks of `block`.
static inline bool by_tiles(const Packed& w, int64_t block) {
    return block == kTileRows && w.layout != kBySteps && w.layout != kColumns && w.values != kFloat32;
}

// Bytes that a thread needs to multiply `padded` rows in blocks of `block`: expanded weights, the list of
// their steps, and sums of all rows between sweeps.
static inline int64_t scratch_bytes(const Packed& w, int64_t padded, int64_t block = kMaxRowBlock) {
    if (by_tiles(w, block))
        return kSweptPanels * (kSweptBytes + (swept_groups(w) < w.groups ? padded * kPanel * 4 : 0));
    if (w.layout == kColumns) return padded * kColumnPanel * 4 + kColumnSpan * kGroup * 128;
    return kTileBytes + kListBytes + kTilePanels * padded * element_bytes(w.values) * kPanel * 4;
}

// Panels of 16 outputs that a layout counts, and is split, by.
static inline int64_t unit_of(int layout) { return layout == kColumns ? kColumnUnit : 1; }

// Panels of 16 outputs, padding included.
static inline int64_t panels_of(int layout, int64_t out) {
    const int64_t unit = unit_of(layout);
    return (out + kPanel * unit - 1) / (kPanel * unit) * unit;
}

// Entries that a row of Active has room for.
static inline int64_t active_room(int64_t groups) { return kGroup * groups + kAhead; }

// Where a row lies among Activations: index of its group 0, and from one group to the next.
struct Place {
    int64_t first, step;
};

static inline Place place_of(const Activations& x, int64_t groups, int64_t row) {
    int64_t block = row & -x.block, left = x.padded - block;
    return {block * groups + row - block, left < x.block ? left : x.block};
}

static inline int64_t row_of_block(const Activations& x, int64_t row) { return row & (x.block - 1); }

// Rows that `rows` are padded to: whole blocks, then one block of 1, 2, 4 or 8; for tiles, whole blocks.
static inline int64_t padded_rows(int64_t rows, int64_t block = kMaxRowBlock) {
    int64_t rest = rows % block;
    if (rest > 4 || (rest > 0 && block == kTileRows)) return rows - rest + block;
    return rest == 3 ? rows + 1 : rows;
}

}  // namespace gossamer
