// Dot products: sum += what the words of a and b hold, 1, 2 or 4 values in each 32-bit lane, as each instruction set does it best.
//
// Where one instruction (or a few) does it, PARTS is 1. Elsewhere a word is multiplied in two parts that become wider numbers first: rows
// once for all columns (`left`), columns once for all rows (`right`). So on AVX2 activations of bf16 are fp32 when they meet the weights.
#pragma once
#include "vector.h"

template <class W>
struct Dot;

struct Whole {
    static constexpr int PARTS = 1;
    template <int PART>
    static Ints right(Ints b) { return b; }
    static void left(uint32_t word, uint32_t* parts) { *parts = word; }
};

template <>
struct Dot<Fp32> : Whole {
    using Sum = Floats;
    static Sum add(Sum sum, Ints a, Ints b) { return fma((Floats)a, (Floats)b, sum); }
};

// Products of bf16 pairs: sum + odd a * odd b + even a * even b, in this order, each rounded to fp32. vdpbf16ps computes just that (but takes
// denormals as zero). It pays on AMD alone: on Intel it takes four times as long as the two FMAs (2.15 against 0.52 cycles each), so
// there, and on processors without it, each half of a word becomes fp32 by a shift or a mask.
template <>
struct Dot<Bf16> : Whole {
    using Sum = Floats;
    static Ints odd(Ints x) { return x & (int32_t)0xffff0000; }
    static Ints even(Ints x) { return x << 16; }
#if defined(FAST_BF16_DOT)
    static Sum add(Sum sum, Ints a, Ints b) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // as the intrinsic, without GCC 12's copies of accumulators
        return sum;
    }
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)  // rounds in a way of its own
    static Sum add(Sum sum, Ints a, Ints b) { return vbfdotq_f32(sum, (bfloat16x8_t)a, (bfloat16x8_t)b); }
#elif defined(__AVX512F__)
    static Sum add(Sum sum, Ints a, Ints b) { return fma((Floats)even(a), (Floats)even(b), fma((Floats)odd(a), (Floats)odd(b), sum)); }
#else
    static constexpr int PARTS = 2;
    template <int PART>
    static Ints right(Ints b) {
        if (PART) return even(b);
#if defined(__AVX2__)
        asm("vpsrld $16, %0, %0\n\tvpslld $16, %0, %0" : "+x"(b));  // odd(), whose mask would take a register from the sums
        return b;
#else
        return odd(b);
#endif
    }
    static void left(uint32_t word, uint32_t* parts) { parts[0] = word & 0xffff0000, parts[1] = word << 16; }
    static Sum add(Sum sum, Ints a, Ints b) {
#if defined(__AVX2__)
        asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));  // fma(), without the accumulators that GCC 12 moves about
        return sum;
#else
        return fma((Floats)a, (Floats)b, sum);
#endif
    }
#endif
};

// Weights of 8 bits against activations of 8 bits: x = row_scale * (u - ZERO_POINT), w = column_scale * s.
struct Int8 {
    static constexpr int per_dword = 4;
};

// Without an instruction for it: bytes as 16-bit numbers, the even ones and the odd ones apart, which is exact. (vpmaddubsw is shorter and
// saturates: 2 x 255 x 127 needs 17 bits.)
template <>
struct Dot<Int8> : Whole {
    using Sum = Ints;
    typedef int16_t Shorts __attribute__((vector_size(LANES * 4)));
    static Ints even(Ints b) { return (Ints)((Shorts)b << 8 >> 8); }
    static Ints odd(Ints b) { return (Ints)((Shorts)b >> 8); }
#if defined(__AVX512VNNI__)
    static Sum add(Sum sum, Ints a, Ints b) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // the intrinsic makes GCC 12 spill every accumulator
        return sum;
    }
#elif defined(__AVXVNNI__)
    static Sum add(Sum sum, Ints a, Ints b) {
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
        return sum;
    }
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    static Sum add(Sum sum, Ints a, Ints b) { return (Sum)vusdotq_s32((int32x4_t)sum, (uint8x16_t)a, (int8x16_t)b); }
#elif defined(__ARM_FEATURE_DOTPROD)  // u w = (u - 128) w + 64 w + 64 w: it knows numbers with a sign only
    static Sum add(Sum sum, Ints a, Ints b) {
        const int8x16_t less = (int8x16_t)(a ^ (int32_t)0x80808080), half = vdupq_n_s8(64), w = (int8x16_t)b;
        return (Sum)vdotq_s32(vdotq_s32(vdotq_s32((int32x4_t)sum, less, w), half, w), half, w);
    }
#elif defined(__AVX512F__)
    static Sum add(Sum sum, Ints a, Ints b) {
        const Sum pairs = (Sum)_mm512_madd_epi16((__m512i)(a & 0x00ff00ff), (__m512i)even(b));
        return sum + pairs + (Sum)_mm512_madd_epi16((__m512i)((Words)a >> 8 & 0x00ff00ff), (__m512i)odd(b));
    }
#else
    static constexpr int PARTS = 2;
    template <int PART>
    static Ints right(Ints b) { return PART ? odd(b) : even(b); }
    static void left(uint32_t word, uint32_t* parts) { parts[0] = word & 0x00ff00ff, parts[1] = word >> 8 & 0x00ff00ff; }
#if defined(__AVX2__)
    static Sum add(Sum sum, Ints a, Ints b) {
        Ints product;  // as _mm256_madd_epi16 and +, whose order GCC 12 changes until no accumulator has a register
        asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=x"(product) : "x"(a), "x"(b));
        return sum;
    }
#else
    static Sum add(Sum sum, Ints a, Ints b) { return sum + (a & 0xffff) * ((b << 16) >> 16) + (a >> 16) * (b >> 16); }
#endif
#endif
};
