// The interface between the C++ kernels and Python: the only definition of the structs, enums and
// sizes that both sides use, and the prototypes of all functions that Python calls.
//
// vector.h includes it inside extern "C"; Python reads it with cffi (kernels/api.py), which drops the
// lines of the preprocessor and parses the rest as plain C. A function belongs to the library that
// its name begins with: lb_step_* to step.cpp, lb_train_* to train.cpp.
//
// Sizes and strides count values unless a comment says bytes. Shapes: T tokens (rows of the flat
// batch), H hidden size, N query heads, K key/value heads, D head size, V vocabulary, I input and
// O output features, r rank of an adapter, S slots, C positions of a slot.
#pragma once
#include <stdint.h>

enum {
    PANEL = 48,          // output columns of a panel of packed weights (gemm.h)
    PAGE = 64,           // positions of a page of the KV cache (attend.h)
    MAX_HEAD_DIM = 512,  // inference: largest D
    STRIP = 8,           // inference: most neighbouring rows that take one adapter together
    ZERO_POINT = 128,    // an 8-bit activation u stands for scale * (u - ZERO_POINT)
    OUTLIERS = 4,        // largest values of an 8-bit row that stay in fp32
    TILE = 64,           // training: I, O and D are multiples of this
    LOW_WIDTH = 16,      // training: each adapter's r columns are padded to a multiple of this
    MAX_RANKS = 256,     // training: most such columns of all adapters of a layer together
};

// Activations, KV cache and unquantised weights of a call all have one type.
enum Type { FLOAT32, BFLOAT16 };

// What does not fit in what a function was given. It is found before anything is read or written.
enum Misfit {
    MISFIT_NONE,
    MISFIT_TOKENS,
    MISFIT_OUTPUTS,
    MISFIT_TOKEN_ID,
    MISFIT_POSITION,
    MISFIT_SLOT,
    MISFIT_GROUPS,
    MISFIT_ADAPTERS,
    MISFIT_SIZES,
};

// ---- step.cpp: inference ------------------------------------------------------------------------

// What an operation does. A profile shows the enumerators as names, in small letters.
enum Kind {
    EMBEDDING,
    NORMS,
    PRODUCTS,
    CACHE_WRITES,
    ATTENTION,
    ACTIVATION,
    QUANTISATION,
    ADAPTERS,
};

// Modes of an operation: what becomes of a product's (or an adapter's) columns ...
enum Output {
    OVERWRITE,        // out [T][O], of the step's type
    ADD_TO_RESIDUAL,  // out [T][O], fp32
    LOGITS,           // out [outputs][V], fp32
    GREEDY,           // the first of the largest columns into Step.greedy
};
enum NormRows { TOKEN_ROWS, OUTPUT_ROWS };  // ... which rows a norm reads ...
enum Activation { GELU, SWIGLU };           // ... and which function an activation is.

enum Weight { NATIVE, INT8 };  // of the step's type, or 8 bits a value

// One row of 8-bit activations: u = ZERO_POINT at its outliers, whose values stand here.
struct RowScale {
    float scale;
    float value[OUTLIERS];
    int32_t index[OUTLIERS];  // feature of each outlier
    int32_t unused[7];        // up to a whole cache line
};

// A recorded operation. What a to e point to, of the step's type where nothing else is said:
//
// EMBEDDING     a: tokens [V][H]; b: positions [C][H], or 0
// NORMS         a: x [T][H], fp32; b: weight [H]; c: bias [H], or 0
// PRODUCTS      a: rows [T][I]; b: panels of W; e: bias [O], or 0;
//               INT8: c: column scales [O], fp32; d: column sums times ZERO_POINT [O], int32
// CACHE_WRITES  a, b: keys and values of the cache; c, d: weights of the norms of queries and keys
//               [D], or 0; e: cosines and sines [C][D], fp32, or 0
// ATTENTION     a, b: keys and values of the cache; c: rows [T][(N + 2 K) D]
// ACTIVATION    a: rows [T][O], for SWIGLU [T][2 O]: gate, up
// QUANTISATION  a: rows [T][O]
// ADAPTERS      a: rows [T][I]; b: panels of every A, one behind the other; c: of every B, scaled
struct Op {
    int64_t kind;     // Kind
    int64_t mode;     // Output, NormRows or Activation
    int64_t weight;   // Weight of a product; of others, of the product that reads their rows
    int64_t n, k;     // O and I; of attention, k is the window, or 0
    int64_t rank;     // of the adapters
    int64_t stride;   // of the adapters: columns of a whole row of out
    int64_t vectors;  // of the adapters: registers of 16 columns in a panel of A
    const void *a, *b, *c, *d, *e;
    void *out;        // CACHE_WRITES: rows [T][(N + 2 K) D]; queries and keys are turned in them
    void *scales;     // struct RowScale [T], of 8-bit rows
    void *plain;      // where 8-bit rows are wanted in the step's type too (for adapters), or 0
    double value;     // epsilon of a norm, scale of attention's scores
};

