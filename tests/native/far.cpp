// Index arithmetic past 2^31: the types that carry it, the functions that compute it, and kernels that work
// at the far end of weights of hundreds of gigabytes, of which only the pages that are touched exist.
#include <stdio.h>

#include <type_traits>

#include "running.h"

namespace testing {

using namespace gossamer;

namespace {

template <class A, class B>
constexpr bool kSame = std::is_same<A, B>::value;

static_assert(sizeof(void*) == 8 && sizeof(size_t) == 8, "sections are addressed with 64 bits");
static_assert(kSame<decltype(Packed::out), int64_t> && kSame<decltype(Packed::in), int64_t> &&
                  kSame<decltype(Packed::panels), int64_t> && kSame<decltype(Packed::groups), int64_t>,
              "sizes of a weight");
static_assert(kSame<decltype(Packed::offsets), const int64_t*>, "offsets into values");
static_assert(kSame<decltype(Activations::rows), int64_t> && kSame<decltype(Activations::padded), int64_t>,
              "rows");
static_assert(kSame<decltype(Place::first), int64_t> && kSame<decltype(Place::step), int64_t>, "places");
static_assert(kSame<decltype(Family::prepare),
                    void (*)(const Packed*, const void*, int, int64_t, int64_t, const Activations*)>,
              "ranges of rows");
static_assert(kSame<decltype(Family::multiply),
                    void (*)(const Packed*, const Activations*, const Output*, int64_t, int64_t, uint8_t*)>,
              "ranges of panels");
static_assert(
    kSame<decltype(&matmul), void (*)(const Program&, const Tier&, const void*, int64_t, int, void*, int)>,
    "rows of a product");
static_assert(kSame<decltype(stored_bytes(0, int64_t())), int64_t> &&
                  kSame<decltype(mask_bytes(Packed())), int64_t> &&
                  kSame<decltype(tile_groups(Packed())), int64_t> &&
                  kSame<decltype(scratch_bytes(Packed(), int64_t())), int64_t> &&
                  kSame<decltype(padded_rows(int64_t())), int64_t>,
              "functions of sizes");

// A weight that is the last panels of a vast one: the same sections at their far ends.
class FarWeight {
  public:
    // Its first panel, of 16 outputs: rows of y have over 2^31 numbers; columns: the first of a panel of
    // theirs.
    const int64_t first;

    explicit FarWeight(const Weight& near)
        : first((int64_t(1) << 27) + (near.layout.layout == kColumns ? 0 : 1)), near_(near) {
        const int64_t groups = near.groups, parts = near.kind.parts;
        // bytes before the first real panel: what as many full ones take (with offsets any number would do)
        start_ =
            first * groups *
            bytes_of_values(near.kind.values, near.layout.layout == kBalanced ? 16 * near.layout.keep : 1024);
        const int64_t mask = near.layout.layout == kBySteps ? 2 : 128;
        put(values_, start_, near.values);
        put(masks_, first * groups * mask, near.masks);
        put(scales_, first * groups * parts * 32, near.scales);
        put(offsets_, first * 8, near.offsets);
        for (int64_t panel = first; exists() && offsets_.data() && panel <= first + near.panels; panel++)
            offsets_.as<int64_t>()[panel] += start_;
    }

    bool exists() const { return exists_; }

    Packed packed() const {
        Packed w = near_.packed();
        w.out = near_.out + 16 * first;
        w.panels = first + near_.panels;
        w.data = values_.data();
        w.data_end = values_.data() + values_.size();
        w.masks = masks_.as<const uint64_t>();
        w.scales = scales_.as<const uint16_t>();
        w.offsets = offsets_.as<const int64_t>();
        return w;
    }

  private:
    void put(Buffer& to, int64_t start, const Buffer& from) {
        if (!from.data()) return;
        to = Buffer::vast(start + from.size());
        if (!to.data()) exists_ = false;
        if (exists_) memcpy(to.data() + start, from.data(), size_t(from.size()));
    }

    const Weight& near_;
    int64_t start_ = 0;
    bool exists_ = true;
    Buffer values_, masks_, scales_, offsets_;
};

// Activations of `rows` rows, `vast` ones or not.
struct Made {
    Buffer codes, scales, negatives, ends, inputs, values;
    Activations of;

