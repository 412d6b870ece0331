// The tier amx where there is no AMX: csrc/tiles.cpp on emulated tiles, which the other tests run as one more
// instruction set; here its self-check, and rows of calls that are cut into chunks.
#include "running.h"

int emulated_fault = 0;

#if defined(GOSSAMER_X86)
extern "C" {
extern const gossamer::Family gossamer_int_emulated, gossamer_float_emulated, gossamer_columns_avx512vnni;
extern const gossamer::DecoderOps gossamer_decoder_avx512vnni;
extern const gossamer::AttentionOps gossamer_attention_emulated;
extern const gossamer::EstimateOps gossamer_estimate_avx512;
bool gossamer_works_emulated();
}
#endif

namespace testing {

using namespace gossamer;

#if defined(GOSSAMER_X86)

namespace {

bool avx512_runs() {
    const Tier* avx512 = tier_called("avx512");
    return avx512 != nullptr && avx512->runs_here();
}

}  // namespace

const Tier& emulated_tiles() {
    static const Tier tier{"amx-emulated",
                           &gossamer_int_emulated,
                           &gossamer_float_emulated,
                           &gossamer_columns_avx512vnni,
                           &gossamer_decoder_avx512vnni,
                           &gossamer_attention_emulated,
                           &gossamer_estimate_avx512,
                           avx512_runs,
                           kTileRows};
    return tier;
}

void test_tiles() {
    if (!avx512_runs()) return;
    describe("the self-check of tiles");
    CHECK(gossamer_works_emulated(), "right tiles are refused");
    for (emulated_fault = 1; emulated_fault <= 2; emulated_fault++)
        CHECK(!gossamer_works_emulated(), "wrong tiles pass, fault %d", emulated_fault);
    emulated_fault = 0;

    // so wide that 70 rows are taken as 64 and 6: the last ones must not be multiplied as few rows are
    Random random(9);
    const Weight weight(random, kLayouts[0], kValues[1], 3, 66000);
    const Packed w = weight.packed();
    const Rows x = random_rows(random, 70, w.in);
    for (const Tier* tier : tiers_under_test()) {
        describe("%s, rows in chunks", tier->name);
        const Rows whole = run(w, *tier, x, 0, 70, kF32, 1, random);
        check_same(run(w, *tier, x, 53, 17, kF32, 1, random), 0, whole, 53, 17, w.out,
                   "the last rows alone, and after others");
    }
}

#else
void test_tiles() {}
#endif

}  // namespace testing
