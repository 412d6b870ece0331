// One parallel loop for all kernels, on the threads that the process already has.
#pragma once
#include <atomic>
#include <cstdint>

namespace gossamer {

// Runs body(data) on up to `threads` threads, the caller among them, and returns when all are done.
// Uses PyTorch's OpenMP team where one is loaded (two teams would fight for the cores), else a pool of ours.
void run_team(int threads, void (*body)(void*), void* data);

// "openmp" or "pool": which of the two run_team uses now.
const char* team_kind();

// Calls f(worker, begin, end) for consecutive ranges of at most `step` items; workers take the next range
// when they are free. `worker` < threads.
template <class F>
void parallel_ranges(int threads, int64_t items, int64_t step, const F& f) {
    if (threads <= 1 || items <= step) {
        if (items > 0) f(0, int64_t(0), items);
        return;
    }
    struct Shared {
        const F& f;
        int64_t items, step;
        std::atomic<int64_t> next{0};
        std::atomic<int> workers{0};
    } shared{f, items, step};
    run_team(
        threads,
        [](void* data) {
            Shared& s = *static_cast<Shared*>(data);
            int worker = s.workers.fetch_add(1, std::memory_order_relaxed);
            for (;;) {
                int64_t begin = s.next.fetch_add(s.step, std::memory_order_relaxed);
                if (begin >= s.items) return;
                int64_t end = begin + s.step < s.items ? begin + s.step : s.items;
                s.f(worker, begin, end);
            }
        },
        &shared);
}

}  // namespace gossamer
