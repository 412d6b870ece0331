// y = x Wᵀ over a weight that lies input-major (layout columns): of the inputs of a row that has enough
// zeros, only those that are not zero are read, and multiplied.
//
//   values   | panel 0: input 0 | input 1 | ... | panel 1: input 0 | ... |     panels of 256 outputs
//   scales   | panel 0: group 0 | group 1 | ... | panel 1: group 0 | ... |     one float16 an output
//
//   an input's 128 outputs, where j is 0..3, L the 16-byte lane and r the word of it:
//     int4       64 bytes    low nibbles outputs 0..63, high ones 64..127, each in this order:
//     int8       2 x 64      byte 16 L + 4 r + j = output 16 r + 4 L + j
//     bfloat16   4 x 64      word i of register n = output 32 n + i, and 32 n + 16 + i in its upper half
//     float32    8 x 64      in order
//
// In that order of bytes, four inputs interleaved within lanes are the steps of the other layouts: 16 outputs
// in a row, four inputs of each side by side. Sums of codes are exact, groups are added in order, and a group
// without a code other than zero would add zero: so results have the bits of the dense layout's.
//
// Rows are multiplied one after the other, by as many groups as stay in a cache together; sums wait in
// `scratch` in between. Many rows of codes meet all inputs, interleaved once for all of them, which gives the
// same bits. A row's result does not depend on the others.
#include "outputs.h"

namespace gossamer {
namespace {

constexpr int64_t kBlockBytes = 32 << 10;       // of weights, that all rows meet before the next
constexpr int64_t kAheadBytes = 8 << 10;        // of weights, between prefetching and multiplying them
constexpr int kScalesAhead = 4 * kColumnPanel;  // scales, likewise
constexpr int64_t kFewRows = 16;                // prefetch what they read; more find it in a cache
constexpr int64_t kSingleRows = 8;              // more rows of codes are multiplied together,
constexpr double kMostListed = 0.25;            // unless they read less than this share of the inputs
constexpr int kInputs = 16;                     // whose outputs are read side by side
constexpr int kUnits = kColumnPanel / 128;      // of a panel; the last one may have fewer

// ---- lists of what is read

template <class T>
struct List {
    int32_t* inputs;
    T* values;
    bool all;
    int32_t count = 0;

    List(const Active& to, int64_t at, bool all_)
        : inputs(to.inputs + at), values((T*)to.values + at), all(all_) {}

    // `some` inputs from `first` on, a multiple of 16.
    void add(const T* x, int64_t first, int some) {
        for (int i = 0; i < some; i += 16) {
            if (!all) {
                count += list_active(x + i, int32_t(first) + i, inputs + count, values + count);
                continue;
            }
            for (int j = 0; j < 16; j++) inputs[count + j] = int32_t(first) + i + j;
            __builtin_memcpy(values + count, x + i, 16 * sizeof(T));
            count += 16;
        }
    }

    // Up to whole quads, with inputs that add nothing.
    void fill_quad() {
        for (; count % 4; count++) {
            inputs[count] = inputs[count - 1];
            values[count] = 0;
        }
    }

