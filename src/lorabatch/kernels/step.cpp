// One forward step of a decoder on a CPU, as a list of operations that Python records once and replays with one call
// (lorabatch/kernels/program.py describes them). All of them run inside one OpenMP region; each shares out its work with an
// orphaned `omp for`, whose end is the barrier before the next operation.
//
// Activations: fp32 residual stream x [T, H]; everything else in the type that the program was recorded for.
#include <algorithm>
#include <type_traits>
#include "attend.h"

enum Kind : int64_t { EMBED, NORM, PRODUCT, STORE, ATTEND, ACTIVATE, QUANTISE, LOW_RANK, KINDS };
enum Output : int64_t { OVERWRITE, ADD_TO_RESIDUAL, LOGITS, GREEDY };
enum Weight : int64_t { NATIVE, INT8 };
enum Misfit : int64_t { NONE, TOKENS, OUTPUTS, TOKEN_ID, POSITION, SLOT, GROUPS, ADAPTERS };
constexpr int64_t STRIP = 8;

struct Op {
    int64_t kind, mode, weight;  // mode: Output of a product; 1 = gated activation; 1 = the norm's rows are the outputs
    int64_t n, k;                // features out and in
    int64_t stride, vectors;     // of low_rank: features of a whole row of out; registers of a panel of A
    const void *a, *b, *c, *d, *e;
    void *out, *scales;
    void* plain;  // where 8-bit rows are wanted in the plain type too (for adapters)
    double value;
};

struct Step {
    int64_t bf16;  // type of activations and cache
    int64_t tokens, outputs, groups;
    const int32_t *token_ids, *positions, *slots;
    const int32_t* group_starts;  // [groups + 1]: rows that are attended together: neighbours of one slot
    int64_t strips;  // up to STRIP neighbouring rows with one adapter; rows without an adapter are in none
    const int32_t *strip_starts, *strip_lengths, *strip_adapters;  // [strips] each
    int64_t heads, kv_heads, head_dim, capacity;
    int64_t threads, scratch_floats;
    int64_t max_tokens, num_slots, vocab_size, num_adapters;  // what was recorded
    float* scratch;      // [threads][scratch_floats]
    int32_t* greedy;     // [outputs]
    float* greedy_value; // scratch [threads][outputs]
    int32_t* greedy_id;  // scratch [threads][outputs]
    double* seconds;     // [KINDS], added to by the first thread; or null
};

extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();
extern "C" double omp_get_wtime();

template <class T>
static void embed(const Op& op, const Step& s) {
    using Value = typename T::Value;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < s.tokens; t++) {
        const Value* token = (const Value*)op.a + s.token_ids[t] * op.n;
        const Value* place = op.b ? (const Value*)op.b + s.positions[t] * op.n : nullptr;
        float* x = (float*)op.out + t * op.n;
        each_vector(op.n, [&](int64_t i, __mmask16 m) {
            __m512 sum = T::load(token + i, m);
            if (place) sum = _mm512_add_ps(sum, T::load(place + i, m));
            _mm512_mask_storeu_ps(x + i, m, sum);
        });
    }
}

// A row of 8-bit activations: x = scale * (u - 128), except for its few largest values, which stay in fp32 (their u is 128).
// A transformer's activations have outliers a hundred times larger than the rest (Dettmers et al., arXiv 2208.07339); without them the
// scale fits the others. Four a row cost a tenth of a product's time and took 13/14 of the error away (docs/LOG.md).
constexpr int OUTLIERS = 4;
struct RowScale {
    float scale;
    float value[OUTLIERS];
    int32_t index[OUTLIERS];
    int32_t unused[7];  // one cache line
};

// x [n] is scratch: its outliers become zero.
static void quantise_row(float* x, int64_t n, uint8_t* out, RowScale* row) {
    float most = 0;
    for (int o = 0; o <= OUTLIERS; o++) {  // the last turn finds the largest of what remains
        __m512 top = _mm512_setzero_ps();
        for (int64_t i = 0; i < n; i += 16) top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_maskz_loadu_ps(first_lanes(n - i), x + i)));
        most = _mm512_reduce_max_ps(top);
        if (o == OUTLIERS) break;
        int64_t at = 0;
        for (__mmask16 hit = 0; !hit; at += 16)
            if ((hit = _mm512_mask_cmpeq_ps_mask(first_lanes(n - at), _mm512_abs_ps(_mm512_maskz_loadu_ps(first_lanes(n - at), x + at)), _mm512_set1_ps(most))))
                row->index[o] = (int32_t)(at + __builtin_ctz(hit));
        row->value[o] = x[row->index[o]];
        x[row->index[o]] = 0;
    }
    row->scale = most / 127.0f;
    const __m512 factor = _mm512_set1_ps(most > 0 ? 127.0f / most : 0.0f);
    each_vector(n, [&](int64_t i, __mmask16 m) {
        const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(m, x + i), factor)), _mm512_set1_epi32(128));
        _mm_mask_storeu_epi8(out + i, m, _mm512_cvtusepi32_epi8(q));
    });
}

