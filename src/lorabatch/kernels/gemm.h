// Y = X Wᵀ for a frozen W: panels of 48 output columns, tiles of up to 8 rows, everything in registers.
//
// A panel is stored as [dwords of K][48 columns] of 32-bit words that hold 1 fp32, 2 bf16 or 4 int8 values of one
// column, which is what one dot-product instruction eats per lane; the same loop serves the three types. Sums run over K in
// one order, whatever the number of rows: a row's result does not depend on its neighbours, bit for bit.
#pragma once
#include "simd.h"

constexpr int PANEL = 48, TILE_ROWS = 8, VECTORS = PANEL / 16;

// Weights of 8 bits against activations of 8 bits: x = row_scale * (u - 128), w = column_scale * s.
struct Int8 {
    using Accumulator = __m512i;
    static constexpr int per_dword = 4;
    static __m512i zero() { return _mm512_setzero_si512(); }
#ifdef __AVX512VNNI__
    static __m512i dot(__m512i sum, __m512i a, __m512i b) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // the intrinsic makes GCC 12 spill every accumulator
        return sum;
    }
#endif
};

// sum += a b: ROWS rows of `steps` words times [steps][VECTORS * 16] words; strides in words. While it runs, `lines` cache lines a step of
// `ahead` are fetched: the panel that comes next, so that memory works while the products do.
template <class W, int ROWS, int VECTORS>
[[gnu::always_inline]] static inline void accumulate(const void* a, int64_t a_stride, const void* b, int64_t b_stride, int64_t steps,
                                                     typename W::Accumulator (&sum)[ROWS][VECTORS], const char* ahead = nullptr, int lines = 0) {
    const char* left = (const char*)a;
    const int32_t* right = (const int32_t*)b;
    for (int64_t s = 0; s < steps; s++, left += 4, right += b_stride) {
        __m512i column[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) column[v] = _mm512_loadu_si512(right + v * 16);
        for (int l = 0; l < lines; l++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            int32_t word;
            std::memcpy(&word, left + r * a_stride * 4, 4);
            const __m512i row = _mm512_set1_epi32(word);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) sum[r][v] = W::dot(sum[r][v], row, column[v]);
        }
    }
}

// result = a b, or result += a b; a function of its own, so that its sums keep to registers whatever surrounds it.
template <class W, bool ADD = false, int ROWS, int VECTORS>
[[gnu::noinline]] static void multiply(const void* a, int64_t a_stride, const void* b, int64_t b_stride, int64_t steps,
                                       typename W::Accumulator (&result)[ROWS][VECTORS], const char* ahead = nullptr, int lines = 0) {
    typename W::Accumulator sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) sum[r][v] = ADD ? result[r][v] : W::zero();
    accumulate<W>(a, a_stride, b, b_stride, steps, sum, ahead, lines);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) result[r][v] = sum[r][v];
}

// Calls f(std::integral_constant<int, rows>) for 1 <= rows <= 8.
template <class F>
static inline void with_rows(int rows, F&& f) {
    switch (rows) {
        case 1: return f(std::integral_constant<int, 1>{});
        case 2: return f(std::integral_constant<int, 2>{});
        case 3: return f(std::integral_constant<int, 3>{});
        case 4: return f(std::integral_constant<int, 4>{});
        case 5: return f(std::integral_constant<int, 5>{});
        case 6: return f(std::integral_constant<int, 6>{});
        case 7: return f(std::integral_constant<int, 7>{});
        default: return f(std::integral_constant<int, 8>{});
    }
}
