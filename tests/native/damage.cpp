// Damaged sections: the check refuses exactly those that the format forbids, and what it lets through keeps
// every kernel inside its buffers.
#include "running.h"
#include "validate.h"

namespace testing {

using namespace gossamer;

namespace {

Buffer copy_of(const Buffer& from, int64_t bytes, Random& random) {
    Buffer to(bytes, random);
    const int64_t kept = bytes < from.size() ? bytes : from.size();
    if (kept > 0) memcpy(to.data(), from.data(), size_t(kept));
    return to;
}

// One field, byte or size of a section becomes something else.
void damage(Weight& w, Random& random) {
    Buffer* sections[] = {&w.values, &w.masks, &w.scales, &w.offsets};
    Buffer* section;
    do section = sections[random.below(4)];
    while (!section->data() || section->size() == 0);
    if (section == &w.values && w.offsets.data() && random.chance(0.3)) {
        const int64_t bytes = w.values.size() + 64 * (random.below(5) - 2);
        w.values = copy_of(w.values, bytes < 0 ? 0 : bytes, random);
        return;
    }
    if (section == &w.offsets || random.chance(0.2)) {
        uint64_t word;
        uint8_t* at = section->data() + 8 * random.below(section->size() / 8);
        memcpy(&word, at, 8);
        const uint64_t others[] = {word + uint64_t(random.below(9) - 4),
                                   word + 64,
                                   word - 64,
                                   word ^ 1ull << 63,
                                   0,
                                   ~uint64_t(0),
                                   random.bits(),
                                   word << 8,
                                   uint64_t(1) << 62,
                                   uint64_t(w.values.size())};
        word = others[random.below(10)];
        memcpy(at, &word, 8);
        return;
    }
    section->data()[random.below(section->size())] ^=
        uint8_t(random.chance(0.5) ? 1 << random.below(8) : random.bits());
}

}  // namespace

void test_damage() {
    Random random(5);
    int refused = 0, accepted = 0;
    for (int turn = 0; turn < 3000; turn++) {
        const LayoutCase& layout = kLayouts[random.below(7)];
        const ValuesCase& kind = kValues[random.below(8)];
        if (!exists(layout, kind)) continue;
        const int64_t shapes[][2] = {{17, 130}, {16, 64}, {40, 66}, {50, 250}, {3, 5}};
        const int64_t* shape = shapes[random.below(5)];
        Weight weight(random, layout, kind, shape[0], shape[1]);
        for (int64_t n = 1 + random.below(3); n > 0; n--) damage(weight, random);
        const Packed w = weight.packed();
        describe("damage %d: %s, %s, %lld x %lld", turn, layout.name, kind.name, (long long)w.out,
                 (long long)w.in);
        const std::string fault = check(w, 1 + turn % 3);
        CHECK(fault.empty() == well_formed(weight), "%s",
              fault.empty() ? "a damaged weight is accepted" : fault.c_str());
        fault.empty() ? accepted++ : refused++;
        if (!fault.empty()) continue;
        const Rows x = random_rows(random, 9, w.in);
        for (const Tier* tier : tiers_under_test())
            for (int64_t rows : {1, 2, 4, 8, 9}) run(w, *tier, x, 0, rows, kF32, 1, random);
    }
    CHECK(refused > 500 && accepted > 500, "%d refused and %d accepted: too few of one kind", refused,
          accepted);
}

}  // namespace testing