    // Something to prefetch past the end.
    void finish() {
        const int32_t last = count ? inputs[count - 1] : 0;
        for (int i = 0; i < kAhead; i++) inputs[count + i] = last;
    }
};

// Lists a row and returns how many inputs are read; `all`: zeros too.
int64_t list_codes(const Packed& w, int64_t row, const Activations& x, bool all) {
    const Place place = place_of(x, w.groups, row);
    int32_t* ends = x.active.ends + row * w.groups * w.parts;
    List<int8_t> list(x.active, row * active_room(w.groups), all);
    const int width = kGroup / w.parts;
    for (int64_t g = 0; g < w.groups; g++) {
        const int8_t* codes = (const int8_t*)x.codes + kGroup * (place.first + g * place.step);
        for (int first = 0; first < kGroup; first += width) {
            list.add(codes + first, kGroup * g + first, width);
            list.fill_quad();
            *ends++ = list.count;
        }
    }
    list.finish();
    return list.count;
}

int64_t list_floats(const Packed& w, int64_t row, const Activations& x, bool all) {
    const Place place = place_of(x, w.groups, row);
    int32_t* ends = x.active.ends + row * w.groups;
    List<float> list(x.active, row * active_room(w.groups), all);
    for (int64_t g = 0; g < w.groups; g++) {
        const int64_t from = kGroup * (place.first + g * place.step);
        for (int i = 0; i < kGroup; i += 16) {
            float v[16];
            store_floats(v,
                         w.values == kBFloat16 ? load_bfloat16((const uint16_t*)x.codes + from + i, 16)
                                               : load_floats((const float*)x.codes + from + i, 16),
                         16);
            list.add(v, kGroup * g + i, 16);
        }
        *ends++ = list.count;
    }
    list.finish();
    return list.count;
}

void prepare(const Packed* w, const void*, int, int64_t begin, int64_t end, const Activations* to) {
    const auto list = w->values >= kInt8 ? list_codes : list_floats;
    for (int64_t row = begin; row < end; row++)
        if (double(list(*w, row, *to, false)) > kMostActive * double(w->in)) list(*w, row, *to, true);
}

// ---- products

// Some outputs of one panel: those that a thread multiplies together.
struct Piece {
    const uint8_t* values;   // of input 0
    int64_t stride;          // bytes from one input to the next
    const uint16_t* scales;  // of group 0
    int64_t width;           // scales from one part of a group to the next: outputs of the panel
    int units;               // of 128 outputs
};

// One row of activations, and what of it is read.
struct Row {
    const uint8_t* codes;  // [group] (x.step)
    const int32_t* inputs;
    const void* values;
    const int32_t* ends;
    const float* scales;       // [group] (x.step)
    const int32_t* negatives;  // [group][part] (x.step)
    int64_t step;
};

GOSSAMER_INLINE Row row_of(const Packed& w, const Activations& x, int64_t row) {
    const Place place = place_of(x, w.groups, row);
    const int64_t at = row * active_room(w.groups), in_block = row_of_block(x, row);
    const int size = w.values >= kInt8 ? 1 : 4;
    return {(const uint8_t*)x.codes + kGroup * place.first * element_bytes(w.values),
            x.active.inputs + at,
            (const uint8_t*)x.active.values + size * at,
            x.active.ends + row * w.groups * w.parts,
            x.scales + place.first,
            x.negatives + (place.first - in_block) * w.parts + in_block,
            place.step};
}

// Prefetches a row's inputs, line by line, kAheadBytes before they are multiplied; not kOn: nothing.
template <bool kOn>
struct Ahead {
    const uint8_t* values;
    int64_t stride;
    const int32_t* inputs;
    int line = 0, lines;

    // From entry `first` of the list on; at the start of a row, what comes first is prefetched here.
    GOSSAMER_INLINE Ahead(const Piece& piece, const int32_t* list, int64_t first, int bytes)
        : values(piece.values), stride(piece.stride), inputs(list + first), lines(piece.units * bytes / 64) {
        const int64_t ahead = kAheadBytes / (64 * lines);
        if (first == 0)
            fetch(int(ahead * lines));
        else
            inputs += ahead;
    }

    GOSSAMER_INLINE void fetch(int some) {
        if (!kOn) return;
        for (int i = 0; i < some; i++) {
            __builtin_prefetch(values + *inputs * stride + 64 * line);
            if (++line == lines) line = 0, inputs++;
        }
    }
};

template <int V>
struct Ints128 {
    static constexpr int kBytes = V == kInt4 ? 64 : 128;
    static constexpr bool kSweeps = true;
    static constexpr int kExpanded = 512;                   // bytes of four inputs, a byte a code
    static constexpr int kRows = kRegisters == 32 ? 2 : 1;  // that meet expanded codes together

    // Four inputs as steps: register r has outputs 16 r .. 16 r + 15.
    static GOSSAMER_INLINE void quad(const uint8_t* values, const int64_t (&at)[4], Bytes (&steps)[8]) {
        GOSSAMER_UNROLL(2)
        for (int n = 0; n < kBytes; n += 64) {
            Bytes mixed[4];
            interleave(load(values + at[0] + n), load(values + at[1] + n), load(values + at[2] + n),
                       load(values + at[3] + n), mixed);
            GOSSAMER_UNROLL(4)
            for (int r = 0; r < 4; r++) {
                steps[n / 16 + r] = V == kInt4 ? low_nibbles(mixed[r]) : mixed[r];
                if (V == kInt4) steps[4 + r] = high_nibbles(mixed[r]);
            }
        }
    }

