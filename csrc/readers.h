// Readers give the weights of a panel-group as registers: 64 bytes a piece, in order of e, pruned ones as
// zero.
//
// One reader per layout and value type; each walks the panel-groups of a range of panels:
//     Reader reader(w, first_panel, end_panel, storage);
//     reader.next();                       // the next panel-group; then, each once and in order:
//     Bytes piece = reader.piece(0 .. kPieces - 1);
// A piece is 64 codes (integers: 16 outputs x 4 inputs), 32 bfloat16 (8 x 4) or 16 float32 (4 x 4).
#pragma once
#include "packed.h"
#include "simd.h"

namespace gossamer {
namespace {

constexpr int kCodeBuffer = kWeights + 256;  // unpacking writes whole registers past the last code

// Working memory of a reader; apart from it, so that the reader's own fields can stay in registers.
struct Storage {
    alignas(64) uint8_t codes[2][kCodeBuffer];
    alignas(64) uint8_t tail[4 * kWeights + kSlack];
};

template <int V>
constexpr int kPieces = 16 * (V == kFloat32    ? 4
                              : V == kBFloat16 ? 2
                                               : 1);

template <int V>
constexpr uint8_t kZeroCode = V == kInt8   ? 128
                              : V == kInt4 ? 8
                              : V == kInt3 ? 4
                                           : 0;

GOSSAMER_INLINE uint64_t load_word(const void* p) {
    uint64_t word;
    __builtin_memcpy(&word, p, 8);
    return word;
}

GOSSAMER_INLINE void prefetch(const uint8_t* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + kPrefetch + i);
}

// ---- dense

// Weights as they are multiplied, without decoding: an expanded panel, or dense int8 and float values.
template <int V>
struct Expanded {
    const uint8_t* ahead;
    const uint8_t* at = nullptr;

    GOSSAMER_INLINE explicit Expanded(const uint8_t* panel) : ahead(panel) {}
    GOSSAMER_INLINE void next() {
        at = ahead;
        ahead += 64 * kPieces<V>;
    }
    GOSSAMER_INLINE Bytes piece(int i) const { return load(at + 64 * i); }
};

//  int4: 8 x 64 bytes, low nibbles = codes 0..63 of 128, high nibbles = codes 64..127
//  int3: 4 x 64 bytes of two bits, field j = codes 64j.. of 256; then 16 words of high bits
template <int V>
struct Dense {
    const uint8_t* ahead;
    const uint8_t* at = nullptr;
    int64_t bytes;

    GOSSAMER_INLINE Dense(const Packed& w, int64_t begin, int64_t, Storage&)
        : bytes(stored_bytes(V, kWeights)) {
        ahead = w.data + begin * w.groups * bytes;
    }
    GOSSAMER_INLINE void next() {
        at = ahead;
        ahead += bytes;
        prefetch(at, bytes);
    }
    GOSSAMER_INLINE Bytes piece(int i) const {
        if (V == kInt4) {
            Bytes two = load(at + 64 * (i / 2));
            return i & 1 ? high_nibbles(two) : low_nibbles(two);
        }
        if (V == kInt3)
            return add_high_bit(two_bits(load(at + 64 * (i / 4)), i % 4), load_word(at + 256 + 8 * i));
        return load(at + 64 * i);
    }
};

// ---- sparse

// 64 bits from bit `offset` on; reads up to 16 bytes from there.
GOSSAMER_INLINE uint64_t bits_at(const uint8_t* p, int64_t offset) {
    int shift = int(offset & 7);
    uint64_t high = uint64_t(p[offset / 8 + 8]);
    return load_word(p + offset / 8) >> shift | high << 1 << (63 - shift);
}

// Stored small codes to one code a byte; the last block is shorter (docs/architecture.md, "Bit fields").
template <int V>
GOSSAMER_INLINE void unpack(const uint8_t* p, int count, uint8_t* to) {
    if (V == kInt4) {
        for (; count >= 128; count -= 128, p += 64, to += 128) {
            Bytes two = load(p);
            store(to, low_nibbles(two));
            store(to + 64, high_nibbles(two));
        }
        if (count > 0) {
            Bytes two = load(p);
            store(to, low_nibbles(two));
            store(to + (count + 1) / 2, high_nibbles(two));
        }
    } else {
        const uint8_t* high = p + count / 256 * 64 + (count % 256 + 3) / 4;
        for (; count >= 256; count -= 256, p += 64, to += 256, high += 32) {
            Bytes four = load(p);
            GOSSAMER_UNROLL(4)
            for (int j = 0; j < 4; j++)
                store(to + 64 * j, add_high_bit(two_bits(four, j), load_word(high + 8 * j)));
        }
        if (count > 0) {
            Bytes four = load(p);
            int field = (count + 3) / 4;
            GOSSAMER_UNROLL(4)
            for (int j = 0; j < 4; j++)
                store(to + field * j, add_high_bit(two_bits(four, j), bits_at(high, field * j)));
        }
    }
}

// bitmap and n:64: masks say where the stored values go. Small codes are unpacked one panel-group ahead, so
// that loads do not wait for the stores just made.
template <int V, bool kOffsets>
struct Sparse {
    static constexpr bool kUnpacks = V == kInt4 || V == kInt3;

