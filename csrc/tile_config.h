// Tiles of AMX as the units use them that multiply by them: which shapes they have, and as long as who lives.
//
// A compiler may take what tiles read for memory that nobody reads (GCC's intrinsics do not say): finish()
// makes it write, and read again, what a pointer leads to.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "simd.h"

namespace gossamer {
namespace {

GOSSAMER_INLINE void finish(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t zeros[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int high, int wide) {
        rows[tile] = uint8_t(high);
        row_bytes[tile] = uint16_t(wide);
    }
};

// Tiles of these shapes, as long as it lives. Whoever had configured tiles on this thread finds them so
// again; what they held is gone.
class Tiles {
  public:
    explicit Tiles(const TileConfig& config) {
        finish(&before_);
        _tile_storeconfig(&before_);
        finish(&config);
        _tile_release();
        _tile_loadconfig(&config);
    }
    Tiles(const Tiles&) = delete;
    ~Tiles() {
        _tile_release();
        if (before_.palette) _tile_loadconfig(&before_);
    }

  private:
    TileConfig before_;
};

}  // namespace
}  // namespace gossamer
