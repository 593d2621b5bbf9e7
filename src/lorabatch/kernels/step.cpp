// One forward step of a decoder on a CPU, as a list of operations that Python records once and replays with one call
// (api.h describes them). All of them run inside one OpenMP region; each shares out its work with an
// orphaned `omp for`, whose end is the barrier before the next operation.
//
// Activations: fp32 residual stream x [T, H]; everything else in the type that the program was recorded for.
#include <algorithm>
#include <type_traits>
#include "attend.h"

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
        each_vector(op.n, [&](int64_t i, auto m) {
            Floats sum = T::load(token + i, m);
            if (place) sum += T::load(place + i, m);
            Fp32::store(x + i, sum, m);
        });
    }
}

// Where x [n] is largest in magnitude: the first such place.
static int64_t largest(const float* x, int64_t n) {
    Floats top = all(-1.0f);
    Ints where{};
    each_vector(n, [&](int64_t i, auto m) {
        const Floats size = only(m, magnitude(Fp32::load(x + i, m)), -1);
        const Ints better = size > top;
        top = max(size, top), where = better ? lanes_from(i) : where;
    });
    int first = 0;
    for (int l = 1; l < LANES; l++)
        if (top[l] > top[first] || (top[l] == top[first] && where[l] < where[first])) first = l;
    return where[first];
}

// A row of 8-bit activations: x = scale * (u - ZERO_POINT), except for its few largest values, which stay in fp32 (struct RowScale).
// A transformer's activations have outliers a hundred times larger than the rest (Dettmers et al., arXiv 2208.07339); without them the
// scale fits the others. Four a row cost a tenth of a product's time and took 13/14 of the error away (docs/LOG.md).
//
// x [n] is scratch: its outliers become zero.
static void quantise_row(float* x, int64_t n, uint8_t* out, RowScale* row) {
    for (int o = 0; o < OUTLIERS; o++) {
        const int64_t at = largest(x, n);
        row->index[o] = (int32_t)at, row->value[o] = x[at];
        x[at] = 0;
    }
    const float most = std::fabs(x[largest(x, n)]), factor = most > 0 ? 127.0f / most : 0.0f;
    row->scale = most / 127.0f;
    each_vector(n, [&](int64_t i, auto m) {
        const Ints u = __builtin_convertvector(nearest(Fp32::load(x + i, m) * factor), Ints) + (int)ZERO_POINT;
        const Bytes narrow = __builtin_convertvector(u, Bytes);
        std::memcpy(out + i, &narrow, m);
    });
}

// What the outliers of a row add to LANES columns (of vector v) of a panel of 8-bit weights, before the column scales.
static inline Floats outliers(Floats sum, const RowScale& row, const char* panel, int v) {
    for (int o = 0; o < OUTLIERS; o++) {
        const Words words = get<Words>(panel + (row.index[o] / 4 * PANEL + v * LANES) * 4);
        const Ints weight = (Ints)(words << (24 - row.index[o] % 4 * 8)) >> 24;
        sum = fma(all(row.value[o]), __builtin_convertvector(weight, Floats), sum);
    }
    return sum;
}

template <class T>
static void emit_row(const Op& op, int64_t row, int64_t n, float* x) {
    using Value = typename T::Value;
    if (Value* plain = (Value*)(op.weight == INT8 ? op.plain : op.out))
        each_vector(n, [&](int64_t i, auto m) { T::store(plain + row * n + i, Fp32::load(x + i, m), m); });
    if (op.weight == INT8) quantise_row(x, n, (uint8_t*)op.out + row * n, (RowScale*)op.scales + row);
}

