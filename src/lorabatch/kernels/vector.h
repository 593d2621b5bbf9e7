// Vector helpers of the CPU kernels, LANES floats at a time, and the two types that activations can have.
#pragma once
#include <type_traits>
#include <utility>
#include "isa.h"

extern "C" {
#include "api.h"
}

constexpr int SIXTEEN = 16 / LANES;  // registers of 16 columns, which all sizes are multiples of

template <class V>
static inline V get(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V>
static inline void put(void* p, V v) { std::memcpy(p, &v, sizeof v); }

static inline Floats all(float x) { return x - Floats{}; }  // -0 stays -0
static inline Ints all(int32_t x) { return x + Ints{}; }
static inline Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7fffffff); }
static inline Floats chosen(Ints where, Floats x, Floats otherwise) { return where ? x : otherwise; }
static inline Ints lanes_from(int64_t first) { return (Ints)word_lanes() + (int32_t)first; }

// The lanes of two vectors, a's first, picked by number. (Never through memory: a vector whose address is taken stays there.)
#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif
using Lanes = std::make_integer_sequence<int, LANES>;
// Words of a and b in turn, a's first: those of the lower halves, or of the higher.
template <int HALF, int... LANE>
static inline Words zipped(Words a, Words b, std::integer_sequence<int, LANE...>) {
    return PICK(a, b, (HALF * LANES / 2 + LANE / 2 + LANE % 2 * LANES)...);
}

// The lanes' sum or maximum, halves upon halves.
template <int HALF, int... LANE>
static inline Floats swapped(Floats x, std::integer_sequence<int, LANE...>) { return PICK(x, x, (LANE ^ HALF)...); }
template <int HALF = LANES / 2, class Join>
static inline float folded(Floats x, Join join) {
    const Floats both = join(x, swapped<HALF>(x, Lanes{}));
    if constexpr (HALF == 1) return both[0];
    else return folded<HALF / 2>(both, join);
}
static inline float sum_of(Floats x) {
    return folded(x, [](Floats a, Floats b) { return a + b; });
}
static inline float most_of(Floats x) { return folded(x, [](Floats a, Floats b) { return max(a, b); }); }

// e^x within 2 ulp for x <= 0 and moderate x > 0; 0 below -87. Range reduction by ln 2 in two parts, then a polynomial
// of degree 6 (the coefficients are those of Cephes' expf, S. L. Moshier).
static inline Floats exp(Floats x) {
    const Ints alive = x > all(-87.3f);
    x = min(x, all(88.0f));
    const Floats n = nearest(x * 1.44269504088896341f);
    Floats r = fma(n, all(-0.693359375f), x);
    r = fma(n, all(2.12194440e-4f), r);
    Floats p = all(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = fma(p, r, all(c));
    p = fma(p, r * r, r + 1.0f);
    return chosen(alive, times_power(p, n), Floats{});
}

static inline Floats sigmoid(Floats x) { return reciprocal(1.0f + exp(-x)); }

// A pair of vectors turned by an angle, as rotary positions turn the two halves of a head.
struct Pair {
    Floats low, high;
};
static inline Pair turned(Floats low, Floats high, Floats cos, Floats sin) {
    return {fma(low, cos, -(high * sin)), fma(high, cos, low * sin)};
}

// f(n) for the first n lanes; that all of them are meant is known to the compiler, and costs nothing.
using AllLanes = std::integral_constant<int, LANES>;
template <class Call>
static inline void first_lanes(int64_t n, Call&& f) { n >= LANES ? f(AllLanes{}) : f((int)n); }

// f(i, n) for n lanes from i on, until `end`.
template <class Call>
static inline void each_vector(int64_t end, Call&& f) {
    int64_t i = 0;
    for (; i + LANES <= end; i += LANES) f(i, AllLanes{});
    if (i < end) f(i, (int)(end - i));
}

template <class N>
static inline Floats only(N n, Floats x, float otherwise = 0) {  // in the first n lanes
    return n >= LANES ? x : chosen(lanes_from(0) < (int)n, x, all(otherwise));
}

// An activation type: memory format, and fp32 in registers. A dword of memory holds `per_dword` values.
struct Fp32 {
    using Value = float;
    static constexpr int per_dword = 1;
    static Floats load(const Value* p, int n = LANES) {  // zeros beyond n
        Floats x{};
        std::memcpy(&x, p, n * 4);
        return x;
    }
    static void store(Value* p, Floats x, int n = LANES) { std::memcpy(p, &x, n * 4); }
    static Value round(float x) { return x; }
    static Words bits(Floats x) { return (Words)x; }  // as it will be in memory
    static Floats rounded(Floats x) { return x; }
};

struct Bf16 {
    using Value = uint16_t;
    static constexpr int per_dword = 2;
    static Floats load(const Value* p, int n = LANES) {
        Halves x{};
        std::memcpy(&x, p, n * 2);
        return (Floats)(widened(x) << 16);
    }
    static void store(Value* p, Floats x, int n = LANES) {
        const Halves h = narrow(x);
        std::memcpy(p, &h, n * 2);
    }
    static Value round(float x) {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        return (Value)((x == x ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000) >> 16);
    }
    static Words bits(Floats x) { return widened(narrow(x)); }
    static Floats rounded(Floats x) { return (Floats)(bits(x) << 16); }
};
