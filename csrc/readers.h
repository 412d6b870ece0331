// Readers give the weights of a panel-group as registers: 64 bytes a piece, in order of e, pruned ones as
// zero.
//
// One reader per layout and value type; each walks the panel-groups of a range of panels:
//     Reader reader(w, first_panel, end_panel, storage);
//     reader.next();                       // the next panel-group; then, each once and in order:
//     Bytes piece = reader.piece(0 .. kPieces - 1);
// A piece is 64 codes (integers: 16 outputs x 4 inputs), 32 bfloat16 (8 x 4) or 16 float32 (4 x 4).
// Readers of whole steps (kBySteps) give the pieces of kept steps only:
//     uint32_t kept = reader.steps();      // bit s: step s is kept
//     Bytes piece = reader.take();         // kPieces / 16 times for each of them, in order
// Reader::Swept reads what expand() wrote of a panel-group.
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
constexpr uint8_t kZeroCode = uint8_t(zero_of(V));

// Several codes to a byte, so that they are unpacked before they are multiplied.
template <int V>
constexpr bool kSmallCodes = code_bits(V) == 4 || code_bits(V) == 3;

// Codes as they are multiplied: themselves, or the levels that they stand for.
template <int V, bool = has_levels(V)>
struct Levels {
    GOSSAMER_INLINE Bytes of(const Bytes& codes) const { return codes; }
};

template <int V>
struct Levels<V, true> {
    Bytes table;

    GOSSAMER_INLINE Levels() : table(repeat16(kLevels[V - kNl4])) {}
    GOSSAMER_INLINE Bytes of(const Bytes& codes) const { return look_up(table, codes); }
};

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
    static constexpr bool kBySteps = false;
    static constexpr bool kListed = false;

    const uint8_t* ahead = nullptr;
    const uint8_t* at = nullptr;

    Expanded() = default;
    // From group `begin` of a panel on.
    GOSSAMER_INLINE Expanded(const uint8_t* weights, const Packed&, int64_t, int64_t) : ahead(weights) {}
    GOSSAMER_INLINE void next() {
        at = ahead;
        ahead += 64 * kPieces<V>;
    }
    GOSSAMER_INLINE Bytes piece(int i) const { return load(at + 64 * i); }
};

//  4 bits: 8 x 64 bytes, low nibbles = codes 0..63 of 128, high nibbles = codes 64..127
//  3 bits: 4 x 64 bytes of two bits, field j = codes 64j.. of 256; then 16 words of high bits
template <int V>
struct Dense {
    static constexpr bool kBySteps = false;
    static constexpr bool kListed = false;
    using Swept = Expanded<V>;

    const uint8_t* ahead;
    const uint8_t* at = nullptr;
    int64_t bytes;
    Levels<V> levels;