// What the outliers of a row add to 16 columns (of vector v) of a panel of 8-bit weights, before the column scales.
static inline __m512 outliers(__m512 sum, const RowScale& row, const char* panel, int v) {
    for (int o = 0; o < OUTLIERS; o++) {
        const __m512i words = _mm512_loadu_si512(panel + (row.index[o] / 4 * PANEL + v * 16) * 4);
        const __m512i weight = _mm512_srai_epi32(_mm512_sll_epi32(words, _mm_cvtsi32_si128(24 - row.index[o] % 4 * 8)), 24);
        sum = _mm512_fmadd_ps(_mm512_set1_ps(row.value[o]), _mm512_cvtepi32_ps(weight), sum);
    }
    return sum;
}

template <class T>
static void emit_row(const Op& op, int64_t row, int64_t n, float* x) {
    using Value = typename T::Value;
    if (Value* plain = (Value*)(op.weight == INT8 ? op.plain : op.out))
        each_vector(n, [&](int64_t i, __mmask16 m) {
            T::store(plain + row * n + i, _mm512_maskz_loadu_ps(m, x + i), m);
        });
    if (op.weight == INT8) quantise_row(x, n, (uint8_t*)op.out + row * n, (RowScale*)op.scales + row);
}

template <class T>
static void norm(const Op& op, const Step& s, float* scratch) {
    using Value = typename T::Value;
    const int64_t rows = op.mode ? s.outputs : s.tokens, n = op.n;
    const Value *weight = (const Value*)op.b, *bias = (const Value*)op.c;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float* x = (const float*)op.a + r * n;
        __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        float centre = 0;
        if (bias) {
            for (int64_t i = 0; i < n; i += 16) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(first_lanes(n - i), x + i));
            centre = _mm512_reduce_add_ps(sum) / n;
        }
        const __m512 mean = _mm512_set1_ps(centre);
        each_vector(n, [&](int64_t i, __mmask16 m) {
            const __m512 d = _mm512_maskz_sub_ps(m, _mm512_maskz_loadu_ps(m, x + i), mean);
            squares = _mm512_fmadd_ps(d, d, squares);
        });
        const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / n + (float)op.value));
        each_vector(n, [&](int64_t i, __mmask16 m) {
            __m512 y = _mm512_mul_ps(_mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(m, x + i), mean), inverse), T::load(weight + i, m));
            if (bias) y = _mm512_add_ps(y, T::load(bias + i, m));
            _mm512_mask_storeu_ps(scratch + i, m, y);
        });
        emit_row<T>(op, r, n, scratch);
    }
}

// What becomes of 48 finished columns (fewer at the right edge) of one row.
template <class T, Output MODE>
static inline void finish(const Op& op, const Step& s, int64_t row, int64_t column, const __m512 (&y)[VECTORS]) {
    using Value = typename T::Value;
    for (int v = 0; v < VECTORS; v++) {
        const int64_t at = column + v * 16;
        const __mmask16 m = first_lanes(op.n - at < 0 ? 0 : op.n - at);
        if (!m) return;
        __m512 value = y[v];
        if (op.e) value = _mm512_add_ps(value, T::load((const Value*)op.e + at, m));
        if (MODE == OVERWRITE) {
            T::store((Value*)op.out + row * op.n + at, value, m);
        } else if (MODE == ADD_TO_RESIDUAL) {
            float* x = (float*)op.out + row * op.n + at;
            _mm512_mask_storeu_ps(x, m, _mm512_add_ps(_mm512_maskz_loadu_ps(m, x), value));
        } else if (MODE == LOGITS) {
            _mm512_mask_storeu_ps((float*)op.out + row * op.n + at, m, value);
        } else {  // the first of the largest logits, columns in rising order
            float& best = s.greedy_value[omp_get_thread_num() * s.outputs + row];
            const float most = _mm512_mask_reduce_max_ps(m, value);
            if (most > best) {
                best = most;
                const __mmask16 where = _mm512_mask_cmpeq_ps_mask(m, value, _mm512_set1_ps(most));
                s.greedy_id[omp_get_thread_num() * s.outputs + row] = (int32_t)(at + __builtin_ctz(where));
            }
        }
    }
}

