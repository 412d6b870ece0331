#include "reading.h"

#include <atomic>

#include "threads.h"

namespace gossamer {

uint64_t sum_words(const uint64_t* p, int64_t words, int threads) {
    std::atomic<uint64_t> sum{0};
    parallel_ranges(threads, words, 1 << 17, [&](int, int64_t begin, int64_t end) {
        using Two = uint64_t __attribute__((vector_size(16), aligned(8)));
        Two part[4] = {};
        const int64_t lines = (end - begin) / 8;
        const Two* two = reinterpret_cast<const Two*>(p + begin);
        for (int64_t i = 0; i < lines; i++, two += 4) {
            part[0] += two[0];
            part[1] += two[1];
            part[2] += two[2];
            part[3] += two[3];
        }
        uint64_t rest = 0;
        for (int64_t i = begin + 8 * lines; i < end; i++) rest += p[i];
        for (const Two& both : part) rest += both[0] + both[1];
        sum += rest;
    });
    return sum;
}

}  // namespace gossamer