    Made(const Packed& w, int64_t rows, bool vast) {
        const int64_t places = padded_rows(rows) * w.groups;
        auto make = [&](int64_t bytes) { return vast ? Buffer::vast(bytes) : Buffer(bytes, Memory::kHeap); };
        codes = make(places * 64 * element_bytes(w.values));
        scales = make(places * 4);
        negatives = make(places * negatives_of(w) * 4);
        of = Activations{rows, padded_rows(rows), codes.data(), scales.as<float>(), negatives.as<int32_t>()};
        if (w.layout != kColumns) return;
        ends = make(rows * w.groups * w.parts * 4);
        inputs = make(rows * active_room(w.groups) * 4);
        values = make(rows * active_room(w.groups) * (w.values >= kInt8 ? 1 : 4));
        of.active = {ends.as<int32_t>(), inputs.as<int32_t>(), values.data()};
    }
};

const Family& family(const Tier& tier, int values) { return values >= kInt8 ? *tier.ints : *tier.floats; }

bool skipped(const char* what) {
    printf("%s: skipped, the system gives no address space for it\n", what);
    return true;
}

}  // namespace

void test_types() {
    const int64_t huge = int64_t(1) << 40;
    const int64_t bytes[] = {4 * huge, 2 * huge, huge, huge / 2, huge * 3 / 8, huge / 2, huge * 3 / 8};
    for (int values = kFloat32; values <= kNl3; values++)
        CHECK(stored_bytes(values, huge) == bytes[values], "%lld bytes of values %d",
              (long long)stored_bytes(values, huge), values);
    for (int64_t count = 0; count <= 1100; count++)
        for (int values = kFloat32; values <= kNl3; values++)
            CHECK(stored_bytes(values, count) == bytes_of_values(values, count),
                  "%lld values %d take %lld bytes", (long long)count, values,
                  (long long)stored_bytes(values, count));

    CHECK(padded_rows(huge + 3) == huge + 4 && padded_rows(huge + 5) == huge + 8 && padded_rows(huge) == huge,
          "rows are not padded to blocks");
    Packed w{};
    w.groups = int64_t(1) << 20;
    w.panels = int64_t(1) << 20;
    w.values = kFloat32;
    w.layout = kBitmap;
    CHECK(mask_bytes(w) == int64_t(1) << 47, "a mask bit a weight");
    w.layout = kBySteps;
    CHECK(mask_bytes(w) == int64_t(1) << 41, "a mask bit a step");
    CHECK(tile_groups(w) == 4, "16 KiB of float32 a panel");
    CHECK(scratch_bytes(w, huge) == 33792 + huge * 512, "128 float32 sums a row, a tile and its list");

    const Activations x{huge + 4, huge + 4, nullptr, nullptr, nullptr};
    for (int64_t row : {int64_t(0), int64_t(13), huge - 1, huge, huge + 3}) {
        const Place place = place_of(x, w.groups, row);
        const int64_t block = row / 8, of_block = row % 8;
        CHECK(place.first == block * 8 * w.groups + of_block && place.step == (row < huge ? 8 : 4),
              "row %lld lies at %lld + %lld g", (long long)row, (long long)place.first,
              (long long)place.step);
    }
}

// The last two panels of a weight whose sections, and whose results, have indices past 2^31.
void test_far_weights() {
    Random random(6);
    for (const LayoutCase& layout : kLayouts)
        for (const ValuesCase& kind : kValues) {
            if (!exists(layout, kind)) continue;
            const Weight near(random, layout, kind, 27, 61);
            const FarWeight far(near);
            const Packed w = near.packed(), vast = far.packed();
            for (int64_t rows : {1, 3, 9}) {  // decoded as they go, and expanded first
                const Buffer y = Buffer::vast(rows * vast.out * 4);
                if (!far.exists() || !y.data()) return void(skipped("weights past 2^31"));
                const Rows x = random_rows(random, rows, w.in);
                const Made made(w, rows, false);
                Buffer scratch(scratch_bytes(w, made.of.padded), Memory::kHeap);
                for (const Tier* tier : tiers_under_test()) {
                    describe("%s, %s, %s, panel %lld", tier->name, layout.name, kind.name,
                             (long long)far.first);
                    const Rows want = run(w, *tier, x, 0, rows, kF32, 1, random);
                    const Family& kernels = family(*tier, w.values);
                    kernels.prepare(&w, x.data(), kF32, 0, rows, &made.of);
                    const Output out{y.data(), kF32, nullptr};
                    if (layout.layout == kColumns) {
                        tier->columns->prepare(&w, x.data(), kF32, 0, rows, &made.of);
                        tier->columns->multiply(&vast, &made.of, &out, far.first / kColumnUnit,
                                                vast.panels / kColumnUnit, scratch.data());
                    } else {
                        kernels.multiply(&vast, &made.of, &out, far.first, vast.panels, scratch.data());
                    }
                    for (int64_t row = 0; row < rows; row++) {
                        float* far_row = y.as<float>() + row * vast.out + 16 * far.first;
                        check_same(Rows(far_row, far_row + w.out), 0, want, row, 1, w.out, "far, and near");
                        memset(far_row, 0, size_t(w.out) * 4);
                    }
                }
            }
        }
}

// A row whose inputs, codes and scales have indices past 2^31.
void test_far_rows() {
    Random random(7);
    const int64_t far_row = (int64_t(1) << 31) + 5, rows = far_row + 3;  // whole blocks of 8
    for (const LayoutCase& layout : {kLayouts[0], kLayouts[2]})
        for (const ValuesCase& kind : kValues) {
            const Weight weight(random, layout, kind, 16, 61);
            const Packed w = weight.packed();
            const Made one(w, 1, false), many(w, rows, true);
            const Buffer x = Buffer::vast(rows * w.in * 4);
            if (!x.data() || !many.of.codes || !many.of.scales || !many.of.negatives)
                return void(skipped("rows past 2^31"));
            const Rows row = random_rows(random, 1, w.in);
            memcpy(x.as<float>() + far_row * w.in, row.data(), row.size() * 4);
            for (const Tier* tier : tiers_under_test()) {
                describe("%s, %s, %s, row %lld", tier->name, layout.name, kind.name, (long long)far_row);
                const Family& kernels = family(*tier, w.values);
                kernels.prepare(&w, row.data(), kF32, 0, 1, &one.of);
                kernels.prepare(&w, x.data(), kF32, far_row, far_row + 1, &many.of);
                const int64_t bytes = 64 * element_bytes(w.values), n = negatives_of(w);
                CHECK(memcmp(one.codes.data(), many.codes.data() + far_row * bytes, size_t(bytes)) == 0,
                      "codes are not where they belong");
                if (!kind.integers()) continue;
                CHECK(same(one.of.scales[0], many.of.scales[far_row]), "its scale is not where it belongs");
                for (int64_t i = 0; i < n; i++)
                    CHECK(one.of.negatives[i] == many.of.negatives[far_row / 8 * 8 * n + 8 * i + far_row % 8],
                          "its sums are not where they belong");
                memset(many.codes.data() + far_row * bytes, 0, size_t(bytes));
            }
        }
}

}  // namespace testing