// a: rows [M, k]; b: packed weights; c: column scales, d: column sums times 128 (int8); e: bias; scales: RowScale [M] (int8).
template <class T, class W, Output MODE>
static void product(const Op& op, const Step& s) {
    constexpr bool quantised = std::is_same<W, Int8>::value;
    const int64_t rows = MODE >= LOGITS ? s.outputs : s.tokens;
    const int64_t dwords = op.k / W::per_dword;
    const int64_t panels = (op.n + PANEL - 1) / PANEL, panel_bytes = dwords * PANEL * 4;
    const int threads = omp_get_num_threads(), me = omp_get_thread_num();
    constexpr int64_t ROWS = TILE_ROWS<W>;
    // Panels are shared out; where they do not divide well, rows are cut too.
    const int64_t cuts = panels >= 16 * threads ? 1 : std::min<int64_t>(threads, (rows + ROWS - 1) / ROWS);
    const int64_t chunk = ((rows + cuts - 1) / cuts + ROWS - 1) / ROWS * ROWS, chunks = cuts ? (rows + chunk - 1) / chunk : 0;
    if (MODE == GREEDY) std::fill_n(s.greedy_value + me * s.outputs, rows, -INFINITY);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < panels * chunks; task++) {
        const int64_t p = task / chunks, from = task % chunks * chunk, to = std::min(rows, from + chunk);
        const char* panel = (const char*)op.b + p * panel_bytes;
        const int64_t tiles = (to - from + ROWS - 1) / ROWS;
        const int lines = tiles >= 3 ? 1 : tiles == 2 ? 2 : 3;
        const char* ahead = panel + panel_bytes;
        for (int64_t row = from; row < to; row += ROWS) {
            const int count = (int)std::min(ROWS, to - row);
            with_rows<W>(count, [&](auto size) {
                constexpr int R = decltype(size)::value;
                typename W::Accumulator sum[R][VECTORS];
                const int fetch = (row - from) / ROWS * lines < 3 ? lines : 0;
                multiply<W>((const int32_t*)op.a + row * dwords, dwords, panel, PANEL, dwords, sum, ahead, fetch, count);
                ahead += (int64_t)fetch * dwords * 64;
                for (int r = 0; r < (tiled<W> ? count : R); r++) {
                    __m512 y[VECTORS];
                    for (int v = 0; v < VECTORS; v++) {
                        if constexpr (quantised) {
                            const int64_t at = p * PANEL + v * 16;
                            const __m512i exact = _mm512_sub_epi32(sum[r][v], _mm512_loadu_si512((const int32_t*)op.d + at));
                            const RowScale& scale = ((const RowScale*)op.scales)[row + r];
                            const __m512 bulk = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(scale.scale));
                            y[v] = _mm512_mul_ps(outliers(bulk, scale, panel, v), _mm512_loadu_ps((const float*)op.c + at));
                        } else {
                            y[v] = sum[r][v];
                        }
                    }
                    finish<T, MODE>(op, s, row + r, p * PANEL, y);
                }
            });
        }
    }
    if (MODE == GREEDY) {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            int best = 0;
            for (int t = 1; t < threads; t++)
                if (s.greedy_value[t * s.outputs + r] > s.greedy_value[best * s.outputs + r]) best = t;
            s.greedy[r] = s.greedy_id[best * s.outputs + r];
        }
    }
}

template <class T, class W>
static void any_product(const Op& op, const Step& s) {
    switch (op.mode) {
        case OVERWRITE: return product<T, W, OVERWRITE>(op, s);
        case ADD_TO_RESIDUAL: return product<T, W, ADD_TO_RESIDUAL>(op, s);
        case LOGITS: return product<T, W, LOGITS>(op, s);
        default: return product<T, W, GREEDY>(op, s);
    }
}

template <class T>
static Cache<T> cache_of(const Op& op, const Step& s) {
    return {(typename T::Value*)op.a, (typename T::Value*)op.b, s.kv_heads, s.head_dim, s.capacity};
}

