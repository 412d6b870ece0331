// Counts cycles by time: one addition that waits for the last takes one cycle on every processor of today.
#include "clock.h"

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace gossamer {
namespace {

constexpr int kRuns = 64;
constexpr int kTurns = 10000;  // of 16 additions: about 50 microseconds a run, shorter than a slice of time

// The empty assembly keeps the compiler from adding up the chain by itself.
#define GOSSAMER_ADD \
    sum += step;     \
    __asm__ volatile("" : "+r"(sum));
#define GOSSAMER_ADD4 GOSSAMER_ADD GOSSAMER_ADD GOSSAMER_ADD GOSSAMER_ADD

double seconds_of_a_run() {
    const auto start = std::chrono::steady_clock::now();
    uint64_t sum = 0, step = 3;
    __asm__ volatile("" : "+r"(step));
    for (int turn = 0; turn < kTurns; turn++) {
        GOSSAMER_ADD4 GOSSAMER_ADD4 GOSSAMER_ADD4 GOSSAMER_ADD4
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

double cycles_per_second() {
    double best = seconds_of_a_run();
    for (int run = 1; run < kRuns; run++) best = std::min(best, seconds_of_a_run());
    return 16.0 * kTurns / best;
}

}  // namespace gossamer
