// A linear layer of a decoder, as packed weights that add up.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "ready.h"
#include "selected.h"
#include "threads.h"

namespace gossamer {

// A packed weight, or several whose products with the same activations are added in order; and a bias or
// null.
struct Linear {
    Linear() = default;
    Linear(const Selected& w, const float* b) : terms{w}, bias(b) {}
    Linear(std::vector<Selected> weights, const float* b) : terms(std::move(weights)), bias(b) {}
    std::vector<Selected> terms;
    const float* bias = nullptr;
};

// An empty string, or how it differs from what it should be.
inline std::string fits(const Selected& w, int64_t out, int64_t in, const std::string& name) {
    if (w.out == out && row_width(w) == in) return "";
    return name + " is " + std::to_string(w.out) + " x " + std::to_string(row_width(w)) + ", not " +
           std::to_string(out) + " x " + std::to_string(in);
}

inline std::string fits(const Linear& linear, int64_t out, int64_t in, const std::string& name) {
    if (linear.terms.empty()) return name + " has no weights";
    for (const Selected& w : linear.terms) {
        const std::string fault = fits(w, out, in, name);
        if (!fault.empty()) return fault;
    }
    return "";
}

// Panels of 16 outputs that a sum is split by, and all of them, padding included: the most of any term.
inline int64_t unit_of(const Linear& linear) {
    int64_t unit = 1;
    for (const Packed& w : linear.terms) unit = std::max(unit, unit_of(w.layout));
    return unit;
}

inline int64_t panels_of(const Linear& linear) {
    int64_t panels = 0;
    for (const Packed& w : linear.terms) panels = std::max(panels, w.panels);
    return panels;
}

inline int64_t units_of(const Linear& linear) { return panels_of(linear) / unit_of(linear); }

inline int64_t activation_bytes(const Linear& linear, int64_t padded) {
    int64_t bytes = 0;
    for (const Packed& w : linear.terms) bytes += activation_bytes(w, padded);
    return bytes;
}

inline int64_t room_bytes(const Linear& linear, int64_t padded) {
    int64_t bytes = 0;
    for (const Selected& w : linear.terms) bytes += room_bytes(w, padded);
    return bytes;
}

// Bytes of a thread's scratch; with up to four rows only some layouts need any.
inline int64_t scratch_bytes(const Linear& linear, int64_t padded, int64_t block) {
    int64_t bytes = 0;
    for (const Packed& w : linear.terms)
        if (padded > 4 || w.layout == kColumns)
            bytes = std::max(bytes, aligned(scratch_bytes(w, padded, block)));
    return bytes;
}

// Makes rows of `x`, float32, ready for each term, in memory of activation_bytes and room of room_bytes.
inline void make_ready(const Tier& tier, const Linear& linear, const float* x, Share rows, int64_t padded,
                       int64_t block, uint8_t* memory, uint8_t* room) {
    for (const Selected& w : linear.terms) {
        if (rows.begin < rows.end)
            make_ready(tier, w, x, kF32, rows.begin, rows.end, activations_at(memory, w, padded, block),
                       room);
        memory += activation_bytes(w, padded);
        room += room_bytes(w, padded);
    }
}

// Outputs of some units, of rows that lie ready: y = base + x Wᵀ + bias.
inline void multiply(const Tier& tier, const Linear& linear, uint8_t* ready, int64_t padded, int64_t block,
                     float* y, const float* base, Share units, uint8_t* scratch) {
    if (units.begin >= units.end) return;
    const int64_t unit = unit_of(linear), begin = units.begin * unit, out = linear.terms[0].out;
    for (const Packed& w : linear.terms) {
        multiply(tier, w, activations_at(ready, w, padded, block), Output{y, kF32, base}, begin,
                 std::min(units.end * unit, w.panels), scratch);
        ready += activation_bytes(w, padded);
        base = y;
    }
    if (linear.bias)
        for (int64_t r = 0; r < padded; r++)
            for (int64_t o = kPanel * begin; o < std::min(kPanel * unit * units.end, out); o++)
                y[r * out + o] += linear.bias[o];
}

}  // namespace gossamer
