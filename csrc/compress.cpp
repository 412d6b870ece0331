// GEAR's algorithm 1 on the keys, or the values, of one head in a block; without rank and outliers it is
// KIVI. And keys in low rank.
#include "compress.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "halves.h"

namespace gossamer {
namespace {

constexpr int kLoops = 3;  // of power iteration
constexpr float kMostHalf = 65504;

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

// Where number `c` of position `p` lies in a block as it is.
int64_t place_of(bool keys, int64_t wide, int64_t p, int64_t c) {
    return keys ? p / 16 * 16 * wide + c / 2 * 32 + p % 16 * 2 + c % 2 : (p / 2 * wide + c) * 2 + p % 2;
}

int code_at(const uint8_t* codes, int bits, int64_t place) {
    const int64_t pair = place / 2, half = place % 2;
    if (bits == 4) return codes[pair] >> 4 * half & 15;
    return codes[pair / 32 * 16 + pair % 16] >> (pair / 16 % 2 * 4 + 2 * half) & 3;
}

// A block as vectors: those of keys are channels, those of values positions. Each lies in runs of 16 numbers,
// the first or the second ones of 16 pairs.
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

    // Run `k` of vector `v` is one half of the group of 16 pairs that is given.
    int64_t group(int64_t v, int64_t k) const { return keys ? (k * wide + v) / 2 : v / 2 * (wide / 16) + k; }
    int64_t run(int64_t k) const { return std::min<int64_t>(16, length - 16 * k); }

