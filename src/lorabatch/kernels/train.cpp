// Training passes: packed causal attention with its gradient, RMSNorm, SwiGLU and the softmax of the loss head.
//
// Each has a plain torch form with the same result (lorabatch/model), which is its test and its stand-in. What is gained
// is passes over memory: one read and one write per tensor, and an attention that multiplies only what a causal mask leaves.
#include <omp.h>
#include <algorithm>
#include <cstdlib>
#include <type_traits>
#include "gemm.h"

constexpr int V = TILE / LANES;  // a tile of products is ROWS<T> rows by TILE columns: what fits the registers, or a processor's tile
constexpr int64_t SPAN = 512;               // queries whose score gradients are alive at once

template <class T>
using ValueOf = typename T::Value;
template <class T>
constexpr int ROWS = tiled<T> ? TILE_ROWS<T> : 6;

// out[c][r] = in[r][c] of 32-bit words; rows and columns are multiples of 16, strides in words.
static void transpose(const void* from, int64_t in_stride, int64_t rows, int64_t columns, void* to, int64_t out_stride) {
    for (int64_t r = 0; r < rows; r += LANES)
        for (int64_t c = 0; c < columns; c += LANES) {
            const int32_t* in = (const int32_t*)from + r * in_stride + c;
            int32_t* out = (int32_t*)to + c * out_stride + r;
            Words a[LANES], b[LANES];
            for (int i = 0; i < LANES; i++) a[i] = get<Words>(in + i * in_stride);
#pragma GCC unroll 4
            for (int round = 1; round < LANES; round *= 2) {  // after as many rounds as a lane's number has bits, rows are columns
#pragma GCC unroll 8
                for (int i = 0; i < LANES / 2; i++) b[2 * i] = zipped<0>(a[i], a[i + LANES / 2], Lanes{}), b[2 * i + 1] = zipped<1>(a[i], a[i + LANES / 2], Lanes{});
                std::memcpy(a, b, sizeof a);
            }
            for (int i = 0; i < LANES; i++) put(out + i * out_stride, a[i]);
        }
}

// Words of one fp32 value, or of two bf16 values of neighbouring rows.
template <class T>
static inline Words paired(Floats first, Floats second) {
    return T::per_dword == 1 ? T::bits(first) : T::bits(first) | T::bits(second) << 16;
}

// n rows of D values, `stride` apart -> [n / per][D] words that pair neighbouring rows.
template <class T>
static void pair_rows(const ValueOf<T>* rows, int64_t stride, int64_t n, int64_t D, int32_t* out) {
    for (int64_t i = 0; i < n; i += T::per_dword, out += D) {
        const ValueOf<T>*first = rows + i * stride, *second = first + stride;
        if constexpr (T::per_dword == 1) {
            std::memcpy(out, first, D * 4);
        } else {
            for (int64_t d = 0; d < D; d += LANES) {
                const Words low = widened(get<Halves>(first + d)), high = widened(get<Halves>(second + d));
                put(out + d, low | high << 16);
            }
        }
    }
}

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
static void load_head(const Block& b, const void* from, int64_t stride, bool turning, int64_t first, int64_t n, int64_t padded, ValueOf<T>* rows) {
    const int64_t D = b.head_dim, half = D / 2;
    const bool turn = turning && b.cos;
    for (int64_t i = 0; i < n; i++) {
        const auto *x = (const ValueOf<T>*)from + (first + i) * stride, *c = (const ValueOf<T>*)b.cos + (first + i) * half;
        const auto* s = (const ValueOf<T>*)b.sin + (first + i) * half;
        for (int64_t d = 0; d < half; d += LANES) {
            Pair pair{T::load(x + d), T::load(x + half + d)};
            if (turn) pair = turned(pair.low, pair.high, T::load(c + d), T::load(s + d));
            T::store(rows + i * D + d, pair.low), T::store(rows + i * D + half + d, pair.high);
        }
    }
    std::memset(rows + n * D, 0, (padded - n) * D * sizeof(ValueOf<T>));
}