    GOSSAMER_INLINE Dense(const Packed& w, int64_t begin, int64_t, Storage&)
        : bytes(stored_bytes(V, kWeights)) {
        ahead = w.data + begin * w.groups * bytes;
    }
    GOSSAMER_INLINE void next() {
        at = ahead;
        ahead += bytes;
        // what is multiplied as it lies is read so fast that the processor's own prefetching is the best
        if (kSmallCodes<V>) prefetch(at, bytes);
    }
    GOSSAMER_INLINE Bytes piece(int i) const {
        if (code_bits(V) == 4) {
            Bytes two = load(at + 64 * (i / 2));
            return levels.of(i & 1 ? high_nibbles(two) : low_nibbles(two));
        }
        if (code_bits(V) == 3) {
            const uint64_t high = load_word(at + 256 + 8 * i);
            return levels.of(add_high_bit(two_bits(load(at + 64 * (i / 4)), i % 4), high));
        }
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

// Stored small codes to one a byte, as they are multiplied; the last block is shorter (docs/architecture.md,
// "Bit fields").
template <int V>
GOSSAMER_INLINE void unpack(const Levels<V>& levels, const uint8_t* p, int count, uint8_t* to) {
    if (code_bits(V) == 4) {
        for (; count >= 128; count -= 128, p += 64, to += 128) {
            Bytes two = load(p);
            store(to, levels.of(low_nibbles(two)));
            store(to + 64, levels.of(high_nibbles(two)));
        }
        if (count > 0) {
            Bytes two = load(p);
            store(to, levels.of(low_nibbles(two)));
            store(to + (count + 1) / 2, levels.of(high_nibbles(two)));
        }
    } else {
        const uint8_t* high = p + count / 256 * 64 + (count % 256 + 3) / 4;
        for (; count >= 256; count -= 256, p += 64, to += 256, high += 32) {
            Bytes four = load(p);
            GOSSAMER_UNROLL(4)
            for (int j = 0; j < 4; j++)
                store(to + 64 * j, levels.of(add_high_bit(two_bits(four, j), load_word(high + 8 * j))));
        }
        if (count > 0) {
            Bytes four = load(p);
            int field = (count + 3) / 4;
            GOSSAMER_UNROLL(4)
            for (int j = 0; j < 4; j++)
                store(to + field * j, levels.of(add_high_bit(two_bits(four, j), bits_at(high, field * j))));
        }
    }
}

// The values section of a sparse layout, made ready by panel-groups. Small codes are unpacked one panel-group
// ahead, so that loads do not wait for the stores just made.
template <int V>
struct Stored {
    static constexpr bool kUnpacks = kSmallCodes<V>;

    Storage& storage;
    Levels<V> levels;
    const uint8_t* ahead;  // values of the next panel-group to be fetched
    const uint8_t* end;
    int turn = 0;

    GOSSAMER_INLINE Stored(const Packed& w, int64_t begin_panel, Storage& memory)
        : storage(memory), end(w.data_end) {
        ahead = w.data +
                (w.offsets ? w.offsets[begin_panel] : begin_panel * w.groups * stored_bytes(V, 16 * w.keep));
    }

    // The stored bytes of the next values; `reach` bytes from their start on may be read, `likely` are
    // prefetched.
    GOSSAMER_INLINE const uint8_t* take(int64_t bytes, int64_t reach, int64_t likely) {
        prefetch(ahead, likely);
        const uint8_t* from = ahead;
        if (end - ahead < reach) {  // registers would read past the section: copy what exists
            if (bytes > 0) __builtin_memcpy(storage.tail, ahead, size_t(bytes));
            from = storage.tail;
        }
        ahead += bytes;
        return from;
    }

    GOSSAMER_INLINE uint8_t* next_codes() {
        turn ^= 1;
        return storage.codes[turn];
    }

    // The next `count` values, ready to be read; `of_32`: there are 512, the common case, unrolled.
    GOSSAMER_INLINE const uint8_t* fetch(int count, bool of_32) {
        const int64_t bytes = stored_bytes(V, count);
        const uint8_t* from = take(bytes, bytes + kSlack, bytes);
        if (!kUnpacks) return from;
        uint8_t* codes = next_codes();
        if (of_32)
            unpack<V>(levels, from, 512, codes);
        else
            unpack<V>(levels, from, count, codes);
        return codes;
    }
};

// bitmap and n:64: masks say where the stored values go.
template <int V, bool kOffsets>
struct Sparse {
    static constexpr bool kBySteps = false;
    static constexpr bool kListed = false;
    using Swept = Expanded<V>;

    Stored<V> stored;
    const uint8_t* cursor = nullptr;
    const uint8_t* cursor_ahead = nullptr;
    const uint64_t* words = nullptr;
    const uint64_t* words_ahead;
    const uint64_t* words_end;
    int keep;

    GOSSAMER_INLINE Sparse(const Packed& w, int64_t begin_panel, int64_t end_panel, Storage& memory)
        : stored(w, begin_panel, memory), keep(w.keep) {
        words_ahead = w.masks + begin_panel * w.groups * kSteps;
        words_end = w.masks + end_panel * w.groups * kSteps;
        if (stored.kUnpacks) fetch();
    }

    GOSSAMER_INLINE void next() {
        if (stored.kUnpacks) {
            words = words_ahead - kSteps;
            cursor = cursor_ahead;
            if (words_ahead < words_end) fetch();
        } else {
            words = words_ahead;
            fetch();
            cursor = cursor_ahead;
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
    GOSSAMER_INLINE void fetch() {
        int count = 16 * keep;
        if (kOffsets) {
            count = 0;
            GOSSAMER_UNROLL(16)
            for (int s = 0; s < kSteps; s++) count += __builtin_popcountll(words_ahead[s]);
        }
        prefetch((const uint8_t*)words_ahead, 8 * kSteps);
        cursor_ahead = stored.fetch(count, !kOffsets && keep == 32);
        words_ahead += kSteps;
    }
};

// Kept steps of a panel's part of a tile, expanded one after the other. The list behind the tile has kSteps
// times the group, counted from the tile's first, plus the step.
struct StepList {
    int32_t count;
    uint16_t at[kListBytes / 2 - 2];
};

template <int V>
struct ExpandedSteps {
    static constexpr bool kBySteps = true;
    static constexpr bool kListed = true;

    const uint8_t* at = nullptr;
    const uint16_t* words = nullptr;
    const StepList* list = nullptr;
    uint32_t kept = 0;

    ExpandedSteps() = default;
    GOSSAMER_INLINE ExpandedSteps(const uint8_t* weights, const Packed& w, int64_t panel, int64_t begin)
        : at(weights),
          words((const uint16_t*)w.masks + panel * w.groups + begin),
          list((const StepList*)(weights + kTileBytes)) {}
    GOSSAMER_INLINE void next() { kept = *words++; }
    GOSSAMER_INLINE uint32_t steps() const { return kept; }
    GOSSAMER_INLINE Bytes take() {
        at += 64;
        return load(at - 64);
    }
};

// 16x4: a panel-group's mask has one bit a step, and whole steps are stored.
template <int V>
struct Steps {
    static constexpr bool kBySteps = true;
    static constexpr bool kListed = false;
    using Swept = ExpandedSteps<V>;

    Stored<V> stored;
    const uint8_t* cursor = nullptr;
    const uint8_t* cursor_ahead = nullptr;
    const uint16_t* words_ahead;
    const uint16_t* words_end;
    uint32_t kept = 0, kept_ahead = 0;

    GOSSAMER_INLINE Steps(const Packed& w, int64_t begin_panel, int64_t end_panel, Storage& memory)
        : stored(w, begin_panel, memory) {
        words_ahead = (const uint16_t*)w.masks + begin_panel * w.groups;
        words_end = (const uint16_t*)w.masks + end_panel * w.groups;
        if (stored.kUnpacks) fetch();
    }

    GOSSAMER_INLINE void next() {
        if (!stored.kUnpacks) fetch();  // there is one tail: what lies in it must be read before the next
        kept = kept_ahead;
        cursor = cursor_ahead;
        if (stored.kUnpacks && words_ahead < words_end) fetch();
    }
    GOSSAMER_INLINE uint32_t steps() const { return kept; }
    GOSSAMER_INLINE Bytes take() {
        cursor += 64;
        return load(cursor - 64);
    }
    // The i-th kept step (integers). kSteps of them may be read; what lies past the kept ones is anything.
    GOSSAMER_INLINE Bytes step(int i) const { return load(cursor + 64 * i); }

  private:
    GOSSAMER_INLINE void fetch() {
        kept_ahead = *words_ahead++;
        const int steps = __builtin_popcount(kept_ahead);
        const int64_t bytes = stored_bytes(V, kGroup * steps);
        if (code_bits(V) == 4) {
            const uint8_t* from = stored.take(bytes, 32 * kSteps + 64, 16 * kSteps);
            uint8_t* codes = stored.next_codes();
            unpack_steps(stored.levels, from, steps, codes);
            cursor_ahead = codes;
        } else if (V == kInt8) {
            cursor_ahead = stored.take(bytes, 64 * kSteps, 32 * kSteps);
        } else {
            cursor_ahead = stored.fetch(kGroup * steps, false);
        }
    }

    // As unpack(), by eight steps at a time: how many there are is hard to foresee, and a wrong guess costs
    // more than eight steps. Writes up to kSteps + 2 of them.
    static GOSSAMER_INLINE void unpack_steps(const Levels<V>& levels, const uint8_t* from, int steps,
                                             uint8_t* to) {
        for (int i = 0; i < steps; i += 8) {
            GOSSAMER_UNROLL(4)
            for (int j = i; j < i + 8; j += 2) {
                Bytes two = load(from + 32 * j);
                store(to + 64 * j, levels.of(low_nibbles(two)));
                store(to + 64 * j + 64, levels.of(high_nibbles(two)));
            }
        }
        const int last = steps / 2;  // of an odd number, the last one fills half of its bytes
        Bytes two = load(from + 64 * last);
        store(to + 128 * last, levels.of(low_nibbles(two)));
        store(to + 128 * last + 32, levels.of(high_nibbles(two)));
    }
};

}  // namespace
}  // namespace gossamer
