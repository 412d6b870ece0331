// y = x Wᵀ for many rows by the tiles of AMX: 16 rows times 16 outputs at once. What tiles do not multiply
// (few rows, float32, 16x4, columns) runs on the AVX-512 kernels, which this unit stands on.
//
//   integer values   A | 16 rows x 64 codes of activations |   B | a panel-group of codes less zero codes |
//   bfloat16         A | 16 rows x 32 numbers              |   B | half a panel-group, by pairs:
//                                                                  row i: | o0 2i 2i+1 | o1 2i 2i+1 | ... |
//   both             C | 16 rows x 16 outputs: int32, or float32 |
//
// With scales of 32 inputs A is half as wide, and B half as high. Integer sums are exact and are scaled and
// added as in matmul_int.cpp, so results have the bits of the AVX-512 kernels. Sums of bfloat16 products have
// an order of their own, the same for every row of every call.
//
// Some panels are expanded at a time, so many that they stay in the second-level cache, and all rows sweep
// over them, 16 (bfloat16: 32) by 16 (32).
#include <immintrin.h>

#include "outputs.h"
#include "readers.h"
#include "tile_config.h"

extern "C" {
extern const gossamer::Family gossamer_int_avx512vnni, gossamer_float_avx512;
}

namespace gossamer {
namespace {

// The numbers of tiles are written out where they are used, as the intrinsics want them:
//     integer values   C 0, 1    A 4, 5   B 6, 7    by turns
//     bfloat16         C 0..3    A 4, 5   B 6, 7
// For scales of 64 / parts inputs; bfloat16: one part.
TileConfig shapes(int parts) {
    TileConfig tiles;
    for (int i = 0; i < 8; i++) tiles.set(i, i >= 6 ? 16 / parts : 16, i == 4 || i == 5 ? 64 / parts : 64);
    return tiles;
}

// What a sweep works on: groups [begin, end) of `count` panels from `panel` on, expanded.
struct Sweep {
    int64_t panel, begin, end;
    int count;
    const uint8_t* weights;  // of panel q: q * stride on
    int64_t stride;
    float* carry;  // [panel][padded][16] sums, where there is more than one sweep
};

// ---- integer values

// One product of tiles: codes of 16 rows, 64 apart, times part of a panel-group, to (16 rows, 16 outputs).
// Two may be under way, one in each turn.
template <int kTurn>
GOSSAMER_INLINE void begin_codes(const int8_t* a, const uint8_t* b) {
    if constexpr (kTurn == 0) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_zero(0);
        _tile_dpbssd(0, 4, 6);
    } else {
        _tile_loadd(5, a, 64);
        _tile_loadd(7, b, 64);
        _tile_zero(1);
        _tile_dpbssd(1, 5, 7);
    }
}

template <int kTurn>
GOSSAMER_INLINE void end_codes(int32_t (&to)[16][16]) {
    if constexpr (kTurn == 0)
        _tile_stored(0, to, 64);
    else
        _tile_stored(1, to, 64);
    finish(to);
}

template <int V>
struct IntTiles {
    static constexpr int kValues = V;

    // Codes less their zero code: what is signed needs no correction.
    template <class Reader>
    static GOSSAMER_INLINE void expand_groups(Reader& reader, int64_t groups, uint8_t* to) {
        for (int64_t g = 0; g < groups; g++) {
            reader.next();
            GOSSAMER_UNROLL(16)
            for (int s = 0; s < kSteps; s++, to += 64)
                store(to, _mm512_sub_epi8(reader.piece(s), _mm512_set1_epi8(char(kZeroCode<V>))));
        }
    }

    static void sweep(const Packed& w, const Activations& x, const Output& out, const Sweep& s) {
        for (int64_t row = 0; row < x.rows; row += kTileRows)
            for (int q = 0; q < s.count; q++) block(w, x, out, s, row, q);
    }

