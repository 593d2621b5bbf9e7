// Attention of single rows over their slot of the KV cache, in pages of 64 positions.
//
// A page of keys is stored as [dwords of D][64 positions] of words that hold 1 fp32 or 2 bf16 values of one position, a page of values
// as [64 positions / values per word][D] of words that hold the same feature of 1 or 2 positions: both products then read the
// cache straight into dot-product instructions, without a sum across lanes. Pages always begin at multiples of 64 and masked
// positions add exact zeros, so a row's result does not depend on how its prompt was cut, nor on its neighbours.
#pragma once
#include "simd.h"

constexpr int PAGE = 64, MAX_QUERIES = 6;

template <class T>
struct Cache {  // of one layer: keys and values are [slots][kv heads][capacity * D]
    typename T::Value* keys;
    typename T::Value* values;
    int64_t kv_heads, head_dim, capacity;
    int64_t head(int64_t slot, int64_t h) const { return (slot * kv_heads + h) * capacity * head_dim; }
};

template <class T>
static void store_position(const Cache<T>& c, int64_t slot, int64_t h, int64_t pos, const typename T::Value* k, const typename T::Value* v) {
    constexpr int P = T::per_dword;
    const int64_t D = c.head_dim, page = pos / PAGE, lane = pos % PAGE;
    auto* keys = c.keys + c.head(slot, h) + page * PAGE * D;
    for (int64_t d = 0; d < D; d++) keys[((d / P) * PAGE + lane) * P + d % P] = k[d];
    auto* values = c.values + c.head(slot, h) + (pos / P) * P * D;
    for (int64_t d = 0; d < D; d++) values[d * P + pos % P] = v[d];
}

static inline __m512i word(const void* p, int64_t index) {
    int32_t w;
    std::memcpy(&w, (const char*)p + index * 4, 4);
    return _mm512_set1_epi32(w);
}

// R query vectors (heads that share a key head, of one or more consecutive tokens) of one slot.
// q[r]: [D]; last[r]: the newest position that r sees; first[r]: the oldest; scores: scratch [R][capacity] floats.
template <class T, int R>
static void attend(const Cache<T>& c, int64_t slot, int64_t h, const typename T::Value* const* q, const int64_t* first, const int64_t* last,
                   float scale, float* scores, typename T::Value* const* out) {
    using Value = typename T::Value;
    constexpr int P = T::per_dword;
    const int64_t D = c.head_dim, words = D / P;
    int64_t begin = first[0], end = last[0];
    for (int r = 1; r < R; r++) begin = first[r] < begin ? first[r] : begin, end = last[r] > end ? last[r] : end;
    begin = begin / PAGE * PAGE, end = (end / PAGE + 1) * PAGE;

    const Value* keys = c.keys + c.head(slot, h);
    __m512 top[R];
    for (int r = 0; r < R; r++) top[r] = _mm512_set1_ps(-INFINITY);
    for (int64_t page = begin; page < end; page += PAGE) {
        const Value* block = keys + page * D;
        __m512 sum[R][4];
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = sum[r][2] = sum[r][3] = _mm512_setzero_ps();
        for (int64_t i = 0; i < words; i++) {
            __m512i k[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) k[j] = _mm512_loadu_si512((const char*)block + (i * PAGE + j * 16) * 4);
#pragma GCC unroll 6
            for (int r = 0; r < R; r++) {
                const __m512i a = word(q[r], i);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) sum[r][j] = T::dot(sum[r][j], a, k[j]);
            }
        }
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (int r = 0; r < R; r++)
            for (int j = 0; j < 4; j++) {
                const __m512i at = _mm512_add_epi32(lane, _mm512_set1_epi32((int)(page + j * 16)));
                const __mmask16 seen = _mm512_cmple_epi32_mask(at, _mm512_set1_epi32((int)last[r])) &
                                       _mm512_cmpge_epi32_mask(at, _mm512_set1_epi32((int)first[r]));
                const __m512 s = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), seen, sum[r][j], _mm512_set1_ps(scale));
                top[r] = _mm512_max_ps(top[r], s);
                _mm512_storeu_ps(scores + r * c.capacity + page + j * 16, s);
            }
    }

    float share[R];
    for (int r = 0; r < R; r++) {  // softmax; the weights replace the scores, in the cache's type
        const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(top[r]));
        float* row = scores + r * c.capacity;
        Value* weights = (Value*)row;
        __m512 total = _mm512_setzero_ps();
        for (int64_t i = begin; i < end; i += 16) {
            const __m512 e = exp16(_mm512_sub_ps(_mm512_loadu_ps(row + i), most));
            total = _mm512_add_ps(total, e);
            T::store(weights + i, e);  // never ahead of what is still to be read: a value is at most as wide as a score
        }
        share[r] = 1.0f / _mm512_reduce_add_ps(total);
    }

    const Value* values = c.values + c.head(slot, h);
    for (int64_t d = 0; d < D; d += 64) {
        const int vectors = (int)((D - d < 64 ? D - d : 64) / 16);
        __m512 sum[R][4];
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = sum[r][2] = sum[r][3] = _mm512_setzero_ps();
        if (vectors == 4)
            for (int64_t i = begin / P; i < end / P; i++) {
                __m512i v[4];
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) v[j] = _mm512_loadu_si512((const char*)values + (i * D + d + j * 16) * 4);
#pragma GCC unroll 6
                for (int r = 0; r < R; r++) {
                    const __m512i a = word(scores + r * c.capacity, i);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; j++) sum[r][j] = T::dot(sum[r][j], a, v[j]);
                }
            }
        else
            for (int64_t i = begin / P; i < end / P; i++)
                for (int r = 0; r < R; r++)
                    for (int j = 0; j < vectors; j++)
                        sum[r][j] = T::dot(sum[r][j], word(scores + r * c.capacity, i), _mm512_loadu_si512((const char*)values + (i * D + d + j * 16) * 4));
        for (int r = 0; r < R; r++)
            for (int j = 0; j < vectors; j++) T::store(out[r] + d + j * 16, _mm512_mul_ps(sum[r][j], _mm512_set1_ps(share[r])));
    }
}
