// y = x Wᵀ for int8, int4, int3, nl4 and nl3 values with int8 activations: one dot product of unsigned
// codes and signed activations per step, groups added in order in float32 (docs/architecture.md,
// "Activations").
#include "multiply.h"

namespace gossamer {
namespace {

// Row `row` of x to int8 codes, one scale a group, and minus the sums that the zero code adds.
template <class T, Floats (*load_some)(const T*, int)>
void quantize_row(const Packed& w, const T* x, int64_t row, const Activations& to) {
    const int32_t zero_code = zero_of(w.values);
    const Place place = place_of(to, w.groups, row);
    const int64_t in_block = row_of_block(to, row);
    for (int64_t g = 0; g < w.groups; g++) {
        int64_t left = w.in - kGroup * g;
        Floats v[4];
        GOSSAMER_UNROLL(4)
        for (int j = 0; j < 4; j++) {
            int64_t n = left - 16 * j;
            v[j] = load_some(x + kGroup * g + (n > 0 ? 16 * j : 0), n < 0 ? 0 : n > 16 ? 16 : int(n));
        }
        float top = largest(v);
        float inverse = 127.0f / top;
        if (!(inverse <= __FLT_MAX__)) inverse = 0;  // all zero, too small to invert, or NaN
        int64_t at = place.first + g * place.step;
        int8_t* codes = (int8_t*)to.codes + kGroup * at;
        Ints rounded[4];
        GOSSAMER_UNROLL(4)
        for (int j = 0; j < 4; j++) rounded[j] = store_codes(codes + 16 * j, mul(v[j], floats(inverse)));
        to.scales[at] = top * float(1.0 / 127.0);
        int32_t* negative = to.negatives + (at - in_block) * negatives_of(w) + in_block;
        if (w.layout == kBySteps) {
            for (int s = 0; s < kSteps; s++, codes += 4, negative += place.step)
                negative[0] = -zero_code * (codes[0] + codes[1] + codes[2] + codes[3]);
            continue;
        }
        Ints low = add(rounded[0], rounded[1]), high = add(rounded[2], rounded[3]);
        if (w.parts == 1) {
            negative[0] = -zero_code * total(add(low, high));
        } else {
            negative[0] = -zero_code * total(low);
            negative[place.step] = -zero_code * total(high);
        }
    }
}

void prepare(const Packed* w, const void* x, int dtype, int64_t begin, int64_t end, const Activations* to) {
    for (int64_t row = begin; row < end; row++) {
        if (dtype == kF32)
            quantize_row<float, load_floats>(*w, (const float*)x + row * w->in, row, *to);
        else
            quantize_row<uint16_t, load_bfloat16>(*w, (const uint16_t*)x + row * w->in, row, *to);
    }
}

template <int V>
struct IntKernel {
    static constexpr int kValues = V;
    static constexpr int kRowBlock = kRegisters == 32 ? 8 : 4;
    static constexpr int kSums = 1;
    static constexpr int kSweepPanels = kRegisters == 32 ? 2 : 1;
    static constexpr int sweep_rows(int) { return kRowBlock; }

    static constexpr int kHalf = kSteps / 2;  // a scale of 32 inputs

    // Sums of one part of a panel-group times their scales, added to y.
    template <int R, int C>
    static GOSSAMER_INLINE void scale(Ints (&sum)[R][C], const uint16_t* scales, const float* scales_x,
                                      Floats (&y)[R][1]) {
        Floats scale = load_halves(scales);
        GOSSAMER_UNROLL(8)
        for (int r = 0; r < R; r++) {
            GOSSAMER_UNROLL(4)
            for (int c = 1; c < C; c++) sum[r][0] = gossamer::add(sum[r][0], sum[r][c]);
            y[r][0] = mul_add(mul(scale, floats(scales_x[r])), to_floats(sum[r][0]), y[r][0]);
        }
    }

    template <int Q, int R, class Reader>
    static GOSSAMER_INLINE void add(Reader (&readers)[Q], const Packed& w, const Activations& x,
                                    int64_t panel, int64_t row, int64_t begin, int64_t end,
                                    Floats (&y)[Q][R][1]) {
        constexpr int kChains = Q * R >= 4 ? 1 : 4 / R;  // independent sums hide the latency of dot products
        const Place place = place_of(x, w.groups, row);
        const int64_t in_block = row_of_block(x, row), at = place.first + begin * place.step;
        const uint16_t* scales = w.scales + (panel * w.groups + begin) * w.parts * kPanel;
        const int64_t panel_scales = w.groups * w.parts * kPanel;  // from one panel's scales to the next's
        const int8_t* codes = (const int8_t*)x.codes + kGroup * at;
        const float* scales_x = x.scales + at;
        const int32_t* negatives = x.negatives + (at - in_block) * negatives_of(w) + in_block;
        for (int64_t g = begin; g < end; g++) {
            GOSSAMER_UNROLL(2)
            for (int q = 0; q < Q; q++) readers[q].next();
            Ints sum[Q][R][kChains];
            if constexpr (Reader::kBySteps) {
                for (int part = 0; part < w.parts; part++, scales += kPanel) {
                    uint32_t kept = readers[0].steps();
                    if (w.parts == 2) kept &= part ? 0xff00 : 0x00ff;
                    if (!kept) continue;
                    if constexpr (Reader::kListed)
                        add_steps(readers, kept, codes, negatives, place.step, sum);
                    else
                        add_gathered(readers[0], kept, codes, sum[0]);
                    GOSSAMER_UNROLL(2)
                    for (int q = 0; q < Q; q++) scale(sum[q], scales + q * panel_scales, scales_x, y[q]);
                }
                negatives += kSteps * place.step;
            } else {
                GOSSAMER_UNROLL(2)
                for (int half = 0; half < 2; half++) {
                    if (half == 0 || w.parts == 2) {
                        GOSSAMER_UNROLL(8)
                        for (int r = 0; r < R; r++) {
                            GOSSAMER_UNROLL(2)
                            for (int q = 0; q < Q; q++) {
                                sum[q][r][0] = ints(negatives[r]);
                                GOSSAMER_UNROLL(4)
                                for (int c = 1; c < kChains; c++) sum[q][r][c] = ints(0);
                            }
                        }
                        negatives += place.step;
                    }
                    GOSSAMER_UNROLL(8)
                    for (int i = 0; i < kHalf; i++) {
                        int s = kHalf * half + i;
                        GOSSAMER_UNROLL(2)
                        for (int q = 0; q < Q; q++) {
                            Bytes weights = readers[q].piece(s);
                            GOSSAMER_UNROLL(8)
                            for (int r = 0; r < R; r++)
                                sum[q][r][s % kChains] = dot8<V == kInt8>(sum[q][r][s % kChains], weights,
                                                                          codes + kGroup * r + 4 * s);
                        }
                    }
                    if (half == 1 || w.parts == 2) {
                        GOSSAMER_UNROLL(2)
                        for (int q = 0; q < Q; q++) scale(sum[q], scales + q * panel_scales, scales_x, y[q]);
                        scales += kPanel;
                    }
                }
            }
            codes += kGroup * place.step;
            scales_x += place.step;
        }
    }

