// Training passes: packed causal attention with its gradient, RMSNorm, SwiGLU and the softmax of the loss head.
//
// Each has a plain torch form with the same result (lorabatch/model), which is its test and its stand-in. What is gained
// is passes over memory: one read and one write per tensor, and an attention that multiplies only what a causal mask leaves.
#include <omp.h>
#include <algorithm>
#include <cstdlib>
#include <type_traits>
#include "gemm.h"

constexpr int V = 4, TILE = 16 * V;  // a tile of products is ROWS<T> rows by TILE columns: 24 of the 32 registers, or a processor's tile
constexpr int64_t SPAN = 512;               // queries whose score gradients are alive at once

constexpr int64_t MISFIT = 1;               // what a function returns, with nothing done, where sizes do not fit together

template <class T>
using ValueOf = typename T::Value;
template <class T>
constexpr int ROWS = tiled<T> ? TILE_ROWS<T> : 6;

// out[c][r] = in[r][c] of 32-bit words; rows and columns are multiples of 16, strides in words.
static void transpose(const void* from, int64_t in_stride, int64_t rows, int64_t columns, void* to, int64_t out_stride) {
    for (int64_t r = 0; r < rows; r += 16)
        for (int64_t c = 0; c < columns; c += 16) {
            const int32_t* in = (const int32_t*)from + r * in_stride + c;
            int32_t* out = (int32_t*)to + c * out_stride + r;
            __m512i a[16], b[16];
            for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(in + i * in_stride);
            for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
            for (int i = 0; i < 16; i += 4) {
                a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]), a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
                a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]), a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
            }
            for (int k = 0; k < 4; k++) {  // a[4 i + k]: column 4 q + k of rows 4 i .. 4 i + 3 in its q-th quarter
                const __m512i even1 = _mm512_shuffle_i32x4(a[k], a[4 + k], 0x88), odd1 = _mm512_shuffle_i32x4(a[k], a[4 + k], 0xdd);
                const __m512i even2 = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0x88), odd2 = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0xdd);
                _mm512_storeu_si512(out + k * out_stride, _mm512_shuffle_i32x4(even1, even2, 0x88));
                _mm512_storeu_si512(out + (4 + k) * out_stride, _mm512_shuffle_i32x4(odd1, odd2, 0x88));
                _mm512_storeu_si512(out + (8 + k) * out_stride, _mm512_shuffle_i32x4(even1, even2, 0xdd));
                _mm512_storeu_si512(out + (12 + k) * out_stride, _mm512_shuffle_i32x4(odd1, odd2, 0xdd));
            }
        }
}

// Values as they will be in memory, without the way there: what is stored masked cannot be loaded again at once.
template <class T>
static inline __m512i bits(__m512 x) {
    if constexpr (T::per_dword == 1) return _mm512_castps_si512(x);
    else return _mm512_cvtepu16_epi32(T::narrow(x));
}

template <class T>
static inline __m512 rounded(__m512 x) {
    return T::per_dword == 1 ? x : _mm512_castsi512_ps(_mm512_slli_epi32(bits<T>(x), 16));
}

// Sixteen words of one fp32 value, or of two bf16 values of neighbouring rows.
template <class T>
static inline __m512i paired(__m512 first, __m512 second) {
    return T::per_dword == 1 ? bits<T>(first) : _mm512_or_si512(bits<T>(first), _mm512_slli_epi32(bits<T>(second), 16));
}

// n rows of D values, `stride` apart -> [n / per][D] words that pair neighbouring rows. D is a multiple of 32.
template <class T>
static void pair_rows(const ValueOf<T>* rows, int64_t stride, int64_t n, int64_t D, int32_t* out) {
    // Lanes of 16 bits: even ones from the first row, odd ones (index + 32) from the second.
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i low = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(32)), 16));
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t i = 0; i < n; i += T::per_dword, out += D) {
        const ValueOf<T>*first = rows + i * stride, *second = first + stride;
        if constexpr (T::per_dword == 1) {
            std::memcpy(out, first, D * 4);
        } else {
            for (int64_t d = 0; d < D; d += 32) {
                const __m512i a = _mm512_loadu_si512(first + d), b = _mm512_loadu_si512(second + d);
                _mm512_storeu_si512(out + d, _mm512_permutex2var_epi16(a, low, b));
                _mm512_storeu_si512(out + d + 16, _mm512_permutex2var_epi16(a, high, b));
            }
        }
    }
}

// Attention inside each document of a packed block. q, k, v, out and their gradients are rows of T tokens with strides in values;
// cosine and sine [T][D / 2] turn queries and keys on the way in and their gradients back on the way out, or are null.
struct Block {
    const void *q, *k, *v, *cosine, *sine;
    void* out;         // [T][N D]
    float* log_sums;   // [N][T]
    const void* grad;  // [T][N D]
    void *q_grad, *k_grad, *v_grad;
    const int64_t* starts;  // of documents, and T
    int64_t documents, tokens, heads, kv_heads, D, stride, grad_stride;
    double scale;
    int64_t threads;
};