    // Four inputs, from `at` of the list on.
    static GOSSAMER_INLINE void add_quad(const uint8_t* values, int64_t stride, const Row& row, int64_t at,
                                         Ints (&sum)[8]) {
        const int32_t* inputs = row.inputs + at;
        Bytes steps[8];
        quad(values, {inputs[0] * stride, inputs[1] * stride, inputs[2] * stride, inputs[3] * stride}, steps);
        GOSSAMER_UNROLL(8)
        for (int r = 0; r < 8; r++)
            sum[r] = dot8<V == kInt8>(sum[r], steps[r], (const int8_t*)row.values + at);
    }

    // Sums of one part of a group times their scales, added to y.
    static GOSSAMER_INLINE void scale(const Ints (&sum)[8], const uint16_t* scales, float scale_x, float* y) {
        GOSSAMER_UNROLL(8)
        for (int r = 0; r < 8; r++) {
            const Floats scale = mul(load_halves(scales + 16 * r), floats(scale_x));
            store_floats(y + 16 * r, mul_add(scale, to_floats(sum[r]), load_floats(y + 16 * r, 16)), 16);
        }
    }

    // Entries [begin, end) of the list, of one part of a group, added to `sums`: some inputs at a time, of
    // which all outputs are read.
    template <bool kOn>
    static GOSSAMER_INLINE void add_part(const Piece& piece, const Row& row, int64_t begin, int64_t end,
                                         Ahead<kOn>& ahead, Ints (&sums)[kUnits][8]) {
        for (int64_t from = begin; from < end; from += kInputs) {
            const int64_t to = from + kInputs < end ? from + kInputs : end;
            for (int unit = 0; unit < piece.units; unit++) {
                Ints sum[8];
                GOSSAMER_UNROLL(8)
                for (int r = 0; r < 8; r++) sum[r] = sums[unit][r];
                for (int64_t at = from; at < to; at += 4) {
                    ahead.fetch(kBytes / 16);
                    add_quad(piece.values + unit * kBytes, piece.stride, row, at, sum);
                }
                GOSSAMER_UNROLL(8)
                for (int r = 0; r < 8; r++) sums[unit][r] = sum[r];
            }
        }
    }

    template <bool kOn>
    static GOSSAMER_INLINE void add(const Packed& w, const Piece& piece, const Row& row, int64_t begin,
                                    int64_t end, float* y) {
        int64_t first = begin ? row.ends[begin * w.parts - 1] : 0;
        Ahead<kOn> ahead(piece, row.inputs, first, kBytes);
        for (int64_t g = begin; g < end; g++) {
            const int32_t* ends = row.ends + g * w.parts;
            const float scale_x = row.scales[g * row.step];
            // a group that holds NaN or infinity has no codes, and makes its row NaN
            if (ends[w.parts - 1] == first && scale_x <= __FLT_MAX__) continue;
            for (int part = 0; part < w.parts; part++) {
                const Ints negative = ints(row.negatives[(g * w.parts + part) * row.step]);
                Ints sums[kUnits][8];
                for (int unit = 0; unit < piece.units; unit++)
                    for (int r = 0; r < 8; r++) sums[unit][r] = negative;
                add_part(piece, row, first, ends[part], ahead, sums);
                first = ends[part];
                const uint16_t* scales = piece.scales + (g * w.parts + part) * piece.width;
                for (int unit = 0; unit < piece.units; unit++) {
                    for (int i = 0; i < 128; i += 32)
                        __builtin_prefetch(scales + kScalesAhead + 128 * unit + i);
                    scale(sums[unit], scales + 128 * unit, scale_x, y + 128 * unit);
                }
            }
        }
    }

    // Groups [begin, end) of one unit, all inputs in order.
    static void expand(const Piece& piece, int unit, int64_t begin, int64_t end, uint8_t* to) {
        const int64_t stride = piece.stride;
        for (int64_t i = kGroup * begin; i < kGroup * end; i += 4, to += kExpanded) {
            Bytes steps[8];
            quad(piece.values + unit * kBytes + i * stride, {0, stride, 2 * stride, 3 * stride}, steps);
            GOSSAMER_UNROLL(8)
            for (int r = 0; r < 8; r++) store(to + 64 * r, steps[r]);
        }
    }

