// A linear layer of a decoder: sums and products of packed weights.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "ready.h"
#include "threads.h"

namespace gossamer {

// A program whose weights have no blocks; and a bias or null. Its last stage gives the outputs, those before
// it are inner ones.
struct Linear {
    Linear() = default;
    Linear(const Selected& w, const float* b) : bias(b) { program.add_term(w, 1, -1); }
    Linear(Program p, const float* b) : program(std::move(p)), bias(b) {}
    Program program;
    const float* bias = nullptr;

    int64_t inner() const { return program.stages() - 1; }  // how many of its stages are
    Stage outputs() const { return program.stage(inner()); }
};

// An empty string, or how it differs from what it should be.
inline std::string fits(const Linear& linear, int64_t out, int64_t in, const std::string& name) {
    const Program& program = linear.program;
    if (program.stages() == 0) return name + " has no weights";
    const std::string fault = program.check();
    if (!fault.empty()) return name + " makes no program: " + fault;
    if (program.out() != out || program.in() != in)
        return name + " is " + std::to_string(program.out()) + " x " + std::to_string(program.in()) +
               ", not " + std::to_string(out) + " x " + std::to_string(in);
    for (const Term& term : program.terms())
        if (term.blocks > 1) return name + " has blocks";
    return "";
}

// Panels of a stage, padding included: the most of any term.
inline int64_t panels_of(const Stage& stage) {
    int64_t panels = 0;
    for (const Term& term : stage.terms) panels = std::max(panels, term.w.panels);
    return panels;
}

inline int64_t units_of(const Stage& stage) { return panels_of(stage) / unit_of(stage); }
inline int64_t units_of(const Linear& linear) { return units_of(linear.outputs()); }
inline int64_t unit_of(const Linear& linear) { return unit_of(linear.outputs()); }
inline int64_t panels_of(const Linear& linear) { return panels_of(linear.outputs()); }

inline int64_t activation_bytes(const Linear& linear, int64_t padded) {
    int64_t bytes = 0;
    for (const Term& term : linear.program.terms()) bytes += activation_bytes(term.w, padded);
    return bytes;
}

inline int64_t room_bytes(const Linear& linear, int64_t padded) {
    int64_t bytes = 0;
    for (const Term& term : linear.program.terms()) bytes += room_bytes(term.w, padded);
    return bytes;
}

// Numbers that inner stages give for each row; those of one begin at its `before`.
inline int64_t inner_numbers(const Linear& linear) { return linear.outputs().before; }

inline int64_t scratch_bytes(const Linear& linear, int64_t padded, int64_t block) {
    return scratch_bytes(linear.program.terms(), padded, block);
}

// Makes rows of `x`, float32, ready for each term that multiplies `source`, in memory of activation_bytes and
// room of room_bytes, in which every term has its place.
inline void make_ready(const Tier& tier, const Linear& linear, const float* x, Share rows, int64_t padded,
                       int64_t block, uint8_t* memory, uint8_t* room, int64_t source = -1) {
    for (const Term& term : linear.program.terms()) {
        if (rows.begin < rows.end && term.source == source)
            make_ready(tier, term.w, x, kF32, rows.begin, rows.end,
                       activations_at(memory, term.w, padded, block), room);
        memory += activation_bytes(term.w, padded);
        room += room_bytes(term.w, padded);
    }
}

// Some units of what a stage gives, of rows that lie ready: y = base + its sum.
inline void multiply(const Tier& tier, const Linear& linear, const Stage& stage, uint8_t* ready,
                     int64_t padded, int64_t block, float* y, const float* base, Share units,
                     uint8_t* scratch) {
    if (units.begin >= units.end) return;
    const int64_t unit = unit_of(stage);
    for (const Term& term : linear.program.terms()) {
        if (&term == stage.terms.last) break;
        if (&term >= stage.terms.first) {
            multiply(tier, term.w, activations_at(ready, term.w, padded, block), Output{y, kF32, base},
                     units.begin * unit, std::min(units.end * unit, term.w.panels), scratch);
            base = y;
        }
        ready += activation_bytes(term.w, padded);
    }
}

// Some units of its outputs: y = base + x Wᵀ + bias.
inline void multiply(const Tier& tier, const Linear& linear, uint8_t* ready, int64_t padded, int64_t block,
                     float* y, const float* base, Share units, uint8_t* scratch) {
    const Stage stage = linear.outputs();
    multiply(tier, linear, stage, ready, padded, block, y, base, units, scratch);
    const int64_t wide = kPanel * unit_of(stage), out = stage.out;
    if (linear.bias)
        for (int64_t r = 0; r < padded; r++)
            for (int64_t o = wide * units.begin; o < std::min(wide * units.end, out); o++)
                y[r * out + o] += linear.bias[o];
}

}  // namespace gossamer
