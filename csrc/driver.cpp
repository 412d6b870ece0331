// Splits a product over rows and threads. The split never changes a result: each output row is a function of
// its input row and of the weight (multiply.h).
#include "driver.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "threads.h"

namespace gossamer {
namespace {

constexpr int64_t kChunkBytes =
    8 << 20;  // activations of a chunk of rows: weights are expanded once for each
constexpr int64_t kAloneBytes = 200 << 10;  // one thread reads these before others could start

// Memory that a calling thread keeps between calls.
class Workspace {
  public:
    ~Workspace() { std::free(memory_); }
    uint8_t* get(int64_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            size_ = 0;
            bytes = (bytes + 4095) / 4096 * 4096;
            memory_ = static_cast<uint8_t*>(std::aligned_alloc(64, size_t(bytes)));
            if (!memory_) throw std::bad_alloc();
            size_ = bytes;
        }
        return memory_;
    }

  private:
    uint8_t* memory_ = nullptr;
    int64_t size_ = 0;
};

thread_local Workspace workspace;

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

void matmul(const Packed& w, const Tier& tier, const void* x, int64_t rows, int dtype, void* y, int threads) {
    if (rows == 0) return;
    const Family& kernels = w.values == kFloat32 || w.values == kBFloat16 ? *tier.floats : *tier.ints;
    const int64_t row_bytes = w.groups * kGroup * element_bytes(w.values);
    int64_t chunk = std::max<int64_t>(64, kChunkBytes / row_bytes / kMaxRowBlock * kMaxRowBlock);
    chunk = std::min(chunk, rows);
    const int64_t padded = padded_rows(chunk);
    const int64_t weights = w.panels * w.groups * kWeights;
    const int64_t bytes = w.data_end - w.data + mask_bytes(w);
    if (bytes + rows * weights / 16 <= kAloneBytes)
        threads = 1;  // sixteen multiplications take as long as a byte
    const bool columns = w.layout == kColumns;
    const int64_t units = columns ? w.panels / kColumnUnit : w.panels;  // that threads share
    threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, units)));

    const int64_t codes = padded * row_bytes;
    const int64_t scales = aligned(padded * w.groups * 4),
                  negatives = aligned(padded * w.groups * negatives_of(w) * 4);
    const int64_t listed = columns ? padded * active_room(w.groups) : 0;
    const int64_t ends = aligned(columns ? padded * w.groups * w.parts * 4 : 0), inputs = listed * 4,
                  values = listed * (w.values >= kInt8 ? 1 : 4);
    const int64_t scratch = columns || padded > 4 ? scratch_bytes(w, padded) : 0;
    const int64_t prepared = codes + scales + negatives, lists = ends + inputs + values;
    uint8_t* memory = workspace.get(prepared + lists + threads * scratch);
    uint8_t* scratches = memory + prepared + lists;
    const Active active{reinterpret_cast<int32_t*>(memory + prepared),
                        reinterpret_cast<int32_t*>(memory + prepared + ends),
                        memory + prepared + ends + inputs};

    const int x_bytes = dtype == kF32 ? 4 : 2;
    for (int64_t first = 0; first < rows; first += chunk) {
        const int64_t n = std::min(chunk, rows - first);
        Activations a{n,
                      padded_rows(n),
                      memory,
                      reinterpret_cast<float*>(memory + codes),
                      reinterpret_cast<int32_t*>(memory + codes + scales),
                      active};
        if (a.padded > n) std::memset(memory, 0, size_t(prepared));  // padding rows
        const uint8_t* from = static_cast<const uint8_t*>(x) + first * w.in * x_bytes;
        uint8_t* to = static_cast<uint8_t*>(y) + first * w.out * x_bytes;
        parallel_ranges(n < 16 ? 1 : threads, n, 8, [&](int, int64_t begin, int64_t end) {
            kernels.prepare(&w, from, dtype, begin, end, &a);
            if (columns) tier.columns->prepare(&w, from, dtype, begin, end, &a);
        });
        const Family& multiplying = columns ? *tier.columns : kernels;
        const int64_t share = std::max<int64_t>(1, units / (4 * threads));
        // columns: whole panels, where there is one for each thread
        const int64_t whole = kColumnPanel / 128, step = columns && units >= whole * threads
                                                             ? (share + whole - 1) / whole * whole
                                                             : share;
        parallel_ranges(threads, units, step, [&](int worker, int64_t begin, int64_t end) {
            multiplying.multiply(&w, &a, to, dtype, begin, end, scratches + worker * scratch);
        });
    }
}

}  // namespace gossamer
