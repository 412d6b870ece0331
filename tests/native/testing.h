// What the native tests share: how one fails, the instruction sets under test, and numbers that repeat.
#pragma once
#include <stdint.h>
#include <string.h>

#include <vector>

#include "dispatch.h"

namespace testing {

// What is being tested now; printed when a check fails or the process dies.
void describe(const char* format, ...) __attribute__((format(printf, 1, 2)));

[[noreturn]] void fail(const char* file, int line, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

#define CHECK(condition, ...)                                               \
    do {                                                                    \
        if (!(condition)) ::testing::fail(__FILE__, __LINE__, __VA_ARGS__); \
    } while (0)

// The instruction sets that run here, tiles emulated among them (emulated_tiles.h); or the one that --tier
// names.
const std::vector<const gossamer::Tier*>& tiers_under_test();

// Same numbers on every machine (splitmix64).
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t bits() {
        uint64_t z = state_ += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
    double unit() { return double(bits() >> 11) * 0x1p-53; }
    bool chance(double p) { return unit() < p; }

  private:
    uint64_t state_;
};

// ---- number formats, bit by bit

inline float float_of(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

inline uint32_t bits_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

// To nearest, ties to even; every NaN becomes the same one.
inline uint16_t to_bfloat16(float f) {
    if (f != f) return 0x7fc0;
    uint32_t bits = bits_of(f), low = bits & 0xffff, high = bits >> 16;
    return uint16_t(high + (low > 0x8000 || (low == 0x8000 && (high & 1))));
}

inline float of_bfloat16(uint16_t h) { return float_of(uint32_t(h) << 16); }

// A finite float16.
inline float of_float16(uint16_t h) {
    int exponent = h >> 10 & 31;
    double fraction = exponent ? 1.0 + (h & 1023) / 1024.0 : (h & 1023) / 1024.0;
    double power = 1.0;
    for (int i = exponent ? exponent : 1; i < 15; i++) power /= 2;
    for (int i = 15; i < exponent; i++) power *= 2;
    return float((h & 0x8000 ? -1 : 1) * fraction * power);
}

// ---- the tests

void test_products();
void test_exact_sums();
void test_threads();
void test_tiers();
void test_tiles();
void test_damage();
void test_types();
void test_far_weights();
void test_far_rows();
void test_programs();
void test_lying_programs();
void test_decoder();
void test_compression();

}  // namespace testing
