// Programs of several weights: the sums of their terms one by one, whatever the rows and threads; and which
// programs are refused.
#include <memory>

#include "running.h"

namespace testing {

using namespace gossamer;

namespace {

struct RandomTerm {
    std::unique_ptr<Weight> weight;
    int64_t blocks, source;
    std::vector<int32_t> inputs;  // that it reads, none: all
};

using RandomStages = std::vector<std::vector<RandomTerm>>;

const int64_t kOutputs[] = {1, 16, 17, 32, 48, 64, 150};

// One to four stages whose terms see the activations or any stage before.
RandomStages random_stages(Random& random, int64_t in) {
    RandomStages stages;
    std::vector<int64_t> widths = {in};
    for (int64_t s = 1 + random.below(4); s > 0; s--) {
        const int64_t out = kOutputs[random.below(7)];
        stages.emplace_back();
        for (int64_t t = 1 + random.below(3); t > 0; t--) {
            const int64_t source = random.below(int64_t(widths.size())) - 1,
                          wide = widths[size_t(source + 1)];
            const LayoutCase& layout = kLayouts[random.below(7)];
            const ValuesCase* kind;
            do kind = &kValues[random.below(8)];
            while (!exists(layout, *kind));
            int64_t blocks = 1 + random.below(4);
            if (wide % blocks || out % (16 * blocks) || layout.layout == kColumns) blocks = 1;
            std::vector<int32_t> inputs;
            for (int32_t i = 0; blocks == 1 && i < wide && random.chance(0.9); i++)
                if (random.chance(0.7)) inputs.push_back(i);
            const int64_t read = inputs.empty() ? wide / blocks : int64_t(inputs.size());
            stages.back().push_back(
                {std::make_unique<Weight>(random, layout, *kind, out, read), blocks, source, inputs});
        }
        widths.push_back(out);
    }
    return stages;
}

Program program_of(const RandomStages& stages, int64_t in) {
    Program program;
    for (const auto& stage : stages) {
        program.begin_stage();
        for (const RandomTerm& term : stage) {
            Selected w = term.weight->packed();
            if (!term.inputs.empty())
                w = {w, term.inputs.data(),
                     term.source < 0 ? in : stages[size_t(term.source)][0].weight->out};
            CHECK(check_inputs(w).empty(), "a good list is refused");
            program.add_term(w, term.blocks, term.source);
        }
    }
    return program;
}

// Panels of one block as a weight of their own.
Packed block_of(const Weight& weight, int64_t blocks, int64_t block) {
    Packed w = weight.packed();
    const int64_t first = w.panels / blocks * block, groups = first * w.groups;
    w.out /= blocks;
    w.panels /= blocks;
    if (w.offsets)
        w.offsets += first;
    else
        w.data += groups * bytes_of_values(w.values, w.layout == kDense ? 1024 : 16 * w.keep);
    if (w.layout == kBySteps)
        w.masks = reinterpret_cast<const uint64_t*>(reinterpret_cast<const uint16_t*>(w.masks) + groups);
    else if (w.masks)
        w.masks += 16 * groups;
    if (w.scales) w.scales += 16 * w.parts * groups;
    return w;
}

// The terms of one stage after the other, each block in a call of its own.
Rows one_by_one(const RandomStages& stages, const Tier& tier, const Rows& x, int64_t rows, Random& random) {
    std::vector<Rows> results = {x};
    for (const auto& stage : stages) {
        const int64_t out = stage[0].weight->out;
        Rows sum;
        for (const RandomTerm& term : stage) {
            const Rows& from = results[size_t(term.source + 1)];
            const int64_t in = term.weight->in, width = int64_t(from.size()) / rows, high = out / term.blocks;
            Rows y(size_t(rows * out));
            for (int64_t block = 0; block < term.blocks; block++) {
                Rows part;
                for (int64_t row = 0; row < rows; row++)
                    for (int64_t i = 0; i < in; i++) {
                        const int64_t at = term.inputs.empty() ? block * in + i : term.inputs[size_t(i)];
                        part.push_back(from[size_t(row * width + at)]);
                    }
                const Packed w = block_of(*term.weight, term.blocks, block);
                const Rows some = run(w, tier, part, 0, rows, kF32, 1, random);
                for (int64_t row = 0; row < rows; row++)
                    for (int64_t o = 0; o < high; o++)
                        y[size_t(row * out + block * high + o)] = some[size_t(row * high + o)];
            }
            for (size_t i = 0; i < y.size() && !sum.empty(); i++) sum[i] += y[i];
            if (sum.empty()) sum = y;
        }
        results.push_back(sum);
    }
    return results.back();
}

}  // namespace

void test_programs() {
    Random random(8);
    for (int turn = 0; turn < 150; turn++) {
        const int64_t widths[] = {1, 60, 64, 132, 192}, in = widths[random.below(5)], rows = 21;
        const RandomStages stages = random_stages(random, in);
        const Program program = program_of(stages, in);
        CHECK(program.check().empty(), "a good program is refused: %s", program.check().c_str());
        const Rows x = random_rows(random, rows, in);
        Rows rounded = x;
        for (float& f : rounded) f = of_bfloat16(to_bfloat16(f));
        for (const Tier* tier : tiers_under_test()) {
            describe("%s, program %d of %d stages, %lld inputs", tier->name, turn, int(stages.size()),
                     (long long)in);
            const Rows whole = run(program, *tier, x, 0, rows, kF32, 1 + turn % 3, random);
            check_same(whole, 0, one_by_one(stages, *tier, x, rows, random), 0, rows, program.out(),
                       "a program, and its terms one by one");
            const Rows few = has_tiles(*tier) ? by_few(program, *tier, x, rows, random) : whole;
            for (int64_t n : {1, 2, 3, 4, 5, 8, 9, 16, 20}) {
                const int64_t first = random.below(rows - n + 1);
                const Rows part = run(program, *tier, x, first, n, kF32, 1 + int(random.below(4)), random);
                check_same(part, 0, n > kFewRows ? whole : few, first, n, program.out(),
                           "some rows alone, and among others");
            }
            Rows y = run(program, *tier, rounded, 0, rows, kF32, 1, random);
            for (float& f : y) f = of_bfloat16(to_bfloat16(f));
            check_same(run(program, *tier, x, 0, rows, kBF16, 2, random), 0, y, 0, rows, program.out(),
                       "bfloat16 activations, and their float32 twins");
        }
    }
}

// Programs whose shapes, blocks and sources are anything: the check lets through those that fit, and those
// run.
void test_lying_programs() {
    Random random(9);
    int refused = 0, accepted = 0;
    for (int turn = 0; turn < 4000; turn++) {
        const int64_t sizes[] = {16, 32, 48, 64};
        std::vector<std::unique_ptr<Weight>> weights;
        std::vector<int64_t> widths;
        Program program;
        bool fits = true;
        for (int64_t s = 0, stages = 1 + random.below(3); s < stages; s++) {
            program.begin_stage();
            const int64_t out = sizes[random.below(4)];
            int64_t first_out = -1;
            for (int64_t t = random.below(20) ? 1 + random.below(2) : 0; t > 0; t--) {
                const int64_t blocks = random.chance(0.7) ? 1 : random.below(5) - 1;
                const int64_t high = random.chance(0.9) ? out : 17, source = random.below(s + 1) -
                                                                             (random.chance(0.9) ? 1 : 2) +
                                                                             (random.chance(0.05) ? 1 : 0);
                const bool known = source >= -1 && source < s && size_t(source + 1) < widths.size();
                const int64_t seen = known && random.chance(0.9) ? widths[size_t(source + 1)] : 64;
                const int64_t in = blocks > 1 && seen % blocks == 0 ? seen / blocks : seen;
                weights.push_back(std::make_unique<Weight>(random, kLayouts[0], kValues[3], high, in));
                program.add_term(weights.back()->packed(), blocks, source);
                if (widths.empty()) widths.push_back(in * blocks);
                if (first_out < 0) first_out = high;
                fits = fits && high == first_out && source >= -1 && source < s && blocks >= 1 &&
                       (blocks == 1 || high % (16 * blocks) == 0) &&
                       in * blocks == widths[size_t(source + 1)];
            }
            fits = fits && first_out > 0;
            if (widths.empty()) widths.push_back(-1);
            widths.push_back(first_out);
        }
        describe("lying program %d", turn);
        const std::string fault = program.check();
        CHECK(fault.empty() == fits, "%s",
              fault.empty() ? "a program that does not fit is accepted" : fault.c_str());
        fault.empty() ? accepted++ : refused++;
        if (!fault.empty()) continue;
        const Rows x = random_rows(random, 9, program.in());
        for (const Tier* tier : tiers_under_test())
            for (int64_t rows : {1, 9}) run(program, *tier, x, 0, rows, turn % 2 ? kF32 : kBF16, 2, random);
    }
    CHECK(refused > 500 && accepted > 500, "%d refused and %d accepted: too few of one kind", refused,
          accepted);
    CHECK(!Program().check().empty(), "a program without stages is accepted");
    const Weight weight(random, kLayouts[0], kValues[3], 16, 3);
    for (const std::vector<int32_t>& list :
         std::vector<std::vector<int32_t>>{{0, 2, 2}, {2, 1, 3}, {-1, 0, 1}, {0, 1, 5}})
        CHECK(!check_inputs({weight.packed(), list.data(), 5}).empty(),
              "a list is accepted that ends with %d", list[2]);
}

}  // namespace testing
