// Checks offsets, masks and scales, so that no kernel reads outside a section whatever the bytes are.
#include "validate.h"

#include <mutex>

#include "threads.h"

namespace gossamer {
namespace {

std::string place(int64_t panel, int64_t group) {
    return " in panel " + std::to_string(panel) + ", group " + std::to_string(group);
}

// Bits of each byte of sixteen 4-bit counts: how many inputs of a step every output keeps.
uint64_t count_fields(uint64_t word) {
    word -= word >> 1 & 0x5555555555555555;
    return (word & 0x3333333333333333) + (word >> 2 & 0x3333333333333333);
}

std::string check_panel_bytes(const Packed& w, int64_t panel, int64_t bytes) {
    const int64_t given = w.offsets[panel + 1] - w.offsets[panel];
    if (given == bytes) return {};
    return "the masks of panel " + std::to_string(panel) + " call for " + std::to_string(bytes) +
           " bytes of values, its offsets give " + std::to_string(given);
}

// 16x4: one bit a step.
std::string check_steps(const Packed& w, int64_t panel) {
    const uint16_t* words = reinterpret_cast<const uint16_t*>(w.masks) + panel * w.groups;
    const int64_t last = (w.in - kGroup * (w.groups - 1) + 3) / 4;  // real steps of the last group
    if (words[w.groups - 1] >> last)
        return "the masks keep steps of the padding" + place(panel, w.groups - 1);
    int64_t bytes = 0;
    for (int64_t g = 0; g < w.groups; g++)
        bytes += stored_bytes(w.values, kGroup * __builtin_popcount(words[g]));
    return check_panel_bytes(w, panel, bytes);
}

std::string check_masks(const Packed& w, int64_t panel) {
    if (w.layout == kBySteps) return check_steps(w, panel);
    int64_t outputs = w.out - kPanel * panel, bytes = 0;
    uint64_t real_outputs = outputs >= kPanel ? ~uint64_t(0) : (uint64_t(1) << 4 * outputs) - 1;
    for (int64_t g = 0; g < w.groups; g++) {
        const uint64_t* words = w.masks + (panel * w.groups + g) * kSteps;
        uint64_t even = 0, odd = 0, stray = 0;  // a byte an output, outputs 0 2 4.. and 1 3 5..
        int64_t count = 0;
        for (int s = 0; s < kSteps; s++) {
            int64_t inputs = w.in - kGroup * g - 4 * s;
            uint64_t real = inputs >= 4 ? 15 : inputs <= 0 ? 0 : (1 << inputs) - 1;
            stray |= words[s] & ~(real_outputs & real * 0x1111111111111111);
            uint64_t fields = count_fields(words[s]);
            even += fields & 0x0f0f0f0f0f0f0f0f;
            odd += fields >> 4 & 0x0f0f0f0f0f0f0f0f;
            count += __builtin_popcountll(words[s]);
        }
        if (stray) return "the masks keep weights of the padding" + place(panel, g);
        bytes += stored_bytes(w.values, count);
        if (w.layout != kBalanced) continue;
        for (int o = 0; o < kPanel; o++) {
            int kept = int((o & 1 ? odd : even) >> (o / 2 * 8) & 255);
            if (kept > w.keep)
                return "output " + std::to_string(kPanel * panel + o) + " keeps " + std::to_string(kept) +
                       " of 64 inputs, more than the " + std::to_string(w.keep) + " of the layout," +
                       place(panel, g);
        }
    }
    return w.offsets ? check_panel_bytes(w, panel, bytes) : std::string();
}

std::string check_scales(const Packed& w, int64_t panel) {
    const int64_t per_panel = w.groups * w.parts * kPanel;
    const uint16_t* scales = w.scales + panel * per_panel;
    uint16_t bad = 0;
    for (int64_t i = 0; i < per_panel; i++) bad |= uint16_t((scales[i] & 0x7c00) == 0x7c00);
    if (bad) return "a scale of panel " + std::to_string(panel) + " is infinite or not a number";
    return {};
}

std::string check_offsets(const Packed& w) {
    if (w.offsets[0] != 0) return "the first offset is " + std::to_string(w.offsets[0]) + ", not 0";
    for (int64_t p = 0; p < w.panels; p++)
        if (w.offsets[p + 1] < w.offsets[p])
            return "the offsets fall from " + std::to_string(w.offsets[p]) + " to " +
                   std::to_string(w.offsets[p + 1]) + " at panel " + std::to_string(p);
    const int64_t end = w.offsets[w.panels], have = w.data_end - w.data;
    if (end > have || have - end >= 64 || have % 64)
        return "the offsets end at byte " + std::to_string(end) + ", but the values section has " +
               std::to_string(have) + " bytes (it should be padded to the next 64)";
    return {};
}

}  // namespace

std::string check(const Packed& w, int threads) {
    if (w.layout == kColumns && (has_levels(w.values) || w.values == kInt3))
        return "the layout columns holds no values of three bits or with levels";
    if (w.offsets) {
        std::string fault = check_offsets(w);
        if (!fault.empty()) return fault;
    }
    std::string first;
    int64_t first_panel = w.panels;
    std::mutex mutex;
    parallel_ranges(threads, w.panels, 16, [&](int, int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; panel++) {
            std::string fault = w.masks ? check_masks(w, panel) : std::string();
            if (fault.empty() && w.scales) fault = check_scales(w, panel);
            if (fault.empty()) continue;
            std::lock_guard<std::mutex> lock(mutex);
            if (panel < first_panel) {  // the same text for any number of threads
                first_panel = panel;
                first = fault;
            }
        }
    });
    return first;
}

}  // namespace gossamer