// Normalises (c, d: weights of q and k norms, or null) and rotates (e: [positions][D] = cos, sin, fp32, or null) one head.
template <class T>
static void prepare_head(typename T::Value* head, const typename T::Value* weight, double eps, const float* turn, int64_t D) {
    float x[512];
    for (int64_t d = 0; d < D; d += 16) _mm512_storeu_ps(x + d, T::load(head + d));
    if (weight) {
        __m512 squares = _mm512_setzero_ps();
        for (int64_t d = 0; d < D; d += 16) squares = _mm512_fmadd_ps(_mm512_loadu_ps(x + d), _mm512_loadu_ps(x + d), squares);
        const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / D + (float)eps));
        for (int64_t d = 0; d < D; d += 16) _mm512_storeu_ps(x + d, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + d), inverse), T::load(weight + d)));
    }
    if (turn) {
        const int64_t half = D / 2;
        for (int64_t d = 0; d < half; d += 16) {
            const __mmask16 m = first_lanes(half - d);
            const __m512 a = _mm512_maskz_loadu_ps(m, x + d), b = _mm512_maskz_loadu_ps(m, x + half + d);
            const __m512 cos = _mm512_maskz_loadu_ps(m, turn + d), sin = _mm512_maskz_loadu_ps(m, turn + half + d);
            _mm512_mask_storeu_ps(x + d, m, _mm512_fmsub_ps(a, cos, _mm512_mul_ps(b, sin)));
            _mm512_mask_storeu_ps(x + half + d, m, _mm512_fmadd_ps(b, cos, _mm512_mul_ps(a, sin)));
        }
    }
    for (int64_t d = 0; d < D; d += 16) T::store(head + d, _mm512_loadu_ps(x + d));
}

// out: rows [T][(N + 2K) D]; queries are turned in place, keys and values go into the cache (a, b).
template <class T>
static void store(const Op& op, const Step& s) {
    using Value = typename T::Value;
    const Cache<T> cache = cache_of<T>(op, s);
    const int64_t D = s.head_dim;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < s.tokens; t++) {
        Value* q = (Value*)op.out + t * (s.heads + 2 * s.kv_heads) * D;
        Value* k = q + s.heads * D;
        const Value* v = k + s.kv_heads * D;
        const float* turn = op.e ? (const float*)op.e + s.positions[t] * D : nullptr;
        if (op.c || turn) {
            for (int64_t h = 0; h < s.heads; h++) prepare_head<T>(q + h * D, (const Value*)op.c, op.value, turn, D);
            for (int64_t h = 0; h < s.kv_heads; h++) prepare_head<T>(k + h * D, (const Value*)op.d, op.value, turn, D);
        }
        for (int64_t h = 0; h < s.kv_heads; h++) store_position<T>(cache, s.slots[t], h, s.positions[t], k + h * D, v + h * D);
    }
}

// c: rows [T][(N + 2K) D]; out [T][N D]; k: window, 0 for none.
template <class T>
static void attend_all(const Op& op, const Step& s, float* scratch) {
    using Value = typename T::Value;
    constexpr int MOST = MAX_QUERIES<T>;
    const Cache<T> cache = cache_of<T>(op, s);
    const int64_t D = s.head_dim, shared = s.heads / s.kv_heads, row = (s.heads + 2 * s.kv_heads) * D;
#pragma omp for schedule(dynamic, 4)
    for (int64_t task = 0; task < s.groups * s.kv_heads; task++) {
        const int64_t group = task / s.kv_heads, h = task % s.kv_heads;
        const int64_t from = s.group_starts[group], next = h + 1 < s.kv_heads ? from : s.group_starts[group + 1];
        const void* ahead = cache.keys + cache.head(next < s.tokens ? s.slots[next] : 0, (h + 1) % s.kv_heads);
        const int64_t count = (s.group_starts[group + 1] - from) * shared;
        for (int64_t done = 0; done < count; done += MOST) {
            const Value* q[MOST];
            Value* out[MOST];
            int64_t first[MOST], last[MOST];
            const int queries = (int)std::min<int64_t>(MOST, count - done);
            for (int i = 0; i < queries; i++) {
                const int64_t t = from + (done + i) / shared, head = h * shared + (done + i) % shared;
                q[i] = (const Value*)op.c + t * row + head * D;
                out[i] = (Value*)op.out + (t * s.heads + head) * D;
                last[i] = s.positions[t];
                first[i] = op.k && last[i] >= op.k ? last[i] - op.k + 1 : 0;
            }
            with_rows<T>(queries, [&](auto size) {
                constexpr int R = decltype(size)::value;
                if constexpr (R <= MOST) attend<T, R>(cache, s.slots[from], h, queries, q, first, last, (float)op.value, scratch, out, ahead);
            });
        }
    }
}

