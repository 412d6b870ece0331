// y = x Wᵀ for many rows by the tiles of AMX: 16 rows times 16 outputs at once. What tiles do not multiply
// (few rows, float32, 16x4, columns) runs on the AVX-512 kernels, which this unit stands on.
//
//   integer values   A | 16 rows x 64 codes of activations |   B | a panel-group, as it is expanded |
//   bfloat16         A | 16 rows x 32 numbers              |   B | half a panel-group, by pairs:
//                                                                  row i: | o0 2i 2i+1 | o1 2i 2i+1 | ... |
//   both             C | 16 rows x 16 outputs: int32, or float32 |
//
// With scales of 32 inputs A is half as wide, and B half as high. Integer sums are exact and are scaled and
// added as in matmul_int.cpp, so results have the bits of the AVX-512 kernels. Sums of bfloat16 products have
// an order of their own, the same for every row of every call.
//
// A compiler may take what tiles read for memory that nobody reads (GCC's intrinsics do not say): finish()
// makes it write, and read again, what a pointer leads to.
#include <immintrin.h>

#include "multiply.h"

extern "C" {
extern const gossamer::Family gossamer_int_avx512, gossamer_float_avx512;
}

namespace gossamer {
namespace {

GOSSAMER_INLINE void finish(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// The numbers of tiles are written out where they are used, as the intrinsics want them:
//     integer values   C 0       A 4      B 6
//     bfloat16         C 0..3    A 4, 5   B 6, 7
struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t zeros[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles for scales of 64 / parts inputs; bfloat16: one part.
void configure(int parts) {
    TileConfig tiles;
    for (int i = 0; i < 8; i++) {
        tiles.row_bytes[i] = uint16_t(i == 4 || i == 5 ? 64 / parts : 64);
        tiles.rows[i] = uint8_t(i >= 6 ? 16 / parts : 16);
    }
    finish(&tiles);
    _tile_loadconfig(&tiles);
}

// to (16 rows, 16 outputs) = A times B: codes of `a`, whose rows lie 64 apart, and of `b`.
GOSSAMER_INLINE void multiply_codes(const int8_t* a, const uint8_t* b, int32_t (&to)[16][16]) {
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_zero(0);
    _tile_dpbsud(0, 4, 6);
    _tile_stored(0, to, 64);
    finish(to);
}

template <int V>
struct IntTiles {
    static constexpr int kValues = V;
    static constexpr int kPanels = 1;

    template <class Reader>
    static GOSSAMER_INLINE void expand_groups(Reader& reader, int64_t groups, uint8_t* to, StepList* list) {
        expand<IntTiles>(reader, groups, to, list);
    }

    template <int Q>
    static void sweep_tile(const Packed& w, const Activations& x, const Tile& tile) {
        for (int64_t row = 0; row < x.rows; row += kTileRows) block(w, x, tile, row);
    }

    static __attribute__((noinline)) void block(const Packed& w, const Activations& x, const Tile& tile,
                                                int64_t row) {
        const int64_t at = row * w.groups + tile.begin * kTileRows;
        const int8_t* codes = (const int8_t*)x.codes + kGroup * at;
        const float* scales_x = x.scales + at;
        const int32_t* negatives = x.negatives + at * w.parts;
        const uint16_t* scales = w.scales + (tile.panel * w.groups + tile.begin) * w.parts * kPanel;
        const uint8_t* weights = tile.weights[0];
        const int width = kGroup / w.parts;
        float* carry = tile.carry + kPanel * row;
        Floats y[kTileRows];
        GOSSAMER_UNROLL(16)
        for (int r = 0; r < kTileRows; r++)
            y[r] = tile.begin == 0 ? floats(0) : load_floats(carry + kPanel * r, kPanel);
        alignas(64) int32_t sums[2][kTileRows][kPanel];  // by turns: one is read while the other is written
        int turn = 0;
        for (int64_t g = tile.begin; g < tile.end; g++) {
            for (int first = 0; first < kGroup; first += width, turn ^= 1) {
                multiply_codes(codes + first, weights, sums[turn]);
                weights += kPanel * width;
                const Floats scale = load_halves(scales);
                scales += kPanel;
                GOSSAMER_UNROLL(16)
                for (int r = 0; r < kTileRows; r++) {
                    const Ints sum = gossamer::add(load(sums[turn][r]), ints(negatives[r]));
                    y[r] = mul_add(mul(scale, floats(scales_x[r])), to_floats(sum), y[r]);
                }
                negatives += kTileRows;
            }
            codes += kGroup * kTileRows;
            scales_x += kTileRows;
        }
        GOSSAMER_UNROLL(16)
        for (int r = 0; r < kTileRows; r++) store_floats(carry + kPanel * r, y[r], kPanel);
    }
};

struct BFloat16Tiles {
    static constexpr int kValues = kBFloat16;
    static constexpr int kPanels = 2;

    // Two pieces of a step to two rows of B: inputs 0 and 1 of all outputs, then inputs 2 and 3.
    template <class Reader>
    static GOSSAMER_INLINE void expand_groups(Reader& reader, int64_t groups, uint8_t* to, StepList*) {
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

    template <int Q>
    static void sweep_tile(const Packed& w, const Activations& x, const Tile& tile) {
        int64_t row = 0;
        for (; row + kTileRows < x.rows; row += 2 * kTileRows) blocks<Q, 2>(w, x, tile, row);
        if (row < x.rows) blocks<Q, 1>(w, x, tile, row);
    }

    // B blocks of rows times Q panels; sums stay in tiles 2 * block + panel.
    template <int Q, int B>
    static __attribute__((noinline)) void blocks(const Packed& w, const Activations& x, const Tile& tile,
                                                 int64_t row) {
        const int64_t stride = kGroup * kTileRows;  // codes from one group to the next
        const uint16_t* upper = (const uint16_t*)x.codes + kGroup * row * w.groups + stride * tile.begin;
        const uint16_t* lower = upper + stride * w.groups;
        const uint8_t *left = tile.weights[0], *right = tile.weights[Q - 1];
        float* carry[] = {tile.carry + kPanel * row, tile.carry + kPanel * (x.padded + row)};
        if (tile.begin == 0) {
            _tile_zero(0);
            if constexpr (Q == 2) _tile_zero(1);
            if constexpr (B == 2) _tile_zero(2);
            if constexpr (Q == 2 && B == 2) _tile_zero(3);
        } else {
            _tile_loadd(0, carry[0], 64);
            if constexpr (Q == 2) _tile_loadd(1, carry[1], 64);
            if constexpr (B == 2) _tile_loadd(2, carry[0] + kPanel * kTileRows, 64);
            if constexpr (Q == 2 && B == 2) _tile_loadd(3, carry[1] + kPanel * kTileRows, 64);
        }
        for (int64_t g = tile.begin; g < tile.end; g++, upper += stride, lower += stride) {
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
        _tile_stored(0, carry[0], 64);
        if constexpr (Q == 2) _tile_stored(1, carry[1], 64);
        if constexpr (B == 2) _tile_stored(2, carry[0] + kPanel * kTileRows, 64);
        if constexpr (Q == 2 && B == 2) _tile_stored(3, carry[1] + kPanel * kTileRows, 64);
        finish(tile.carry);
    }
};

// Panels [panel, panel + Q); the carry holds (Q, padded, 16) sums.
template <class Kernel, class Reader, bool kInPlace, int Q>
void multiply_panels(const Packed& w, const Activations& x, const Output& out, int64_t panel,
                     uint8_t* scratch, Storage* storage) {
    walk_tiles<Kernel, Reader, kInPlace, Q>(
        w, panel, scratch, storage, Kernel::template expand_groups<Reader>, [&](const Tile& tile) {
            finish(scratch);
            Kernel::template sweep_tile<Q>(w, x, tile);
            if (tile.end < w.groups) return;
            for (int q = 0; q < Q; q++) {
                const int64_t first = kPanel * (panel + q), left = w.out - first;
                for (int64_t row = 0; row < x.rows; row++)
                    store_outputs(out, row * w.out + first,
                                  load_floats(tile.carry + kPanel * (q * x.padded + row), kPanel),
                                  left < kPanel ? int(left) : kPanel);
            }
        });
}

template <class Kernel, class Reader, bool kInPlace>
void multiply_tiles(const Packed& w, const Activations& x, const Output& out, int64_t panel, int64_t end,
                    uint8_t* scratch) {
    constexpr int Q = Kernel::kPanels;
    Storage storage[Q];
    configure(w.parts);
    for (; panel + Q <= end; panel += Q)
        multiply_panels<Kernel, Reader, kInPlace, Q>(w, x, out, panel, scratch, storage);
    for (; panel < end; panel++)
        multiply_panels<Kernel, Reader, kInPlace, 1>(w, x, out, panel, scratch, storage);
    _tile_release();
}

template <class Kernel>
void multiply_stored(const Packed& w, const Activations& x, const Output& out, int64_t begin, int64_t end,
                     uint8_t* scratch) {
    constexpr int V = Kernel::kValues;
    if (w.layout == kDense)
        multiply_tiles<Kernel, Dense<V>, V == kInt8>(w, x, out, begin, end, scratch);
    else if (w.layout == kBitmap)
        multiply_tiles<Kernel, Sparse<V, true>, false>(w, x, out, begin, end, scratch);
    else
        multiply_tiles<Kernel, Sparse<V, false>, false>(w, x, out, begin, end, scratch);
}

bool by_tiles(const Packed& w, const Activations& x) {
    return x.block == kTileRows && w.layout != kBySteps && w.values != kFloat32;
}

// ---- the tables

void prepare_ints(const Packed* w, const void* x, int dtype, int64_t begin, int64_t end,
                  const Activations* to) {
    gossamer_int_avx512.prepare(w, x, dtype, begin, end, to);
}

void prepare_floats(const Packed* w, const void* x, int dtype, int64_t begin, int64_t end,
                    const Activations* to) {
    gossamer_float_avx512.prepare(w, x, dtype, begin, end, to);
}

void multiply_ints(const Packed* w, const Activations* x, const Output* out, int64_t begin, int64_t end,
                   uint8_t* scratch) {
    if (!by_tiles(*w, *x))
        gossamer_int_avx512.multiply(w, x, out, begin, end, scratch);
    else if (w->values == kInt8)
        multiply_stored<IntTiles<kInt8>>(*w, *x, *out, begin, end, scratch);
    else if (w->values == kInt4)
        multiply_stored<IntTiles<kInt4>>(*w, *x, *out, begin, end, scratch);
    else
        multiply_stored<IntTiles<kInt3>>(*w, *x, *out, begin, end, scratch);
}

void multiply_floats(const Packed* w, const Activations* x, const Output* out, int64_t begin, int64_t end,
                     uint8_t* scratch) {
    if (!by_tiles(*w, *x))
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
    alignas(64) int8_t a[16][64];
    alignas(64) uint8_t b[16][64];
    alignas(64) int32_t c[16][16];
    Numbers numbers;
    for (int i = 0; i < 16 * 64; i++) {
        a[i / 64][i % 64] = int8_t(numbers.below(255) - 127);
        b[i / 64][i % 64] = uint8_t(numbers.below(256));
    }
    a[0][0] = -127, b[0][0] = 255;
    configure(parts);
    finish(a), finish(b);
    multiply_codes(a[0], b[0], c);
    _tile_release();
    for (int row = 0; row < 16; row++)
        for (int output = 0; output < 16; output++) {
            int32_t sum = 0;
            for (int k = 0; k < kGroup / parts; k++) sum += a[row][k] * b[k / 4][4 * output + k % 4];
            if (c[row][output] != sum) return false;
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
    configure(1);
    finish(a), finish(b);
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_zero(0);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stored(0, c, 64);
    finish(c);
    _tile_release();
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
