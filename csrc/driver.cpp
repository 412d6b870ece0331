// Splits a program over rows, stages and threads. The split never changes a result: each output row is a
// function of its input row and of the weights (multiply.h), and terms are added in their order.
//
// Memory of a call: results of stages in float32 (of the last one too, where its terms are summed for
// bfloat16 outputs) | activations of a stage, made ready | rows of what terms select, before that | of each
// thread: scratch, and the activations of one block of a block-diagonal term, which the thread that
// multiplies it makes ready.
#include "driver.h"

#include <algorithm>
#include <cstring>

#include "ready.h"
#include "threads.h"
#include "workspace.h"

namespace gossamer {
namespace {

// Activations of a chunk of rows: weights are expanded once for each.
constexpr int64_t kChunkBytes = 8 << 20;
constexpr int64_t kAloneBytes = 200 << 10;  // one thread reads these before others could start

thread_local Workspace workspace;

// Of all terms of a stage that see all inputs.
int64_t activation_bytes(const Stage& stage, int64_t padded) {
    int64_t bytes = 0;
    for (const Term& term : stage.terms)
        if (term.blocks == 1) bytes += activation_bytes(term.w, padded);
    return bytes;
}

// Rows that a program takes at a time.
int64_t chunk_rows(const Program& program, int64_t rows, int64_t block) {
    for (int64_t s = 0; s < program.stages(); s++)
        for (const Term& term : program.stage(s).terms) {
            const int64_t most = kChunkBytes / Sizes::row_bytes(term.w);
            rows = std::min(rows, std::max<int64_t>(64, most / block * block));
        }
    return rows;
}

// What a stage takes for `rows` rows, in bytes that are read: sixteen multiplications take as long as one.
int64_t cost_of(const Stage& stage, int64_t rows) {
    int64_t cost = 0;
    for (const Term& term : stage.terms) {
        const Packed& w = term.w;
        cost += w.data_end - w.data + mask_bytes(w) + rows * w.panels * w.groups * kWeights / 16;
    }
    return cost;
}

// A row-major array of `width` numbers a row.
struct Array {
    uint8_t* data;
    int dtype;
    int64_t width;
    int size() const { return dtype == kF32 ? 4 : 2; }
};

struct Memory {
    uint8_t* activations;  // of the terms of a stage that are no blocks
    uint8_t* room;         // of what they select
    uint8_t* workers;      // of each thread: scratch | activations of one block
    int64_t of_worker, scratch;
};

// Makes rows [begin, end) of `from` ready for one block of a term.
void prepare(const Tier& tier, const Term& term, int64_t block, const Array& from, int64_t begin, int64_t end,
             const Activations& to, void* room) {
    const Packed& w = term.w;
    if (term.blocks == 1) return make_ready(tier, term.w, from.data, from.dtype, begin, end, to, room);
    for (int64_t row = begin; row < end; row++) {  // kernels take rows of w.in, one after the other
        const int64_t skipped = row * (from.width - w.in) + block * w.in;
        family(tier, w).prepare(&w, from.data + skipped * from.size(), from.dtype, row, row + 1, &to);
    }
    if (w.layout == kColumns) tier.columns->prepare(&w, nullptr, kF32, begin, end, &to);
}

// Adds up the terms of a stage for `rows` rows, made ready in blocks of `row_block`; `input(source)` is what
// a term multiplies. Sums of several terms wait in `sums`, float32, and may lie in `to`.
template <class Input>
void run_stage(const Stage& stage, const Tier& tier, int64_t rows, int64_t row_block, const Input& input,
               float* sums, const Array& to, const Memory& memory, int threads) {
    const int64_t padded = padded_rows(rows, row_block), unit = unit_of(stage);
    const int64_t units = (stage.out + kPanel * unit - 1) / (kPanel * unit);
    const bool pads = padded > rows;
    threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, units)));

    if (pads) std::memset(memory.activations, 0, size_t(activation_bytes(stage, padded)));
    parallel_ranges(rows < 16 ? 1 : threads, rows, 8, [&](int, int64_t begin, int64_t end) {
        uint8_t *activations = memory.activations, *room = memory.room;
        for (const Term& term : stage.terms) {
            if (term.blocks > 1) continue;
            prepare(tier, term, 0, input(term.source), begin, end,
                    activations_at(activations, term.w, rows, row_block), room);
            activations += activation_bytes(term.w, padded);
            room += room_bytes(term.w, rows);
        }
    });

    // columns: whole panels; many rows: whole tiles; where there is one for each thread
    const int64_t most = unit > 1 ? kColumnPanel / 128 : padded > kMaxRowBlock ? kTilePanels : 1;
    const int64_t whole = units >= most * threads ? most : 1;
    const int64_t step = (std::max<int64_t>(1, units / (4 * threads)) + whole - 1) / whole * whole;
    parallel_ranges(threads, units, step, [&](int worker, int64_t first_unit, int64_t end_unit) {
        uint8_t* activations = memory.activations;
        uint8_t* scratch = memory.workers + worker * memory.of_worker;
        for (const Term& term : stage.terms) {
            const Packed& w = term.w;
            const bool writes = &term == stage.terms.first, last = &term + 1 == stage.terms.last;
            const Output out{last ? to.data : reinterpret_cast<uint8_t*>(sums), last ? to.dtype : kF32,
                             writes ? nullptr : sums};
            const int64_t begin = first_unit * unit, end = std::min(end_unit * unit, w.panels);
            if (term.blocks == 1) {
                multiply(tier, w, activations_at(activations, w, rows, row_block), out, begin, end, scratch);
                activations += activation_bytes(w, padded);
                continue;
            }
            const Activations a = activations_at(scratch + memory.scratch, w, rows, row_block);
            const int64_t of_block = w.panels / term.blocks;
            for (int64_t from = begin, until; from < end; from = until) {
                const int64_t block = from / of_block;
                until = std::min(end, (block + 1) * of_block);
                if (pads) std::memset(a.codes, 0, size_t(activation_bytes(w, padded)));
                prepare(tier, term, block, input(term.source), 0, rows, a, nullptr);
                multiply(tier, w, a, out, from, until, scratch);
            }
        }
    });
}

}  // namespace