    void read(const uint16_t* from, int64_t v) {
        for (int64_t k = 0; 16 * k < length; k++) {
            const uint16_t* numbers = from + 32 * group(v, k) + v % 2;
            for (int64_t i = 0; i < run(k); i++)
                x[v * length + 16 * k + i] = float_of_bfloat16(numbers[2 * i]);
        }
    }
    void put(const uint8_t* codes, int64_t v, int bits, uint8_t* to) const {
        for (int64_t k = 0; 16 * k < length; k++) {
            const int64_t g = group(v, k);
            uint8_t* bytes = to + (bits == 4 ? 16 * g : g / 2 * 16);
            const int shift = bits == 4 ? 4 * int(v % 2) : 4 * int(g % 2) + 2 * int(v % 2);
            for (int64_t i = 0; i < run(k); i++) bytes[i] |= uint8_t(codes[16 * k + i] << shift);
        }
    }

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

constexpr int kLanes = 8;  // sums and the largest are found in so many, which compilers make vectors of

float largest_of(const float* x, int64_t length) {
    float lanes[kLanes];
    std::fill(lanes, lanes + kLanes, -std::numeric_limits<float>::infinity());
    int64_t i = 0;
    for (; i + kLanes <= length; i += kLanes)
        for (int lane = 0; lane < kLanes; lane++)
            lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
    for (; i < length; i++) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
    return *std::max_element(lanes, lanes + kLanes);
}

float sum_of(const float* x, int64_t length) {
    float lanes[kLanes] = {}, sum = 0;
    int64_t i = 0;
    for (; i + kLanes <= length; i += kLanes)
        for (int lane = 0; lane < kLanes; lane++) lanes[lane] += x[i + lane];
    for (; i < length; i++) lanes[0] += x[i];
    for (float lane : lanes) sum += lane;
    return sum;
}

// Takes the outliers out of a vector, in whose places its mean stays.
void take_out(float* x, int64_t length, const Outliers& how, int64_t apart, uint16_t* numbers,
              uint8_t* places) {
    if (count_of(how) == 0) return;
    const float mean = sum_of(x, length) / float(length);
    float left[kMostHead];
    for (int n = 0; n < count_of(how); n++) {
        const float sign = n < how.most ? 1.0f : -1.0f;
        for (int64_t i = 0; i < length; i++) left[i] = sign * x[i];
        for (int m = 0; m < n; m++) left[places[m * apart]] = -std::numeric_limits<float>::infinity();
        const float top = largest_of(left, length);
        const int64_t best = std::min<int64_t>(std::find(left, left + length, top) - left, length - 1);
        numbers[n * apart] = bfloat16_of(x[best]);
        places[n * apart] = uint8_t(best);
    }
    for (int n = 0; n < count_of(how); n++) x[places[n * apart]] = mean;
}

struct Scale {
    uint16_t scale, low;
};

// Codes of a vector in equal steps from its least to its largest number; what they miss stays in it.
Scale round_off(Vectors& rest, int64_t v, int bits, uint8_t* to) {
    float *x = rest[v], other[kMostHead];
    const int64_t length = rest.length;
    for (int64_t i = 0; i < length; i++) other[i] = 0 * x[i];
    const float all = sum_of(other, length);
    if (all != 0) return {half_of(all), half_of(all)};  // a number that is not finite spoils its vector
    for (int64_t i = 0; i < length; i++) other[i] = -x[i];
    const float least = -largest_of(other, length), most = largest_of(x, length);
    const float top = float((1 << bits) - 1);
    const uint16_t low = half_of(std::min(kMostHalf, std::max(-kMostHalf, least)));
    const float from = float_of_half(low);
    const uint16_t scale = half_of(std::min(kMostHalf, std::max(0.0f, (most - from) / top)));
    const float step = float_of_half(scale), by = step > 0 ? step : 1;
    uint8_t codes[kMostHead];
    for (int64_t i = 0; i < length; i++) {
        float code = rounded((x[i] - from) / by);
        code = code > 0 ? code : 0;
        code = code < top ? code : top;
        x[i] -= code * step + from;
        codes[i] = uint8_t(int(code));
    }
    rest.put(codes, v, bits, to);
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
                return float_of_bfloat16(word(at.outliers, n * at.vectors + v));
        float x =
            float(code_at(from, how.bits, place_of(keys, wide, p, c))) * float_of_half(word(at.scales, v)) +
            float_of_half(word(at.lows, v));
        for (int r = 0; r < how.rank; r++)
            x += float_of_bfloat16(word(at.left, r * kBlock + p)) *
                 float_of_bfloat16(word(at.right, r * wide + c));
        return x;
    }
};

Reader reader_of(const Compression& how, bool keys, int64_t dim, const uint8_t* from) {
    const int64_t wide = wide_of(dim);
    return {how, keys, wide, packed_block(how, kBlock, int(wide), keys), from};
}

// ---- low rank of all heads' keys

struct Turn {
    float cos, sin;
};

// Of numbers i and dim / 2 + i at position `p` of a block.
Turn turn_at(const LowRankKeys& low, int64_t dim, int64_t number, int64_t p, int64_t i) {
    const float *start = low.starts + number * dim, *turn = low.turns + i * 2 * kBlock;
    const float c = start[i], s = start[dim / 2 + i];
    return {c * turn[p] - s * turn[kBlock + p], s * turn[p] + c * turn[kBlock + p]};
}

void turn_key(const LowRankKeys& low, int64_t dim, int64_t number, int64_t p, float* key) {
    for (int64_t i = 0, half = dim / 2; low.starts && i < half; i++) {
        const Turn turn = turn_at(low, dim, number, p, i);
        const float a = key[i], b = key[half + i];
        key[i] = a * turn.cos - b * turn.sin;
        key[half + i] = b * turn.cos + a * turn.sin;
    }
}

void turn_back(const LowRankKeys& low, int64_t dim, int64_t number, int64_t p, float* key) {
    for (int64_t i = 0, half = dim / 2; low.starts && i < half; i++) {
        const Turn turn = turn_at(low, dim, number, p, i);
        const float size = turn.cos * turn.cos + turn.sin * turn.sin;
        const float a = key[i] / size, b = key[half + i] / size;
        key[i] = a * turn.cos + b * turn.sin;
        key[half + i] = b * turn.cos - a * turn.sin;
    }
}

void read_low_rank_key(const LowRankKeys& low, int64_t dim, int64_t number, const uint8_t* from, int64_t p,
                       float* to) {
    const uint16_t* factors = reinterpret_cast<const uint16_t*>(from);
    for (int64_t c = 0; c < dim; c++) {
        float sum = 0;
        for (int64_t r = 0; r < low.rank; r++)
            sum += float_of_bfloat16(factors[place_of(true, low.rank, p, r)]) *
                   float_of_bfloat16(low.vectors[c * low.rank + r]);
        to[c] = sum;
    }
    turn_key(low, dim, number, p, to);
}

}  // namespace

