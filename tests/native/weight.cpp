#include "weight.h"

#include <cmath>
#include <limits>
#include <utility>

namespace testing {
namespace {

using namespace gossamer;

int64_t padded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

float random_float(Random& random) {
    if (random.chance(0.01)) return -0.0f;
    float f = float(4 * random.unit() - 2);
    return random.chance(0.01) ? f * 1e-39f : f;
}

uint16_t random_scale(Random& random) {
    int exponent = random.chance(0.05) ? 0 : int(1 + random.below(17));  // up to 8; 0: zero or subnormal
    uint16_t fraction = exponent == 0 && random.chance(0.5) ? 0 : uint16_t(random.bits() & 1023);
    return uint16_t((random.bits() & 1) << 15 | exponent << 10 | fraction);
}

// Codes of a stream of bit fields, `fields` to a byte (docs: "Bit fields").
int field(const uint8_t* stream, int64_t count, int fields, int64_t c) {
    const int64_t block = c / (64 * fields), left = count - block * 64 * fields;
    const int64_t length = left < 64 * fields ? left : 64 * fields, h = (length + fields - 1) / fields;
    const int64_t at = c % (64 * fields);
    const int width = 8 / fields;
    return stream[64 * block + at % h] >> width * (at / h) & ((1 << width) - 1);
}

int64_t bytes_of_fields(int64_t count, int fields) {
    int64_t bytes = 0;
    for (; count > 0; count -= 64 * fields)
        bytes += count >= 64 * fields ? 64 : (count + fields - 1) / fields;
    return bytes;
}

// What the codes of nl4 and nl3 stand for.
constexpr int kLevelsOf[2][16] = {
    {-62, -48, -39, -31, -24, -17, -11, -5, 0, 6, 12, 19, 26, 34, 44, 58},
    {-30, -19, -11, -5, 0, 6, 13, 23},
};

// Value c of a panel-group of `count`: a float, or q.
float value_at(int values, const uint8_t* stored, int64_t count, int64_t c) {
    switch (values) {
        case kFloat32: {
            float f;
            memcpy(&f, stored + 4 * c, 4);
            return f;
        }
        case kBFloat16:
            return of_bfloat16(uint16_t(stored[2 * c] | stored[2 * c + 1] << 8));
        case kInt8:
            return float(stored[c] - 128);
        case kInt4:
            return float(field(stored, count, 2, c) - 8);
        case kNl4:
            return float(kLevelsOf[0][field(stored, count, 2, c)]);
        default: {
            int high = stored[bytes_of_fields(count, 4) + c / 8] >> c % 8 & 1;
            int code = field(stored, count, 4, c) + 4 * high;
            return float(values == kInt3 ? code - 4 : kLevelsOf[1][code]);
        }
    }
}

int64_t count_true(const std::vector<bool>& bits) {
    int64_t count = 0;
    for (bool bit : bits) count += bit;
    return count;
}

// Values that a panel-group has room for.
int64_t stored_count(const Weight& w, int64_t panel, int64_t group) {
    if (w.layout.layout == kBalanced) return 16 * w.layout.keep;
    return count_true(stored_of(w, panel, group));
}

}  // namespace

int64_t bytes_of_values(int values, int64_t count) {
    switch (values) {
        case kFloat32:
            return 4 * count;
        case kBFloat16:
            return 2 * count;
        case kInt8:
            return count;
        case kInt4:
        case kNl4:
            return bytes_of_fields(count, 2);
        default:
            return bytes_of_fields(count, 4) + (count + 7) / 8;
    }
}

std::vector<bool> stored_of(const Weight& w, int64_t panel, int64_t group) {
    const int64_t at = panel * w.groups + group;
    std::vector<bool> stored(1024);
    for (int e = 0; e < 1024; e++) {
        if (!w.masks.data())
            stored[e] = true;
        else if (w.layout.layout == kBySteps)
            stored[e] = w.masks.as<uint16_t>()[at] >> e / 64 & 1;
        else
            stored[e] = w.masks.as<uint64_t>()[16 * at + e / 64] >> e % 64 & 1;
    }
    return stored;
}

Weight::Weight(Random& random, const LayoutCase& layout_, const ValuesCase& kind_, int64_t out_, int64_t in_,
               Numbers numbers)
    : layout(layout_),
      kind(kind_),
      out(out_),
      in(in_),
      panels(layout_.layout == kColumns ? (out_ + 127) / 128 * 8 : (out_ + 15) / 16),
      groups((in_ + 63) / 64) {
    if (layout.layout != kDense && layout.layout != kColumns) fill_masks(random);
    fill_values(random, numbers);
    if (kind.integers()) fill_scales(random, numbers);
}

void Weight::fill_masks(Random& random) {
    const bool by_steps = layout.layout == kBySteps;
    masks = Buffer(padded(panels * groups * (by_steps ? 2 : 128)), random);
    const double densities[] = {0.5, 0.5, 0.5, 1.0, 0.0, 0.05};
    for (int64_t at = 0; at < panels * groups; at++) {
        const int64_t panel = at / groups, group = at % groups;
        const int64_t width = in - 64 * group < 64 ? in - 64 * group : 64;
        const double density = densities[random.below(6)];
        uint64_t words[16] = {};
        uint16_t steps = 0;
        for (int s = 0; by_steps && s < (width + 3) / 4; s++) steps |= uint16_t(random.chance(density) << s);
        for (int o = 0; !by_steps && o < 16 && 16 * panel + o < out; o++) {
            const int64_t most = layout.layout == kBalanced && layout.keep < width ? layout.keep : width;
            int64_t left = density == 1 ? most : int64_t(density * double(most) + random.unit());
            for (int64_t i = 0; i < width; i++) {  // `left` of the inputs that are left
                if (random.below(width - i) >= left) continue;
                words[i / 4] |= uint64_t(1) << (4 * o + i % 4);
                left--;
            }
        }
        if (by_steps)
            masks.as<uint16_t>()[at] = steps;
        else
            memcpy(masks.as<uint64_t>() + 16 * at, words, sizeof words);
    }
}

void Weight::fill_values(Random& random, Numbers numbers) {
    const bool has_offsets = layout.layout == kBitmap || layout.layout == kBySteps;
    std::vector<int64_t> starts{0};
    int64_t end = 0;
    for (int64_t panel = 0; panel < panels; panel++) {
        for (int64_t group = 0; group < groups; group++)
            end += bytes_of_values(kind.values, stored_count(*this, panel, group));
        starts.push_back(end);
    }
    if (has_offsets) {
        offsets = Buffer(padded((panels + 1) * 8), random);
        memcpy(offsets.data(), starts.data(), size_t(panels + 1) * 8);
    }
    values = Buffer(padded(end), random);
    if (kind.integers()) {
        for (int64_t i = 0; i < end; i++) values.data()[i] = uint8_t(random.bits());
        return;
    }
    const int size = kind.values == kFloat32 ? 4 : 2;
    for (int64_t i = 0; i < end / size; i++) {
        uint32_t bits = bits_of(random_float(random));
        memcpy(values.data() + size * i, (const uint8_t*)&bits + (4 - size), size_t(size));
    }
    const bool stores_padding = layout.layout != kBitmap && layout.layout != kBalanced;
    if (numbers != Numbers::kPoisoned || stores_padding) return;  // padding must stay finite
    for (int64_t n = 0; n < 3 && end > 0; n++) {
        uint32_t bits = random.chance(0.5) ? 0x7fc00000 : random.chance(0.5) ? 0x7f800000 : 0xff800000;
        memcpy(values.data() + size * random.below(end / size), (const uint8_t*)&bits + (4 - size),
               size_t(size));
    }
}

void Weight::fill_scales(Random& random, Numbers numbers) {
    const int64_t count = panels * groups * kind.parts * 16;
    scales = Buffer(padded(2 * count), random);
    for (int64_t i = 0; i < count; i++)
        scales.as<uint16_t>()[i] = numbers == Numbers::kUnit ? 0x3c00 : random_scale(random);
}

Packed Weight::packed() const {
    return Packed{out,
                  in,
                  panels,
                  groups,
                  layout.layout,
                  kind.values,
                  layout.keep,
                  kind.parts,
                  values.data(),
                  values.data() + values.size(),
                  masks.as<const uint64_t>(),
                  scales.as<const uint16_t>(),
                  offsets.as<const int64_t>()};
}

bool well_formed(const Weight& w) {
    int64_t end = 0;
    for (int64_t panel = 0; panel < w.panels; panel++) {
        if (w.offsets.data() && w.offsets.as<int64_t>()[panel] != end) return false;
        for (int64_t group = 0; group < w.groups; group++) {
            const std::vector<bool> stored = stored_of(w, panel, group);
            end += bytes_of_values(w.kind.values, stored_count(w, panel, group));
            if (!w.masks.data()) continue;
            for (int o = 0; o < 16; o++) {
                int kept = 0;
                for (int i = 0; i < 64; i++) {
                    if (!stored[size_t(64 * (i / 4) + 4 * o + i % 4)]) continue;
                    kept++;
                    bool padding = w.layout.layout == kBySteps
                                       ? 64 * group + i / 4 * 4 >= w.in
                                       : 16 * panel + o >= w.out || 64 * group + i >= w.in;
                    if (padding) return false;
                }
                if (w.layout.layout == kBalanced && kept > w.layout.keep) return false;
            }
        }
    }
    if (w.offsets.data() && w.offsets.as<int64_t>()[w.panels] != end) return false;
    if (w.values.size() != padded(end)) return false;
    for (int64_t i = 0; w.scales.data() && i < w.panels * w.groups * w.kind.parts * 16; i++)
        if ((w.scales.as<uint16_t>()[i] >> 10 & 31) == 31) return false;
    return true;
}

namespace {

// Byte (int4, int8) or word of 16 or 32 bits of a unit of the layout columns that holds its output `o`.
int place_in_unit(int values, int o) {
    if (values == kFloat32) return o;
    if (values == kBFloat16) return o / 32 * 32 + 2 * (o % 16) + o % 32 / 16;
    const int place = 16 * (o % 16 / 4) + 4 * (o % 64 / 16) + o % 4;
    return values == kInt8 ? o / 64 * 64 + place : place;
}

// Docs: "Columns".
Plain unpack_columns(const Weight& w, Plain plain) {
    const int64_t units = w.panels / 8, inputs = 64 * w.groups, parts = w.groups * w.kind.parts;
    const int64_t bytes = bytes_of_values(w.kind.values, 128);
    for (int64_t o = 0; o < w.out; o++) {
        const int64_t unit = o / 128, panel = unit / 2 * 2, width = units - panel < 2 ? 1 : 2;
        const int place = place_in_unit(w.kind.values, int(o % 128));
        for (int64_t i = 0; i < w.in; i++) {
            const uint8_t* at = w.values.data() + (panel * inputs + i * width + unit - panel) * bytes;
            uint32_t bits = 0;
            float value;
            if (w.kind.values == kInt4) {
                value = float((at[place] >> (o % 128 / 64 * 4) & 15) - 8);
            } else if (w.kind.values == kInt8) {
                value = float(at[place] - 128);
            } else {
                const int size = w.kind.values == kFloat32 ? 4 : 2;
                memcpy((uint8_t*)&bits + (4 - size), at + size * place, size_t(size));
                value = float_of(bits);
            }
            plain.weight[size_t(o * w.in + i)] = value;
        }
        for (int64_t part = 0; w.scales.data() && part < parts; part++)
            plain.scales[size_t(o * parts + part)] = of_float16(
                w.scales.as<uint16_t>()[(panel * parts + part * width + unit - panel) * 128 + o % 128]);
    }
    return plain;
}

}  // namespace

Plain unpack(const Weight& w) {
    Plain plain{w.out, w.in, w.panels, w.groups, w.kind.values, w.kind.parts, w.layout.layout, {}, {}, {}};
    plain.weight.resize(size_t(w.out * w.in));
    plain.scales.resize(size_t(w.scales.data() ? w.out * w.groups * w.kind.parts : 0));
    plain.steps.assign(size_t(w.panels * w.groups * 16), true);
    if (w.layout.layout == kColumns) return unpack_columns(w, std::move(plain));
    const uint8_t* values = w.values.data();
    for (int64_t at = 0; at < w.panels * w.groups; at++) {
        const int64_t panel = at / w.groups, group = at % w.groups, count = stored_count(w, panel, group);
        const std::vector<bool> stored = stored_of(w, panel, group);
        int64_t c = 0;
        for (int e = 0; e < 1024; e++) {
            const int64_t o = 16 * panel + e / 4 % 16, i = 64 * group + e / 64 * 4 + e % 4;
            if (w.layout.layout == kBySteps && e % 64 == 0) plain.steps[size_t(16 * at + e / 64)] = stored[e];
            if (!stored[e]) continue;
            if (o < w.out && i < w.in)
                plain.weight[size_t(o * w.in + i)] = value_at(w.kind.values, values, count, c);
            c++;
        }
        values += bytes_of_values(w.kind.values, count);
        for (int64_t part = 0; w.scales.data() && part < w.kind.parts; part++)
            for (int64_t o = 16 * panel; o < 16 * panel + 16 && o < w.out; o++)
                plain.scales[size_t((o * w.groups + group) * w.kind.parts + part)] =
                    of_float16(w.scales.as<uint16_t>()[(at * w.kind.parts + part) * 16 + o % 16]);
    }
    return plain;
}

namespace {

struct Codes {
    std::vector<int> codes;     // (in)
    std::vector<float> scales;  // (groups)
};

// int8 codes of a row (docs: "Activations").
Codes quantize(const Plain& w, const float* x) {
    Codes to{std::vector<int>(size_t(w.in)), std::vector<float>(size_t(w.groups))};
    for (int64_t g = 0; g < w.groups; g++) {
        float top = 0;
        for (int64_t i = 64 * g; i < 64 * g + 64 && i < w.in; i++)
            if (std::isnan(x[i]) || std::fabs(x[i]) > top) top = std::fabs(x[i]);
        float inverse = 127.0f / top;
        if (!(inverse <= std::numeric_limits<float>::max())) inverse = 0;
        for (int64_t i = 64 * g; i < 64 * g + 64 && i < w.in; i++) {
            float scaled = x[i] * inverse;
            to.codes[size_t(i)] = std::isnan(scaled) ? 0 : int(std::nearbyint(scaled));
        }
        to.scales[size_t(g)] = top * float(1.0 / 127.0);
    }
    return to;
}

void product_of_integers(const Plain& w, const float* x, Expected& to) {
    const Codes row = quantize(w, x);
    const int64_t width = 64 / w.parts;
    for (int64_t o = 0; o < w.out; o++) {
        double sum = 0, magnitude = 0;
        float in_order = 0;
        int64_t terms = 0;
        for (int64_t part = 0; part < w.groups * w.parts; part++) {
            const int64_t first = part * width, group = part / w.parts;
            bool multiplied = false;
            for (int64_t s = first / 4 % 16; s < first / 4 % 16 + width / 4; s++)
                multiplied |= w.steps[size_t((o / 16 * w.groups + group) * 16 + s)];
            if (!multiplied) continue;
            int64_t dot = 0;
            for (int64_t i = first; i < first + width && i < w.in; i++)
                dot += int64_t(w.weight[size_t(o * w.in + i)]) * row.codes[size_t(i)];
            const float scale = w.scales[size_t(o * w.groups * w.parts + part)],
                        step = row.scales[size_t(group)];
            in_order += (scale * step) * float(dot);
            sum += double(scale) * step * double(dot);
            magnitude += std::fabs(double(scale) * step * double(dot));
            terms++;
        }
        // each scale product, each term and each addition rounds
        to.y.push_back(sum);
        to.room.push_back(double(terms + 2) * 0x1p-24 * magnitude + 1e-37);
        to.in_order.push_back(in_order);
    }
}

void product_of_floats(const Plain& w, const float* x, bool flushes, Expected& to) {
    auto number = [&](float f) {
        if (w.values == kBFloat16) f = of_bfloat16(to_bfloat16(f));
        return flushes && std::fabs(f) < std::numeric_limits<float>::min() ? 0.0 : double(f);
    };
    std::vector<double> row;
    for (int64_t i = 0; i < w.in; i++) row.push_back(number(x[i]));
    for (int64_t o = 0; o < w.out; o++) {
        double sum = 0, magnitude = 0;
        for (int64_t i = 0; i < w.in; i++) {
            if (!w.steps[size_t(o / 16 * w.groups * 16 + i / 4)]) continue;
            const double term = number(w.weight[size_t(o * w.in + i)]) * row[size_t(i)];
            sum += term;
            magnitude += std::fabs(term);
        }
        // chains of at most in / 4 terms (columns: in), each a rounded product and a rounded sum, and what
        // meets at the end
        const double chain = w.layout == kColumns ? 2 : 0.5;
        to.y.push_back(sum);
        to.room.push_back((chain * double(w.in) + 4) * 0x1p-24 * magnitude + 1e-36);
    }
}

}  // namespace

Expected product(const Plain& w, const float* x, bool flushes) {
    Expected to;
    if (w.values >= kInt8)
        product_of_integers(w, x, to);
    else
        product_of_floats(w, x, flushes, to);
    return to;
}

}  // namespace testing