// The thread's own memory, kept between calls: fresh pages would cost more than the work.
struct Arena {
    char* at;
    explicit Arena(size_t bytes) {
        static thread_local char* memory = nullptr;
        static thread_local size_t size = 0;
        if (bytes > size) {
            std::free(memory);
            memory = (char*)std::aligned_alloc(64, size = (bytes + 4095) / 4096 * 4096);
        }
        at = memory;
    }
    template <class X>
    X* take(int64_t count) {
        X* p = (X*)at;
        at += (count * sizeof(X) + 63) / 64 * 64;
        return p;
    }
};

// One head of one document into contiguous rows [padded][D], turned by its positions' angles; zeros below.
template <class T>
static void load_head(const Block& b, const void* from, int64_t stride, bool turned, int64_t first, int64_t n, int64_t padded, ValueOf<T>* rows) {
    const int64_t D = b.D, half = D / 2;
    const bool turn = turned && b.cosine;
    for (int64_t i = 0; i < n; i++) {
        const auto *x = (const ValueOf<T>*)from + (first + i) * stride, *c = (const ValueOf<T>*)b.cosine + (first + i) * half;
        const auto* s = (const ValueOf<T>*)b.sine + (first + i) * half;
        for (int64_t d = 0; d < half; d += 16) {
            __m512 low = T::load(x + d), high = T::load(x + half + d);
            if (turn) {
                const __m512 cos = T::load(c + d), sin = T::load(s + d), was = low;
                low = _mm512_fmsub_ps(low, cos, _mm512_mul_ps(high, sin)), high = _mm512_fmadd_ps(high, cos, _mm512_mul_ps(was, sin));
            }
            T::store(rows + i * D + d, low), T::store(rows + i * D + half + d, high);
        }
    }
    std::memset(rows + n * D, 0, (padded - n) * D * sizeof(ValueOf<T>));
}

// The way back: gradients [n][D] of one head, turned by the opposite angles.
template <class T>
static void store_head(const Block& b, const float* rows, bool turned, int64_t first, int64_t n, void* to) {
    const int64_t D = b.D, half = D / 2;
    const bool turn = turned && b.cosine;
    for (int64_t i = 0; i < n; i++) {
        auto* x = (ValueOf<T>*)to + (first + i) * b.grad_stride;
        const auto *c = (const ValueOf<T>*)b.cosine + (first + i) * half, *s = (const ValueOf<T>*)b.sine + (first + i) * half;
        for (int64_t d = 0; d < half; d += 16) {
            __m512 low = _mm512_loadu_ps(rows + i * D + d), high = _mm512_loadu_ps(rows + i * D + half + d);
            if (turn) {
                const __m512 cos = T::load(c + d), sin = T::load(s + d), was = low;
                low = _mm512_fmadd_ps(low, cos, _mm512_mul_ps(high, sin)), high = _mm512_fmsub_ps(high, cos, _mm512_mul_ps(was, sin));
            }
            T::store(x + d, low), T::store(x + half + d, high);
        }
    }
}

static inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static inline __mmask16 not_before(int64_t column, int64_t row) {  // lanes whose column is at least row
    return column >= row ? 0xffff : row - column >= 16 ? 0 : (__mmask16)(0xffff << (row - column));
}

template <class T>
static void attend_forward(const Block& b, int64_t document, int64_t kv) {
    constexpr int P = T::per_dword, R = ROWS<T>;
    const int64_t D = b.D, first = b.starts[document], n = b.starts[document + 1] - first, padded = up(n, TILE), rows = padded + R;
    TileRegion tiles;
    Arena arena(8 * rows * (4 * D + R) + 4096);
    auto *keys = arena.take<ValueOf<T>>(rows * D), *queries = arena.take<ValueOf<T>>(rows * D);
    auto *across = arena.take<int32_t>(padded * D / P), *values = arena.take<int32_t>(padded * D / P);
    auto* scores = arena.take<float>(R * padded);
    auto* weights = arena.take<ValueOf<T>>(R * padded);
    load_head<T>(b, (const ValueOf<T>*)b.v + kv * D, b.stride, false, first, n, padded, keys);
    pair_rows<T>(keys, D, padded, D, values);
    load_head<T>(b, (const ValueOf<T>*)b.k + kv * D, b.stride, true, first, n, padded, keys);
    transpose(keys, D / P, padded, D / P, across, padded);
    __m512 sum[R][V];
    for (int64_t head = kv * b.heads / b.kv_heads; head < (kv + 1) * b.heads / b.kv_heads; head++) {
        load_head<T>(b, (const ValueOf<T>*)b.q + head * D, b.stride, true, first, n, rows, queries);
        for (int64_t i = 0; i < n; i += R) {
            const int64_t end = up(std::min(i + R, n), TILE);
            __m512 top[R];
            for (int r = 0; r < R; r++) top[r] = _mm512_set1_ps(-INFINITY);
            for (int64_t j = 0; j < end; j += TILE) {
                multiply<T>(queries + i * D, D / P, across + j, padded, D / P, sum);
                for (int r = 0; r < R; r++)
                    for (int v = 0; v < V; v++) {
                        const __mmask16 seen = (__mmask16)~not_before(j + v * 16, i + r + 1);
                        const __m512 s = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), seen, sum[r][v], _mm512_set1_ps((float)b.scale));
                        top[r] = _mm512_max_ps(top[r], s);
                        _mm512_storeu_ps(scores + r * padded + j + v * 16, s);
                    }
            }
            float total[R];
            for (int r = 0; r < R; r++) {
                const float most = _mm512_reduce_max_ps(top[r]);
                __m512 mass = _mm512_setzero_ps();
                for (int64_t j = 0; j < end; j += 16) {
                    const __m512 e = exp16(_mm512_sub_ps(_mm512_loadu_ps(scores + r * padded + j), _mm512_set1_ps(most)));
                    mass = _mm512_add_ps(mass, e);
                    T::store(weights + r * padded + j, e);
                }
                total[r] = _mm512_reduce_add_ps(mass);
                if (i + r < n) b.log_sums[head * b.tokens + first + i + r] = most + std::log(total[r]);
            }
            for (int64_t d = 0; d < D; d += TILE) {
                multiply<T>(weights, padded / P, values + d, D, std::min(end, up(i + R, STEPS<T> * P)) / P, sum);
                for (int r = 0; r < R && i + r < n; r++)
                    for (int v = 0; v < V; v++)
                        T::store((ValueOf<T>*)b.out + (first + i + r) * b.heads * D + head * D + d + v * 16, _mm512_mul_ps(sum[r][v], _mm512_set1_ps(1 / total[r])));
            }
        }
    }
}