// The way back: gradients [n][D] of one head, turned by the opposite angles.
template <class T>
static void store_head(const Block& b, const float* rows, bool turning, int64_t first, int64_t n, void* to) {
    const int64_t D = b.head_dim, half = D / 2;
    const bool turn = turning && b.cos;
    for (int64_t i = 0; i < n; i++) {
        auto* x = (ValueOf<T>*)to + (first + i) * b.grad_stride;
        const auto *c = (const ValueOf<T>*)b.cos + (first + i) * half, *s = (const ValueOf<T>*)b.sin + (first + i) * half;
        for (int64_t d = 0; d < half; d += LANES) {
            Pair pair{get<Floats>(rows + i * D + d), get<Floats>(rows + i * D + half + d)};
            if (turn) pair = turned(pair.low, pair.high, T::load(c + d), -T::load(s + d));
            T::store(x + d, pair.low), T::store(x + half + d, pair.high);
        }
    }
}

static inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static inline Ints not_before(int64_t column, int64_t row) { return lanes_from(column) >= (int)row; }  // lanes whose column is at least row

template <class T>
static void attend_forward(const Block& b, int64_t document, int64_t kv) {
    constexpr int P = T::per_dword, R = ROWS<T>;
    const int64_t D = b.head_dim, first = b.starts[document], n = b.starts[document + 1] - first, padded = up(n, TILE), rows = padded + R;
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
    Floats sum[R][V];
    for (int64_t head = kv * b.heads / b.kv_heads; head < (kv + 1) * b.heads / b.kv_heads; head++) {
        load_head<T>(b, (const ValueOf<T>*)b.q + head * D, b.stride, true, first, n, rows, queries);
        for (int64_t i = 0; i < n; i += R) {
            const int64_t end = up(std::min(i + R, n), TILE);
            Floats top[R];
            for (int r = 0; r < R; r++) top[r] = all(-INFINITY);
            for (int64_t j = 0; j < end; j += TILE) {
                multiply<T, R>(queries + i * D, D / P, across + j, padded, D / P, sum);
                for (int r = 0; r < R; r++)
                    for (int v = 0; v < V; v++) {
                        const Floats s = chosen(not_before(j + v * LANES, i + r + 1), all(-INFINITY), sum[r][v] * (float)b.scale);
                        top[r] = max(top[r], s);
                        put(scores + r * padded + j + v * LANES, s);
                    }
            }
            float total[R];
            for (int r = 0; r < R; r++) {
                const float most = most_of(top[r]);
                Floats mass{};
                for (int64_t j = 0; j < end; j += LANES) {
                    const Floats e = exp(get<Floats>(scores + r * padded + j) - most);
                    mass += e;
                    T::store(weights + r * padded + j, e);
                }
                total[r] = sum_of(mass);
                if (i + r < n) b.log_sums[head * b.tokens + first + i + r] = most + std::log(total[r]);
            }
            for (int64_t d = 0; d < D; d += TILE) {
                multiply<T, R>(weights, padded / P, values + d, D, std::min(end, up(i + R, STEPS<T> * P)) / P, sum);
                for (int r = 0; r < R && i + r < n; r++)
                    for (int v = 0; v < V; v++)
                        T::store((ValueOf<T>*)b.out + (first + i + r) * b.heads * D + head * D + d + v * LANES, sum[r][v] * (1 / total[r]));
            }
        }
    }
}

template <int R>
static inline void add_rows(float* to, int64_t D, const Floats (&sum)[R][V]) {
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) put(to + r * D + v * LANES, get<Floats>(to + r * D + v * LANES) + sum[r][v]);
}