// The inputs of one step, and the buffers that were made once for all of them.
struct Step {
    int64_t type;                         // Type
    int64_t tokens, outputs;              // T, and rows of the head
    const int32_t *token_ids, *positions, *slots;  // [T] each
    int64_t groups;
    const int32_t *group_starts;          // [groups + 1]: neighbours of one slot, attended together
    int64_t strips;
    const int32_t *strip_starts, *strip_lengths, *strip_adapters;  // [strips] each
    int64_t heads, kv_heads, head_dim, capacity;                   // N, K, D, C
    int64_t max_tokens, num_slots, vocab_size, num_adapters;       // what was recorded
    int64_t threads;
    int64_t scratch_floats;
    float *scratch;                       // [threads][scratch_floats]
    int32_t *greedy;                      // [outputs]
    float *greedy_value;                  // scratch [threads][outputs]
    int32_t *greedy_id;                   // scratch [threads][outputs]
    double *seconds;                      // one for each Kind, added to by the first thread; or 0
};

// Query vectors of a Type that attend together.
int64_t lb_step_max_queries(int64_t type);

// Runs the operations one after another; returns a Misfit.
int64_t lb_step_run(const struct Op *ops, int64_t count, const struct Step *step);

// w [n][k] -> panels [n / columns, rounded up][k / per][columns][per], where a word holds per =
// 4 / bytes values; missing columns are zero. bytes: of one value.
void lb_step_pack(const void *w, int64_t n, int64_t k, int64_t bytes, int64_t columns, void *out);

// ---- train.cpp: training ------------------------------------------------------------------------
// type: Type of all void pointers. Functions that return a number return a Misfit.

// Causal attention inside each document of a packed block. The pointers to queries, keys, values
// and their gradients are to the first of T rows, `stride` (`grad_stride`) apart.
struct Block {
    const void *q, *k, *v;
    const void *cos, *sin;          // [T][D / 2], for the turn of queries and keys; or both 0
    void *out;                      // [T][N D]
    float *log_sums;                // [N][T]: log of the sum of exponentials
    const void *grad;               // [T][N D]; the rest of this kind only for the backward pass
    void *q_grad, *k_grad, *v_grad;
    const int64_t *starts;          // [documents + 1], with T at the end
    int64_t documents, tokens, heads, kv_heads, head_dim, stride, grad_stride;
    double scale;                   // of the scores
    int64_t threads;
};

// One adapter of a fused layer.
struct Part {
    const float *a, *b;    // [r][I], [width][r]
    int64_t start, width;  // its columns of y
    double scale;
};

struct Adapters {
    const struct Part *parts;  // [count]
    int64_t count, rank;
    int64_t in, out;           // I and O of the whole layer
    int64_t tokens, threads;
};

int64_t lb_train_attend(int64_t type, const struct Block *block, int64_t backward);

// y = x / rms(x) * weight [rows][columns]; inverse [rows] = 1 / rms(x).
void lb_train_norm(int64_t type, const void *x, const void *weight, double eps, void *y,
                   float *inverse, int64_t rows, int64_t columns, int64_t threads);
void lb_train_norm_grad(int64_t type, const void *x, const void *weight, const float *inverse,
                        const void *grad, void *x_grad, int64_t rows, int64_t columns,
                        int64_t threads);

// x [rows][2 columns] = gate, up -> out [rows][columns] = silu(gate) up. With a gradient of that
// (not 0), the gradient of x instead: out [rows][2 columns].
void lb_train_swiglu(int64_t type, const void *x, const void *grad, void *out, int64_t rows,
                     int64_t columns, int64_t threads);

// y [rows][n] = x [rows][k] W^T + bias (or 0), W [n][k] in panels.
void lb_train_product(int64_t type, const void *x, const void *panels, const void *bias, void *y,
                      int64_t rows, int64_t n, int64_t k, int64_t threads);

// y [T][O] += scale (x A^T) B^T for each part. low [T][count, each padded to LOW_WIDTH] = x A^T.
int64_t lb_train_lora(int64_t type, const struct Adapters *adapters, const void *x, void *low,
                      void *y);

// grad [T][O] of y -> a_grad [count r][I], b_grad one [width][r] after another; adds to x_grad
// [T][I], unless it is 0. low_grad: scratch of low's shape.
int64_t lb_train_lora_grad(int64_t type, const struct Adapters *adapters, const void *x,
                           const void *low, const void *grad, void *low_grad, void *x_grad,
                           float *a_grad, float *b_grad);

// loss [rows] of logits [rows][V], with label smoothing and z loss; with `replace` the gradient
// takes the place of the logits.
int64_t lb_train_loss(int64_t type, void *logits, const int64_t *targets, float *loss, int64_t rows,
                      int64_t vocabulary, int64_t replace, double smoothing, double z,
                      int64_t threads);
