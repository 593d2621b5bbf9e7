// Attention of single rows over their slot of the KV cache, in pages of PAGE = 64 positions.
//
// A page of keys is stored as [dwords of D][64 positions] of words that hold 1 fp32 or 2 bf16 values of one position, a page of values
// as [64 positions / values per word][D] of words that hold the same feature of 1 or 2 positions: both products then read the
// cache straight into dot-product instructions, without a sum across lanes. Pages always begin at multiples of 64 and masked
// positions add exact zeros, so a row's result does not depend on how its prompt was cut, nor on its neighbours.
#pragma once
#include <algorithm>
#include "gemm.h"

// Queries that share a pass over the keys: a tile of rows, or what fits the registers beside four vectors of keys.
template <class T>
constexpr int MAX_QUERIES = tiled<T> ? TILE_ROWS<T> : 6;

template <class T>
struct Cache {  // of one layer: keys and values are [slots][kv heads][capacity * D]
    typename T::Value* keys;
    typename T::Value* values;
    int64_t kv_heads, head_dim, capacity;
    int64_t head(int64_t slot, int64_t h) const { return (slot * kv_heads + h) * capacity * head_dim; }
};

// k, v: [D], written as words of the pages; D is a multiple of 16.
template <class T>
static void store_position(const Cache<T>& c, int64_t slot, int64_t h, int64_t pos, const typename T::Value* k, const typename T::Value* v) {
    constexpr int P = T::per_dword;
    const int64_t D = c.head_dim;
    auto* keys = (int32_t*)(c.keys + c.head(slot, h) + pos / PAGE * PAGE * D) + pos % PAGE;
    for (int64_t i = 0; i < D / P; i++) std::memcpy(keys + i * PAGE, k + i * P, 4);
    auto* values = (int32_t*)(c.values + c.head(slot, h) + pos / P * P * D);
    // Two positions share a word, and their tokens may be two threads'.
    for (int64_t d = 0; d < D; d += LANES)
        if constexpr (P == 1) put(values + d, get<Floats>(v + d));
        else put_halves(values + d, v + d, pos % P);
}

// `queries` query vectors (heads that share a key head, of one or more consecutive tokens) of one slot; with vectors there are just R.
// q[r]: [D]; last[r]: the newest position that r sees; first[r]: the oldest; scores: scratch [R][capacity] floats;
// ahead: the keys that this thread will probably need next.
template <class T, int R>
static void attend(const Cache<T>& c, int64_t slot, int64_t h, int queries, const typename T::Value* const* q, const int64_t* first, const int64_t* last,
                   float scale, float* scores, typename T::Value* const* out, const void* ahead) {
    using Value = typename T::Value;
    constexpr int P = T::per_dword, WHOLE = std::max(16, STEPS<T> * P);  // positions that are read together
    const int64_t D = c.head_dim, words = D / P;
    if constexpr (!tiled<T>) queries = R;  // known to the compiler
    int64_t begin = first[0], end = last[0];
    for (int r = 1; r < queries; r++) begin = std::min(begin, first[r]), end = std::max(end, last[r]);
    begin = begin / PAGE * PAGE, end = (end / WHOLE + 1) * WHOLE;  // what lies beyond a row's last position weighs zero

    alignas(64) Value rows[R * MAX_HEAD_DIM];
    for (int r = 0; r < queries; r++) std::memcpy(rows + r * D, q[r], D * sizeof(Value));
    const Value *keys = c.keys + c.head(slot, h), *values = c.values + c.head(slot, h);
    Floats top[R];
    for (int r = 0; r < queries; r++) top[r] = all(-INFINITY);
    for (int64_t page = begin; page < end; page += PAGE)
        with_vectors(std::min<int64_t>(end - page, PAGE), [&](auto count) {
            constexpr int V = decltype(count)::value;
            Floats sum[R][V];
            multiply<T, R>(rows, words, keys + page * D, PAGE, words, sum, (const char*)(values + page * D), V / SIXTEEN, queries);  // values of this page, wanted soon
            for (int r = 0; r < queries; r++)
                for (int v = 0; v < V; v++) {
                    const Ints at = lanes_from(page + v * LANES), seen = (at <= (int)last[r]) & (at >= (int)first[r]);
                    const Floats s = chosen(seen, sum[r][v] * scale, all(-INFINITY));
                    top[r] = max(top[r], s);
                    put(scores + r * c.capacity + page + v * LANES, s);
                }
        });

    float share[R];
    for (int r = 0; r < queries; r++) {  // softmax; the weights replace the scores, in the cache's type
        const float most = most_of(top[r]);
        float* row = scores + r * c.capacity;
        Value* weights = (Value*)row;
        Floats total{};
        for (int64_t i = begin; i < end; i += LANES) {
            const Floats e = exp(get<Floats>(row + i) - most);
            total += e;
            T::store(weights + i, e);  // never ahead of what is still to be read: a value is at most as wide as a score
        }
        share[r] = 1.0f / sum_of(total);
    }

    const void* weights = (const Value*)scores + begin;  // [queries][capacity words]
    for (int64_t d = 0; d < D; d += 64)
        with_vectors(std::min<int64_t>(D - d, 64), [&](auto count) {
            constexpr int V = decltype(count)::value;
            Floats sum[R][V];
            multiply<T, R>(weights, c.capacity, (const int32_t*)(values + begin * D) + d, D, (end - begin) / P, sum, (const char*)ahead, V * LANES == 64 ? 4 : 0, queries);
            for (int r = 0; r < queries; r++)
                for (int v = 0; v < V; v++) T::store(out[r] + d + v * LANES, sum[r][v] * share[r]);
        });
}
