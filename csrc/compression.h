// How whole blocks of a cache are kept in few bits (Liu et al. 2024, KIVI; Kang et al. 2024, GEAR): codes, in
// low rank what these miss, and outliers as they are.
//
// Of one head's keys in a block each channel is a vector, of its values each position; `wide` numbers are a
// position's (attention.h). One after the other:
//
//   codes     pairs in the order of a block of bfloat16. 4 bits: byte i holds pair i, its first number low;
//             2 bits: byte i of each 16 holds pair i of 32 in its low half, and pair 16 + i in its high one
//   scales    [vectors] float16      number = code * scale + low
//   lows      [vectors] float16
//   left      [rank][kBlock] bfloat16, by positions      + left rightᵀ
//   right     [rank][wide] bfloat16, by numbers of a head
//   outliers  [count][vectors] bfloat16, then their places in the vector [count][vectors] bytes: instead
//
// Or keys, before rotation, in low rank (Sun et al. 2024, ShadowKV), those of all heads of a layer together:
//
//   factors   [block of 16 positions][rank / 2][16][2] bfloat16, as keys of `rank` numbers would lie
//
// A head's keys are factors times its vectors, rotated by their positions.
//
// This header is included by units of every instruction set: nothing in it may have external linkage.
#pragma once
#include <stdint.h>

namespace gossamer {

constexpr int kMostRank = 4;
constexpr int kMostOutliers = 16;  // of a vector

// Of a vector, `most` of the largest and `least` of the least numbers are outliers.
struct Outliers {
    int most, least;
};

static inline int count_of(const Outliers& some) { return some.most + some.least; }

// What opens low-rank keys of one head.
struct LowRankKeys {
    int rank = 0;                       // a multiple of 16; 0: keys are coded
    const uint16_t* vectors = nullptr;  // [number of the head][rank] bfloat16
    const float* starts = nullptr;  // [block][cos, sin][dim / 2]: of its first position; null: no rotation
    const float* turns = nullptr;   // [dim / 2][cos, sin][kBlock]: from there on, and the rotation's scale
};

struct Compression {
    int bits = 0;  // of a code: 2 or 4; 0: nothing is compressed
    int rank = 0;
    Outliers keys{0, 0}, values{0, 0};
    LowRankKeys low{};
};

constexpr int kMostKeyRank = 1024;

static inline const Outliers& outliers_of(const Compression& how, bool keys) {
    return keys ? how.keys : how.values;
}

// Whether heads of `dim` numbers can be compressed so.
static inline bool compresses(const Compression& how, int64_t dim) {
    const Outliers &keys = how.keys, &values = how.values;
    const bool few = keys.most >= 0 && keys.least >= 0 && values.most >= 0 && values.least >= 0 &&
                     count_of(keys) <= kMostOutliers && count_of(values) <= kMostOutliers &&
                     count_of(values) <= dim;
    return (how.bits == 2 || how.bits == 4) && how.rank >= 0 && how.rank <= kMostRank && how.rank <= dim &&
           few && how.low.rank >= 0 && how.low.rank <= kMostKeyRank && how.low.rank % 16 == 0;
}

// Where the parts of a compressed block begin.
struct PackedBlock {
    int vectors, count;  // and outliers of each
    int64_t scales, lows, left, right, outliers, places, bytes;
};

static inline PackedBlock packed_block(const Compression& how, int block, int wide, bool keys) {
    PackedBlock at{};
    if (keys && how.low.rank) {
        at.bytes = 2 * int64_t(block) * how.low.rank;
        return at;
    }
    at.vectors = keys ? wide : block;
    at.count = count_of(outliers_of(how, keys));
    at.scales = int64_t(block) * wide * how.bits / 8;
    at.lows = at.scales + 2 * at.vectors;
    at.left = at.lows + 2 * at.vectors;
    at.right = at.left + 2 * how.rank * block;
    at.outliers = at.right + 2 * how.rank * wide;
    at.places = at.outliers + 2 * at.count * at.vectors;
    at.bytes = (at.places + at.count * at.vectors + 63) / 64 * 64;
    return at;
}

}  // namespace gossamer