    Storage& storage;
    const uint8_t* ahead;  // values of the next panel-group to be fetched
    const uint8_t* end;
    const uint8_t* cursor = nullptr;
    const uint64_t* words = nullptr;
    const uint64_t* words_ahead;
    const uint64_t* words_end;
    int keep;
    int turn = 0;

    GOSSAMER_INLINE Sparse(const Packed& w, int64_t begin_panel, int64_t end_panel, Storage& memory)
        : storage(memory), end(w.data_end), keep(w.keep) {
        words_ahead = w.masks + begin_panel * w.groups * kSteps;
        words_end = w.masks + end_panel * w.groups * kSteps;
        ahead = w.data +
                (kOffsets ? w.offsets[begin_panel] : begin_panel * w.groups * stored_bytes(V, 16 * keep));
        if (kUnpacks) fetch();
    }

    GOSSAMER_INLINE void next() {
        if (kUnpacks) {
            words = words_ahead - kSteps;
            cursor = storage.codes[turn ^ 1];
            if (words_ahead < words_end) fetch();
        } else {
            words = words_ahead;
            fetch();
        }
    }

    GOSSAMER_INLINE Bytes piece(int i) {
        if (V == kFloat32) {
            uint32_t kept = uint16_t(words[i / 4] >> 16 * (i % 4));
            const uint8_t* from = cursor;
            cursor += 4 * __builtin_popcount(kept);
            return expand32(from, kept);
        }
        if (V == kBFloat16) {
            uint32_t kept = uint32_t(words[i / 2] >> 32 * (i % 2));
            const uint8_t* from = cursor;
            cursor += 2 * __builtin_popcount(kept);
            return expand16(from, kept);
        }
        uint64_t kept = words[i];
        const uint8_t* from = cursor;
        cursor += __builtin_popcountll(kept);
        return expand8(from, kept, kZeroCode<V>);
    }

  private:
    // Makes the values at `ahead` ready, unpacked or in place, and moves on by one panel-group.
    GOSSAMER_INLINE void fetch() {
        int count = 16 * keep;
        if (kOffsets) {
            count = 0;
            GOSSAMER_UNROLL(16)
            for (int s = 0; s < kSteps; s++) count += __builtin_popcountll(words_ahead[s]);
        }
        int64_t bytes = stored_bytes(V, count);
        prefetch(ahead, bytes);
        prefetch((const uint8_t*)words_ahead, 8 * kSteps);
        const uint8_t* from = ahead;
        if (end - ahead < bytes + kSlack) {  // registers would read past the section: copy what exists
            __builtin_memcpy(storage.tail, ahead, size_t(bytes));
            from = storage.tail;
        }
        if (!kUnpacks)
            cursor = from;
        else if (!kOffsets && keep == 32)
            unpack<V>(from, 512, storage.codes[turn]);  // the common case, unrolled
        else
            unpack<V>(from, count, storage.codes[turn]);
        turn ^= 1;
        ahead += bytes;
        words_ahead += kSteps;
    }
};

}  // namespace
}  // namespace gossamer