void matmul(const Program& program, const Tier& tier, const void* x, int64_t rows, int dtype, void* y,
            int threads) {
    if (rows == 0) return;
    // chosen by all rows, not by those of a chunk: it decides which kernels run, and so perhaps a row's bits
    const int64_t row_block = rows > kFewRows ? tier.row_block : kMaxRowBlock;
    const int64_t chunk = chunk_rows(program, rows, row_block), padded = padded_rows(chunk, row_block);
    const Stage last = program.stage(program.stages() - 1);
    const bool summed = dtype != kF32 && last.terms.size() > 1;
    const int64_t results = aligned((last.before + (summed ? last.out : 0)) * chunk * 4);
    int64_t activations = 0, room = 0, scratch = 0, block = 0, cost = 0;
    for (int64_t s = 0; s < program.stages(); s++) {
        const Stage stage = program.stage(s);
        activations = std::max(activations, activation_bytes(stage, padded));
        cost += cost_of(stage, rows);
        scratch = std::max(scratch, scratch_bytes(stage.terms, padded, row_block));
        int64_t selected = 0;
        for (const Term& term : stage.terms) {
            selected += room_bytes(term.w, chunk);
            if (term.blocks > 1) block = std::max(block, activation_bytes(term.w, padded));
        }
        room = std::max(room, selected);
    }
    if (cost <= kAloneBytes) threads = 1;
    uint8_t* base = workspace.get(results + activations + room + std::max(1, threads) * (scratch + block));
    uint8_t* after = base + results + activations;
    const Memory memory{base + results, after, after + room, scratch + block, scratch};

    const int64_t size = dtype == kF32 ? 4 : 2;
    for (int64_t first = 0; first < rows; first += chunk) {
        const int64_t n = std::min(chunk, rows - first);
        const Array from{static_cast<uint8_t*>(const_cast<void*>(x)) + first * program.in() * size, dtype,
                         program.in()};
        const Array to{static_cast<uint8_t*>(y) + first * program.out() * size, dtype, program.out()};
        auto sums = [&](const Stage& stage) { return reinterpret_cast<float*>(base) + stage.before * chunk; };
        auto input = [&](int64_t source) {
            if (source < 0) return from;
            const Stage stage = program.stage(source);
            return Array{reinterpret_cast<uint8_t*>(sums(stage)), kF32, stage.out};
        };
        for (int64_t s = 0; s < program.stages(); s++) {
            const Stage stage = program.stage(s);
            float* waiting = stage.last && dtype == kF32 ? reinterpret_cast<float*>(to.data) : sums(stage);
            const Array written =
                stage.last ? to : Array{reinterpret_cast<uint8_t*>(waiting), kF32, stage.out};
            run_stage(stage, tier, n, row_block, input, waiting, written, memory, threads);
        }
    }
}

}  // namespace gossamer
