// The kernels of one instruction set behind plain C functions, with faults that can be planted (planted.h).
#include "planted.h"

#include "driver.h"

// The tier amx: on emulated tiles, and with the columns of avx512vnni.
#if defined(__AMX_TILE__)
#define PLANTED_COLUMNS gossamer_columns_avx512vnni
constexpr int kRowBlock = gossamer::kTileRows;
#else
#define PLANTED_COLUMNS GOSSAMER_EXPORT(columns)
constexpr int kRowBlock = gossamer::kMaxRowBlock;
#endif

extern "C" {
extern const gossamer::Family GOSSAMER_EXPORT(int), GOSSAMER_EXPORT(float), PLANTED_COLUMNS;

int emulated_fault = 0;

int planted_fault = kNoFault;

// The names of all faults, separated by blanks.
const char* faults() {
#define PLANTED_NAME(name) #name " "
    return PLANTED_FAULTS(PLANTED_NAME);
}

// Plants the fault of a number: 0 for none, then as faults() lists them.
void plant(int number) { planted_fault = number; }

// y = x Wᵀ, as _native.matmul of a program of one term; the weight as _native.Packed takes it.
void multiply(int64_t out, int64_t in, int layout, int values, int keep, int parts, const uint8_t* data,
              int64_t data_bytes, const uint64_t* masks, const uint16_t* scales, const int64_t* offsets,
              const void* x, int64_t rows, int dtype, void* y) {
    const gossamer::Packed w{out,
                             in,
                             gossamer::panels_of(layout, out),
                             (in + 63) / 64,
                             layout,
                             values,
                             keep,
                             parts,
                             data,
                             data + data_bytes,
                             masks,
                             scales,
                             offsets};
    const gossamer::Tier tier{"planted",
                              &GOSSAMER_EXPORT(int),
                              &GOSSAMER_EXPORT(float),
                              &PLANTED_COLUMNS,
                              nullptr,
                              nullptr,
                              nullptr,
                              nullptr,
                              kRowBlock};
    gossamer::Program program;
    program.add_term(w, 1, -1);
    gossamer::matmul(program, tier, x, rows, dtype, y, 1);
}
}
