#include "gates.h"

#include <cmath>
#include <cstring>

namespace gossamer {
namespace {

// A score as bits that sort as scores do; NaN comes last.
uint32_t score_bits(const Gate& gate, const float* x, int64_t j) {
    const float score = std::fabs(x[j]) * (gate.importance ? gate.importance[j] : 1.0f);
    uint32_t bits;
    std::memcpy(&bits, &score, 4);
    return bits;
}

// The k-th smallest (from 1 on) of a row's scores, by counting their upper, middle and lower bits in turn.
uint32_t kth_smallest(const Gate& gate, const float* x, int64_t n, int64_t k) {
    uint32_t found = 0, known = 0;  // bits that are known, and which they are
    for (const int shift : {21, 10, 0}) {
        const uint32_t width = shift ? 11 : 10, mask = (1u << width) - 1;
        int32_t counts[1 << 11] = {};
        for (int64_t j = 0; j < n; j++) {
            const uint32_t bits = score_bits(gate, x, j);
            counts[bits >> shift & mask] += (bits & known) == found;
        }
        uint32_t digit = 0;
        for (; k > counts[digit]; digit++) k -= counts[digit];
        found |= digit << shift;
        known |= mask << shift;
    }
    return found;
}

}  // namespace

int64_t drop(const DecoderOps& ops, const Gate& gate, const float* x, int64_t n, float* y) {
    if (gate.pruned < 0) return ops.drop(x, gate.importance, gate.threshold, n, y);
    constexpr uint32_t kInfinity = 0x7f800000;
    const uint32_t last = gate.pruned ? kth_smallest(gate, x, n, gate.pruned) : kInfinity + 1;
    int64_t below = 0;
    for (int64_t j = 0; j < n && last <= kInfinity; j++) below += score_bits(gate, x, j) < last;
    int64_t ties = gate.pruned - below, dropped = 0;
    for (int64_t j = 0; j < n; j++) {
        const uint32_t bits = score_bits(gate, x, j);
        const bool gone = last <= kInfinity && (bits < last || (bits == last && ties-- > 0));
        dropped += gone;
        y[j] = gone ? 0 : x[j];
    }
    return dropped;
}

}  // namespace gossamer