// a: [T][2n] (gate, up; SwiGLU) or [T][n] (GELU, tanh form) -> [T][n], quantised if the next product wants it.
template <class T>
static void activate(const Op& op, const Step& s, float* scratch) {
    using Value = typename T::Value;
    const int64_t n = op.n;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < s.tokens; t++) {
        const Value* x = (const Value*)op.a + t * n * (op.mode ? 2 : 1);
        each_vector(n, [&](int64_t i, __mmask16 m) {
            const __m512 g = T::load(x + i, m);
            __m512 y;
            if (op.mode) {
                y = _mm512_mul_ps(_mm512_mul_ps(g, sigmoid16(g)), T::load(x + n + i, m));
            } else {  // 0.5 (1 + tanh u) = sigmoid(2 u)
                const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(g, g), g);
                const __m512 u = _mm512_mul_ps(_mm512_set1_ps(1.5957691216f), _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), g));
                y = _mm512_mul_ps(g, sigmoid16(u));
            }
            _mm512_mask_storeu_ps(scratch + i, m, y);
        });
        emit_row<T>(op, t, n, scratch);
    }
}

template <class T>
static void quantise(const Op& op, const Step& s, float* scratch) {
    using Value = typename T::Value;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < s.tokens; t++) {
        each_vector(op.n, [&](int64_t i, __mmask16 m) {
            _mm512_mask_storeu_ps(scratch + i, m, T::load((const Value*)op.a + t * op.n + i, m));
        });
        quantise_row(scratch, op.n, (uint8_t*)op.out + t * op.n, (RowScale*)op.scales + t);
    }
}

// y += x Aᵀ Bᵀ with each row's own adapter, y: the columns of one part of a fused layer. b, c: banks of packed A [adapters], in panels of
// V * 16 columns, and packed B [adapters], with the scale of LoRA in it; weight: rank. Source: LoRA, arXiv 2106.09685; grouping as in Punica, 2310.18547.
template <class T, int V>
static void low_rank(const Op& op, const Step& s, float* scratch) {
    using Value = typename T::Value;
    const int64_t rank = op.weight, k_dwords = op.k / T::per_dword, r_dwords = rank / T::per_dword;
    const int64_t a_panels = (rank + V * 16 - 1) / (V * 16), b_panels = (op.n + PANEL - 1) / PANEL;
    Value* low = (Value*)scratch;  // [STRIP][rank]
#pragma omp for schedule(dynamic, 1)
    for (int64_t strip = 0; strip < s.strips; strip++) {
        const int64_t row = s.strip_starts[strip], adapter = s.strip_adapters[strip];
        const char* x = (const char*)op.a + row * op.k * sizeof(Value);
        const char* a = (const char*)op.b + adapter * a_panels * k_dwords * V * 64;
        const char* b = (const char*)op.c + adapter * b_panels * r_dwords * PANEL * 4;
        const int count = s.strip_lengths[strip];
        with_rows<T>(count, [&](auto size) {
            constexpr int R = decltype(size)::value;
            const int rows = tiled<T> ? count : R;
            for (int64_t p = 0; p < a_panels; p++) {
                __m512 sum[R][V];
                multiply<T>(x, k_dwords, a + p * k_dwords * V * 64, V * 16, k_dwords, sum, nullptr, 0, rows);
                for (int r = 0; r < rows; r++)
                    for (int v = 0; v < V; v++)
                        if (const int64_t at = (p * V + v) * 16; at < rank) T::store(low + r * rank + at, sum[r][v], first_lanes(rank - at));
            }
            for (int64_t p = 0; p < b_panels; p++) {
                __m512 sum[R][VECTORS];
                multiply<T>(low, r_dwords, b + p * r_dwords * PANEL * 4, PANEL, r_dwords, sum, nullptr, 0, rows);
                for (int r = 0; r < rows; r++)
                    for (int v = 0; v < VECTORS; v++) {
                        const int64_t at = p * PANEL + v * 16;
                        if (at >= op.n) break;
                        const __mmask16 m = first_lanes(op.n - at);
                        if (op.mode == ADD_TO_RESIDUAL) {
                            float* y = (float*)op.out + (row + r) * op.stride + at;
                            _mm512_mask_storeu_ps(y, m, _mm512_add_ps(_mm512_maskz_loadu_ps(m, y), sum[r][v]));
                        } else {
                            Value* y = (Value*)op.out + (row + r) * op.stride + at;
                            T::store(y, _mm512_add_ps(T::load(y, m), sum[r][v]), m);
                        }
                    }
            }
        });
    }
}