template <int R>
static inline void add_rows(float* to, int64_t D, const __m512 (&sum)[R][V]) {
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) _mm512_storeu_ps(to + r * D + v * 16, _mm512_add_ps(_mm512_loadu_ps(to + r * D + v * 16), sum[r][v]));
}

// Scores are computed again, transposed (a row is a key), so that P and dS lie as the products for dV and dK want them and
// the sums of the softmax are read per column. Source of the recomputation: FlashAttention, arXiv 2205.14135.
template <class T>
static void attend_backward(const Block& b, int64_t document, int64_t kv) {
    constexpr int P = T::per_dword, R = ROWS<T>;
    using Value = ValueOf<T>;
    const int64_t D = b.D, first = b.starts[document], n = b.starts[document + 1] - first, padded = up(n, TILE), rows = padded + R;
    const int64_t span = std::min(SPAN, padded);
    TileRegion tiles;
    Arena arena(4 * (rows * (12 * D + 2 + span) + R * (padded + 2 * span) + TILE * (2 * D + R)) + 65536);
    auto *keys = arena.take<Value>(rows * D), *values = arena.take<Value>(rows * D), *queries = arena.take<Value>(rows * D), *grads = arena.take<Value>(rows * D);
    auto *pairs = arena.take<int32_t>(padded * D / P), *keys_across = arena.take<int32_t>((D + R) * padded / P);
    auto *queries_across = arena.take<int32_t>(padded * D / P), *query_pairs = arena.take<int32_t>(padded * D / P);
    auto *grads_across = arena.take<int32_t>(padded * D / P), *grad_pairs = arena.take<int32_t>(padded * D / P);
    auto *k_sum = arena.take<float>(rows * D), *v_sum = arena.take<float>(rows * D), *log_sum = arena.take<float>(padded), *shift = arena.take<float>(padded);
    auto *weight_rows = arena.take<Value>(R * span), *score_rows = arena.take<Value>(R * span);
    auto* score_pairs = arena.take<int32_t>(rows / P * span);
    auto *q_across = arena.take<float>((D + R) * TILE), *q_rows = arena.take<float>(TILE * D);
    load_head<T>(b, (const Value*)b.k + kv * D, b.stride, true, first, n, rows, keys);
    load_head<T>(b, (const Value*)b.v + kv * D, b.stride, false, first, n, rows, values);
    pair_rows<T>(keys, D, padded, D, pairs);
    transpose(pairs, D, padded / P, D, keys_across, padded / P);
    std::memset(keys_across + D * padded / P, 0, R * padded / P * 4);
    std::fill_n(k_sum, rows * D, 0.0f), std::fill_n(v_sum, rows * D, 0.0f);
    const __m512 scale = _mm512_set1_ps((float)b.scale);
    __m512 sum[R][V], weight[R][V];
    for (int64_t head = kv * b.heads / b.kv_heads; head < (kv + 1) * b.heads / b.kv_heads; head++) {
        load_head<T>(b, (const Value*)b.q + head * D, b.stride, true, first, n, padded, queries);
        load_head<T>(b, (const Value*)b.grad + head * D, b.heads * D, false, first, n, padded, grads);
        transpose(queries, D / P, padded, D / P, queries_across, padded), pair_rows<T>(queries, D, padded, D, query_pairs);
        transpose(grads, D / P, padded, D / P, grads_across, padded), pair_rows<T>(grads, D, padded, D, grad_pairs);
        for (int64_t i = 0; i < padded; i++) {
            __m512 both = _mm512_setzero_ps();
            for (int64_t d = 0; d < D && i < n; d += 16)
                both = _mm512_fmadd_ps(T::load(grads + i * D + d), T::load((const Value*)b.out + (first + i) * b.heads * D + head * D + d), both);
            shift[i] = _mm512_reduce_add_ps(both);
            log_sum[i] = i < n ? b.log_sums[head * b.tokens + first + i] : INFINITY;  // a weight of exp(-inf) beyond the end
        }
        for (int64_t begin = 0; begin < n; begin += span) {
            const int64_t end = std::min(begin + span, padded);
            for (int64_t j = 0; j < std::min(end, n); j += R) {
                const int64_t from = std::max(begin, j / TILE * TILE);
                for (int64_t i = from; i < end; i += TILE) {
                    multiply<T>(keys + j * D, D / P, queries_across + i, padded, D / P, sum);
                    for (int r = 0; r < R; r++)
                        for (int v = 0; v < V; v++) {
                            const __m512 e = exp16(_mm512_fmsub_ps(sum[r][v], scale, _mm512_loadu_ps(log_sum + i + v * 16)));
                            weight[r][v] = _mm512_maskz_mov_ps(not_before(i + v * 16, j + r), e);
                            T::store(weight_rows + r * span + i - begin + v * 16, weight[r][v]);
                        }
                    multiply<T>(values + j * D, D / P, grads_across + i, padded, D / P, sum);
                    for (int v = 0; v < V; v++) {
                        for (int r = 0; r < R; r++) {
                            sum[r][v] = _mm512_mul_ps(_mm512_mul_ps(weight[r][v], scale), _mm512_sub_ps(sum[r][v], _mm512_loadu_ps(shift + i + v * 16)));
                            T::store(score_rows + r * span + i - begin + v * 16, sum[r][v]);
                        }
                        for (int r = 0; r < R; r += P)
                            _mm512_storeu_si512(score_pairs + (j + r) / P * span + i - begin + v * 16, paired<T>(sum[r][v], sum[r + P - 1][v]));
                    }
                }
                for (int64_t d = 0; d < D; d += TILE) {
                    multiply<T>(weight_rows + from - begin, span / P, grad_pairs + from / P * D + d, D, (end - from) / P, sum);
                    add_rows(v_sum + j * D + d, D, sum);
                    multiply<T>(score_rows + from - begin, span / P, query_pairs + from / P * D + d, D, (end - from) / P, sum);
                    add_rows(k_sum + j * D + d, D, sum);
                }
            }
            for (int64_t i = begin; i < std::min(end, n); i += TILE) {
                for (int64_t d = 0; d < D; d += R) {
                    multiply<T>(keys_across + d * padded / P, padded / P, score_pairs + i - begin, span, std::min(i + TILE, up(n, P)) / P, sum);
                    for (int r = 0; r < R; r++)
                        for (int v = 0; v < V; v++) _mm512_storeu_ps(q_across + (d + r) * TILE + v * 16, sum[r][v]);
                }
                transpose(q_across, TILE, D, TILE, q_rows, D);
                store_head<T>(b, q_rows, true, first + i, std::min<int64_t>(TILE, n - i), (Value*)b.q_grad + head * D);
            }
        }
    }
    store_head<T>(b, k_sum, true, first, n, (Value*)b.k_grad + kv * D);
    store_head<T>(b, v_sum, false, first, n, (Value*)b.v_grad + kv * D);
}

