// PyTorch's OpenMP team, found in the running process; else, or with GOSSAMER_TEAM=pool, a small pool that
// survives fork.
#include "threads.h"

#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace gossamer {
namespace {

// ---- the OpenMP team

// GOMP_parallel(fn, data, threads, flags): what `#pragma omp parallel` compiles to. GNU's and LLVM's
// libraries both export it.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

#if defined(__linux__)
struct Found {
    Parallel parallel = nullptr;
};

Parallel parallel_in(const char* path) {
    // NOLOAD gives a handle only to what the process has loaded already; the look-up searches the library
    // and what it was linked with, so asking libtorch finds the very team that PyTorch uses.
    void* library = dlopen(path, RTLD_NOLOAD | RTLD_LAZY);
    if (!library) return nullptr;
    void* symbol = dlsym(library, "GOMP_parallel");
    dlclose(library);  // stays loaded: others hold it
    return reinterpret_cast<Parallel>(symbol);
}

template <bool kTorch>
int visit(dl_phdr_info* info, size_t, void* data) {
    Found& found = *static_cast<Found*>(data);
    const char* slash = std::strrchr(info->dlpi_name, '/');
    const char* name = slash ? slash + 1 : info->dlpi_name;
    bool wanted = kTorch ? std::strncmp(name, "libtorch_cpu.", 13) == 0
                         : std::strncmp(name, "libgomp", 7) == 0 || std::strncmp(name, "libomp", 6) == 0 ||
                               std::strncmp(name, "libiomp", 7) == 0;
    if (wanted) found.parallel = parallel_in(info->dlpi_name);
    return found.parallel != nullptr;
}

Parallel find_parallel() {
    Found found;
    dl_iterate_phdr(visit<true>, &found);
    if (!found.parallel) dl_iterate_phdr(visit<false>, &found);
    return found.parallel;
}
#else
Parallel find_parallel() { return nullptr; }
#endif

// ---- our own pool

// Turns of a loop that threads wait in before they sleep: about 30 microseconds, longer than what lies
// between two products of a model, and too short to be missed by anyone.
constexpr int kSpins = 1000;

template <class Ready>
bool spin(const Ready& ready) {
    for (int i = 0; i < kSpins; i++) {
        if (ready()) return true;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        __asm__ volatile("isb");
#endif
    }
    return ready();
}

class Pool {
  public:
    // Another thread may have the team: then this one works alone, or waits for its turn.
    void run(int threads, void (*body)(void*), void* data, bool alone) {
        std::unique_lock<std::mutex> turn(turn_, std::defer_lock);
        if (!alone)
            turn.lock();
        else if (!turn.try_lock())
            return body(data);
        const uint64_t round = round_.load(std::memory_order_relaxed);
        while (int(workers_.size()) < threads - 1) {
            int index = int(workers_.size());
            workers_.emplace_back([this, index, round] { work(index, round); });
        }
        body_ = body;
        data_ = data;
        busy_.store(threads - 1, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(mutex_);  // nobody is between looking and falling asleep
            round_.store((round / kMost + 1) * kMost + uint64_t(threads - 1), std::memory_order_release);
        }
        start_.notify_all();
        body(data);
        const auto done = [this] { return busy_.load(std::memory_order_acquire) == 0; };
        if (spin(done)) return;
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, done);
    }

  private:
    static constexpr uint64_t kMost = 1
                                      << 16;  // round_: its number times this, plus the workers that it wants

    void work(int index, uint64_t seen) {
        const auto started = [&] { return round_.load(std::memory_order_acquire) != seen; };
        for (;;) {
            if (!spin(started)) {
                std::unique_lock<std::mutex> lock(mutex_);
                start_.wait(lock, started);
            }
            seen = round_.load(std::memory_order_acquire);
            if (uint64_t(index) >= seen % kMost) continue;
            body_(data_);
            if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                std::lock_guard<std::mutex> lock(mutex_);
                done_.notify_one();
            }
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable start_, done_;
    std::vector<std::thread> workers_;
    void (*body_)(void*) = nullptr;
    void* data_ = nullptr;
    std::atomic<uint64_t> round_{0};
    std::atomic<int> busy_{0};
};

// Never destroyed: its threads may outlive every other static object.
std::atomic<Pool*> pool{nullptr};
std::atomic<bool> forked{false};

Pool& the_pool() {
    Pool* have = pool.load();
    if (have) return *have;
    Pool* made = new Pool;
    if (pool.compare_exchange_strong(have, made)) return *made;
    delete made;
    return *have;
}

// A forked child has none of its parent's threads: OpenMP would wait for them for ever, and so would a pool.
void in_child() {
    forked = true;
    pool = nullptr;
}

Parallel openmp() {
    static const Parallel parallel = [] {
#if defined(__unix__) || defined(__APPLE__)
        pthread_atfork(nullptr, nullptr, in_child);
#endif
        const char* wanted = std::getenv("GOSSAMER_TEAM");
        return wanted && std::strcmp(wanted, "pool") == 0 ? nullptr : find_parallel();
    }();
    return forked ? nullptr : parallel;
}

}  // namespace

const char* team_kind() { return openmp() ? "openmp" : "pool"; }

void run_team(int threads, void (*body)(void*), void* data) {
    if (Parallel parallel = openmp())
        parallel(body, data, unsigned(threads), 0);
    else
        the_pool().run(threads, body, data, true);
}

void run_together(int threads, void (*body)(void*, int), void* data) {
    openmp();  // forks are seen from now on
    struct Shared {
        void (*body)(void*, int);
        void* data;
        std::atomic<int> workers{0};
    } shared{body, data};
    the_pool().run(
        threads,
        [](void* all) {
            Shared& s = *static_cast<Shared*>(all);
            s.body(s.data, s.workers.fetch_add(1, std::memory_order_relaxed));
        },
        &shared, false);
}

void Barrier::wait() {
    const unsigned round = round_.load(std::memory_order_relaxed);
    if (here_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
        here_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    while (!spin([&] { return round_.load(std::memory_order_acquire) != round; })) std::this_thread::yield();
}

}  // namespace gossamer