template <class T>
static void norm(const Op& op, const Step& s, float* scratch) {
    using Value = typename T::Value;
    const int64_t rows = op.mode == OUTPUT_ROWS ? s.outputs : s.tokens, n = op.n;
    const Value *weight = (const Value*)op.b, *bias = (const Value*)op.c;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const float* x = (const float*)op.a + r * n;
        Floats sum{}, squares{};
        float centre = 0;
        if (bias) {
            each_vector(n, [&](int64_t i, auto m) { sum += Fp32::load(x + i, m); });
            centre = sum_of(sum) / n;
        }
        each_vector(n, [&](int64_t i, auto m) {
            const Floats d = only(m, Fp32::load(x + i, m) - centre);
            squares = fma(d, d, squares);
        });
        const float inverse = 1.0f / std::sqrt(sum_of(squares) / n + (float)op.value);
        each_vector(n, [&](int64_t i, auto m) {
            const Floats unit = (Fp32::load(x + i, m) - centre) * inverse, w = T::load(weight + i, m);
            Fp32::store(scratch + i, bias ? fma(unit, w, T::load(bias + i, m)) : unit * w, m);
        });
        emit_row<T>(op, r, n, scratch);
    }
}

// The first of the largest logits of a row so far, columns in rising order.
static inline void keep_best(const Step& s, int64_t row, int64_t column, Floats logits) {
    const int64_t mine = omp_get_thread_num() * s.outputs + row;
    const float most = most_of(logits);
    if (!(most > s.greedy_value[mine])) return;
    s.greedy_value[mine] = most;
    int lane = 0;
    while (logits[lane] != most) lane++;
    s.greedy_id[mine] = (int32_t)(column + lane);
}

// What becomes of the finished columns of a panel (fewer at the right edge) of one row.
template <class T, Output MODE>
static inline void finish(const Op& op, const Step& s, int64_t row, int64_t column, const Floats (&y)[VECTORS]) {
    using Value = typename T::Value;
    for (int v = 0; v < VECTORS; v++) {
        const int64_t at = column + v * LANES, place = row * op.n + at;
        if (at >= op.n) return;
        first_lanes(op.n - at, [&](auto m) {
            Floats value = y[v];
            if (op.e) value += T::load((const Value*)op.e + at, m);
            if (MODE == OVERWRITE) T::store((Value*)op.out + place, value, m);
            else if (MODE == ADD_TO_RESIDUAL) Fp32::store((float*)op.out + place, Fp32::load((float*)op.out + place, m) + value, m);
            else if (MODE == LOGITS) Fp32::store((float*)op.out + place, value, m);
            else keep_best(s, row, at, only(m, value, -INFINITY));
        });
    }
}

// Sums of 8-bit products in fp32, with the row's outliers and all scales.
static inline Floats dequantised(const Op& op, Ints sum, const RowScale& row, const char* panel, int64_t column, int v) {
    const Ints exact = sum - get<Ints>((const int32_t*)op.d + column + v * LANES);
    const Floats bulk = __builtin_convertvector(exact, Floats) * row.scale;
    return outliers(bulk, row, panel, v) * get<Floats>((const float*)op.c + column + v * LANES);
}