    // The same groups, expanded, for R rows whose sums lie kColumnPanel floats apart.
    template <int R>
    static __attribute__((noinline)) void add_expanded(const Packed& w, const Piece& piece, int unit,
                                                       const Row* rows, int64_t begin, int64_t end,
                                                       const uint8_t* steps, float* y) {
        const int quads = kSteps / w.parts;
        for (int64_t part = begin * w.parts; part < end * w.parts; part++) {
            const int64_t g = part / w.parts, first = part % w.parts * (kGroup / w.parts);
            Ints sum[R][8];
            const int8_t* codes[R];
            GOSSAMER_UNROLL(2)
            for (int n = 0; n < R; n++) {
                codes[n] = (const int8_t*)rows[n].codes + kGroup * g * rows[n].step + first;
                GOSSAMER_UNROLL(8)
                for (int r = 0; r < 8; r++) sum[n][r] = ints(rows[n].negatives[part * rows[n].step]);
            }
            for (int q = 0; q < quads; q++, steps += kExpanded) {
                GOSSAMER_UNROLL(8)
                for (int r = 0; r < 8; r++) {
                    const Bytes weights = load(steps + 64 * r);
                    GOSSAMER_UNROLL(2)
                    for (int n = 0; n < R; n++)
                        sum[n][r] = dot8<V == kInt8>(sum[n][r], weights, codes[n] + 4 * q);
                }
            }
            for (int n = 0; n < R; n++)
                scale(sum[n], piece.scales + part * piece.width + 128 * unit,
                      rows[n].scales[g * rows[n].step], y + n * kColumnPanel + 128 * unit);
        }
    }

    // Many rows, on all inputs.
    static void sweep(const Packed& w, const Piece& piece, const Activations& x, float* sums,
                      uint8_t* steps) {
        for (int64_t g = 0; g < w.groups; g += kColumnSpan)
            for (int unit = 0; unit < piece.units; unit++) {
                const int64_t end = g + kColumnSpan < w.groups ? g + kColumnSpan : w.groups;
                expand(piece, unit, g, end, steps);
                int64_t row = 0;
                for (; row + kRows <= x.rows; row += kRows) {
                    Row rows[kRows];
                    for (int n = 0; n < kRows; n++) rows[n] = row_of(w, x, row + n);
                    add_expanded<kRows>(w, piece, unit, rows, g, end, steps, sums + row * kColumnPanel);
                }
                for (; row < x.rows; row++) {
                    const Row one = row_of(w, x, row);
                    add_expanded<1>(w, piece, unit, &one, g, end, steps, sums + row * kColumnPanel);
                }
            }
    }
};

template <int V>
struct Floats128 {
    static constexpr int kBytes = V == kBFloat16 ? 256 : 512;
    static constexpr bool kSweeps = false;

    static GOSSAMER_INLINE void add_input(const uint8_t* values, Floats x, Floats (&sum)[8]) {
        GOSSAMER_UNROLL(8)
        for (int n = 0; n < kBytes / 64; n++) {
            const Bytes weights = load(values + 64 * n);
            if constexpr (V == kBFloat16) {
                sum[2 * n] = mul_add(lower_halves(weights), x, sum[2 * n]);
                sum[2 * n + 1] = mul_add(upper_halves(weights), x, sum[2 * n + 1]);
            } else {
                sum[n] = mul_add(as_floats(weights), x, sum[n]);
            }
        }
    }

