#include "buffer.h"

#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <utility>

namespace testing {
namespace {

uint8_t* map(int64_t bytes) {
    void* mapping = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return mapping == MAP_FAILED ? nullptr : static_cast<uint8_t*>(mapping);
}

}  // namespace

Buffer::Buffer(int64_t bytes, Memory memory) : size_(bytes) {
    if (bytes == 0) return;
    if (memory == Memory::kHeap) {
        void* heap = nullptr;
        CHECK(posix_memalign(&heap, 64, size_t(bytes)) == 0, "no memory for %lld bytes", (long long)bytes);
        data_ = static_cast<uint8_t*>(heap);
        memset(data_, 0, size_t(bytes));
        return;
    }
    const int64_t page = sysconf(_SC_PAGESIZE), room = (bytes + page - 1) / page * page;
    mapped_ = room + 2 * page;
    mapping_ = map(mapped_);
    CHECK(mapping_, "no memory for %lld bytes", (long long)bytes);
    CHECK(mprotect(mapping_, size_t(page), PROT_NONE) == 0, "no guard page");
    CHECK(mprotect(mapping_ + page + room, size_t(page), PROT_NONE) == 0, "no guard page");
    data_ = mapping_ + page + (memory == Memory::kBeforeGuard ? room - bytes : 0);
}

Buffer Buffer::vast(int64_t bytes) {
    Buffer buffer;
    buffer.mapping_ = buffer.data_ = map(bytes);
    if (buffer.data_) buffer.size_ = buffer.mapped_ = bytes;
    return buffer;
}

Buffer::~Buffer() {
    if (mapping_)
        munmap(mapping_, size_t(mapped_));
    else
        free(data_);
}

void Buffer::swap(Buffer& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(mapping_, other.mapping_);
    std::swap(mapped_, other.mapped_);
}

}  // namespace testing
