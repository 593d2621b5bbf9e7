// Products by AMX tiles (Intel, from Sapphire Rapids on): 16 rows by 16 columns by 16 dwords of K an instruction.
//
// The panels of gemm.h are what the instructions read as their right side. A row's sums depend neither on the other rows of its tile nor
// on how many there are, and K is always cut at the same places: a row in company equals the row alone, bit for bit. One row too goes
// through tiles, so that its bits stay its own (it is no slower: memory decides there).
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <cstring>
#include <utility>

#ifdef EMULATE_TILES
#include "emulate.h"
#endif

namespace tiles {

constexpr int ROWS = 16, WORDS = 16;                     // of a whole tile; a word is 4 bytes
constexpr int LEFT = 4, FIRST_RIGHT = 5, RIGHTS = 3;     // tiles 0 to 3 hold sums

struct alignas(64) Shapes {  // what ldtilecfg reads
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

// Own assembly instead of GCC's intrinsics: those say nothing of the memory that they read and write, and they need a newer compiler
// than the rest does.
#ifdef EMULATE_TILES
static inline void configure(const Shapes& s) { emulated::configure(&s); }
static inline void release() { emulated::release(); }
template <int T>
static inline void zero() { emulated::zero(T); }
template <int T>
static inline void load(const void* p, int64_t stride) { emulated::load(T, p, stride); }
template <int T>
static inline void store(void* p, int64_t stride) { emulated::store(T, p, stride); }
template <bool BF16, int D, int A, int B>
static inline void dot() { emulated::dot<BF16>(D, A, B); }
#else
static inline void configure(const Shapes& s) { asm volatile("ldtilecfg %0" ::"m"(s) : "memory"); }
static inline void release() { asm volatile("tilerelease" ::: "memory"); }
template <int T>
static inline void zero() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T>
static inline void load(const void* p, int64_t stride) { asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory"); }
template <int T>
static inline void store(void* p, int64_t stride) { asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory"); }
template <bool BF16, int D, int A, int B>
static inline void dot() {
    if constexpr (BF16) asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(D), "i"(A), "i"(B));
    else asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(D), "i"(A), "i"(B));
}
#endif

// oneDNN shapes the tiles of the same threads for its own products, so no shape outlives an operation: one Region each, in every thread.
static thread_local int shaped_rows = 0, shaped_words = 0;

struct Region {
    Region() { shaped_rows = shaped_words = 0; }
    ~Region() { release(); }
};

// Shapes for sums of `rows` rows over `words` dwords of K. (A left side of M rows by K words needs a right side of K rows.)
static inline void shape(int rows, int words) {
    if (rows == shaped_rows && words == shaped_words) return;
    Shapes s;
    for (int t = 0; t < 8; t++) s.bytes[t] = 64, s.rows[t] = (uint8_t)(t <= LEFT ? rows : words);
    s.bytes[LEFT] = (uint16_t)(words * 4);
    configure(s);
    shaped_rows = rows, shaped_words = words;
}

template <class F, int... I>
static inline void each_of(F&& f, std::integer_sequence<int, I...>) { (f(std::integral_constant<int, I>{}), ...); }
template <int N, class F>
static inline void each(F&& f) { each_of(f, std::make_integer_sequence<int, N>{}); }

// result [rows][V * 16] = a b, or += a b with `add`, over `blocks` blocks of `words` dwords; strides in bytes. While it runs, `lines` cache
// lines a dword of `ahead` are fetched, spread between the loads: in one burst they cost more than they brought.
template <bool BF16, int V>
[[gnu::noinline]] static void blocks_of(const char* a, int64_t a_stride, const char* b, int64_t b_stride, int64_t blocks, int words, int rows, char* result, bool add, const char* ahead, int lines) {
    shape(rows, words);
    each<V>([&](auto v) { add ? load<v>(result + v * 64, V * 64) : zero<v>(); });
    for (int64_t i = 0; i < blocks; i++, a += words * 4, b += words * b_stride) {
        load<LEFT>(a, a_stride);
        each<V>([&](auto v) {
            constexpr int right = FIRST_RIGHT + v % RIGHTS;
            load<right>(b + v * 64, b_stride);
            for (const char* end = ahead + words * lines * (v + 1) / V * 64 - words * lines * v / V * 64; ahead < end; ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
            dot<BF16, v, LEFT, right>();
        });
    }
    each<V>([&](auto v) { store<v>(result + v * 64, V * 64); });
}

template <bool BF16, int V>
static inline void multiply(const char* a, int64_t a_stride, const char* b, int64_t b_stride, int64_t steps, int rows, void* result, bool add, const char* ahead, int lines) {
    const int64_t blocks = steps / WORDS, whole = blocks * WORDS;
    if (blocks || !steps) blocks_of<BF16, V>(a, a_stride, b, b_stride, blocks, WORDS, rows, (char*)result, add, ahead, lines);
    if (steps > whole)
        blocks_of<BF16, V>(a + whole * 4, a_stride, b + whole * b_stride, b_stride, 1, (int)(steps - whole), rows, (char*)result, add || blocks, ahead, 0);
}

}  // namespace tiles