template <class T>
static int64_t attend(const Block& b, bool backward) {
    for (int64_t i = 0; i < b.documents; i++)
        if (b.starts[i] < 0 || b.starts[i] > b.starts[i + 1] || b.starts[i + 1] > b.tokens) return MISFIT;
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)b.threads)
    for (int64_t task = 0; task < b.documents * b.kv_heads; task++)
        backward ? attend_backward<T>(b, task / b.kv_heads, task % b.kv_heads) : attend_forward<T>(b, task / b.kv_heads, task % b.kv_heads);
    return 0;
}

constexpr int64_t MAX_RANKS = 256;  // of all parts of a layer together

// The low-rank side of an adapted product, y += scale (x Aᵀ) Bᵀ for each part of a fused layer, and its gradients. Beside the big
// product these are passes over its operands, so each operand is read once here.
struct Part {
    const float *a, *b;    // [r][I], [O of the part][r]
    int64_t start, width;  // its columns of y
    double scale;
};
struct Adapters {
    const Part* parts;
    int64_t count, rank, in, out, tokens, threads;
    // Columns of a part in what is `rank` wide: whole vectors, zeros at their end.
    int64_t width() const { return up(rank, 16); }
    bool fits() const {
        bool fine = rank > 0 && count * width() <= MAX_RANKS && in % TILE == 0;
        for (int64_t n = 0; n < count; n++) fine &= parts[n].start >= 0 && parts[n].width % TILE == 0 && parts[n].start + parts[n].width <= out;
        return fine;
    }
};