// a: rows [M, k]; b: packed weights; c: column scales, d: column sums times ZERO_POINT (int8); e: bias; scales: RowScale [M] (int8).
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
            const int fetch = (row - from) / ROWS * lines < 3 ? lines : 0;
            Sum<W> sum[ROWS][VECTORS];
            multiply_rows<W>(count, (const int32_t*)op.a + row * dwords, dwords, panel, PANEL, dwords, sum, ahead, fetch);
            ahead += (int64_t)fetch * dwords * 64;
            for (int r = 0; r < count; r++) {
                Floats y[VECTORS];
                for (int v = 0; v < VECTORS; v++)
                    if constexpr (quantised) y[v] = dequantised(op, sum[r][v], ((const RowScale*)op.scales)[row + r], panel, p * PANEL, v);
                    else y[v] = sum[r][v];
                finish<T, MODE>(op, s, row + r, p * PANEL, y);
            }
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
    float x[MAX_HEAD_DIM];
    for (int64_t d = 0; d < D; d += LANES) put(x + d, T::load(head + d));
    if (weight) {
        Floats squares{};
        for (int64_t d = 0; d < D; d += LANES) squares = fma(get<Floats>(x + d), get<Floats>(x + d), squares);
        const float inverse = 1.0f / std::sqrt(sum_of(squares) / D + (float)eps);
        for (int64_t d = 0; d < D; d += LANES) put(x + d, get<Floats>(x + d) * inverse * T::load(weight + d));
    }
    if (turn)
        each_vector(D / 2, [&](int64_t d, auto m) {
            const auto [low, high] = turned(Fp32::load(x + d, m), Fp32::load(x + D / 2 + d, m), Fp32::load(turn + d, m), Fp32::load(turn + D / 2 + d, m));
            Fp32::store(x + d, low, m), Fp32::store(x + D / 2 + d, high, m);
        });
    for (int64_t d = 0; d < D; d += LANES) T::store(head + d, get<Floats>(x + d));
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
            with_rows<T, MOST>(queries, [&](auto size) {
                attend<T, decltype(size)::value>(cache, s.slots[from], h, queries, q, first, last, (float)op.value, scratch, out, ahead);
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
        const Value* x = (const Value*)op.a + t * n * (op.mode == SWIGLU ? 2 : 1);
        each_vector(n, [&](int64_t i, auto m) {
            const Floats g = T::load(x + i, m);
            if (op.mode == SWIGLU) return Fp32::store(scratch + i, g * sigmoid(g) * T::load(x + n + i, m), m);
            const Floats u = 1.5957691216f * fma(g * g * g, all(0.044715f), g);  // 0.5 (1 + tanh u) = sigmoid(2 u)
            Fp32::store(scratch + i, g * sigmoid(u), m);
        });
        emit_row<T>(op, t, n, scratch);
    }
}

template <class T>
static void quantise(const Op& op, const Step& s, float* scratch) {
    using Value = typename T::Value;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < s.tokens; t++) {
        each_vector(op.n, [&](int64_t i, auto m) { Fp32::store(scratch + i, T::load((const Value*)op.a + t * op.n + i, m), m); });
        quantise_row(scratch, op.n, (uint8_t*)op.out + t * op.n, (RowScale*)op.scales + t);
    }
}

template <class T>
static inline void add_low_rank(const Op& op, int64_t row, int64_t column, Floats more) {
    if (column >= op.n) return;
    first_lanes(op.n - column, [&](auto m) {
        const auto add = [&](auto type, auto* y) { type.store(y, type.load(y, m) + more, m); };
        const int64_t place = row * op.stride + column;
        op.mode == ADD_TO_RESIDUAL ? add(Fp32(), (float*)op.out + place) : add(T(), (typename T::Value*)op.out + place);
    });
}

// y += x Aᵀ Bᵀ with each row's own adapter, y: the columns of one part of a fused layer. b, c: banks of packed A [adapters], in panels of
// V * 16 columns, and packed B [adapters], with the scale of LoRA in it. Source: LoRA, arXiv 2106.09685; grouping as in Punica, 2310.18547.
template <class T, int V>
static void low_rank(const Op& op, const Step& s, float* scratch) {
    using Value = typename T::Value;
    constexpr int WIDTH = V * LANES, ROWS = std::max<int>(STRIP, TILE_ROWS<T>);
    const int64_t rank = op.rank, k_dwords = op.k / T::per_dword, r_dwords = rank / T::per_dword;
    const int64_t a_panels = (rank + WIDTH - 1) / WIDTH, b_panels = (op.n + PANEL - 1) / PANEL;
    Value* low = (Value*)scratch;  // [STRIP][rank]
#pragma omp for schedule(dynamic, 1)
    for (int64_t strip = 0; strip < s.strips; strip++) {
        const int64_t row = s.strip_starts[strip], adapter = s.strip_adapters[strip];
        const char* x = (const char*)op.a + row * op.k * sizeof(Value);
        const char* a = (const char*)op.b + adapter * a_panels * k_dwords * WIDTH * 4;
        const char* b = (const char*)op.c + adapter * b_panels * r_dwords * PANEL * 4;
        const int count = s.strip_lengths[strip];
        for (int64_t p = 0; p < a_panels; p++) {
            Floats sum[ROWS][V];
            multiply_rows<T, STRIP>(count, x, k_dwords, a + p * k_dwords * WIDTH * 4, WIDTH, k_dwords, sum);
            for (int r = 0; r < count; r++)
                for (int v = 0; v < V; v++)
                    if (const int64_t at = p * WIDTH + v * LANES; at < rank)
                        first_lanes(rank - at, [&](auto m) { T::store(low + r * rank + at, sum[r][v], m); });
        }
        for (int64_t p = 0; p < b_panels; p++) {
            Floats sum[ROWS][VECTORS];
            multiply_rows<T, STRIP>(count, low, r_dwords, b + p * r_dwords * PANEL * 4, PANEL, r_dwords, sum);
            for (int r = 0; r < count; r++)
                for (int v = 0; v < VECTORS; v++) add_low_rank<T>(op, row + r, p * PANEL + v * LANES, sum[r][v]);
        }
    }
}

