// One parallel loop for all kernels, on the threads that the process already has.
#pragma once
#include <atomic>
#include <cstdint>

namespace gossamer {

// Runs body(data) on up to `threads` threads, the caller among them, and returns when all are done.
// Uses PyTorch's OpenMP team where one is loaded (two teams would fight for the cores), else a pool of ours.
void run_team(int threads, void (*body)(void*), void* data);

// Runs body(data, worker) on exactly `threads` threads at once, workers 0 (the caller) to threads - 1, so
// that they may wait for each other. Always on the pool of ours; callers take turns.
void run_together(int threads, void (*body)(void*, int), void* data);

// Where threads that run together wait until all of them have come.
class Barrier {
  public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait();

  private:
    const int threads_;
    std::atomic<int> here_{0};
    std::atomic<unsigned> round_{0};
};

// Items [begin, end) of a worker, of workers that each take about as many.
struct Share {
    int64_t begin, end;
};

inline Share share_of(int64_t items, int worker, int workers) {
    return {items * worker / workers, items * (worker + 1) / workers};
}

// "openmp" or "pool": which of the two run_team uses now.
const char* team_kind();

// Calls f(worker, begin, end) for all items, in ranges of `step` from 0 on; `worker` < threads. Each worker
// has a part of its own, which it walks from end to end, so that it reads memory as one stream (two threads
// that take turns at ranges of 32 KiB read at 60 % of the rate); who is done early helps the others.
template <class F>
void parallel_ranges(int threads, int64_t items, int64_t step, const F& f) {
    constexpr int kMostParts = 64;
    if (threads <= 1 || items <= step) {
        if (items > 0) f(0, int64_t(0), items);
        return;
    }
    struct alignas(64) Part {
        std::atomic<int64_t> next;
        int64_t end;
    };
    struct Shared {
        const F& f;
        int64_t step;
        int parts;
        std::atomic<int> workers;
        Part part[kMostParts];
    };
    Shared shared{f, step, threads < kMostParts ? threads : kMostParts, {0}, {}};
    const auto begin_of = [&](int64_t i) { return items * i / shared.parts / step * step; };
    for (int i = 0; i < shared.parts; i++) {
        shared.part[i].next.store(begin_of(i), std::memory_order_relaxed);
        shared.part[i].end = i + 1 < shared.parts ? begin_of(i + 1) : items;
    }
    run_team(
        threads,
        [](void* data) {
            Shared& s = *static_cast<Shared*>(data);
            const int worker = s.workers.fetch_add(1, std::memory_order_relaxed);
            for (int i = 0; i < s.parts; i++) {
                Part& part = s.part[(worker + i) % s.parts];
                for (;;) {
                    const int64_t begin = part.next.fetch_add(s.step, std::memory_order_relaxed);
                    if (begin >= part.end) break;
                    s.f(worker, begin, begin + s.step < part.end ? begin + s.step : part.end);
                }
            }
        },
        &shared);
}

}  // namespace gossamer