    // Sums of one product times their scales, added to y.
    static GOSSAMER_INLINE void scale(const int32_t (&sums)[16][16], const uint16_t* scales,
                                      const float* scales_x, Floats (&y)[kTileRows]) {
        const Floats scale = load_halves(scales);
        GOSSAMER_UNROLL(16)
        for (int r = 0; r < kTileRows; r++)
            y[r] = mul_add(mul(scale, floats(scales_x[r])), to_floats(load(sums[r])), y[r]);
    }

    // 16 rows times one panel. The next product of tiles runs while the last one is scaled.
    static __attribute__((noinline)) void block(const Packed& w, const Activations& x, const Output& out,
                                                const Sweep& s, int64_t row, int q) {
        const int64_t at = row * w.groups + s.begin * kTileRows, panel = s.panel + q;
        const int parts = w.parts, width = kGroup / parts, halves = parts - 1;
        const int8_t* codes = (const int8_t*)x.codes + kGroup * at;
        const float* scales_x = x.scales + at;
        const uint16_t* scales = w.scales + (panel * w.groups + s.begin) * parts * kPanel;
        const uint8_t* weights = s.weights + q * s.stride;
        const int64_t products = (s.end - s.begin) * parts;
        float* carry = s.carry + kPanel * (q * x.padded + row);
        Floats y[kTileRows];
        GOSSAMER_UNROLL(16)
        for (int r = 0; r < kTileRows; r++)
            y[r] = s.begin == 0 ? floats(0) : load_floats(carry + kPanel * r, kPanel);
        alignas(64) int32_t sums[2][16][16];
        const auto codes_of = [&](int64_t i) {
            return codes + (parts == 1 ? i * kGroup * kTileRows : i / 2 * kGroup * kTileRows + i % 2 * width);
        };
        begin_codes<0>(codes, weights);
        end_codes<0>(sums[0]);
        int64_t i = 0;
        for (; i + 2 < products; i += 2) {
            begin_codes<1>(codes_of(i + 1), weights + (i + 1) * kPanel * width);
            end_codes<1>(sums[1]);
            scale(sums[0], scales + i * kPanel, scales_x + (i >> halves) * kTileRows, y);
            begin_codes<0>(codes_of(i + 2), weights + (i + 2) * kPanel * width);
            end_codes<0>(sums[0]);
            scale(sums[1], scales + (i + 1) * kPanel, scales_x + ((i + 1) >> halves) * kTileRows, y);
        }
        if (i + 1 < products) {
            begin_codes<1>(codes_of(i + 1), weights + (i + 1) * kPanel * width);
            end_codes<1>(sums[1]);
            scale(sums[0], scales + i * kPanel, scales_x + (i >> halves) * kTileRows, y);
            i++;
        }
        scale(sums[i & 1], scales + i * kPanel, scales_x + (i >> halves) * kTileRows, y);
        if (s.end < w.groups) {
            GOSSAMER_UNROLL(16)
            for (int r = 0; r < kTileRows; r++) store_floats(carry + kPanel * r, y[r], kPanel);
            return;
        }
        const int64_t first = kPanel * panel, left = w.out - first;
        const int n = left < kPanel ? int(left) : kPanel;
        GOSSAMER_UNROLL(16)
        for (int r = 0; r < kTileRows; r++)
            if (row + r < x.rows) store_outputs(out, (row + r) * w.out + first, y[r], n);
    }
};

// ---- bfloat16

struct BFloat16Tiles {
    static constexpr int kValues = kBFloat16;

    // Two pieces of a step to two rows of B: inputs 0 and 1 of all outputs, then inputs 2 and 3.
    template <class Reader>
    static GOSSAMER_INLINE void expand_groups(Reader& reader, int64_t groups, uint8_t* to) {
        const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        for (int64_t g = 0; g < groups; g++) {
            reader.next();
            GOSSAMER_UNROLL(16)
            for (int s = 0; s < kSteps; s++, to += 128) {
                const Bytes low = reader.piece(2 * s), high = reader.piece(2 * s + 1);
                store(to, _mm512_permutex2var_epi32(low, even, high));
                store(to + 64, _mm512_permutex2var_epi32(low, odd, high));
            }
        }
    }

