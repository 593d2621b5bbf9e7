// Y = X Wᵀ for a frozen W: panels of PANEL = 48 output columns, a few rows at a time, everything in registers.
//
// A panel is stored as [dwords of K][48 columns] of 32-bit words that hold 1 fp32, 2 bf16 or 4 int8 values of one
// column, which is what one dot-product instruction eats per lane; the same loop serves the three types. Sums run over K in
// one order, whatever the number of rows: a row's result does not depend on its neighbours, bit for bit. So which
// instructions serve (vectors or tiles) depends on the type and on K, never on the number of rows.
#pragma once
#include "dot.h"
#ifdef TILES
#include "tiles.h"
constexpr bool HAS_TILES = true;
#else
constexpr bool HAS_TILES = false;
#endif

constexpr int VECTORS = PANEL / LANES;

// Types that tiles multiply, and how many rows one call of multiply takes: a tile, or what fits the registers.
template <class W>
constexpr bool tiled = HAS_TILES && W::per_dword > 1;
template <class W>
constexpr int TILE_ROWS = tiled<W> ? 16 : LANES == 16 ? 8 : 6;
// Dwords of K that sums of bf16 are rounded up to where zeros lie beyond the end: a whole tile, or one.
template <class W>
constexpr int STEPS = tiled<W> ? 16 : 1;
template <class W>
using Sum = typename Dot<W>::Sum;

// Between its braces tiles may be used. Every thread of an operation needs its own.
struct TileRegion {
#ifdef TILES
    tiles::Region region;
#else
    ~TileRegion() {}
#endif
};

// Vectors of columns whose sums are in registers at once: as many as fit beside the columns themselves, in equal shares.
constexpr int share_of(int rows, int vectors) {
    int share = vectors;
    while (share > 1 && ((rows + 1) * share > REGISTERS - 2 || vectors % share)) share--;
    return share;
}

// sum[.][c + .] = a b, or += a b with `add`, for SHARE vectors of columns; strides in words. While it runs, `lines` cache lines a step of `ahead` are fetched:
// the panel that comes next, so that memory works while the products do.
template <class W, int ROWS, int SHARE, int VECTORS>
[[gnu::always_inline]] static inline void accumulate_share(const char* left, int64_t a_stride, const int32_t* right, int64_t b_stride, int64_t steps,
                                                           Sum<W> (*sum)[VECTORS], int c, bool add, const char* ahead, int lines) {
    using D = Dot<W>;
    Sum<W> part[ROWS][SHARE];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < SHARE; v++) part[r][v] = add ? sum[r][c + v] : Sum<W>{};
    for (int64_t s = 0; s < steps; s++, left += 4 * D::PARTS, right += b_stride) {
        for (int l = 0; l < lines; l++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
        const auto both_sides = [&](auto half) {
            Ints column[SHARE];
#pragma GCC unroll 8
            for (int v = 0; v < SHARE; v++) column[v] = D::template right<half>(get<Ints>(right + v * LANES));
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++) {
                const Ints row = all(get<int32_t>(left + (r * a_stride + half) * 4));
#pragma GCC unroll 8
                for (int v = 0; v < SHARE; v++) part[r][v] = D::add(part[r][v], row, column[v]);
            }
        };
        both_sides(std::integral_constant<int, 0>{});
        if constexpr (D::PARTS == 2) {
            asm volatile("" : "+r"(right));  // or GCC 12 reads these columns early, and has no registers left for the sums
            both_sides(std::integral_constant<int, 1>{});
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < SHARE; v++) sum[r][c + v] = part[r][v];
}