    template <bool kOn>
    static GOSSAMER_INLINE void add(const Packed&, const Piece& piece, const Row& row, int64_t begin,
                                    int64_t end, float* y) {
        const int64_t first = begin ? row.ends[begin - 1] : 0, last = row.ends[end - 1];
        Ahead<kOn> ahead(piece, row.inputs, first, kBytes);
        for (int64_t from = first; from < last; from += kInputs) {
            const int64_t to = from + kInputs < last ? from + kInputs : last;
            for (int unit = 0; unit < piece.units; unit++) {
                const uint8_t* values = piece.values + unit * kBytes;
                Floats sum[8];
                GOSSAMER_UNROLL(8)
                for (int r = 0; r < 8; r++) sum[r] = load_floats(y + 128 * unit + 16 * r, 16);
                for (int64_t at = from; at < to; at++) {
                    ahead.fetch(kBytes / 64);
                    add_input(values + row.inputs[at] * piece.stride, floats(((const float*)row.values)[at]),
                              sum);
                }
                GOSSAMER_UNROLL(8)
                for (int r = 0; r < 8; r++) store_floats(y + 128 * unit + 16 * r, sum[r], 16);
            }
        }
    }
};

// 128 x units outputs of one row.
void write(const Packed& w, const float* sums, int64_t row, int64_t output, int units, const Output& out) {
    for (int i = 0; i < 128 * units && output + i < w.out; i += 16) {
        const int64_t left = w.out - output - i, at = row * w.out + output + i;
        const int n = left < 16 ? int(left) : 16;
        store_outputs(out, at, load_floats(sums + i, 16), n);
    }
}

// Inputs that are read, of all rows together.
double listed(const Packed& w, const Activations& x) {
    const int64_t parts = w.groups * w.parts;
    double sum = 0;
    for (int64_t row = 1; row <= x.rows; row++) sum += x.active.ends[row * parts - 1];
    return sum;
}

template <class Kernel>
void multiply_values(const Packed& w, const Activations& x, const Output& out, int64_t begin, int64_t end,
                     float* scratch) {
    const int64_t all = w.panels / kColumnUnit, inputs = kGroup * w.groups;
    while (begin < end) {
        const int64_t panel = begin / kUnits * kUnits;
        const int64_t of_panel = all - panel < kUnits ? all - panel : kUnits;
        const int64_t to = end - panel < of_panel ? end : panel + of_panel, before = begin - panel;
        const Piece piece{w.data + (panel * inputs + before) * Kernel::kBytes, of_panel * Kernel::kBytes,
                          w.scales ? w.scales + (panel * w.groups * w.parts + before) * 128 : nullptr,
                          of_panel * 128, int(to - begin)};
        const int64_t bytes = kGroup * piece.units * Kernel::kBytes;  // of a group
        const int64_t step = bytes < kBlockBytes ? kBlockBytes / bytes : 1;
        for (int64_t i = 0; i < x.rows * kColumnPanel; i += 16) store_floats(scratch + i, floats(0), 16);
        bool swept = false;
        if constexpr (Kernel::kSweeps) {
            swept = x.rows > kSingleRows && listed(w, x) > kMostListed * double(x.rows * inputs);
            if (swept) Kernel::sweep(w, piece, x, scratch, (uint8_t*)(scratch + x.padded * kColumnPanel));
        }
        for (int64_t g = 0; g < w.groups && !swept; g += step) {
            const int64_t last = g + step < w.groups ? g + step : w.groups;
            for (int64_t row = 0; row < x.rows; row++) {
                float* sums = scratch + row * kColumnPanel;
                if (x.rows <= kFewRows)
                    Kernel::template add<true>(w, piece, row_of(w, x, row), g, last, sums);
                else
                    Kernel::template add<false>(w, piece, row_of(w, x, row), g, last, sums);
            }
        }
        for (int64_t row = 0; row < x.rows; row++)
            write(w, scratch + row * kColumnPanel, row, 128 * begin, piece.units, out);
        begin = to;
    }
}

void multiply(const Packed* w, const Activations* x, const Output* out, int64_t begin, int64_t end,
              uint8_t* scratch) {
    float* sums = (float*)scratch;
    if (w->values == kInt4)
        multiply_values<Ints128<kInt4>>(*w, *x, *out, begin, end, sums);
    else if (w->values == kInt8)
        multiply_values<Ints128<kInt8>>(*w, *x, *out, begin, end, sums);
    else if (w->values == kBFloat16)
        multiply_values<Floats128<kBFloat16>>(*w, *x, *out, begin, end, sums);
    else
        multiply_values<Floats128<kFloat32>>(*w, *x, *out, begin, end, sums);
}

}  // namespace
}  // namespace gossamer

extern "C" {
extern const gossamer::Family GOSSAMER_EXPORT(columns);
const gossamer::Family GOSSAMER_EXPORT(columns) = {gossamer::prepare, gossamer::multiply};
}
