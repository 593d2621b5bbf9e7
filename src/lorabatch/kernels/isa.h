// What an instruction set says for itself about vectors of its own width: how wide they are, and the few operations that C++ has no sign for.
// (Dot products: dot.h. Matrix tiles: tiles.h.) Whatever is in none of these three files is plain arithmetic on GCC's and Clang's vector
// types. Never use wider ones than the registers: GCC keeps those in memory.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
#else
constexpr int LANES = 4, REGISTERS = 32;
#endif
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

static inline Words word_lanes() {
    Words lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    return lanes;
}

// fma: a b + c, rounded once (the compiler makes none by itself: -ffp-contract=off, or bits would depend on its mood). max, min: b if one is
// no number. nearest: to whole numbers, ties to even. times_power: x 2^n for whole n from -126 to 127. reciprocal: 1 / x to about 2^-23.
// widened: 16-bit numbers without a sign in 32 bits (GCC 12 would do it in halves).
#if defined(__AVX512F__)
static inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
static inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
static inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, 0); }
static inline Floats times_power(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
static inline Words widened(Halves x) { return (Words)_mm512_cvtepu16_epi32((__m256i)x); }
static inline Floats reciprocal(Floats x) {
    const Floats r = _mm512_rcp14_ps(x);  // one Newton step makes it exact enough
    return r * (Floats)_mm512_fnmadd_ps(x, r, _mm512_set1_ps(2.0f));
}
#else
#if defined(__AVX2__)
static inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
static inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
static inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
static inline Floats nearest(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Words widened(Halves x) { return (Words)_mm256_cvtepu16_epi32((__m128i)x); }
#elif defined(__aarch64__)
static inline Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
static inline Floats max(Floats a, Floats b) { return a > b ? a : b; }
static inline Floats min(Floats a, Floats b) { return a < b ? a : b; }
static inline Floats nearest(Floats x) { return vrndnq_f32(x); }
static inline Words widened(Halves x) { return __builtin_convertvector(x, Words); }
#else
#error "no kernels for this instruction set"
#endif
static inline Floats times_power(Floats x, Floats n) { return x * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23); }
static inline Floats reciprocal(Floats x) { return 1.0f / x; }
#endif

// x as bf16, to nearest, ties to even; NaN stays NaN. (The instruction takes denormals as zero.)
#if defined(__AVX512BF16__)
static inline Halves narrow(Floats x) { return (Halves)_mm512_cvtneps_pbh(x); }
#else
static inline Halves narrow(Floats x) {
    const Words bits = (Words)x, up = bits + 0x7fff + ((bits >> 16) & 1);
    return __builtin_convertvector((x == x ? up : bits | 0x400000) >> 16, Halves);
}
#endif

// Values into the low or the high halves of words. The other halves may be another thread's at this moment: they are not even written back.
static inline void put_halves(int32_t* words, const uint16_t* values, bool high) {
#if defined(__AVX512BW__)
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)values));
    _mm512_mask_storeu_epi16(words, high ? 0xaaaaaaaa : 0x55555555, high ? _mm512_slli_epi32(wide, 16) : wide);
#else
    for (int i = 0; i < LANES; i++) ((uint16_t*)words)[2 * i + high] = values[i];
#endif
}
