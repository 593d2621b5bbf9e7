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

template <class T>
struct Float : T {
    using Accumulator = __m512;
    static __m512 zero() { return _mm512_setzero_ps(); }
};

// One tile: rows x (row stride in bytes) times one panel. While it runs, `lines` cache lines per step of `ahead` are
// fetched: the panel that comes next, so that memory works while the products do. V: panels of V * 16 columns.
template <class W, int ROWS, int V = VECTORS>
[[gnu::noinline]] static void tile(const char* x, int64_t stride, const char* panel, int64_t dwords, const char* ahead, int lines,
                        typename W::Accumulator (&result)[ROWS][V]) {
    typename W::Accumulator sum[ROWS][V];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) sum[r][v] = W::zero();
    for (int64_t i = 0; i < dwords; i++) {
        __m512i w[V];
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) w[v] = _mm512_loadu_si512(panel + (i * V + v) * 64);
        for (int l = 0; l < lines; l++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            int32_t word;
            std::memcpy(&word, x + r * stride + i * 4, 4);
            const __m512i a = _mm512_set1_epi32(word);
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) sum[r][v] = W::dot(sum[r][v], a, w[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) result[r][v] = sum[r][v];
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