// out[t][c] = sum over words of x[t] block[.][c], for narrow results: width is a multiple of 16.
template <class T>
static void narrow(const ValueOf<T>* x, int64_t stride, int64_t tokens, const int32_t* block, int64_t words, int64_t width, ValueOf<T>* out, int64_t out_stride) {
    constexpr int R = TILE_ROWS<T>;
    const auto some = [&](int64_t t, int64_t c, auto rows, auto vectors, int count) {  // with tiles `count` of the rows are there
        __m512 sum[decltype(rows)::value][decltype(vectors)::value];
        multiply<T>(x + t * stride, stride / T::per_dword, block + c, width, words, sum, nullptr, 0, count);
        for (int r = 0; r < count; r++)
            for (int v = 0; v < vectors; v++) T::store(out + (t + r) * out_stride + c + v * 16, sum[r][v]);
    };
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t += R)
        for (int64_t c = 0; c < width; c += 48)
            with_vectors(std::min<int64_t>(width - c, 48) / 16, [&](auto vectors) {
                if (const int count = (int)std::min<int64_t>(R, tokens - t); tiled<T> || count == R) some(t, c, std::integral_constant<int, R>{}, vectors, count);
                else
                    for (int r = 0; r < count; r++) some(t + r, c, std::integral_constant<int, 1>{}, vectors, 1);
            });
}

// R rows by TILE columns of y += low block (with tiles: `rows` of them); a function of its own for the registers' sake.
template <class T, int R>
[[gnu::noinline]] static void widen_tile(const ValueOf<T>* low, int64_t stride, const int32_t* block, int64_t words, int64_t width, ValueOf<T>* y, int64_t y_stride, int rows = R) {
    if constexpr (!tiled<T>) rows = R;  // known to the compiler
    __m512 sum[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] = T::load(y + r * y_stride + v * 16);
    if constexpr (tiled<T>) multiply<T, true>(low, stride / T::per_dword, block, width, words, sum, nullptr, 0, rows);
    else accumulate<T>(low, stride / T::per_dword, block, width, words, sum);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) T::store(y + r * y_stride + v * 16, sum[r][v]);
}

// y[t][c] += sum over words of low[t] block[.][c]; width is a multiple of TILE.
template <class T>
static void widen(const ValueOf<T>* low, int64_t stride, int64_t tokens, const int32_t* block, int64_t words, int64_t width, ValueOf<T>* y, int64_t y_stride) {
    constexpr int R = ROWS<T>;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t += R)
        for (int64_t c = 0; c < width; c += TILE) {
            if (tiled<T> || t + R <= tokens) widen_tile<T, R>(low + t * stride, stride, block + c, words, width, y + t * y_stride + c, y_stride, (int)std::min<int64_t>(R, tokens - t));
            else
                for (int64_t last = t; last < tokens; last++) widen_tile<T, 1>(low + last * stride, stride, block + c, words, width, y + last * y_stride + c, y_stride);
        }
}

// out[k][c] = scale * sum over tokens of low[t][k] x[t][c], in fp32, or out[c][k] with `turned`, for the first `kept` of each `group` of k
// (which is a multiple of 16, and `rank` one of it). width as above.
template <class T>
static void over_tokens(const ValueOf<T>* low, int64_t low_stride, int64_t rank, int64_t group, int64_t kept, const ValueOf<T>* x, int64_t stride, int64_t width, int64_t tokens, double scale, bool turned, int32_t* low_words, float* out) {
    constexpr int P = T::per_dword, K = tiled<T> ? 16 : 4;
    const int64_t padded = up(tokens, TILE), steps = padded / P;
#pragma omp for schedule(static)
    for (int64_t s = 0; s < steps; s++)  // low, transposed: [rank][tokens]
        for (int64_t k = 0; k < rank; k++)
            for (int i = 0; i < P; i++) ((ValueOf<T>*)low_words)[(k * steps + s) * P + i] = s * P + i < tokens ? low[(s * P + i) * low_stride + k] : 0;
#pragma omp for schedule(static)
    for (int64_t c = 0; c < width; c += TILE) {
        alignas(64) ValueOf<T> rows[TILE * TILE];
        alignas(64) int32_t pairs[TILE / P * TILE];
        __m512 total[MAX_RANKS][V];
        for (int64_t k = 0; k < rank; k++)
            for (int v = 0; v < V; v++) total[k][v] = _mm512_setzero_ps();
        for (int64_t t = 0; t < padded; t += TILE) {
            const ValueOf<T>* from = x + t * stride + c;
            int64_t from_stride = stride;
            if (t + TILE > tokens) {  // zeros below the last token
                for (int64_t i = 0; i < TILE; i++)
                    if (t + i < tokens) std::memcpy(rows + i * TILE, from + i * stride, sizeof(rows) / TILE);
                    else std::memset(rows + i * TILE, 0, sizeof(rows) / TILE);
                from = rows, from_stride = TILE;
            }
            pair_rows<T>(from, from_stride, TILE, TILE, pairs);
            for (int64_t k = 0; k < rank; k += K) multiply<T, true>(low_words + k * steps + t / P, steps, pairs, TILE, TILE / P, *(__m512(*)[K][V])(total + k));
        }
        for (int64_t k = 0, to = 0; k < rank; k++) {
            if (k % group >= kept) continue;
            for (int64_t i = 0; i < TILE; i++) out[turned ? (c + i) * kept + to : to * width + c + i] = ((const float*)total[k])[i] * (float)scale;
            to++;
        }
    }
}

