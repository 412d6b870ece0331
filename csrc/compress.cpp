// GEAR's algorithm 1 on the keys, or the values, of one head in a block; without rank and outliers it is
// KIVI.
#include "compress.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace gossamer {
namespace {

constexpr int kLoops = 3;  // of power iteration
constexpr float kMostHalf = 65504;

float float_of(uint16_t bfloat16) {
    const uint32_t bits = uint32_t(bfloat16) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

uint16_t bfloat16_of(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return f != f ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// To the nearest whole number, ties to even; up to 2^22.
float rounded(float f) { return (f + 12582912.0f) - 12582912.0f; }

// To nearest, ties to even; of numbers up to kMostHalf, and NaN.
uint16_t half_of(float f) {
    if (f != f) return 0x7e00;
    const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
    if (f == 0) return sign;
    int exponent;
    std::frexp(f, &exponent);
    const int unit = std::max(exponent - 11, -24);  // the exponent of the last bit
    return uint16_t(sign | (((unit + 24) << 10) + int(rounded(std::ldexp(std::fabs(f), -unit)))));
}

float float_of_half(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float magnitude = exponent == 31  ? std::numeric_limits<float>::quiet_NaN()
                            : exponent == 0 ? std::ldexp(float(fraction), -24)
                                            : std::ldexp(float(1024 + fraction), exponent - 25);
    return half >> 15 ? -magnitude : magnitude;
}

// Where number `c` of position `p` lies in a block as it is.
int64_t place_of(bool keys, int64_t wide, int64_t p, int64_t c) {
    return keys ? p / 16 * 16 * wide + c / 2 * 32 + p % 16 * 2 + c % 2 : (p / 2 * wide + c) * 2 + p % 2;
}

int code_at(const uint8_t* codes, int bits, int64_t place) {
    const int64_t pair = place / 2, half = place % 2;
    if (bits == 4) return codes[pair] >> 4 * half & 15;
    return codes[pair / 32 * 16 + pair % 16] >> (pair / 16 % 2 * 4 + 2 * half) & 3;
}

void put_code(uint8_t* codes, int bits, int64_t place, int code) {
    const int64_t pair = place / 2, half = place % 2;
    if (bits == 4)
        codes[pair] |= uint8_t(code << 4 * half);
    else
        codes[pair / 32 * 16 + pair % 16] |= uint8_t(code << (pair / 16 % 2 * 4 + 2 * half));
}

// A block as vectors: those of keys are channels, those of values positions.
struct Vectors {
    const bool keys;
    const int64_t dim, wide, count, length;
    float x[kBlock * kMostHead];  // [count][length]

    Vectors(bool of_keys, int64_t head)
        : keys(of_keys),
          dim(head),
          wide(wide_of(head)),
          count(keys ? head : kBlock),
          length(keys ? kBlock : head) {}

    float* operator[](int64_t v) { return x + v * length; }
    int64_t place(int64_t v, int64_t i) const { return place_of(keys, wide, keys ? i : v, keys ? v : i); }

    // to[i] = sum of x[v][i] * by[v]
    void across(const float* by, float* to) const {
        std::fill(to, to + length, 0.0f);
        for (int64_t v = 0; v < count; v++)
            for (int64_t i = 0; i < length; i++) to[i] += x[v * length + i] * by[v];
    }
    // to[v] = sum of x[v][i] * by[i]
    void along(const float* by, float* to) const {
        for (int64_t v = 0; v < count; v++) {
            float sums[8] = {};
            int64_t i = 0;
            for (; i + 8 <= length; i += 8)
                for (int lane = 0; lane < 8; lane++) sums[lane] += x[v * length + i + lane] * by[i + lane];
            for (; i < length; i++) sums[0] += x[v * length + i] * by[i];
            to[v] = 0;
            for (float sum : sums) to[v] += sum;
        }
    }
};

// Takes the outliers out of a vector, in whose places its mean stays.
void take_out(float* x, int64_t length, const Outliers& how, int64_t apart, uint16_t* numbers,
              uint8_t* places) {
    if (count_of(how) == 0) return;
    float sum = 0;
    for (int64_t i = 0; i < length; i++) sum += x[i];
    bool taken[kMostHead] = {};
    for (int n = 0; n < count_of(how); n++) {
        const float sign = n < how.most ? 1.0f : -1.0f;
        int64_t best = -1;
        for (int64_t i = 0; i < length; i++)
            if (!taken[i] && (best < 0 || sign * x[i] > sign * x[best])) best = i;
        taken[best] = true;
        numbers[n * apart] = bfloat16_of(x[best]);
        places[n * apart] = uint8_t(best);
    }
    for (int64_t i = 0; i < length; i++)
        if (taken[i]) x[i] = sum / float(length);
}

struct Scale {
    uint16_t scale, low;
};

// Codes of a vector in equal steps from its least to its largest number; what they miss stays in it.
Scale round_off(Vectors& rest, int64_t v, int bits, uint8_t* codes) {
    float* x = rest[v];
    float least = x[0], most = x[0], all = 0;
    for (int64_t i = 0; i < rest.length; i++) {
        least = std::min(least, x[i]);
        most = std::max(most, x[i]);
        all += 0 * x[i];
    }
    if (all != 0) return {half_of(all), half_of(all)};  // a number that is not finite spoils its vector
    const int top = (1 << bits) - 1;
    const uint16_t low = half_of(std::min(kMostHalf, std::max(-kMostHalf, least)));
    const float from = float_of_half(low);
    const uint16_t scale = half_of(std::min(kMostHalf, std::max(0.0f, (most - from) / float(top))));
    const float step = float_of_half(scale);
    for (int64_t i = 0; i < rest.length; i++) {
        const float steps = rounded((x[i] - from) / (step > 0 ? step : 1));
        const int code = int(std::min(float(top), std::max(0.0f, steps)));
        put_code(codes, bits, rest.place(v, i), code);
        x[i] -= float(code) * step + from;
    }
    return {scale, low};
}

// Makes the columns of `left`, [rank][kBlock], orthonormal; those that lie in the ones before become zeros.
void make_orthonormal(float* left, int rank) {
    for (int r = 0; r < rank; r++) {
        float* mine = left + r * kBlock;
        float before = 0, after = 0;
        for (int p = 0; p < kBlock; p++) before += mine[p] * mine[p];
        for (int s = 0; s < r; s++) {
            const float* other = left + s * kBlock;
            float along = 0;
            for (int p = 0; p < kBlock; p++) along += mine[p] * other[p];
            for (int p = 0; p < kBlock; p++) mine[p] -= along * other[p];
        }
        for (int p = 0; p < kBlock; p++) after += mine[p] * mine[p];
        const float inverse = after > 1e-10f * before ? 1 / std::sqrt(after) : 0;
        for (int p = 0; p < kBlock; p++) mine[p] *= inverse;
    }
}

// left [rank][kBlock] and right [rank][dim], of `rest` as a matrix (kBlock, dim).
void low_rank(const Vectors& rest, int rank, const float* start, float* left, float* right) {
    std::copy(start, start + rank * rest.dim, right);
    for (int loop = 0; loop < kLoops; loop++) {
        for (int r = 0; r < rank; r++) {
            float *l = left + r * kBlock, *of = right + r * rest.dim;
            rest.keys ? rest.across(of, l) : rest.along(of, l);
        }
        make_orthonormal(left, rank);
        for (int r = 0; r < rank; r++) {
            float *l = left + r * kBlock, *to = right + r * rest.dim;
            rest.keys ? rest.along(l, to) : rest.across(l, to);
        }
    }
}

// Numbers of a compressed block.
struct Reader {
    const Compression& how;
    const bool keys;
    const int64_t wide;
    const PackedBlock at;
    const uint8_t* from;

    uint16_t word(int64_t offset, int64_t i) const {
        uint16_t w;
        std::memcpy(&w, from + offset + 2 * i, 2);
        return w;
    }
    float number(int64_t p, int64_t c) const {
        const int64_t v = keys ? c : p, place = keys ? p : c;
        for (int n = 0; n < at.count; n++)
            if (from[at.places + n * at.vectors + v] == place)
                return float_of(word(at.outliers, n * at.vectors + v));
        float x =
            float(code_at(from, how.bits, place_of(keys, wide, p, c))) * float_of_half(word(at.scales, v)) +
            float_of_half(word(at.lows, v));
        for (int r = 0; r < how.rank; r++)
            x += float_of(word(at.left, r * kBlock + p)) * float_of(word(at.right, r * wide + c));
        return x;
    }
};

Reader reader_of(const Compression& how, bool keys, int64_t dim, const uint8_t* from) {
    const int64_t wide = wide_of(dim);
    return {how, keys, wide, packed_block(how, kBlock, int(wide), keys), from};
}

}  // namespace

void compress_block(const Compression& how, bool keys, int64_t dim, const uint8_t* whole, const float* start,
                    uint8_t* to) {
    Vectors rest(keys, dim);
    const PackedBlock at = packed_block(how, kBlock, int(rest.wide), keys);
    const uint16_t* from = reinterpret_cast<const uint16_t*>(whole);
    const auto words = [&](int64_t offset) { return reinterpret_cast<uint16_t*>(to + offset); };
    std::memset(to, 0, size_t(at.bytes));
    for (int64_t v = 0; v < rest.count; v++) {
        for (int64_t i = 0; i < rest.length; i++) rest[v][i] = float_of(from[rest.place(v, i)]);
        take_out(rest[v], rest.length, outliers_of(how, keys), at.vectors, words(at.outliers) + v,
                 to + at.places + v);
        const Scale scale = round_off(rest, v, how.bits, to);
        words(at.scales)[v] = scale.scale;
        words(at.lows)[v] = scale.low;
    }
    if (!how.rank) return;
    float left[kMostRank * kBlock], right[kMostRank * kMostHead];
    low_rank(rest, how.rank, start, left, right);
    for (int64_t i = 0; i < how.rank * kBlock; i++) words(at.left)[i] = bfloat16_of(left[i]);
    for (int64_t r = 0; r < how.rank; r++)
        for (int64_t c = 0; c < dim; c++)
            words(at.right)[r * rest.wide + c] = bfloat16_of(right[r * dim + c]);
}

void open_block(const Compression& how, bool keys, int64_t dim, const uint8_t* from, uint8_t* whole) {
    const Reader reader = reader_of(how, keys, dim, from);
    uint16_t* to = reinterpret_cast<uint16_t*>(whole);
    for (int64_t p = 0; p < kBlock; p++)
        for (int64_t c = 0; c < reader.wide; c++)
            to[place_of(keys, reader.wide, p, c)] = c < dim ? bfloat16_of(reader.number(p, c)) : 0;
}

void read_packed_key(const Compression& how, int64_t dim, const uint8_t* from, int64_t p, float* to) {
    const Reader reader = reader_of(how, true, dim, from);
    for (int64_t c = 0; c < dim; c++) to[c] = reader.number(p, c);
}

void read_whole_key(int64_t dim, const uint8_t* whole, int64_t p, float* to) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(whole);
    for (int64_t c = 0; c < dim; c++) to[c] = float_of(from[place_of(true, wide_of(dim), p, c)]);
}

}  // namespace gossamer
