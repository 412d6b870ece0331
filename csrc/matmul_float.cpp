// y = x Wᵀ for float32 and bfloat16 values: activations rounded to the value type, sums in float32.
//
// A lane sums one (float32) or two (bfloat16) of the four inputs of a step for one output; neighbouring lanes
// meet at the end of the panel:
//     bfloat16   sum 0: | o0 k01 | o0 k23 | o1 k01 | ... | o7 k23 |     sum 1: outputs 8..15
//     float32    sum 0: | o0 k0 | o0 k1 | o0 k2 | o0 k3 | ... | o3 k3 | sums 1..3: outputs 4..15
#include "multiply.h"

namespace gossamer {
namespace {

template <class T, Floats (*load_some)(const T*, int)>
void round_row(const Packed& w, const T* x, int64_t row, const Activations& to) {
    const Place place = place_of(to, w.groups, row);
    for (int64_t g = 0; g < w.groups; g++) {
        int64_t left = w.in - kGroup * g, at = kGroup * (place.first + g * place.step);
        for (int j = 0; j < 4; j++) {
            int64_t n = left - 16 * j;
            Floats v = load_some(x + kGroup * g + (n > 0 ? 16 * j : 0), n < 0 ? 0 : n > 16 ? 16 : int(n));
            if (w.values == kBFloat16)
                store_bfloat16((uint16_t*)to.codes + at + 16 * j, v, 16);
            else
                store_floats((float*)to.codes + at + 16 * j, v, 16);
        }
    }
}

void prepare(const Packed* w, const void* x, int dtype, int64_t begin, int64_t end, const Activations* to) {
    for (int64_t row = begin; row < end; row++) {
        if (dtype == kF32)
            round_row<float, load_floats>(*w, (const float*)x + row * w->in, row, *to);
        else
            round_row<uint16_t, load_bfloat16>(*w, (const uint16_t*)x + row * w->in, row, *to);
    }
}

GOSSAMER_INLINE Floats dot(Floats sum, const Bytes& w, const float* x) { return dot32(sum, w, x); }
GOSSAMER_INLINE Floats dot(Floats sum, const Bytes& w, const uint16_t* x) { return dot16(sum, w, x); }

template <int V>
struct Activation {
    using type = float;
};
template <>
struct Activation<kBFloat16> {
    using type = uint16_t;
};

template <int V>
struct FloatKernel {
    static constexpr int kValues = V;
    static constexpr int kSums = kPieces<V> / kSteps;
    static constexpr int kRowBlock = kRegisters / 2 / kSums;
    static constexpr int kSweepPanels = kRegisters == 32 && V == kBFloat16 ? 2 : 1;
    static constexpr int sweep_rows(int panels) { return kRowBlock / panels; }

    template <int Q, int R, class Reader>
    static GOSSAMER_INLINE void add(Reader (&readers)[Q], const Packed& w, const Activations& x, int64_t,
                                    int64_t row, int64_t begin, int64_t end, Floats (&sums)[Q][R][kSums]) {
        using T = typename Activation<V>::type;
        const Place place = place_of(x, w.groups, row);
        const T* codes = (const T*)x.codes + kGroup * (place.first + begin * place.step);
        if constexpr (Reader::kListed) {  // one loop over all groups: none of its own to end at a surprising
                                          // step
            const StepList& list = *readers[0].list;
            for (int32_t n = 0; n < list.count; n++) {
                const int64_t g = list.at[n] / kSteps, s = list.at[n] % kSteps;
                GOSSAMER_UNROLL(2)
                for (int q = 0; q < Q; q++) {
                    GOSSAMER_UNROLL(4)
                    for (int i = 0; i < kSums; i++)
                        meet<R>(readers[q].take(), codes + kGroup * place.step * g + 4 * s, i, sums[q]);
                }
            }
            return;
        }
        for (int64_t g = begin; g < end; g++) {
            GOSSAMER_UNROLL(2)
            for (int q = 0; q < Q; q++) readers[q].next();
            if constexpr (Reader::kBySteps) {
                for (uint32_t kept = readers[0].steps(); kept; kept &= kept - 1) {
                    GOSSAMER_UNROLL(4)
                    for (int i = 0; i < kSums; i++)
                        meet<R>(readers[0].take(), codes + 4 * __builtin_ctz(kept), i, sums[0]);
                }
            } else {
                GOSSAMER_UNROLL(16)
                for (int s = 0; s < kSteps; s++) {
                    GOSSAMER_UNROLL(2)
                    for (int q = 0; q < Q; q++) {
                        GOSSAMER_UNROLL(4)
                        for (int i = 0; i < kSums; i++)
                            meet<R>(readers[q].piece(kSums * s + i), codes + 4 * s, i, sums[q]);
                    }
                }
            }
            codes += kGroup * place.step;
        }
    }

    // One piece of a step, its activations at `codes`, for R rows.
    template <int R, class T>
    static GOSSAMER_INLINE void meet(Bytes weights, const T* codes, int i, Floats (&sums)[R][kSums]) {
        GOSSAMER_UNROLL(8)
        for (int r = 0; r < R; r++) sums[r][i] = dot(sums[r][i], weights, codes + kGroup * r);
    }

    static GOSSAMER_INLINE Floats result(const Floats (&sums)[kSums]) {
        if constexpr (kSums == 4)
            return pair_sums(pair_sums(sums[0], sums[1]), pair_sums(sums[2], sums[3]));
        else
            return pair_sums(sums[0], sums[1]);
    }
};

}  // namespace
}  // namespace gossamer

extern "C" {
extern const gossamer::Family GOSSAMER_EXPORT(float);
const gossamer::Family GOSSAMER_EXPORT(float) = {
    gossamer::prepare,
    gossamer::multiply<gossamer::FloatKernel<gossamer::kFloat32>, gossamer::FloatKernel<gossamer::kBFloat16>>
};
}