// Columns `first` and on of a product's right side, block [words][width]: column c < columns holds the values scale * from[c * step + i * stride]
// for i < rows; the other places, of `padded` columns and of all words, hold zeros.
template <class T>
static void fill_block(int64_t words, int64_t width, int32_t* block, int64_t first, int64_t columns, int64_t padded, int64_t rows, const float* from, int64_t step, int64_t stride, double scale) {
    constexpr int P = T::per_dword;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < words; i++)
        for (int64_t c = 0; c < padded; c++)
            for (int p = 0; p < P; p++) {
                const int64_t row = i * P + p;
                ((ValueOf<T>*)block)[(i * width + first + c) * P + p] = c < columns && row < rows ? T::round(from[c * step + row * stride] * (float)scale) : 0;
            }
}

// x [T][I], low [T][count width()], y [T][O]: fills low, adds to y.
template <class T>
static int64_t lora_forward(const Adapters& ad, const ValueOf<T>* x, ValueOf<T>* low, ValueOf<T>* y) {
    constexpr int P = T::per_dword;
    if (!ad.fits()) return MISFIT;
    const int64_t each = ad.width(), all = ad.count * each;
    Arena arena(4 * (all * ad.in + each * ad.out) + 4096);
    auto *a = arena.take<int32_t>(ad.in / P * all), *b = arena.take<int32_t>(each / P * ad.out);
#pragma omp parallel num_threads((int)ad.threads)
    {
        TileRegion tiles;
        for (int64_t n = 0; n < ad.count; n++) fill_block<T>(ad.in / P, all, a, n * each, ad.rank, each, ad.in, ad.parts[n].a, ad.in, 1, 1);
        narrow<T>(x, ad.in, ad.tokens, a, ad.in / P, all, low, all);
        for (int64_t n = 0; n < ad.count; n++) {
            const Part& p = ad.parts[n];
            fill_block<T>(each / P, p.width, b, 0, p.width, p.width, ad.rank, p.b, ad.rank, 1, p.scale);
            widen<T>(low + n * each, all, ad.tokens, b, each / P, p.width, y + p.start, ad.out);
        }
    }
    return 0;
}

// grad [T][O] -> a_grad [count r][I], b_grads one [O of the part][r] after another, and what the adapters add to x_grad (or null).
template <class T>
static int64_t lora_backward(const Adapters& ad, const ValueOf<T>* x, const ValueOf<T>* low, const ValueOf<T>* grad, ValueOf<T>* low_grad, ValueOf<T>* x_grad, float* a_grad, float* b_grads) {
    constexpr int P = T::per_dword;
    if (!ad.fits()) return MISFIT;
    const int64_t each = ad.width(), all = ad.count * each;
    Arena arena(4 * (all * ad.in + each * ad.out + all * (ad.tokens + TILE)) + 4096);
    auto *a = arena.take<int32_t>(all / P * ad.in), *b = arena.take<int32_t>(ad.out / P * each), *low_words = arena.take<int32_t>(all * up(ad.tokens, TILE) / P);
#pragma omp parallel num_threads((int)ad.threads)
    {
        TileRegion tiles;
        int64_t done = 0;
        for (int64_t n = 0; n < ad.count; n++) {
            const Part& p = ad.parts[n];
            fill_block<T>(p.width / P, each, b, 0, ad.rank, each, p.width, p.b, 1, ad.rank, p.scale);
            narrow<T>(grad + p.start, ad.out, ad.tokens, b, p.width / P, each, low_grad + n * each, all);
            over_tokens<T>(low + n * each, all, each, each, ad.rank, grad + p.start, ad.out, p.width, ad.tokens, p.scale, true, low_words, b_grads + done);
            done += p.width * ad.rank;
        }
        over_tokens<T>(low_grad, all, all, each, ad.rank, x, ad.in, ad.in, ad.tokens, 1, false, low_words, a_grad);
        if (x_grad) {
            for (int64_t n = 0; n < ad.count; n++) fill_block<T>(each / P, ad.in, a + n * each / P * ad.in, 0, ad.in, ad.in, ad.rank, ad.parts[n].a, 1, ad.in, 1);
            widen<T>(low_grad, all, ad.tokens, a, all / P, ad.in, x_grad, ad.in);
        }
    }
    return 0;
}

