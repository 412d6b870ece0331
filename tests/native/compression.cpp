// Blocks of a packed cache: what compression keeps, opened by every instruction set and by the host.
#include <algorithm>
#include <cmath>

#include "compress.h"
#include "running.h"

namespace testing {

using namespace gossamer;

namespace {

// Number `c` of position `p` of a block as it is (attention.h).
uint16_t& at(uint8_t* whole, bool keys, int64_t wide, int64_t p, int64_t c) {
    uint16_t* numbers = reinterpret_cast<uint16_t*>(whole);
    return keys ? numbers[(p / 16 * wide / 2 + c / 2) * 32 + p % 16 * 2 + c % 2]
                : numbers[(p / 2 * wide + c) * 2 + p % 2];
}

// Some vectors are constant, some hold a number that stands out; zeros behind a head's numbers.
void fill(uint8_t* whole, bool keys, int64_t dim, Random& random) {
    const int64_t wide = wide_of(dim);
    for (int64_t p = 0; p < kBlock; p++)
        for (int64_t c = 0; c < wide; c++) {
            const int64_t v = keys ? c : p, i = keys ? p : c;
            float x = float(random.unit() * 2 - 1) * float(std::ldexp(1.0, int(v % 7) - 3));
            if (v % 5 == 4) x = float(v);
            if (v % 5 == 3 && i == v % 2) x *= 40;
            at(whole, keys, wide, p, c) = c < dim ? to_bfloat16(x) : 0;
        }
}

void check_block(const Compression& how, bool keys, int64_t dim, Random& random) {
    describe("%s of %lld numbers, %d bits, rank %d, %d outliers", keys ? "keys" : "values", (long long)dim,
             how.bits, how.rank, count_of(outliers_of(how, keys)));
    const int64_t wide = wide_of(dim), vectors = keys ? dim : kBlock, length = keys ? kBlock : dim;
    const PackedBlock sizes = packed_block(how, kBlock, int(wide), keys);
    const Buffer whole(whole_bytes(dim), random), packed(sizes.bytes, random), host(whole_bytes(dim), random);
    const Buffer start(std::max<int64_t>(4, 4 * how.rank * dim), random);
    for (int64_t i = 0; i < how.rank * dim; i++) start.as<float>()[i] = float(random.unit() * 2 - 1);
    fill(whole.data(), keys, dim, random);
    compress_block(how, keys, dim, whole.data(), start.as<float>(), packed.data());
    open_block(how, keys, dim, packed.data(), host.data());
    const auto number = [&](const Buffer& block, int64_t v, int64_t i) {
        return of_bfloat16(at(block.data(), keys, wide, keys ? i : v, keys ? v : i));
    };
    for (int64_t v = 0; v < vectors; v++) {
        float low = INFINITY, high = -INFINITY;
        for (int64_t i = 0; i < length; i++) {
            low = std::min(low, number(whole, v, i));
            high = std::max(high, number(whole, v, i));
        }
        const float size = std::max(std::fabs(low), std::fabs(high));
        // half a step, and roundings of scale, least number and the sum
        float bound = (high - low) / float((1 << how.bits) - 1) * 0.51f + size / 128;
        if (how.rank >= std::min<int64_t>(dim, kBlock)) bound = size / 32;  // nothing is missed
        double lost = 0;
        for (int64_t i = 0; i < length; i++) {
            const float off = std::fabs(number(host, v, i) - number(whole, v, i));
            lost += off * off;
            CHECK(how.rank ? off <= 8 * bound : off <= bound, "number %lld of vector %lld is off by %g of %g",
                  (long long)i, (long long)v, double(off), double(bound));
        }
        CHECK(lost <= double(length) * bound * bound, "vector %lld is off by %g", (long long)v, lost);
        for (int n = 0; n < sizes.count; n++) {
            const int64_t place = packed.data()[sizes.places + n * sizes.vectors + v];
            CHECK(place < length && number(host, v, place) == number(whole, v, place),
                  "outlier %d of vector %lld is another number", n, (long long)v);
        }
        if (outliers_of(how, keys).most)
            CHECK(number(whole, v, packed.data()[sizes.places + v]) == high, "not the largest of vector %lld",
                  (long long)v);
    }
    float one[kMostHead];
    for (int64_t p = 0; p < kBlock && keys; p++) {
        read_packed_key(how, dim, packed.data(), p, one);
        for (int64_t c = 0; c < dim; c++)
            CHECK(of_bfloat16(to_bfloat16(one[c])) == number(host, c, p), "a key that is read alone");
    }
    for (const Tier* tier : tiers_under_test()) {
        const Buffer opened(whole_bytes(dim), random);
        tier->attention->open(&how, keys, dim, packed.data(), opened.data());
        for (int64_t v = 0; v < vectors; v++)
            for (int64_t i = 0; i < length; i++) {
                const float a = number(opened, v, i), b = number(host, v, i);
                CHECK(std::fabs(a - b) <= std::fabs(b) / 64 + 1e-3f, "%s opens %g as %g", tier->name,
                      double(b), double(a));
            }
    }
}

// What is not finite spoils its vector, and nothing else.
void check_infinite(bool keys, Random& random) {
    const Compression how{4, 0, {1, 0}, {1, 0}};
    const int64_t dim = 20, wide = wide_of(dim);
    const Buffer whole(whole_bytes(dim), random),
        packed(packed_block(how, kBlock, int(wide), keys).bytes, random);
    fill(whole.data(), keys, dim, random);
    at(whole.data(), keys, wide, 7, 3) = 0x7fc0;
    at(whole.data(), keys, wide, 7, 5) = 0xff80;
    compress_block(how, keys, dim, whole.data(), nullptr, packed.data());
    open_block(how, keys, dim, packed.data(), whole.data());
    for (int64_t p = 0; p < kBlock; p++)
        for (int64_t c = 0; c < dim; c++) {
            const bool finite = std::isfinite(of_bfloat16(at(whole.data(), keys, wide, p, c)));
            if (keys ? c != 3 && c != 5 : p != 7) CHECK(finite, "what is not finite spoils another vector");
        }
}

}  // namespace

void test_compression() {
    Random random(11);
    const Outliers outliers[] = {{0, 0}, {1, 0}, {1, 1}};
    for (int64_t dim : {2, 16, 20, 130})
        for (int bits : {2, 4})
            for (int rank = 0; rank <= std::min<int64_t>(dim, kMostRank); rank++) {
                const Compression how{bits, rank, outliers[random.below(3)], outliers[random.below(3)]};
                for (bool keys : {true, false}) check_block(how, keys, dim, random);
            }
    for (bool keys : {true, false}) check_infinite(keys, random);
}

}  // namespace testing