void add_factors(const LowRankKeys& low, int64_t dim, int64_t number, int64_t p, const uint8_t* whole,
                 float* factors) {
    float key[kMostHead];
    read_whole_key(dim, whole, p, key);
    turn_back(low, dim, number, p, key);
    const int64_t rank = low.rank;
    int64_t c = 0;
    for (; c + 4 <= dim; c += 4) {  // four numbers for each factor that is loaded and stored
        const uint16_t* v = low.vectors + c * rank;
        for (int64_t r = 0; r < rank; r++)
            factors[r] += (key[c] * float_of_bfloat16(v[r]) + key[c + 1] * float_of_bfloat16(v[rank + r])) +
                          (key[c + 2] * float_of_bfloat16(v[2 * rank + r]) +
                           key[c + 3] * float_of_bfloat16(v[3 * rank + r]));
    }
    for (; c < dim; c++)
        for (int64_t r = 0; r < rank; r++)
            factors[r] += key[c] * float_of_bfloat16(low.vectors[c * rank + r]);
}

void keep_factors(const LowRankKeys& low, int64_t p, const float* factors, uint8_t* to) {
    for (int64_t r = 0; r < low.rank; r++)
        reinterpret_cast<uint16_t*>(to)[place_of(true, low.rank, p, r)] = bfloat16_of(factors[r]);
}

void compress_block(const Compression& how, bool keys, int64_t dim, const uint8_t* whole, const float* start,
                    uint8_t* to) {
    Vectors rest(keys, dim);
    const PackedBlock at = packed_block(how, kBlock, int(rest.wide), keys);
    const uint16_t* from = reinterpret_cast<const uint16_t*>(whole);
    const auto words = [&](int64_t offset) { return reinterpret_cast<uint16_t*>(to + offset); };
    std::memset(to, 0, size_t(at.bytes));
    for (int64_t v = 0; v < rest.count; v++) {
        rest.read(from, v);
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

void open_block(const Compression& how, bool keys, int64_t dim, int64_t number, const uint8_t* from,
                uint8_t* whole) {
    const Reader reader = reader_of(how, keys, dim, from);
    uint16_t* to = reinterpret_cast<uint16_t*>(whole);
    if (keys && how.low.rank) {
        for (int64_t p = 0; p < kBlock; p++) {
            float key[kMostHead] = {};
            read_low_rank_key(how.low, dim, number, from, p, key);
            for (int64_t c = 0; c < reader.wide; c++)
                to[place_of(true, reader.wide, p, c)] = bfloat16_of(key[c]);
        }
        return;
    }
    for (int64_t p = 0; p < kBlock; p++)
        for (int64_t c = 0; c < reader.wide; c++)
            to[place_of(keys, reader.wide, p, c)] = c < dim ? bfloat16_of(reader.number(p, c)) : 0;
}

void read_packed_key(const Compression& how, int64_t dim, int64_t number, const uint8_t* from, int64_t p,
                     float* to) {
    if (how.low.rank) return read_low_rank_key(how.low, dim, number, from, p, to);
    const Reader reader = reader_of(how, true, dim, from);
    for (int64_t c = 0; c < dim; c++) to[c] = reader.number(p, c);
}

void read_whole_key(int64_t dim, const uint8_t* whole, int64_t p, float* to) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(whole);
    for (int64_t c = 0; c < dim; c++) to[c] = float_of_bfloat16(from[place_of(true, wide_of(dim), p, c)]);
}

}  // namespace gossamer
