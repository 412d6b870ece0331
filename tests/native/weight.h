// Random packed weights, and what their bytes mean: written from docs/architecture.md ("Packed weights"), not
// from csrc/, and one code at a time.
#pragma once
#include <string>
#include <vector>

#include "buffer.h"
#include "packed.h"

namespace testing {

struct LayoutCase {
    const char* name;
    int layout, keep;
};

struct ValuesCase {
    const char* name;
    int values, parts;
    bool integers() const { return values >= gossamer::kInt8; }
};

constexpr LayoutCase kLayouts[] = {
    {"dense", gossamer::kDense, 0},     {"bitmap", gossamer::kBitmap, 0}, {"16x4", gossamer::kBySteps, 0},
    {"32:64", gossamer::kBalanced, 32}, {"7:64", gossamer::kBalanced, 7}, {"64:64", gossamer::kBalanced, 64},
    {"columns", gossamer::kColumns, 0},
};

constexpr ValuesCase kValues[] = {
    {"float32", gossamer::kFloat32, 1}, {"bfloat16", gossamer::kBFloat16, 1},
    {"int8", gossamer::kInt8, 1},       {"int4", gossamer::kInt4, 1},
    {"int3", gossamer::kInt3, 1},       {"int8 by 32", gossamer::kInt8, 2},
    {"int4 by 32", gossamer::kInt4, 2}, {"int3 by 32", gossamer::kInt3, 2},
    {"nl4", gossamer::kNl4, 1},         {"nl3", gossamer::kNl3, 1},
    {"nl3 by 32", gossamer::kNl3, 2},
};

// The layout columns has no values of three bits or with levels.
inline bool exists(const LayoutCase& layout, const ValuesCase& kind) {
    return layout.layout != gossamer::kColumns || kind.values < gossamer::kInt3;
}

enum class Numbers {
    kUsual,     // among them -0.0 and subnormal values and scales, and scales of zero
    kPoisoned,  // float values: some infinite, some NaN
    kUnit,      // every scale is 1
};

// A valid packed weight: any mask that the layout allows (empty and full groups among them), any codes, also
// where the format wants zeros that nothing may depend on. Its sections have their exact sizes.
class Weight {
  public:
    Weight(Random& random, const LayoutCase& layout, const ValuesCase& values, int64_t out, int64_t in,
           Numbers numbers = Numbers::kUsual);

    gossamer::Packed packed() const;

    LayoutCase layout;
    ValuesCase kind;
    int64_t out, in, panels, groups;        // panels: of 16 outputs, padding included
    Buffer values, masks, scales, offsets;  // empty where the layout has none

  private:
    void fill_masks(Random& random);
    void fill_values(Random& random, Numbers numbers);
    void fill_scales(Random& random, Numbers numbers);
};

// Which weights of a panel-group are stored, in order of e.
std::vector<bool> stored_of(const Weight& w, int64_t panel, int64_t group);

// Bytes of `count` stored values of a panel-group.
int64_t bytes_of_values(int values, int64_t count);

// Whether the sections are what the format allows: nothing else may reach a kernel.
bool well_formed(const Weight& w);

// A weight as numbers.
struct Plain {
    int64_t out, in, panels, groups;
    int values, parts, layout;
    std::vector<float> weight;  // (out, in): a float, or an integer q; 0 where pruned
    std::vector<float> scales;  // (out, groups * parts)
    std::vector<bool> steps;    // (panels, groups, 16): which steps are multiplied; all but in 16x4
};

Plain unpack(const Weight& w);

// One row of a product: what it is in real numbers, and how far a kernel's result may lie from that.
struct Expected {
    std::vector<double> y, room;  // (out)
    std::vector<float> in_order;  // integer values: the same operations in the same order, in float32
};

// `flushes`: subnormal bfloat16 numbers count as zero.
Expected product(const Plain& w, const float* x, bool flushes);

}  // namespace testing