// y [rows][n] = x [rows][k] Wᵀ + bias (or null), W in the panels of gemm.h. For processors with tiles: there the sums of oneDNN's product depend
// on how many rows there are (docs/LOG.md, 2026-11-29), ours do not.
template <class T>
static void product(const ValueOf<T>* x, const char* panels, const ValueOf<T>* bias, ValueOf<T>* y, int64_t rows, int64_t n, int64_t k, int64_t threads) {
    constexpr int64_t R = TILE_ROWS<T>;
    const int64_t words = k / T::per_dword, count = (n + PANEL - 1) / PANEL, panel_bytes = words * PANEL * 4;
    // A chunk of rows stays in the second-level cache while all panels pass by.
    const int64_t chunk = std::min<int64_t>(256, up((rows + threads - 1) / threads, R)), chunks = (rows + chunk - 1) / chunk;
#pragma omp parallel num_threads((int)threads)
    {
        TileRegion tiles;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < chunks * count; task++) {
            const int64_t p = task % count, from = task / count * chunk, to = std::min(rows, from + chunk);
            const char *panel = panels + p * panel_bytes, *ahead = panel + (p + 1 < count ? panel_bytes : -p * panel_bytes);
            for (int64_t row = from; row < to; row += R) {
                const int here = (int)std::min(R, to - row), fetch = row - from < 3 * R;
                with_rows<T>(here, [&](auto size) {
                    constexpr int R = decltype(size)::value;
                    __m512 sum[R][VECTORS];
                    multiply<T>(x + row * k, words, panel, PANEL, words, sum, ahead, fetch, here);
                    ahead += fetch * words * 64;
                    for (int r = 0; r < here; r++)
                        for (int64_t v = 0, at = p * PANEL; v < VECTORS && at < n; v++, at += 16) {
                            const __mmask16 m = first_lanes(n - at);
                            T::store(y + (row + r) * n + at, bias ? _mm512_add_ps(sum[r][v], T::load(bias + at, m)) : sum[r][v], m);
                        }
                });
            }
        }
    }
}

// y = x / rms(x) * weight, rounded before the weight as transformers does; inverse [rows] = 1 / rms.
template <class T>
static void norm_forward(const ValueOf<T>* x, const ValueOf<T>* weight, double eps, ValueOf<T>* y, float* inverse, int64_t rows, int64_t n, int64_t threads) {
#pragma omp parallel for num_threads((int)threads)
    for (int64_t r = 0; r < rows; r++) {
        const ValueOf<T>* in = x + r * n;
        ValueOf<T>* out = y + r * n;
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < n; i += 16) {
            const __m512 a = T::load(in + i, first_lanes(n - i));
            squares = _mm512_fmadd_ps(a, a, squares);
        }
        inverse[r] = 1 / std::sqrt(_mm512_reduce_add_ps(squares) / n + (float)eps);
        each_vector(n, [&](int64_t i, __mmask16 m) {
            const __m512 unit = rounded<T>(_mm512_mul_ps(T::load(in + i, m), _mm512_set1_ps(inverse[r])));
            T::store(out + i, _mm512_mul_ps(unit, T::load(weight + i, m)), m);
        });
    }
}

template <class T>
static void norm_backward(const ValueOf<T>* x, const ValueOf<T>* weight, const float* inverse, const ValueOf<T>* grad, ValueOf<T>* out, int64_t rows, int64_t n, int64_t threads) {
#pragma omp parallel for num_threads((int)threads)
    for (int64_t r = 0; r < rows; r++) {
        const ValueOf<T>*in = x + r * n, *g = grad + r * n;
        __m512 both = _mm512_setzero_ps();
        each_vector(n, [&](int64_t i, __mmask16 m) {
            both = _mm512_fmadd_ps(_mm512_mul_ps(T::load(g + i, m), T::load(weight + i, m)), T::load(in + i, m), both);
        });
        const __m512 scale = _mm512_set1_ps(inverse[r]), share = _mm512_set1_ps(_mm512_reduce_add_ps(both) / n * inverse[r] * inverse[r]);
        each_vector(n, [&](int64_t i, __mmask16 m) {
            const __m512 direct = _mm512_mul_ps(T::load(g + i, m), T::load(weight + i, m));
            T::store(out + r * n + i, _mm512_mul_ps(scale, _mm512_fnmadd_ps(T::load(in + i, m), share, direct)), m);
        });
    }
}

// x [rows][2 n] = gate, up -> y [rows][n] = silu(gate) up; with a gradient of y, instead the gradient of x into out.
template <class T>
static void swiglu(const ValueOf<T>* x, const ValueOf<T>* grad, ValueOf<T>* out, int64_t rows, int64_t n, int64_t threads) {
#pragma omp parallel for num_threads((int)threads)
    for (int64_t r = 0; r < rows; r++)
        each_vector(n, [&](int64_t i, __mmask16 m) {
            const __m512 gate = T::load(x + 2 * r * n + i, m), above = T::load(x + (2 * r + 1) * n + i, m), s = sigmoid16(gate), silu = _mm512_mul_ps(gate, s);
            if (!grad) {
                T::store(out + r * n + i, _mm512_mul_ps(silu, above), m);
            } else {  // silu' = s + silu (1 - s)
                const __m512 g = T::load(grad + r * n + i, m);
                T::store(out + 2 * r * n + i, _mm512_mul_ps(_mm512_mul_ps(g, above), _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1), s), s)), m);
                T::store(out + (2 * r + 1) * n + i, _mm512_mul_ps(g, silu), m);
            }
        });
}