    // The steps `kept` of a group in Q panels; `negatives` has kSteps entries of `stride` rows.
    template <int Q, int R, int C, class Reader>
    static GOSSAMER_INLINE void add_steps(Reader (&readers)[Q], uint32_t kept, const int8_t* codes,
                                          const int32_t* negatives, int64_t stride, Ints (&sum)[Q][R][C]) {
        Ints negative = ints(0);  // lane r: of row r
        GOSSAMER_UNROLL(2)
        for (int q = 0; q < Q; q++) {
            GOSSAMER_UNROLL(8)
            for (int r = 0; r < R; r++) {
                GOSSAMER_UNROLL(4)
                for (int c = 0; c < C; c++) sum[q][r][c] = ints(0);
            }
        }
        while (kept) {
            GOSSAMER_UNROLL(4)
            for (int c = 0; c < C; c++) {
                if (c > 0 && !kept) break;
                const int s = __builtin_ctz(kept);
                kept &= kept - 1;
                GOSSAMER_UNROLL(2)
                for (int q = 0; q < Q; q++) {
                    Bytes weights = readers[q].take();
                    GOSSAMER_UNROLL(8)
                    for (int r = 0; r < R; r++)
                        sum[q][r][c] = dot8<V == kInt8>(sum[q][r][c], weights, codes + kGroup * r + 4 * s);
                }
                negative = gossamer::add(negative, load_ints(negatives + s * stride, R));
            }
        }
        int32_t of_row[16];
        store_ints(of_row, negative);
        GOSSAMER_UNROLL(8)
        for (int r = 0; r < R; r++) {
            GOSSAMER_UNROLL(2)
            for (int q = 0; q < Q; q++) sum[q][r][0] = gossamer::add(sum[q][r][0], ints(of_row[r]));
        }
    }

    // The same where they are decoded as they are met, eight at a time: activations of the kept steps are
    // gathered, zeros behind them, so that the loop hardly depends on how many there are.
    template <int R, int C, class Reader>
    static GOSSAMER_INLINE void add_gathered(const Reader& reader, uint32_t kept, const int8_t* codes,
                                             Ints (&sum)[R][C]) {
        constexpr int32_t kZero = kZeroCode<V>;
        alignas(64) int8_t gathered[R][kGroup];
        const int before = __builtin_popcount(reader.steps() & (kept & 0xff ? 0 : 0xff));
        GOSSAMER_UNROLL(8)
        for (int r = 0; r < R; r++) {
            gather_steps(codes + kGroup * r, kept, gathered[r]);
            sum[r][0] = ints(-kZero * sum_codes(gathered[r]));
            GOSSAMER_UNROLL(4)
            for (int c = 1; c < C; c++) sum[r][c] = ints(0);
        }
        const int steps = __builtin_popcount(kept);
        for (int i = 0; i < steps; i += 8) {
            GOSSAMER_UNROLL(8)
            for (int j = 0; j < 8; j++) {
                Bytes weights = reader.step(before + i + j);
                GOSSAMER_UNROLL(8)
                for (int r = 0; r < R; r++)
                    sum[r][j % C] = dot8<V == kInt8>(sum[r][j % C], weights, gathered[r] + 4 * (i + j));
            }
        }
    }

    static GOSSAMER_INLINE Floats result(const Floats (&y)[1]) { return y[0]; }
};

}  // namespace
}  // namespace gossamer

extern "C" {
extern const gossamer::Family GOSSAMER_EXPORT(int);
const gossamer::Family GOSSAMER_EXPORT(int) = {
    gossamer::prepare,
    gossamer::multiply<gossamer::IntKernel<gossamer::kInt8>, gossamer::IntKernel<gossamer::kInt4>,
                       gossamer::IntKernel<gossamer::kInt3>, gossamer::IntKernel<gossamer::kNl4>,
                       gossamer::IntKernel<gossamer::kNl3>>
};
}