// Scores are computed again, transposed (a row is a key), so that P and dS lie as the products for dV and dK want them and
// the sums of the softmax are read per column. Source of the recomputation: FlashAttention, arXiv 2205.14135.
template <class T>
static void attend_backward(const Block& b, int64_t document, int64_t kv) {
    constexpr int P = T::per_dword, R = ROWS<T>;
    using Value = ValueOf<T>;
    const int64_t D = b.head_dim, first = b.starts[document], n = b.starts[document + 1] - first, padded = up(n, TILE), rows = padded + R;
    const int64_t span = std::min(SPAN, padded);
    TileRegion tiles;
    Arena arena(4 * (rows * (12 * D + 2 + span) + R * (padded + 2 * span) + TILE * (2 * D + R)) + 65536);
    auto *keys = arena.take<Value>(rows * D), *values = arena.take<Value>(rows * D), *queries = arena.take<Value>(rows * D), *grads = arena.take<Value>(rows * D);
    auto *pairs = arena.take<int32_t>(padded * D / P), *keys_across = arena.take<int32_t>((D + R) * padded / P);
    auto *queries_across = arena.take<int32_t>(padded * D / P), *query_pairs = arena.take<int32_t>(padded * D / P);
    auto *grads_across = arena.take<int32_t>(padded * D / P), *grad_pairs = arena.take<int32_t>(padded * D / P);
    auto *k_sum = arena.take<float>(rows * D), *v_sum = arena.take<float>(rows * D), *log_sum = arena.take<float>(padded) /* negative */, *shift = arena.take<float>(padded);
    auto *weight_rows = arena.take<Value>(R * span), *score_rows = arena.take<Value>(R * span);
    auto* score_pairs = arena.take<int32_t>(rows / P * span);
    auto *q_across = arena.take<float>((D + R) * TILE), *q_rows = arena.take<float>(TILE * D);
    load_head<T>(b, (const Value*)b.k + kv * D, b.stride, true, first, n, rows, keys);
    load_head<T>(b, (const Value*)b.v + kv * D, b.stride, false, first, n, rows, values);
    pair_rows<T>(keys, D, padded, D, pairs);
    transpose(pairs, D, padded / P, D, keys_across, padded / P);
    std::memset(keys_across + D * padded / P, 0, R * padded / P * 4);
    std::fill_n(k_sum, rows * D, 0.0f), std::fill_n(v_sum, rows * D, 0.0f);
    const float scale = (float)b.scale;
    Floats sum[R][V], weight[R][V];
    for (int64_t head = kv * b.heads / b.kv_heads; head < (kv + 1) * b.heads / b.kv_heads; head++) {
        load_head<T>(b, (const Value*)b.q + head * D, b.stride, true, first, n, padded, queries);
        load_head<T>(b, (const Value*)b.grad + head * D, b.heads * D, false, first, n, padded, grads);
        transpose(queries, D / P, padded, D / P, queries_across, padded), pair_rows<T>(queries, D, padded, D, query_pairs);
        transpose(grads, D / P, padded, D / P, grads_across, padded), pair_rows<T>(grads, D, padded, D, grad_pairs);
        for (int64_t i = 0; i < padded; i++) {
            Floats both{};
            for (int64_t d = 0; d < D && i < n; d += LANES)
                both = fma(T::load(grads + i * D + d), T::load((const Value*)b.out + (first + i) * b.heads * D + head * D + d), both);
            shift[i] = sum_of(both);
            log_sum[i] = i < n ? -b.log_sums[head * b.tokens + first + i] : -INFINITY;  // a weight of exp(-inf) beyond the end
        }
        for (int64_t begin = 0; begin < n; begin += span) {
            const int64_t end = std::min(begin + span, padded);
            for (int64_t j = 0; j < std::min(end, n); j += R) {
                const int64_t from = std::max(begin, j / TILE * TILE);
                for (int64_t i = from; i < end; i += TILE) {
                    multiply<T, R>(keys + j * D, D / P, queries_across + i, padded, D / P, sum);
                    for (int r = 0; r < R; r++)
                        for (int v = 0; v < V; v++) {
                            const Floats e = exp(fma(sum[r][v], all(scale), get<Floats>(log_sum + i + v * LANES)));
                            weight[r][v] = chosen(not_before(i + v * LANES, j + r), e, Floats{});
                            T::store(weight_rows + r * span + i - begin + v * LANES, weight[r][v]);
                        }
                    multiply<T, R>(values + j * D, D / P, grads_across + i, padded, D / P, sum);
                    for (int v = 0; v < V; v++) {
                        for (int r = 0; r < R; r++) {
                            sum[r][v] = weight[r][v] * scale * (sum[r][v] - get<Floats>(shift + i + v * LANES));
                            T::store(score_rows + r * span + i - begin + v * LANES, sum[r][v]);
                        }
                        for (int r = 0; r < R; r += P)
                            put(score_pairs + (j + r) / P * span + i - begin + v * LANES, paired<T>(sum[r][v], sum[r + P - 1][v]));
                    }
                }
                for (int64_t d = 0; d < D; d += TILE) {
                    multiply<T, R>(weight_rows + from - begin, span / P, grad_pairs + from / P * D + d, D, (end - from) / P, sum);
                    add_rows(v_sum + j * D + d, D, sum);
                    multiply<T, R>(score_rows + from - begin, span / P, query_pairs + from / P * D + d, D, (end - from) / P, sum);
                    add_rows(k_sum + j * D + d, D, sum);
                }
            }
            for (int64_t i = begin; i < std::min(end, n); i += TILE) {
                for (int64_t d = 0; d < D; d += R) {
                    multiply<T, R>(keys_across + d * padded / P, padded / P, score_pairs + i - begin, span, std::min(i + TILE, up(n, P)) / P, sum);
                    for (int r = 0; r < R; r++)
                        for (int v = 0; v < V; v++) put(q_across + (d + r) * TILE + v * LANES, sum[r][v]);
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
        if (b.starts[i] < 0 || b.starts[i] > b.starts[i + 1] || b.starts[i + 1] > b.tokens) return MISFIT_SIZES;
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)b.threads)
    for (int64_t task = 0; task < b.documents * b.kv_heads; task++)
        backward ? attend_backward<T>(b, task / b.kv_heads, task % b.kv_heads) : attend_forward<T>(b, task / b.kv_heads, task % b.kv_heads);
    return MISFIT_NONE;
}

// The low-rank side of an adapted product, y += scale (x Aᵀ) Bᵀ for each part of a fused layer, and its gradients. Beside the big
// product these are passes over its operands, so each operand is read once here.

// Columns of a part in what is `rank` wide: whole vectors, zeros at their end.
static int64_t low_width(const Adapters& ad) { return up(ad.rank, LOW_WIDTH); }

static bool fits(const Adapters& ad) {
    bool fine = ad.rank > 0 && ad.count * low_width(ad) <= MAX_RANKS && ad.in % TILE == 0;
    for (int64_t n = 0; n < ad.count; n++) {
        const Part& p = ad.parts[n];
        fine &= p.start >= 0 && p.width % TILE == 0 && p.start + p.width <= ad.out;
    }
    return fine;
}

// out[t][c] = sum over words of x[t] block[.][c], for narrow results: width is a multiple of 16.
template <class T>
static void narrow(const ValueOf<T>* x, int64_t stride, int64_t tokens, const int32_t* block, int64_t words, int64_t width, ValueOf<T>* out, int64_t out_stride) {
    constexpr int R = TILE_ROWS<T>;
    const auto some = [&](int64_t t, int64_t c, auto rows, auto vectors, int count) {  // with tiles `count` of the rows are there
        Floats sum[decltype(rows)::value][decltype(vectors)::value];
        multiply<T, decltype(rows)::value>(x + t * stride, stride / T::per_dword, block + c, width, words, sum, nullptr, 0, count);
        for (int r = 0; r < count; r++)
            for (int v = 0; v < vectors; v++) T::store(out + (t + r) * out_stride + c + v * LANES, sum[r][v]);
    };
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t += R)
        for (int64_t c = 0; c < width; c += 48)
            with_vectors<48>(std::min<int64_t>(width - c, 48), [&](auto vectors) {
                if (const int count = (int)std::min<int64_t>(R, tokens - t); tiled<T> || count == R) some(t, c, std::integral_constant<int, R>{}, vectors, count);
                else
                    for (int r = 0; r < count; r++) some(t + r, c, std::integral_constant<int, 1>{}, vectors, 1);
            });
}

// R rows by TILE columns of y += low block (with tiles: `rows` of them); a function of its own for the registers' sake.
template <class T, int R>
[[gnu::noinline]] static void widen_tile(const ValueOf<T>* low, int64_t stride, const int32_t* block, int64_t words, int64_t width, ValueOf<T>* y, int64_t y_stride, int rows = R) {
    if constexpr (!tiled<T>) rows = R;  // known to the compiler
    Floats sum[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] = T::load(y + r * y_stride + v * LANES);
    if constexpr (tiled<T>) multiply<T, R, true>(low, stride / T::per_dword, block, width, words, sum, nullptr, 0, rows);
    else accumulate<T, R, true>(low, stride / T::per_dword, block, width, words, sum);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) T::store(y + r * y_stride + v * LANES, sum[r][v]);
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
        Floats total[MAX_RANKS][V];
        std::memset(total, 0, rank * sizeof *total);
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
            for (int64_t k = 0; k < rank; k += K) multiply<T, K, true>(low_words + k * steps + t / P, steps, pairs, TILE, TILE / P, total + k);
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

// x [T][I], low [T][count low_width()], y [T][O]: fills low, adds to y.
template <class T>
static int64_t lora_forward(const Adapters& ad, const ValueOf<T>* x, ValueOf<T>* low, ValueOf<T>* y) {
    constexpr int P = T::per_dword;
    if (!fits(ad)) return MISFIT_SIZES;
    const int64_t each = low_width(ad), all = ad.count * each;
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
    return MISFIT_NONE;
}

// grad [T][O] -> a_grad [count r][I], b_grads one [O of the part][r] after another, and what the adapters add to x_grad (or null).
template <class T>
static int64_t lora_backward(const Adapters& ad, const ValueOf<T>* x, const ValueOf<T>* low, const ValueOf<T>* grad, ValueOf<T>* low_grad, ValueOf<T>* x_grad, float* a_grad, float* b_grads) {
    constexpr int P = T::per_dword;
    if (!fits(ad)) return MISFIT_SIZES;
    const int64_t each = low_width(ad), all = ad.count * each;
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
    return MISFIT_NONE;
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
                Floats sum[R][VECTORS];
                multiply_rows<T>(here, x + row * k, words, panel, PANEL, words, sum, ahead, fetch);
                ahead += fetch * words * 64;
                for (int r = 0; r < here; r++)
                    for (int64_t v = 0, at = p * PANEL; v < VECTORS && at < n; v++, at += LANES)
                        first_lanes(n - at, [&](auto m) { T::store(y + (row + r) * n + at, bias ? sum[r][v] + T::load(bias + at, m) : sum[r][v], m); });
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
        Floats squares{};
        each_vector(n, [&](int64_t i, auto m) {
            const Floats a = T::load(in + i, m);
            squares = fma(a, a, squares);
        });
        inverse[r] = 1 / std::sqrt(sum_of(squares) / n + (float)eps);
        each_vector(n, [&](int64_t i, auto m) { T::store(out + i, T::rounded(T::load(in + i, m) * inverse[r]) * T::load(weight + i, m), m); });
    }
}

template <class T>
static void norm_backward(const ValueOf<T>* x, const ValueOf<T>* weight, const float* inverse, const ValueOf<T>* grad, ValueOf<T>* out, int64_t rows, int64_t n, int64_t threads) {
#pragma omp parallel for num_threads((int)threads)
    for (int64_t r = 0; r < rows; r++) {
        const ValueOf<T>*in = x + r * n, *g = grad + r * n;
        Floats both{};
        each_vector(n, [&](int64_t i, auto m) { both = fma(T::load(g + i, m) * T::load(weight + i, m), T::load(in + i, m), both); });
        const float scale = inverse[r], share = sum_of(both) / n * inverse[r] * inverse[r];
        each_vector(n, [&](int64_t i, auto m) {
            const Floats direct = T::load(g + i, m) * T::load(weight + i, m);
            T::store(out + r * n + i, scale * fma(T::load(in + i, m), all(-share), direct), m);
        });
    }
}

// x [rows][2 n] = gate, up -> y [rows][n] = silu(gate) up; with a gradient of y, instead the gradient of x into out.
template <class T>
static void swiglu(const ValueOf<T>* x, const ValueOf<T>* grad, ValueOf<T>* out, int64_t rows, int64_t n, int64_t threads) {
#pragma omp parallel for num_threads((int)threads)
    for (int64_t r = 0; r < rows; r++)
        each_vector(n, [&](int64_t i, auto m) {
            const Floats gate = T::load(x + 2 * r * n + i, m), above = T::load(x + (2 * r + 1) * n + i, m), s = sigmoid(gate), silu = gate * s;
            if (!grad) return T::store(out + r * n + i, silu * above, m);
            const Floats g = T::load(grad + r * n + i, m);  // silu' = s + silu (1 - s)
            T::store(out + 2 * r * n + i, g * above * fma(silu, 1.0f - s, s), m);
            T::store(out + (2 * r + 1) * n + i, g * silu, m);
        });
}

// loss[row] = lse - (1 - smooth) target's logit - smooth mean(logits) + z lse², with lse = log sum exp. With `replace` the logits
// become the loss's gradient: softmax (1 + 2 z lse) - smooth / n, less 1 - smooth at the target (model/loss.py).
template <class T>
static int64_t loss_rows(ValueOf<T>* logits, const int64_t* targets, float* loss, int64_t rows, int64_t n, int64_t replace, double smooth, double z, int64_t threads) {
    for (int64_t r = 0; r < rows; r++)
        if (targets[r] < 0 || targets[r] >= n) return MISFIT_SIZES;
#pragma omp parallel for num_threads((int)threads)
    for (int64_t r = 0; r < rows; r++) {
        ValueOf<T>* row = logits + r * n;
        Floats top = all(-INFINITY), mass{}, sum{};
        each_vector(n, [&](int64_t i, auto m) {
            const Floats x = T::load(row + i, m);
            top = max(top, only(m, x, -INFINITY)), sum += x;
        });
        const float most = most_of(top);
        each_vector(n, [&](int64_t i, auto m) { mass += only(m, exp(T::load(row + i, m) - most)); });
        const float log_sum = most + std::log(sum_of(mass)), even = (float)smooth / n, factor = std::fma(2 * (float)z, log_sum, 1.0f);
        const float logit = T::load(row + targets[r], 1)[0], own = 1 - (float)smooth;
        loss[r] = std::fma((float)z * log_sum, log_sum, std::fma(-even, sum_of(sum), std::fma(-own, logit, log_sum)));
        if (!replace) continue;
        each_vector(n, [&](int64_t i, auto m) { T::store(row + i, fma(exp(T::load(row + i, m) - log_sum), all(factor), all(-even)), m); });
        T::store(row + targets[r], all(std::fma(std::exp(logit - log_sum), factor, -even) - own), 1);
    }
    return MISFIT_NONE;
}

// f(T()) for the Type that Python names.
template <class F>
static auto with_type(int64_t type, F&& f) {
    return type == BFLOAT16 ? f(Bf16()) : f(Fp32());
}

extern "C" {

int64_t lb_train_attend(int64_t type, const Block* block, int64_t backward) {
    return with_type(type, [&](auto t) { return attend<decltype(t)>(*block, backward); });
}

void lb_train_norm(int64_t type, const void* x, const void* weight, double eps, void* y,
                   float* inverse, int64_t rows, int64_t columns, int64_t threads) {
    with_type(type, [&](auto t) {
        using Value = ValueOf<decltype(t)>;
        norm_forward<decltype(t)>((const Value*)x, (const Value*)weight, eps, (Value*)y, inverse,
                                  rows, columns, threads);
    });
}

void lb_train_norm_grad(int64_t type, const void* x, const void* weight, const float* inverse,
                        const void* grad, void* x_grad, int64_t rows, int64_t columns,
                        int64_t threads) {
    with_type(type, [&](auto t) {
        using Value = ValueOf<decltype(t)>;
        norm_backward<decltype(t)>((const Value*)x, (const Value*)weight, inverse,
                                   (const Value*)grad, (Value*)x_grad, rows, columns, threads);
    });
}

void lb_train_swiglu(int64_t type, const void* x, const void* grad, void* out, int64_t rows,
                     int64_t columns, int64_t threads) {
    with_type(type, [&](auto t) {
        using Value = ValueOf<decltype(t)>;
        swiglu<decltype(t)>((const Value*)x, (const Value*)grad, (Value*)out, rows, columns,
                            threads);
    });
}

void lb_train_product(int64_t type, const void* x, const void* panels, const void* bias, void* y,
                      int64_t rows, int64_t n, int64_t k, int64_t threads) {
    with_type(type, [&](auto t) {
        using Value = ValueOf<decltype(t)>;
        product<decltype(t)>((const Value*)x, (const char*)panels, (const Value*)bias, (Value*)y,
                             rows, n, k, threads);
    });
}

int64_t lb_train_lora(int64_t type, const Adapters* adapters, const void* x, void* low, void* y) {
    return with_type(type, [&](auto t) {
        using Value = ValueOf<decltype(t)>;
        return lora_forward<decltype(t)>(*adapters, (const Value*)x, (Value*)low, (Value*)y);
    });
}

int64_t lb_train_lora_grad(int64_t type, const Adapters* adapters, const void* x, const void* low,
                           const void* grad, void* low_grad, void* x_grad, float* a_grad,
                           float* b_grad) {
    return with_type(type, [&](auto t) {
        using Value = ValueOf<decltype(t)>;
        return lora_backward<decltype(t)>(*adapters, (const Value*)x, (const Value*)low,
                                          (const Value*)grad, (Value*)low_grad, (Value*)x_grad,
                                          a_grad, b_grad);
    });
}

int64_t lb_train_loss(int64_t type, void* logits, const int64_t* targets, float* loss, int64_t rows,
                      int64_t vocabulary, int64_t replace, double smoothing, double z,
                      int64_t threads) {
    return with_type(type, [&](auto t) {
        return loss_rows<decltype(t)>((ValueOf<decltype(t)>*)logits, targets, loss, rows,
                                      vocabulary, replace, smoothing, z, threads);
    });
}
}
