// The vector operations that kernels are written in, for the instruction set this unit is compiled for.
//
// Names in units of an instruction set lie in an anonymous namespace: were an inline function shared, a
// linker might keep its AVX-512 copy for everyone, and older processors would stop on it.
#pragma once

#define GOSSAMER_INLINE inline __attribute__((always_inline))
#define GOSSAMER_JOIN2(a, b) a##b
#define GOSSAMER_JOIN(a, b) GOSSAMER_JOIN2(a, b)
#define GOSSAMER_EXPORT(family) GOSSAMER_JOIN(gossamer_##family##_, GOSSAMER_TIER)

// Loops over registers are unrolled whole. Portable code has loops inside each operation instead.
#define GOSSAMER_TEXT(x) #x
#if defined(GOSSAMER_PORTABLE)
#define GOSSAMER_UNROLL(n)
#elif defined(__clang__)
#define GOSSAMER_UNROLL(n) _Pragma(GOSSAMER_TEXT(unroll n))
#else
#define GOSSAMER_UNROLL(n) _Pragma(GOSSAMER_TEXT(GCC unroll n))
#endif

#if defined(GOSSAMER_AVX512)
#include "simd_avx512.h"
#elif defined(GOSSAMER_AVX2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif
