// Memory of an exact size: touching a byte before or after it stops the process.
#pragma once
#include <stdint.h>

#include "testing.h"

namespace testing {

// At a guard, a page that may not be touched follows or comes before: hardware sees every access, masked
// loads and stores too, which no compiler instruments. On the heap, AddressSanitizer sees both ends at once.
enum class Memory { kBeforeGuard, kAfterGuard, kHeap };
#if defined(__SANITIZE_ADDRESS__)
constexpr int kPlaces = 3;
#else
constexpr int kPlaces = 2;
#endif

class Buffer {
  public:
    Buffer() = default;
    Buffer(int64_t bytes, Memory memory);  // of zeros; data() is null for 0 bytes, as that of an empty tensor
    Buffer(int64_t bytes, Random& random) : Buffer(bytes, Memory(random.below(kPlaces))) {}
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Buffer();

    // `bytes` of zeros that cost no memory until they are touched; data() is null where the system refuses.
    static Buffer vast(int64_t bytes);

    uint8_t* data() const { return data_; }
    int64_t size() const { return size_; }
    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(data_);
    }

  private:
    void swap(Buffer& other);

    uint8_t* data_ = nullptr;
    int64_t size_ = 0;
    uint8_t* mapping_ = nullptr;  // null: on the heap
    int64_t mapped_ = 0;
};

}  // namespace testing
