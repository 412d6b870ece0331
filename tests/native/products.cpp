// Every kernel gives the product that its bytes stand for, and the same bits of a row whatever is around it.
#include <cmath>

#include "running.h"
#include "threads.h"
#include "validate.h"

#if defined(__linux__)
#include <dirent.h>
#endif

namespace testing {

using namespace gossamer;

namespace {

constexpr int64_t kMany = 70;  // rows that are expanded and swept

struct Shape {
    int64_t out, in;
};

// Tails of panels, groups and steps; the last three go past one span of groups, a block of panels, and a
// panel of columns.
constexpr Shape kShapes[] = {{17, 130}, {1, 1},    {16, 64}, {33, 63}, {5, 321},
                             {15, 2},   {3, 2200}, {70, 68}, {420, 70}};

void check_row(const Expected& want, const float* y, bool in_order, int64_t row) {
    for (size_t o = 0; o < want.y.size(); o++) {
        const bool right = std::isfinite(want.y[o]) ? std::fabs(double(y[o]) - want.y[o]) <= want.room[o]
                                                    : same(y[o], float(want.y[o]));
        CHECK(right, "row %lld, output %zu is %.9g instead of %.9g (+- %.3g)", (long long)row, o,
              double(y[o]), want.y[o], want.room[o]);
        if (in_order && !want.in_order.empty())
            CHECK(same(y[o], want.in_order[o]), "row %lld, output %zu is %.9g, not the same bits as %.9g",
                  (long long)row, o, double(y[o]), double(want.in_order[o]));
    }
}

void check_rows(const Plain& plain, const Tier& tier, const Rows& x, const Rows& y) {
    const bool portable = strcmp(tier.name, "portable") == 0;
    for (int64_t row = 0; row < int64_t(y.size()) / plain.out; row++)
        check_row(product(plain, x.data() + row * plain.in, flushes(tier, plain)), y.data() + row * plain.out,
                  portable, row);
}

// The same on another tier, to the bit: tiles change nothing but the bfloat16 products of many rows.
const Tier* same_bits_as(const Tier& tier) { return has_tiles(tier) ? tier_called("avx512") : nullptr; }

void check_weight(const Weight& weight, Random& random) {
    const Packed w = weight.packed();
    CHECK(well_formed(weight), "the test's own weight is not well formed");
    const std::string fault = check(w, 1);
    CHECK(fault.empty(), "a good weight is refused: %s", fault.c_str());
    const Plain plain = unpack(weight);
    const Rows x = random_rows(random, kMany, w.in);
    Rows rounded = x;
    for (float& f : rounded) f = of_bfloat16(to_bfloat16(f));
    for (const Tier* tier : tiers_under_test()) {
        describe("%s, %s, %s, %lld x %lld", tier->name, weight.layout.name, weight.kind.name,
                 (long long)w.out, (long long)w.in);
        const Rows whole = run(w, *tier, x, 0, kMany, kF32, 1, random);
        check_rows(plain, *tier, x, whole);
        const Rows few = two_ways(*tier, plain) ? by_few(w, *tier, x, kMany, random) : whole;
        if (two_ways(*tier, plain)) check_rows(plain, *tier, x, few);
        if (const Tier* other = same_bits_as(*tier))
            check_same(few, 0, run(w, *other, x, 0, kMany, kF32, 1, random), 0, kMany, w.out,
                       "with tiles, and without");
        for (int64_t rows = 1; rows <= 20; rows++) {
            const int64_t first = random.below(kMany - rows + 1);
            const Rows part = run(w, *tier, x, first, rows, kF32, 1, random);
            check_same(part, 0, rows > kFewRows ? whole : few, first, rows, w.out,
                       "some rows alone, and among others");
        }
        // bfloat16 in and out: the same as float32 in, then rounded
        for (int64_t rows : {1, 3, 8, 21}) {
            const int64_t first = random.below(kMany - rows + 1);
            Rows y = run(w, *tier, rounded, first, rows, kF32, 1, random);
            for (float& f : y) f = of_bfloat16(to_bfloat16(f));
            check_same(run(w, *tier, x, first, rows, kBF16, 1, random), 0, y, 0, rows, w.out,
                       "bfloat16 activations, and their float32 twins");
        }
    }
}

}  // namespace

void test_products() {
    Random random(1);
    for (const Shape& shape : kShapes)
        for (const LayoutCase& layout : kLayouts)
            for (const ValuesCase& kind : kValues)
                if (exists(layout, kind))
                    check_weight(Weight(random, layout, kind, shape.out, shape.in,
                                        random.chance(0.2) ? Numbers::kPoisoned : Numbers::kUsual),
                                 random);
}

// Scales of 1, and activations that are their own codes: results are integers below 2^24, and exact.
void test_exact_sums() {
    Random random(2);
    for (const LayoutCase& layout : kLayouts)
        for (const ValuesCase& kind : kValues) {
            if (!kind.integers() || !exists(layout, kind)) continue;
            const Weight weight(random, layout, kind, 39, 310, Numbers::kUnit);
            const Packed w = weight.packed();
            const Plain plain = unpack(weight);
            Rows x;
            for (int64_t i = 0; i < 11 * w.in; i++)
                x.push_back(i % w.in % 64 == 0                   ? 127.0f
                            : i / w.in % 2 && random.chance(0.7) ? 0.0f
                                                                 : float(random.below(255) - 127));
            for (const Tier* tier : tiers_under_test()) {
                describe("%s, %s, %s", tier->name, layout.name, kind.name);
                const Rows y = run(w, *tier, x, 0, 11, kF32, 1, random);
                for (int64_t i = 0; i < 11 * w.out; i++) {
                    int64_t want = 0;
                    for (int64_t k = 0; k < w.in; k++)
                        want += int64_t(plain.weight[size_t(i % w.out * w.in + k)]) *
                                int64_t(x[size_t(i / w.out * w.in + k)]);
                    CHECK(y[size_t(i)] == float(want), "row %lld, output %lld is %.9g instead of %lld",
                          (long long)(i / w.out), (long long)(i % w.out), double(y[size_t(i)]),
                          (long long)want);
                }
            }
        }
}

namespace {

int threads_of_this_process() {
#if defined(__linux__)
    int count = 0;
    if (DIR* tasks = opendir("/proc/self/task")) {
        while (dirent* entry = readdir(tasks)) count += entry->d_name[0] != '.';
        closedir(tasks);
        return count;
    }
#endif
    return 0;  // cannot be asked
}

}  // namespace

// A row is the same bits for any number of threads, on weights large enough that they all work.
void test_threads() {
    CHECK(strcmp(team_kind(), "pool") == 0, "the native tests run on the own pool, not on %s", team_kind());
    const int before = threads_of_this_process();
    Random random(3);
    int turn = 0;
    for (const LayoutCase& layout : {kLayouts[0], kLayouts[1], kLayouts[2], kLayouts[3], kLayouts[6]})
        for (const ValuesCase& kind : {kValues[0], kValues[1], kValues[2], kValues[3], kValues[7]}) {
            if (!exists(layout, kind)) continue;
            const Weight weight(random, layout, kind, 1030, kind.integers() ? 520 : 200);
            const Packed w = weight.packed();
            CHECK(check(w, 1 + turn % 5).empty(), "a good weight is refused");
            const Rows x = random_rows(random, 17, w.in);
            for (const Tier* tier : tiers_under_test()) {
                describe("%s, %s, %s, many threads", tier->name, layout.name, kind.name);
                const Rows whole = run(w, *tier, x, 0, 17, kF32, 1, random);
                const Rows few = by_few(w, *tier, x, 17, random);
                for (int64_t rows : {1, 2, 3, 5, 8, 16, 17}) {
                    const int64_t first = random.below(17 - rows + 1);
                    const Rows part = run(w, *tier, x, first, rows, kF32, 2 + turn++ % 4, random);
                    check_same(part, 0, rows > kFewRows ? whole : few, first, rows, w.out,
                               "many threads, and one");
                }
            }
        }
    if (before > 0)
        CHECK(threads_of_this_process() == before + 4, "%d threads were to work beside the caller, %d did", 4,
              threads_of_this_process() - before);
}

}  // namespace testing