// sum = a b, or sum += a b: ROWS rows of `steps` words times [steps][VECTORS * LANES] words. Rows that are multiplied in parts are cut up a block at a
// time, which stays in the first-level cache for all columns.
template <class W, int ROWS, bool ADD, int VECTORS>
[[gnu::always_inline]] static inline void accumulate(const void* a, int64_t a_stride, const void* b, int64_t b_stride, int64_t steps,
                                                     Sum<W> (*sum)[VECTORS], const char* ahead = nullptr, int lines = 0) {
    constexpr int SHARE = share_of(ROWS, VECTORS), PARTS = Dot<W>::PARTS, BLOCK = 128;
    const auto all_columns = [&](const char* left, int64_t stride, const int32_t* right, int64_t count, bool add) {
        for (int c = 0; c < VECTORS; c += SHARE) {
            const int before = lines * c / VECTORS, here = lines * (c + SHARE) / VECTORS - before;
            accumulate_share<W, ROWS, SHARE>(left, stride, right + c * LANES, b_stride, count, sum, c, add, ahead, here);
            ahead += here * count * 64;
        }
    };
    if constexpr (PARTS == 1) return all_columns((const char*)a, a_stride, (const int32_t*)b, steps, ADD);
    int64_t s = 0;
    do {  // also for no steps at all
        const int64_t count = steps - s < BLOCK ? steps - s : BLOCK;
        uint32_t left[ROWS][BLOCK * PARTS];
        for (int r = 0; r < ROWS; r++)
            for (int64_t i = 0; i < count; i++) Dot<W>::left(get<uint32_t>((const char*)a + (r * a_stride + s + i) * 4), left[r] + i * PARTS);
        all_columns((const char*)left, BLOCK * PARTS, (const int32_t*)b + s * b_stride, count, ADD || s);
    } while ((s += BLOCK) < steps);
}

// result = a b, or result += a b, for up to ROWS rows (with vectors: just ROWS); a function of its own, so that its sums keep to registers
// whatever surrounds it.
template <class W, int ROWS, bool ADD = false, int VECTORS>
[[gnu::noinline]] static void multiply(const void* a, int64_t a_stride, const void* b, int64_t b_stride, int64_t steps, Sum<W> (*result)[VECTORS],
                                       const char* ahead = nullptr, int lines = 0, [[maybe_unused]] int rows = ROWS) {
#ifdef TILES
    if constexpr (tiled<W>)
        return tiles::multiply<W::per_dword == 2, VECTORS>((const char*)a, a_stride * 4, (const char*)b, b_stride * 4, steps, rows, result, ADD, ahead, lines);
#endif
    accumulate<W, ROWS, ADD>(a, a_stride, b, b_stride, steps, result, ahead, lines);
}

// Calls f(std::integral_constant<int, R>) with R = rows, 1 <= rows <= MOST; with tiles R is a whole tile, and f says `rows` to multiply.
template <class W, int MOST = TILE_ROWS<W>, class Call>
static inline void with_rows(int rows, Call&& f) {
    if constexpr (tiled<W>) return f(std::integral_constant<int, TILE_ROWS<W>>{});
    if constexpr (MOST > 1)
        if (rows < MOST) return with_rows<W, MOST - 1>(rows, f);
    f(std::integral_constant<int, MOST>{});
}

// result = a b for `rows` rows, at most MOST; a tile's result has room for all of its rows.
template <class W, int MOST = TILE_ROWS<W>, int VECTORS>
static inline void multiply_rows(int rows, const void* a, int64_t a_stride, const void* b, int64_t b_stride, int64_t steps, Sum<W> (*result)[VECTORS],
                                 const char* ahead = nullptr, int lines = 0) {
    with_rows<W, MOST>(rows, [&](auto size) { multiply<W, decltype(size)::value>(a, a_stride, b, b_stride, steps, result, ahead, lines, rows); });
}

// Calls f with the number of vectors of 16, 32, 48 or 64 columns, as a std::integral_constant.
template <int MOST = 64, class Call>
static inline void with_vectors(int64_t columns, Call&& f) {
    if constexpr (MOST > 16)
        if (columns < MOST) return with_vectors<MOST - 16>(columns, f);
    f(std::integral_constant<int, MOST / LANES>{});
}