template <class T>
static void run(const Op& op, const Step& s, float* scratch) {
    switch (op.kind) {
        case EMBED: return embed<T>(op, s);
        case NORM: return norm<T>(op, s, scratch);
        case PRODUCT: return op.weight == INT8 ? any_product<T, Int8>(op, s) : any_product<T, T>(op, s);
        case STORE: return store<T>(op, s);
        case ATTEND: return attend_all<T>(op, s, scratch);
        case ACTIVATE: return activate<T>(op, s, scratch);
        case QUANTISE: return quantise<T>(op, s, scratch);
        case LOW_RANK: return op.vectors == 1 ? low_rank<T, 1>(op, s, scratch) : low_rank<T, VECTORS>(op, s, scratch);
    }
}

static void run_one(const Op& op, const Step& s, float* scratch) {
    s.bf16 ? run<Bf16>(op, s, scratch) : run<Fp32>(op, s, scratch);
}

// Whether the numbers of this step stay inside the buffers that were recorded.
static Misfit misfit(const Step& s) {
    const auto outside = [](int64_t x, int64_t end) { return x < 0 || x >= end; };
    if (outside(s.tokens, s.max_tokens + 1)) return TOKENS;
    if (outside(s.outputs, s.max_tokens + 1)) return OUTPUTS;
    for (int64_t t = 0; t < s.tokens; t++) {
        if (outside(s.token_ids[t], s.vocab_size)) return TOKEN_ID;
        if (outside(s.positions[t], s.capacity)) return POSITION;
        if (outside(s.slots[t], s.num_slots)) return SLOT;
    }
    for (int64_t g = 0; g < s.groups; g++)
        if (s.group_starts[g] < 0 || s.group_starts[g] >= s.group_starts[g + 1] || s.group_starts[g + 1] > s.tokens) return GROUPS;
    for (int64_t i = 0; i < s.strips; i++)
        if (outside(s.strip_adapters[i], s.num_adapters) || s.strip_lengths[i] < 1 || s.strip_lengths[i] > STRIP || s.strip_starts[i] < 0 || s.strip_starts[i] + s.strip_lengths[i] > s.tokens) return ADAPTERS;
    return NONE;
}

extern "C" {

// Query vectors that attend together.
int64_t lb_max_queries(int64_t bf16) { return bf16 ? MAX_QUERIES<Bf16> : MAX_QUERIES<Fp32>; }

// Returns what does not fit (then nothing was done), or 0.
int64_t lb_run(const Op* ops, int64_t count, const Step* step) {
    if (const Misfit wrong = misfit(*step)) return wrong;
#pragma omp parallel num_threads((int)step->threads)
    {
        TileRegion tiles;
        float* scratch = step->scratch + omp_get_thread_num() * step->scratch_floats;
        const bool timed = step->seconds && omp_get_thread_num() == 0;
        for (int64_t i = 0; i < count; i++) {
            const double start = timed ? omp_get_wtime() : 0;
            run_one(ops[i], *step, scratch);
            if (timed) step->seconds[ops[i].kind] += omp_get_wtime() - start;
        }
    }
    return NONE;
}

// w [n][k] -> panels [ceil(n / columns)][k / per][columns][per], missing columns zero. bytes: size of a value; per: values a dword.
void lb_pack(const void* w, int64_t n, int64_t k, int64_t bytes, int64_t columns, void* out) {
    const int64_t per = 4 / bytes, panels = (n + columns - 1) / columns;
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++)
        for (int64_t i = 0; i < k / per; i++)
            for (int64_t c = 0; c < columns; c++) {
                char* to = (char*)out + ((p * (k / per) + i) * columns + c) * 4;
                if (p * columns + c < n)
                    std::memcpy(to, (const char*)w + ((p * columns + c) * k + i * per) * bytes, 4);
                else
                    std::memset(to, 0, 4);
            }
}
}
