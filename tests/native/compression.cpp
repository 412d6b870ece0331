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
    open_block(how, keys, dim, 0, packed.data(), host.data());
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
        read_packed_key(how, dim, 0, packed.data(), p, one);
        for (int64_t c = 0; c < dim; c++)
            CHECK(of_bfloat16(to_bfloat16(one[c])) == number(host, c, p), "a key that is read alone");
    }
    for (const Tier* tier : tiers_under_test()) {
        const Buffer opened(whole_bytes(dim), random);
        tier->attention->open(&how, keys, dim, 0, packed.data(), opened.data());
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
    open_block(how, keys, dim, 0, packed.data(), whole.data());
    for (int64_t p = 0; p < kBlock; p++)
        for (int64_t c = 0; c < dim; c++) {
            const bool finite = std::isfinite(of_bfloat16(at(whole.data(), keys, wide, p, c)));
            if (keys ? c != 3 && c != 5 : p != 7) CHECK(finite, "what is not finite spoils another vector");
        }
}

// Keys of two heads in low rank, each of whose numbers is read by the host, and opened by every instruction
// set, as double precision gives it.
void check_low_rank(int64_t dim, int rank, bool rotates, Random& random) {
    describe("keys of %lld numbers in rank %d%s", (long long)dim, rank, rotates ? ", rotated" : "");
    const int64_t wide = wide_of(dim), half = dim / 2, number = 2;
    const Buffer vectors(2 * 2 * dim * rank, random), starts(4 * (number + 1) * dim, random),
        turns(4 * half * 2 * kBlock, random), packed(2 * int64_t(kBlock) * rank, random);
    for (int64_t i = 0; i < 2 * dim * rank; i++)
        vectors.as<uint16_t>()[i] = to_bfloat16(float(random.unit() * 2 - 1) / std::sqrt(float(rank)));
    for (int64_t i = 0; i < (number + 1) * dim; i++)
        starts.as<float>()[i] =
            float(i % dim < half ? std::cos(1.3 * double(i % half)) : std::sin(1.3 * double(i % half)));
    for (int64_t i = 0; i < half; i++)
        for (int64_t p = 0; p < kBlock; p++) {
            turns.as<float>()[i * 2 * kBlock + p] = float(1.5 * std::cos(0.1 * double(i * p)));
            turns.as<float>()[(i * 2 + 1) * kBlock + p] = float(1.5 * std::sin(0.1 * double(i * p)));
        }
    Compression how{4, 0, {0, 0}, {0, 0}, {}};
    how.low = {rank, vectors.as<uint16_t>(), rotates ? starts.as<float>() : nullptr, turns.as<float>()};
    CHECK(compresses(how, dim) && packed_block(how, kBlock, int(wide), true).bytes == packed.size(),
          "a good compression is refused");
    const Buffer whole(whole_bytes(dim), random), host(whole_bytes(dim), random);
    std::vector<float> factors(size_t(kBlock * rank));
    for (int64_t p = 0; p < kBlock; p++) {
        float* mine = factors.data() + p * rank;
        for (int head = 0; head < 2; head++) {
            how.low.vectors = vectors.as<uint16_t>() + head * dim * rank;
            fill(whole.data(), true, dim, random);
            std::vector<double> want(mine, mine + rank);
            double size = 0;
            for (int64_t c = 0; c < dim; c++) {
                const auto key = [&](int64_t i) {
                    return double(of_bfloat16(at(whole.data(), true, wide, p, i)));
                };
                const int64_t i = c % half;
                const double angle = 1.3 * double(i) + 0.1 * double(i * p);
                double x = key(c);
                if (rotates) {
                    const double other = c < half ? key(c + half) : -key(c - half);
                    x = (x * std::cos(angle) + other * std::sin(angle)) / 1.5;
                }
                size = std::max(size, std::fabs(x));
                for (int r = 0; r < rank; r++)
                    want[size_t(r)] += x * double(of_bfloat16(how.low.vectors[c * rank + r]));
            }
            add_factors(how.low, dim, number, p, whole.data(), mine);
            for (int r = 0; r < rank; r++)
                CHECK(std::fabs(mine[r] - want[size_t(r)]) <= 1e-5 * double(dim) * size,
                      "factor %d is %g, not %g", r, double(mine[r]), want[size_t(r)]);
        }
        keep_factors(how.low, p, mine, packed.data());
    }
    open_block(how, true, dim, number, packed.data(), host.data());
    float one[kMostHead];
    for (int64_t p = 0; p < kBlock; p++) {
        std::vector<double> want(size_t(dim), 0.0);
        double size = 0;
        for (int64_t c = 0; c < dim; c++)
            for (int r = 0; r < rank; r++) {
                const double product = double(of_bfloat16(to_bfloat16(factors[size_t(p * rank + r)]))) *
                                       double(of_bfloat16(how.low.vectors[c * rank + r]));
                want[size_t(c)] += product;
                size = std::max(size, std::fabs(product));
            }
        for (int64_t i = 0; rotates && i < half; i++) {
            const double angle = 1.3 * double(i) + 0.1 * double(i * p), a = want[size_t(i)],
                         b = want[size_t(half + i)];
            want[size_t(i)] = 1.5 * (a * std::cos(angle) - b * std::sin(angle));
            want[size_t(half + i)] = 1.5 * (b * std::cos(angle) + a * std::sin(angle));
        }
        read_packed_key(how, dim, number, packed.data(), p, one);
        for (int64_t c = 0; c < dim; c++) {
            const double bound = 1e-4 * size * rank + std::fabs(want[size_t(c)]) / 128;
            CHECK(std::fabs(double(one[c]) - want[size_t(c)]) <= bound, "number %lld is read as %g, not %g",
                  (long long)c, double(one[c]), want[size_t(c)]);
            CHECK(of_bfloat16(to_bfloat16(one[c])) == of_bfloat16(at(host.data(), true, wide, p, c)),
                  "a key that is read alone");
        }
    }
    for (const Tier* tier : tiers_under_test()) {
        const Buffer opened(whole_bytes(dim), random);
        tier->attention->open(&how, true, dim, number, packed.data(), opened.data());
        for (int64_t p = 0; p < kBlock; p++)
            for (int64_t c = 0; c < wide; c++) {
                const float a = of_bfloat16(at(opened.data(), true, wide, p, c)),
                            b = of_bfloat16(at(host.data(), true, wide, p, c));
                CHECK(c < dim ? std::fabs(a - b) <= std::fabs(b) / 64 + 1e-2f : a == 0, "%s opens %g as %g",
                      tier->name, double(b), double(a));
            }
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
    for (int64_t dim : {2, 16, 20, 130, 256})
        for (int rank : {16, 48})
            for (bool rotates : {true, false}) check_low_rank(dim, rank, rotates, random);
}

}  // namespace testing
