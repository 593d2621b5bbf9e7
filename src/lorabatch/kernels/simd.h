// Vector helpers of the CPU kernels: sixteen floats at a time, and the two types that activations can have.
#pragma once
#include <immintrin.h>
#include <cmath>
#include <cstdint>
#include <cstring>

// e^x within 2 ulp for x <= 0 and moderate x > 0; 0 below -87. Range reduction by ln 2 in two parts, then a polynomial
// of degree 6 (the coefficients are those of Cephes' expf, S. L. Moshier).
static inline __m512 exp16(__m512 x) {
    const __mmask16 alive = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.3f), _CMP_GT_OQ);
    x = _mm512_min_ps(x, _mm512_set1_ps(88.0f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_maskz_scalef_ps(alive, p, n);
}

// 1 / (1 + e^-x): an approximate reciprocal, one Newton step makes it exact to about 2^-23.
static inline __m512 sigmoid16(__m512 x) {
    const __m512 d = _mm512_add_ps(_mm512_set1_ps(1.0f), exp16(_mm512_sub_ps(_mm512_setzero_ps(), x)));
    const __m512 r = _mm512_rcp14_ps(d);
    return _mm512_mul_ps(r, _mm512_fnmadd_ps(d, r, _mm512_set1_ps(2.0f)));
}

static inline __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1); }

// f(i, lanes) for every 16th i below n. Whole vectors get a mask that the compiler knows and drops: masked loads and stores of 16-bit
// values made SwiGLU take twice as long (Zen 5).
template <class F>
static inline void each_vector(int64_t n, F&& f) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) f(i, (__mmask16)0xffff);
    if (i < n) f(i, first_lanes(n - i));
}

// An activation type: memory format, and fp32 in registers. A dword of memory holds `per_dword` values.
struct Fp32 {
    using Value = float;
    using Accumulator = __m512;
    static constexpr int per_dword = 1;
    static __m512 zero() { return _mm512_setzero_ps(); }
    static __m512 load(const Value* p, __mmask16 m = 0xffff) { return _mm512_maskz_loadu_ps(m, p); }
    static void store(Value* p, __m512 x, __mmask16 m = 0xffff) { _mm512_mask_storeu_ps(p, m, x); }
    static Value round(float x) { return x; }
    static __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum); }
};

// Products of bf16 pairs: sum + odd a * odd b + even a * even b, in this order, each rounded to fp32. vdpbf16ps computes just that (but takes
// denormals as zero). It pays on AMD alone: on Intel it takes four times as long as the two FMAs (2.15 against 0.52 cycles each), so
// there, and on processors without it, each half of a word becomes fp32 by a shift or a mask.
struct Bf16 {
    using Value = uint16_t;
    using Accumulator = __m512;
    static constexpr int per_dword = 2;
    static __m512 zero() { return _mm512_setzero_ps(); }
    static __m512 load(const Value* p, __mmask16 m = 0xffff) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
    }
    static void store(Value* p, __m512 x, __mmask16 m = 0xffff) { _mm256_mask_storeu_epi16(p, m, narrow(x)); }
#ifdef __AVX512BF16__
    static __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
#else
    static __m256i narrow(__m512 x) {  // to nearest, ties to even; NaN stays NaN
        const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __m512i kept = _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
    }
#endif
    static Value round(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        return (Value)((x == x ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000) >> 16);
    }
#ifdef FAST_BF16_DOT
    static __m512 dot(__m512 sum, __m512i a, __m512i b) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // as the intrinsic, without GCC 12's copies of accumulators
        return sum;
    }
#else
    static __m512 even(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
    static __m512 odd(__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000))); }
    static __m512 dot(__m512 sum, __m512i a, __m512i b) { return _mm512_fmadd_ps(even(a), even(b), _mm512_fmadd_ps(odd(a), odd(b), sum)); }
#endif
};
