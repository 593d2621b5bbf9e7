// Y = X Wᵀ for a frozen W: panels of 48 output columns, a few rows at a time, everything in registers.
//
// A panel is stored as [dwords of K][48 columns] of 32-bit words that hold 1 fp32, 2 bf16 or 4 int8 values of one
// column, which is what one dot-product instruction eats per lane; the same loop serves the three types. Sums run over K in
// one order, whatever the number of rows: a row's result does not depend on its neighbours, bit for bit. So which
// instructions serve (vectors or tiles) depends on the type and on K, never on the number of rows.
#pragma once
#include "simd.h"
#ifdef TILES
#include "tiles.h"
constexpr bool HAS_TILES = true;
#else
constexpr bool HAS_TILES = false;
#endif

constexpr int PANEL = 48, VECTORS = PANEL / 16;

// Types that tiles multiply, and how many rows one call of multiply takes: a tile, or what fits the registers.
template <class W>
constexpr bool tiled = HAS_TILES && W::per_dword > 1;
template <class W>
constexpr int TILE_ROWS = tiled<W> ? 16 : 8;
// Dwords of K that sums of bf16 are rounded up to where zeros lie beyond the end: a whole tile, or one.
template <class W>
constexpr int STEPS = tiled<W> ? 16 : 1;

// Between its braces tiles may be used. Every thread of an operation needs its own.
struct TileRegion {
#ifdef TILES
    tiles::Region region;
#else
    ~TileRegion() {}
#endif
};

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
#else
    // Bytes as 16-bit numbers, the even ones and the odd ones apart: exact. (vpmaddubsw is shorter and saturates: 2 x 255 x 127 needs 17 bits.)
    static __m512i dot(__m512i sum, __m512i a, __m512i b) {
        const __m512i even = _mm512_madd_epi16(_mm512_and_si512(a, _mm512_set1_epi16(255)), _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
        const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(a, 8), _mm512_srai_epi16(b, 8));
        return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
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

// result = a b, or result += a b, for up to ROWS rows (with vectors: just ROWS); a function of its own, so that its sums keep to registers
// whatever surrounds it.
template <class W, bool ADD = false, int ROWS, int VECTORS>
[[gnu::noinline]] static void multiply(const void* a, int64_t a_stride, const void* b, int64_t b_stride, int64_t steps,
                                       typename W::Accumulator (&result)[ROWS][VECTORS], const char* ahead = nullptr, int lines = 0, [[maybe_unused]] int rows = ROWS) {
#ifdef TILES
    if constexpr (tiled<W>)
        return tiles::multiply<W::per_dword == 2, VECTORS>((const char*)a, a_stride * 4, (const char*)b, b_stride * 4, steps, rows, result, ADD, ahead, lines);
#endif
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

// Calls f(std::integral_constant<int, R>) with R = rows, 1 <= rows <= 8; with tiles R is a whole tile, and f says `rows` to multiply.
template <class W, class F>
static inline void with_rows(int rows, F&& f) {
    if constexpr (tiled<W>) return f(std::integral_constant<int, TILE_ROWS<W>>{});
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

// Calls f(std::integral_constant<int, count>) for 1 <= count <= 4.
template <class F>
static inline void with_vectors(int64_t count, F&& f) {
    switch (count) {
        case 1: return f(std::integral_constant<int, 1>{});
        case 2: return f(std::integral_constant<int, 2>{});
        case 3: return f(std::integral_constant<int, 3>{});
        default: return f(std::integral_constant<int, 4>{});
    }
}
