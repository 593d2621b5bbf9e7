// Intel's tile instructions in C++: the same shapes, the same bits, an abort where the processor would raise #UD. For tests on machines
// without tiles. Source: the pseudo-code of TDPBF16PS and TDPBUSD in Intel's manual; compared with a Granite Rapids bit for bit
// (docs/LOG.md, 2026-11-29).
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct State {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
    alignas(64) uint8_t data[8][16][64];
};
static thread_local State state{};

static inline void need(bool fine, const char* what) {
    if (!fine) std::fprintf(stderr, "tiles: %s\n", what), std::abort();
}

static inline void configure(const void* shapes) {
    std::memcpy(&state, shapes, 64);
    std::memset(state.data, 0, sizeof state.data);
}

static inline void release() { std::memset(&state, 0, sizeof state); }

static inline void zero(int t) {
    need(state.rows[t], "zero of a tile without a shape");
    std::memset(state.data[t], 0, sizeof state.data[t]);
}

static inline void load(int t, const void* p, int64_t stride) {
    zero(t);
    for (int r = 0; r < state.rows[t]; r++) std::memcpy(state.data[t][r], (const char*)p + r * stride, state.bytes[t]);
}

static inline void store(int t, void* p, int64_t stride) {
    need(state.rows[t], "store of a tile without a shape");
    for (int r = 0; r < state.rows[t]; r++) std::memcpy((char*)p + r * stride, state.data[t][r], state.bytes[t]);
}

// d += a b. bf16: per row, the even products and the odd products of all words are summed apart from zero, then together, then to d;
// every step rounds to nearest, denormals are zero on both sides. 8 bits: unsigned a, signed b, exact.
template <bool BF16>
static inline void dot(int d, int a, int b) {
    need(state.rows[d] && state.rows[d] == state.rows[a] && state.bytes[d] == state.bytes[b] && state.bytes[a] / 4 == state.rows[b] && d != a && d != b &&
             a != b,
         "shapes do not fit");
    const unsigned before = _mm_getcsr();
    _mm_setcsr(0x1f80 | 0x8040);  // all exceptions masked, denormals are zero, flush to zero
    for (int m = 0; m < state.rows[d]; m++) {
        void* at = state.data[d][m];
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        __m512i whole = _mm512_load_si512(at);
        for (int k = 0; k < state.bytes[a] / 4; k++) {
            const uint8_t* x = state.data[a][m] + 4 * k;
            const __m512i w = _mm512_load_si512(state.data[b][k]);
            if (BF16) {
                const __m512 x_even = _mm512_castsi512_ps(_mm512_set1_epi32(x[0] << 16 | x[1] << 24)), x_odd = _mm512_castsi512_ps(_mm512_set1_epi32(x[2] << 16 | x[3] << 24));
                even = _mm512_fmadd_ps(x_even, _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), even);
                odd = _mm512_fmadd_ps(x_odd, _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000))), odd);
            } else {
                for (int i = 0; i < 4; i++) {
                    const __m512i weight = _mm512_srai_epi32(_mm512_slli_epi32(w, 24 - 8 * i), 24);
                    whole = _mm512_add_epi32(whole, _mm512_mullo_epi32(_mm512_set1_epi32(x[i]), weight));
                }
            }
        }
        if (BF16) whole = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(whole), _mm512_add_ps(even, odd)));
        _mm512_store_si512(at, whole);
    }
    _mm_setcsr(before);
}

}  // namespace emulated
