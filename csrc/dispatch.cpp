// Asks the processor (CPUID) and the system (XCR0, and for tiles a system call) which kernels may run.
#include "dispatch.h"

#if defined(GOSSAMER_X86)
#include <cpuid.h>
#endif
#if defined(GOSSAMER_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

extern "C" {
extern const gossamer::Family gossamer_int_portable, gossamer_float_portable, gossamer_columns_portable;
extern const gossamer::DecoderOps gossamer_decoder_portable;
extern const gossamer::AttentionOps gossamer_attention_portable;
extern const gossamer::EstimateOps gossamer_estimate_portable;
#if defined(GOSSAMER_X86)
extern const gossamer::Family gossamer_int_avx2, gossamer_float_avx2, gossamer_columns_avx2;
extern const gossamer::Family gossamer_int_avx512vnni, gossamer_float_avx512vnni, gossamer_columns_avx512vnni;
extern const gossamer::Family gossamer_float_avx512;
extern const gossamer::DecoderOps gossamer_decoder_avx2, gossamer_decoder_avx512vnni;
extern const gossamer::AttentionOps gossamer_attention_avx2, gossamer_attention_avx512vnni;
extern const gossamer::AttentionOps gossamer_attention_avx512;
extern const gossamer::EstimateOps gossamer_estimate_avx2, gossamer_estimate_avx512vnni;
extern const gossamer::EstimateOps gossamer_estimate_avx512;
#endif
#if defined(GOSSAMER_AVXVNNI)
extern const gossamer::Family gossamer_int_avxvnni, gossamer_columns_avxvnni;
#endif
#if defined(GOSSAMER_AMX)
extern const gossamer::Family gossamer_int_amx, gossamer_float_amx;
extern const gossamer::AttentionOps gossamer_attention_amx;
bool gossamer_works_amx();
#endif
}

namespace gossamer {
namespace {

#if defined(GOSSAMER_X86)
struct Registers {
    uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t part) {
    Registers r;
    if (!__get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d)) return Registers{};
    return r;
}

constexpr uint32_t bits() { return 0; }
template <class... Rest>
constexpr uint32_t bits(int first, Rest... rest) {
    return 1u << first | bits(rest...);
}

bool all(uint32_t word, uint32_t wanted) { return (word & wanted) == wanted; }

// Register sets that the system saves at a context switch; 0 where it cannot say.
uint64_t saved_registers() {
    if (!all(cpuid(1, 0).c, bits(27))) return 0;  // OSXSAVE
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return uint64_t(high) << 32 | low;
}

bool has_avx2() {
    if (!all(uint32_t(saved_registers()), bits(1, 2))) return false;  // SSE and AVX registers
    return all(cpuid(1, 0).c, bits(12, 23, 28, 29))                   // FMA POPCNT AVX F16C
           && all(cpuid(0x80000001, 0).c, bits(5))                    // LZCNT
           && all(cpuid(7, 0).b, bits(3, 5, 8));                      // BMI1 AVX2 BMI2
}

[[maybe_unused]] bool has_avxvnni() { return has_avx2() && all(cpuid(7, 1).a, bits(4)); }

bool has_avx512vnni() {
    if (!has_avx2() || !all(uint32_t(saved_registers()), bits(5, 6, 7))) return false;  // masks and ZMM
    return all(cpuid(7, 0).b, bits(16, 17, 30, 31))                                     // F DQ BW VL
           && all(cpuid(7, 0).c, bits(1, 6, 11));                                       // VBMI VBMI2 VNNI
}

bool has_avx512() { return has_avx512vnni() && all(cpuid(7, 1).a, bits(5)); }  // BF16

// Asked once.
template <bool (*kHas)()>
bool runs() {
    static const bool here = kHas();
    return here;
}
#endif

#if defined(GOSSAMER_AMX)
// Eight tiles of 16 rows x 64 bytes.
bool has_amx() {
    if (!all(cpuid(7, 0).d, bits(22, 24, 25))) return false;            // AMX-BF16 AMX-TILE AMX-INT8
    if (!all(uint32_t(saved_registers()), bits(17, 18))) return false;  // TILECFG TILEDATA
    const Registers palette = cpuid(0x1d, 1);
    return palette.a >> 16 >= 1024 && (palette.b & 0xffff) >= 64 && palette.b >> 16 >= 8 &&
           (palette.c & 0xffff) >= 16;
}

// Linux gives tiles to processes that ask for them, as PyTorch does too; their signal frames then are larger
// by 8 KiB.
bool system_gives_tiles() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool amx_runs() {
    static const bool here = runs<has_avx512>() && has_amx() && system_gives_tiles() && gossamer_works_amx();
    return here;
}
#endif

bool always() { return true; }

}  // namespace

const Tier* tiers(int* count) {
    static const Tier all_tiers[] = {
        {"portable", &gossamer_int_portable, &gossamer_float_portable, &gossamer_columns_portable,
         &gossamer_decoder_portable, &gossamer_attention_portable, &gossamer_estimate_portable, always},
#if defined(GOSSAMER_X86)
        {"avx2", &gossamer_int_avx2, &gossamer_float_avx2, &gossamer_columns_avx2, &gossamer_decoder_avx2,
         &gossamer_attention_avx2, &gossamer_estimate_avx2, runs<has_avx2>},
#endif
#if defined(GOSSAMER_AVXVNNI)
        {"avxvnni", &gossamer_int_avxvnni, &gossamer_float_avx2, &gossamer_columns_avxvnni,
         &gossamer_decoder_avx2, &gossamer_attention_avx2, &gossamer_estimate_avx2, runs<has_avxvnni>},
#endif
#if defined(GOSSAMER_X86)
        {"avx512vnni", &gossamer_int_avx512vnni, &gossamer_float_avx512vnni, &gossamer_columns_avx512vnni,
         &gossamer_decoder_avx512vnni, &gossamer_attention_avx512vnni, &gossamer_estimate_avx512vnni,
         runs<has_avx512vnni>},
        {"avx512", &gossamer_int_avx512vnni, &gossamer_float_avx512, &gossamer_columns_avx512vnni,
         &gossamer_decoder_avx512vnni, &gossamer_attention_avx512, &gossamer_estimate_avx512,
         runs<has_avx512>},
#endif
#if defined(GOSSAMER_AMX)
        {"amx", &gossamer_int_amx, &gossamer_float_amx, &gossamer_columns_avx512vnni,
         &gossamer_decoder_avx512vnni, &gossamer_attention_amx, &gossamer_estimate_avx512, amx_runs,
         kTileRows},
#endif
    };
    *count = int(sizeof all_tiers / sizeof *all_tiers);
    return all_tiers;
}

}  // namespace gossamer
