// The instruction sets that kernels were compiled for, and which of them this processor runs.
#pragma once
#include "attention.h"
#include "decoder_ops.h"
#include "estimate.h"
#include "packed.h"

namespace gossamer {

struct Tier {
    const char* name;
    const Family* ints;
    const Family* floats;
    const Family* columns;
    const DecoderOps* decoder;
    const AttentionOps* attention;
    const EstimateOps* estimate;
    bool (*runs_here)();               // the processor has it and the system saves its registers; asked once
    int64_t row_block = kMaxRowBlock;  // Activations::block where a call has more than kFewRows
};

// From the slowest to the fastest; the first is "portable" and runs everywhere.
const Tier* tiers(int* count);

}  // namespace gossamer
