// Memory that a calling thread keeps between calls.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

namespace gossamer {

class Workspace {
  public:
    Workspace() = default;
    Workspace(const Workspace&) = delete;
    ~Workspace() { std::free(memory_); }
    // At least so many bytes, aligned to 64; what they hold is left open. Ends the last such memory's life.
    // Throws std::bad_alloc.
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

}  // namespace gossamer