    static void sweep(const Packed& w, const Activations& x, const Output& out, const Sweep& s) {
        for (int64_t row = 0; row < x.rows; row += 2 * kTileRows) {
            const bool two = row + kTileRows < x.rows;
            int q = 0;
            for (; q + 2 <= s.count; q += 2)
                two ? blocks<2, 2>(w, x, out, s, row, q) : blocks<2, 1>(w, x, out, s, row, q);
            if (q < s.count) two ? blocks<1, 2>(w, x, out, s, row, q) : blocks<1, 1>(w, x, out, s, row, q);
        }
    }

    // B blocks of rows times Q panels; sums stay in tiles 2 * block + panel.
    template <int Q, int B>
    static __attribute__((noinline)) void blocks(const Packed& w, const Activations& x, const Output& out,
                                                 const Sweep& s, int64_t row, int q) {
        const int64_t stride = kGroup * kTileRows;  // codes from one group to the next
        const uint16_t* upper = (const uint16_t*)x.codes + kGroup * row * w.groups + stride * s.begin;
        const uint16_t* lower = upper + stride * w.groups;
        const uint8_t *left = s.weights + q * s.stride, *right = left + s.stride;
        const bool last = s.end == w.groups;
        alignas(64) float sums[Q][B][kTileRows][kPanel];
        // where the sums of a panel go: sixteen rows of `sums`, or of the carry, which has the others behind
        float* to[Q];
        for (int i = 0; i < Q; i++)
            to[i] = last ? sums[i][0][0] : s.carry + kPanel * ((q + i) * x.padded + row);
        if (s.begin == 0) {
            _tile_zero(0);
            if constexpr (Q == 2) _tile_zero(1);
            if constexpr (B == 2) _tile_zero(2);
            if constexpr (Q == 2 && B == 2) _tile_zero(3);
        } else {
            const float* carry = s.carry + kPanel * (q * x.padded + row);
            const float* other = carry + kPanel * x.padded;
            _tile_loadd(0, carry, 64);
            if constexpr (Q == 2) _tile_loadd(1, other, 64);
            if constexpr (B == 2) _tile_loadd(2, carry + kPanel * kTileRows, 64);
            if constexpr (Q == 2 && B == 2) _tile_loadd(3, other + kPanel * kTileRows, 64);
        }
        // activations of the next blocks, a share of them during each panel, on their way to the second-level
        // cache
        constexpr int64_t share = 4 * kTileRows * kGroup / kSweptPanels;
        const uint8_t* ahead =
            (const uint8_t*)(upper + 2 * stride * w.groups) + q * (s.end - s.begin) * share;
        for (int64_t g = s.begin; g < s.end; g++, upper += stride, lower += stride) {
            for (int i = 0; i < Q * share; i += 64, ahead += 64)
                _mm_prefetch((const char*)ahead, _MM_HINT_T1);
            GOSSAMER_UNROLL(2)
            for (int half = 0; half < kGroup; half += 32, left += 1024, right += 1024) {
                _tile_loadd(4, upper + half, 2 * kGroup);
                _tile_loadd(6, left, 64);
                _tile_dpbf16ps(0, 4, 6);
                if constexpr (Q == 2) {
                    _tile_loadd(7, right, 64);
                    _tile_dpbf16ps(1, 4, 7);
                }
                if constexpr (B == 2) {
                    _tile_loadd(5, lower + half, 2 * kGroup);
                    _tile_dpbf16ps(2, 5, 6);
                    if constexpr (Q == 2) _tile_dpbf16ps(3, 5, 7);
                }
            }
        }
        _tile_stored(0, to[0], 64);
        if constexpr (Q == 2) _tile_stored(1, to[Q - 1], 64);
        if constexpr (B == 2) _tile_stored(2, to[0] + kPanel * kTileRows, 64);
        if constexpr (Q == 2 && B == 2) _tile_stored(3, to[Q - 1] + kPanel * kTileRows, 64);
        finish(to[0]);
        if (!last) return;
        const int64_t first = kPanel * (s.panel + q);
        for (int r = 0; r < B * kTileRows && row + r < x.rows; r++)
            for (int i = 0; i < Q; i++) {
                const int64_t from = first + kPanel * i, left_of = w.out - from;
                store_outputs(out, (row + r) * w.out + from, load_floats(sums[i][0][0] + kPanel * r, kPanel),
                              left_of < kPanel ? int(left_of) : kPanel);
            }
    }
};

// ---- how panels are walked

template <class Kernel, class Reader>
void multiply_tiles(const Packed& w, const Activations& x, const Output& out, int64_t panel, int64_t end,
                    uint8_t* scratch) {
    constexpr int64_t kBytes = 64 * kPieces<Kernel::kValues>;  // of an expanded panel-group
    Storage storage[kSweptPanels];
    const Tiles tiles(shapes(w.parts));
    const int64_t most = swept_groups(w);
    for (; panel < end; panel += kSweptPanels) {
        const int count = end - panel < kSweptPanels ? int(end - panel) : kSweptPanels;
        const auto reader = [&](int q) {
            const int64_t at = panel + (q < count ? q : count - 1);
            return Reader(w, at, at + 1, storage[q]);
        };
        Reader readers[] = {reader(0), reader(1), reader(2), reader(3),
                            reader(4), reader(5), reader(6), reader(7)};
        Sweep s{panel, 0, 0, count, scratch, most * kBytes, (float*)(scratch + kSweptPanels * kSweptBytes)};
        for (; s.begin < w.groups; s.begin = s.end) {
            s.end = s.begin + most < w.groups ? s.begin + most : w.groups;
            for (int q = 0; q < count; q++)
                Kernel::expand_groups(readers[q], s.end - s.begin, scratch + q * s.stride);
            finish(scratch);
            Kernel::sweep(w, x, out, s);
        }
    }
}

template <class Kernel>
void multiply_stored(const Packed& w, const Activations& x, const Output& out, int64_t begin, int64_t end,
                     uint8_t* scratch) {
    constexpr int V = Kernel::kValues;
    if (w.layout == kDense)
        multiply_tiles<Kernel, Dense<V>>(w, x, out, begin, end, scratch);
    else if (w.layout == kBitmap)
        multiply_tiles<Kernel, Sparse<V, true>>(w, x, out, begin, end, scratch);
    else
        multiply_tiles<Kernel, Sparse<V, false>>(w, x, out, begin, end, scratch);
}

// ---- the tables

void prepare_ints(const Packed* w, const void* x, int dtype, int64_t begin, int64_t end,
                  const Activations* to) {
    gossamer_int_avx512vnni.prepare(w, x, dtype, begin, end, to);
}

void prepare_floats(const Packed* w, const void* x, int dtype, int64_t begin, int64_t end,
                    const Activations* to) {
    gossamer_float_avx512.prepare(w, x, dtype, begin, end, to);
}

void multiply_ints(const Packed* w, const Activations* x, const Output* out, int64_t begin, int64_t end,
                   uint8_t* scratch) {
    if (!by_tiles(*w, x->block))
        gossamer_int_avx512vnni.multiply(w, x, out, begin, end, scratch);
    else if (w->values == kInt8)
        multiply_stored<IntTiles<kInt8>>(*w, *x, *out, begin, end, scratch);
    else if (w->values == kInt4)
        multiply_stored<IntTiles<kInt4>>(*w, *x, *out, begin, end, scratch);
    else if (w->values == kInt3)
        multiply_stored<IntTiles<kInt3>>(*w, *x, *out, begin, end, scratch);
    else if (w->values == kNl4)
        multiply_stored<IntTiles<kNl4>>(*w, *x, *out, begin, end, scratch);
    else
        multiply_stored<IntTiles<kNl3>>(*w, *x, *out, begin, end, scratch);
}

void multiply_floats(const Packed* w, const Activations* x, const Output* out, int64_t begin, int64_t end,
                     uint8_t* scratch) {
    if (!by_tiles(*w, x->block))
        gossamer_float_avx512.multiply(w, x, out, begin, end, scratch);
    else
        multiply_stored<BFloat16Tiles>(*w, *x, *out, begin, end, scratch);
}

// ---- the self-check

struct Numbers {
    uint32_t state = 1;
    int below(int n) {
        state = state * 1664525 + 1013904223;
        return int((state >> 8) % uint32_t(n));
    }
};

bool right_codes(int parts) {
    alignas(64) int8_t a[16][64], b[16][64];
    alignas(64) int32_t c[2][16][16];
    Numbers numbers;
    for (int i = 0; i < 16 * 64; i++) {
        a[i / 64][i % 64] = int8_t(numbers.below(255) - 127);
        b[i / 64][i % 64] = int8_t(numbers.below(256) - 128);
    }
    a[0][0] = -127, b[0][0] = -128;
    {
        const Tiles tiles(shapes(parts));
        finish(a), finish(b);
        const uint8_t* weights = (const uint8_t*)b[0];
        begin_codes<0>(a[0], weights);
        begin_codes<1>(a[0], weights);
        end_codes<0>(c[0]);
        end_codes<1>(c[1]);
    }
    for (int row = 0; row < 16; row++)
        for (int output = 0; output < 16; output++) {
            int32_t sum = 0;
            for (int k = 0; k < kGroup / parts; k++) sum += a[row][k] * b[k / 4][4 * output + k % 4];
            if (c[0][row][output] != sum || c[1][row][output] != sum) return false;
        }
    return true;
}

// Small integers, whose sums are exact in any order; each product is added twice.
bool right_floats() {
    alignas(64) uint16_t a[16][32], b[16][32];
    alignas(64) float c[16][16];
    int a_numbers[16][32], b_numbers[16][32];
    Numbers numbers;
    for (int i = 0; i < 16 * 32; i++) {
        const int row = i / 32, column = i % 32;
        const float of_a = float(a_numbers[row][column] = numbers.below(33) - 16);
        const float of_b = float(b_numbers[row][column] = numbers.below(33) - 16);
        __builtin_memcpy(&a[row][column], (const uint8_t*)&of_a + 2, 2);
        __builtin_memcpy(&b[row][column], (const uint8_t*)&of_b + 2, 2);
    }
    {
        const Tiles tiles(shapes(1));
        finish(a), finish(b);
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_zero(0);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(0, 4, 6);
        _tile_stored(0, c, 64);
        finish(c);
    }
    for (int row = 0; row < 16; row++)
        for (int output = 0; output < 16; output++) {
            int sum = 0;
            for (int k = 0; k < 32; k++) sum += a_numbers[row][k] * b_numbers[k / 2][2 * output + k % 2];
            if (c[row][output] != float(2 * sum)) return false;
        }
    return true;
}

}  // namespace
}  // namespace gossamer

extern "C" {
extern const gossamer::Family GOSSAMER_EXPORT(int), GOSSAMER_EXPORT(float);
const gossamer::Family GOSSAMER_EXPORT(int) = { gossamer::prepare_ints, gossamer::multiply_ints };
const gossamer::Family GOSSAMER_EXPORT(float) = { gossamer::prepare_floats, gossamer::multiply_floats };

// Whether tiles give the right numbers here, on a processor and system that say they have them.
bool GOSSAMER_EXPORT(works)();
bool GOSSAMER_EXPORT(works)() {
    return gossamer::right_codes(1) && gossamer::right_codes(2) && gossamer::right_floats();
}
}
