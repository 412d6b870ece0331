#include "running.h"

namespace testing {

using namespace gossamer;

Rows run(const Packed& w, const Tier& tier, const Rows& x, int64_t first, int64_t rows, int dtype,
         int threads, Random& random) {
    Program program;
    program.add_term(w, 1, -1);
    return run(program, tier, x, first, rows, dtype, threads, random);
}

Rows run(const Program& program, const Tier& tier, const Rows& x, int64_t first, int64_t rows, int dtype,
         int threads, Random& random) {
    const int size = dtype == kF32 ? 4 : 2;
    const int64_t in = program.in(), out = program.out();
    Buffer from(rows * in * size, random), to(rows * out * size, random);
    for (int64_t i = 0; i < rows * in; i++) {
        const float f = x[size_t(first * in + i)];
        if (dtype == kF32)
            from.as<float>()[i] = f;
        else
            from.as<uint16_t>()[i] = to_bfloat16(f);
    }
    memset(to.data(), 0x5a, size_t(to.size()));  // a number that no product gives: what is not written shows
    matmul(program, tier, from.data(), rows, dtype, to.data(), threads);
    Rows y;
    for (int64_t i = 0; i < rows * out; i++)
        y.push_back(dtype == kF32 ? to.as<float>()[i] : of_bfloat16(to.as<uint16_t>()[i]));
    return y;
}

Rows by_few(const Program& program, const Tier& tier, const Rows& x, int64_t rows, Random& random) {
    Rows y;
    for (int64_t first = 0; first < rows; first += kFewRows) {
        const int64_t some = rows - first < kFewRows ? rows - first : kFewRows;
        const Rows part = run(program, tier, x, first, some, kF32, 1, random);
        y.insert(y.end(), part.begin(), part.end());
    }
    return y;
}

Rows by_few(const Packed& w, const Tier& tier, const Rows& x, int64_t rows, Random& random) {
    Program program;
    program.add_term(w, 1, -1);
    return by_few(program, tier, x, rows, random);
}

Rows random_rows(Random& random, int64_t rows, int64_t in) {
    Rows x;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t start = int64_t(x.size());
        const float scales[] = {0.0f, -0.0f, 1e-44f, 1e-39f, 3e-37f, 1e30f};
        const int64_t kind = random.below(24);
        const double zeros = random.chance(0.5) ? random.unit() : 0;  // their share of the row
        for (int64_t i = 0; i < in; i++) {
            const float f = random.chance(zeros) ? 0.0f : float(4 * random.unit() - 2);
            x.push_back(kind < 6 ? f * scales[kind] : f);
        }
        if (kind < 6 || kind > 8) continue;
        const uint32_t bad[] = {0x7fc00000, 0x7f800000, 0xff800000};  // NaN, infinities
        x[size_t(start + random.below(in))] = float_of(bad[kind - 6]);
    }
    return x;
}

bool same(float a, float b) { return bits_of(a) == bits_of(b) || (a != a && b != b); }

void check_same(const Rows& a, int64_t first, const Rows& b, int64_t other, int64_t rows, int64_t out,
                const char* what) {
    for (int64_t i = 0; i < rows * out; i++) {
        const float left = a[size_t(first * out + i)], right = b[size_t(other * out + i)];
        CHECK(same(left, right), "%s: row %lld, output %lld is %.9g and %.9g", what,
              (long long)(first + i / out), (long long)(i % out), double(left), double(right));
    }
}

bool flushes(const Tier& tier, const Plain& w) {
    return w.values == kBFloat16 && w.layout != kColumns &&
           (has_tiles(tier) || strcmp(tier.name, "avx512") == 0);
}

const Tier* tier_called(const char* name) {
    int count;
    const Tier* all = tiers(&count);
    for (int i = 0; i < count; i++)
        if (strcmp(all[i].name, name) == 0) return &all[i];
    return nullptr;
}

bool has_tiles(const Tier& tier) { return tier.row_block == kTileRows; }

bool two_ways(const Tier& tier, const Plain& w) {
    return has_tiles(tier) && w.values == kBFloat16 && w.layout != kColumns && w.layout != kBySteps;
}

}  // namespace testing