// loss[row] = lse - (1 - smooth) target's logit - smooth mean(logits) + z lse², with lse = log sum exp. With `replace` the logits
// become the loss's gradient: softmax (1 + 2 z lse) - smooth / n, less 1 - smooth at the target (model/loss.py).
template <class T>
static int64_t loss_rows(ValueOf<T>* logits, const int64_t* targets, float* loss, int64_t rows, int64_t n, int64_t replace, double smooth, double z, int64_t threads) {
    for (int64_t r = 0; r < rows; r++)
        if (targets[r] < 0 || targets[r] >= n) return MISFIT;
#pragma omp parallel for num_threads((int)threads)
    for (int64_t r = 0; r < rows; r++) {
        ValueOf<T>* row = logits + r * n;
        __m512 top = _mm512_set1_ps(-INFINITY), mass = _mm512_setzero_ps(), all = _mm512_setzero_ps();
        each_vector(n, [&](int64_t i, __mmask16 m) {
            const __m512 x = T::load(row + i, m);
            top = _mm512_mask_max_ps(top, m, top, x), all = _mm512_add_ps(all, x);
        });
        const float most = _mm512_reduce_max_ps(top);
        each_vector(n, [&](int64_t i, __mmask16 m) {
            mass = _mm512_mask_add_ps(mass, m, mass, exp16(_mm512_sub_ps(T::load(row + i, m), _mm512_set1_ps(most))));
        });
        const float log_sum = most + std::log(_mm512_reduce_add_ps(mass)), even = (float)smooth / n, factor = 1 + 2 * (float)z * log_sum;
        const float chosen = _mm512_cvtss_f32(T::load(row + targets[r], 1));
        loss[r] = log_sum - (1 - (float)smooth) * chosen - even * _mm512_reduce_add_ps(all) + (float)z * log_sum * log_sum;
        if (!replace) continue;
        each_vector(n, [&](int64_t i, __mmask16 m) {
            const __m512 p = exp16(_mm512_sub_ps(T::load(row + i, m), _mm512_set1_ps(log_sum)));
            T::store(row + i, _mm512_fmsub_ps(p, _mm512_set1_ps(factor), _mm512_set1_ps(even)), m);
        });
        T::store(row + targets[r], _mm512_set1_ps(std::exp(chosen - log_sum) * factor - even - (1 - (float)smooth)), 1);
    }
    return 0;
}

#define EXPORT(T, type)                                                                                                                                         \
    int64_t lb_attend_##type(const Block* block, int64_t backward) { return attend<T>(*block, backward); }                                                      \
    void lb_norm_##type(const void* x, const void* w, double eps, void* y, float* inverse, int64_t rows, int64_t n, int64_t threads) {                          \
        norm_forward<T>((const ValueOf<T>*)x, (const ValueOf<T>*)w, eps, (ValueOf<T>*)y, inverse, rows, n, threads);                                            \
    }                                                                                                                                                           \
    void lb_norm_grad_##type(const void* x, const void* w, const float* inverse, const void* g, void* out, int64_t rows, int64_t n, int64_t threads) {          \
        norm_backward<T>((const ValueOf<T>*)x, (const ValueOf<T>*)w, inverse, (const ValueOf<T>*)g, (ValueOf<T>*)out, rows, n, threads);                        \
    }                                                                                                                                                           \
    void lb_product_##type(const void* x, const void* panels, const void* bias, void* y, int64_t rows, int64_t n, int64_t k, int64_t threads) {                 \
        product<T>((const ValueOf<T>*)x, (const char*)panels, (const ValueOf<T>*)bias, (ValueOf<T>*)y, rows, n, k, threads);                                    \
    }                                                                                                                                                           \
    void lb_swiglu_##type(const void* x, const void* g, void* out, int64_t rows, int64_t n, int64_t threads) {                                                  \
        swiglu<T>((const ValueOf<T>*)x, (const ValueOf<T>*)g, (ValueOf<T>*)out, rows, n, threads);                                                              \
    }                                                                                                                                                           \
    int64_t lb_lora_##type(const Adapters* ad, const void* x, void* low, void* y) {                                                                             \
        return lora_forward<T>(*ad, (const ValueOf<T>*)x, (ValueOf<T>*)low, (ValueOf<T>*)y);                                                                    \
    }                                                                                                                                                           \
    int64_t lb_lora_grad_##type(const Adapters* ad, const void* x, const void* low, const void* g, void* low_g, void* x_g, float* a_g, float* b_g) {            \
        return lora_backward<T>(*ad, (const ValueOf<T>*)x, (const ValueOf<T>*)low, (const ValueOf<T>*)g, (ValueOf<T>*)low_g, (ValueOf<T>*)x_g, a_g, b_g);       \
    }                                                                                                                                                           \
    int64_t lb_loss_##type(void* x, const int64_t* targets, float* loss, int64_t rows, int64_t n, int64_t replace, double smooth, double z, int64_t threads) {  \
        return loss_rows<T>((ValueOf<T>*)x, targets, loss, rows, n, replace, smooth, z, threads);                                                               \
    }

extern "C" {
EXPORT(Fp32, float32)
EXPORT(Bf16, bfloat16)
}
