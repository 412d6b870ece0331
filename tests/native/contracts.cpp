// Which instruction sets run, and what distinguishes them.
#include <utility>

#include "running.h"

namespace testing {

using namespace gossamer;

namespace {

// y of a weight (16, 64) of one value type, all zero but for `stored` in the first inputs of output 0.
float first_output(const Tier& tier, int values, const float (&stored)[5], const float (&x)[5],
                   Random& random) {
    const int size = values == kFloat32 ? 4 : 2;
    Buffer bytes(1024 * size, random);
    Rows row(64);
    for (int i = 0; i < 5; i++) {
        const uint32_t bits = bits_of(stored[i]);
        memcpy(bytes.data() + size * (64 * (i / 4) + i % 4), (const uint8_t*)&bits + (4 - size),
               size_t(size));
        row[size_t(i)] = x[i];
    }
    const Packed w{
        16,      64,      1,      1, kDense, values, 0, 1, bytes.data(), bytes.data() + bytes.size(),
        nullptr, nullptr, nullptr};
    return run(w, tier, row, 0, 1, kF32, 1, random)[0];
}

}  // namespace

// Every instruction set of this processor runs, and runs its own code: the last bits of float sums tell them
// apart (docs/architecture.md, "Contracts").
void test_tiers() {
    int count;
    const Tier* all = tiers(&count);
    CHECK(strcmp(all[0].name, "portable") == 0 && all[0].runs_here(), "the first tier is not portable");
#if defined(GOSSAMER_X86)
    const char* known[] = {"portable", "avx2", "avxvnni", "avx512vnni", "avx512", "amx"};
    int seen = 0;
    for (int i = 0; i < count; i++, seen++) {  // these in this order, perhaps without avxvnni and amx
        while (seen < 6 && strcmp(known[seen], all[i].name) != 0) seen++;
        CHECK(seen < 6, "the tier %s is not known, or in another order", all[i].name);
    }
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                      __builtin_cpu_supports("popcnt");
    const bool vnni = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") &&
                      __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni");
    const bool avx512 = vnni && __builtin_cpu_supports("avx512bf16");
    const std::pair<const char*, bool> wanted[] = {{"avx2", avx2}, {"avx512vnni", vnni}, {"avx512", avx512}};
    for (const auto& [name, has] : wanted) {
        const Tier* tier = tier_called(name);
        CHECK(tier != nullptr, "there is no %s", name);
        CHECK(tier->runs_here() == has, "%s %s, though the processor %s", name,
              tier->runs_here() ? "runs" : "is skipped", has ? "has it" : "does not have it");
    }
#endif
    Random random(4);
    for (const Tier* tier : tiers_under_test()) {
        describe("%s, its marks", tier->name);
        const bool portable = strcmp(tier->name, "portable") == 0;
        const bool avx512 = has_tiles(*tier) || strcmp(tier->name, "avx512") == 0;
        // (1 + 2^-12)^2 - (1 + 2^-11), in one chain: 2^-24 where the product is not rounded by itself
        const float a = 1 + 0x1p-12f, b = -(1 + 0x1p-11f);
        const float fused = first_output(*tier, kFloat32, {b, 0, 0, 0, a}, {1, 0, 0, 0, a}, random);
        CHECK(fused == (portable ? 0 : 0x1p-24f), "a product and a sum in float32 give %g", double(fused));
        const float tiny = first_output(*tier, kBFloat16, {0x1p-130f, 0, 0, 0, 0}, {4, 0, 0, 0, 0}, random);
        CHECK(tiny == (avx512 ? 0 : 0x1p-128f), "4 x 2^-130 in bfloat16 gives %g", double(tiny));
    }
}

}  // namespace testing