template <class T>
static void run(const Op& op, const Step& s, float* scratch) {
    switch (op.kind) {
        case EMBEDDING: return embed<T>(op, s);
        case NORMS: return norm<T>(op, s, scratch);
        case PRODUCTS: return op.weight == INT8 ? any_product<T, Int8>(op, s) : any_product<T, T>(op, s);
        case CACHE_WRITES: return store<T>(op, s);
        case ATTENTION: return attend_all<T>(op, s, scratch);
        case ACTIVATION: return activate<T>(op, s, scratch);
        case QUANTISATION: return quantise<T>(op, s, scratch);
        case ADAPTERS: return op.vectors == 1 ? low_rank<T, SIXTEEN>(op, s, scratch) : low_rank<T, VECTORS>(op, s, scratch);
    }
}

static void run_one(const Op& op, const Step& s, float* scratch) {
    s.type == BFLOAT16 ? run<Bf16>(op, s, scratch) : run<Fp32>(op, s, scratch);
}

// Whether the numbers of this step stay inside the buffers that were recorded.
static Misfit misfit(const Step& s) {
    const auto outside = [](int64_t x, int64_t end) { return x < 0 || x >= end; };
    if (outside(s.tokens, s.max_tokens + 1)) return MISFIT_TOKENS;
    if (outside(s.outputs, s.max_tokens + 1)) return MISFIT_OUTPUTS;
    for (int64_t t = 0; t < s.tokens; t++) {
        if (outside(s.token_ids[t], s.vocab_size)) return MISFIT_TOKEN_ID;
        if (outside(s.positions[t], s.capacity)) return MISFIT_POSITION;
        if (outside(s.slots[t], s.num_slots)) return MISFIT_SLOT;
    }
    for (int64_t g = 0; g < s.groups; g++)
        if (s.group_starts[g] < 0 || s.group_starts[g] >= s.group_starts[g + 1] || s.group_starts[g + 1] > s.tokens) return MISFIT_GROUPS;
    for (int64_t i = 0; i < s.strips; i++)
        if (outside(s.strip_adapters[i], s.num_adapters) || s.strip_lengths[i] < 1 || s.strip_lengths[i] > STRIP || s.strip_starts[i] < 0 || s.strip_starts[i] + s.strip_lengths[i] > s.tokens) return MISFIT_ADAPTERS;
    return MISFIT_NONE;
}

extern "C" {

int64_t lb_step_max_queries(int64_t type) { return type == BFLOAT16 ? MAX_QUERIES<Bf16> : MAX_QUERIES<Fp32>; }

int64_t lb_step_run(const Op* ops, int64_t count, const Step* step) {
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
    return MISFIT_NONE;
}

void lb_step_pack(const void* w, int64_t n, int64_t k, int64_t bytes, int64_t columns, void* out) {
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
