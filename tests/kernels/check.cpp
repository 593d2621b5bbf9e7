// What differs between instruction sets, against double: products of the three types, exp, rounding to bf16, and the
// ways between lanes. Built for one variant and run, under an emulator if need be; names the first thing that is wrong.
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "gemm.h"

static float next() {
    static uint32_t seed = 1;
    seed = seed * 1664525 + 1013904223;
    return ((int)(seed >> 8) % 2001 - 1000) * 1e-3f;
}

static void need(bool fine, const char* what, double got, double wanted) {
    if (!fine) std::printf("%s: %.9g instead of %.9g\n", what, got, wanted), std::exit(1);
}

// `rows` rows times a panel, and each of them alone: right, and the same bits.
template <class W, class A, class B, class Wide>
static void product(const char* name, const std::vector<A>& a, const std::vector<B>& panel, int64_t k, Wide wide, double tolerance) {
    constexpr int ROWS = TILE_ROWS<W>, P = W::per_dword;
    for (int rows = 1; rows <= ROWS; rows++) {
        Sum<W> sum[ROWS][VECTORS], alone[1][VECTORS];
        multiply_rows<W>(rows, a.data(), k / P, panel.data(), PANEL, k / P, sum);
        for (int r = 0; r < rows; r++) {
            multiply_rows<W>(1, a.data() + r * k, k / P, panel.data(), PANEL, k / P, alone);
            need(!std::memcmp(sum[r], alone[0], sizeof alone), name, r, rows);
            for (int c = 0; c < PANEL; c++) {
                double exact = 0, size = 0;
                for (int64_t i = 0; i < k; i++) {
                    const double term = wide(a[r * k + i], panel[(i / P * PANEL + c) * P + i % P]);
                    exact += term, size += std::fabs(term);
                }
                const double got = sum[r][c / LANES][c % LANES];
                need(std::fabs(got - exact) <= tolerance * size, name, got, exact);
            }
        }
    }
}

static float value(uint16_t half) { return Bf16::load(&half, 1)[0]; }

int main() {
    const int64_t k = 600;  // more than a block of words that are multiplied in parts
    std::vector<float> a(8 * k), b(PANEL * k);
    for (auto* side : {&a, &b})
        for (float& x : *side) x = next();
    std::vector<uint16_t> a16(a.size()), b16(b.size());
    std::vector<uint8_t> a8(a.size());
    std::vector<int8_t> b8(b.size());
    for (size_t i = 0; i < a.size(); i++) a16[i] = Bf16::round(a[i]), a8[i] = (uint8_t)(a[i] * 127 + 128);
    for (size_t i = 0; i < b.size(); i++) b16[i] = Bf16::round(b[i]), b8[i] = (int8_t)(b[i] * 127);
    for (int i = 0; i < 8; i++) a8[i] = 255, b8[i] = 127;  // what saturates 16 bits
    product<Fp32>("fp32", a, b, k, [](float x, float y) { return (double)x * y; }, 1e-5);
    product<Bf16>("bf16", a16, b16, k, [](uint16_t x, uint16_t y) { return (double)value(x) * value(y); }, 1e-5);
    product<Int8>("int8", a8, b8, k, [](uint8_t x, int8_t y) { return (double)x * y; }, 0);
    for (float x = -87; x < 88; x += 0.37f) {
        const float got = exp(all(x))[0], wanted = std::exp(x), s = sigmoid(all(x))[0];
        need(std::fabs(got - wanted) <= 3e-7f * wanted, "exp", got, wanted);
        need(std::fabs(s - 1 / (1 + std::exp(-(double)x))) <= 1e-6 * s, "sigmoid", s, 1 / (1 + std::exp(-(double)x)));
    }
    need(exp(all(-INFINITY))[0] == 0 && exp(all(-90.0f))[0] == 0, "exp of little", exp(all(-90.0f))[0], 0);
    uint16_t rounded[LANES], kept[2 * LANES] = {};
    Bf16::store(rounded, all(1.00390625f));  // between two neighbours: the even one
    need(rounded[0] == 0x3f80 && rounded[0] == Bf16::round(1.00390625f), "ties to even", rounded[0], 0x3f80);
    put_halves((int32_t*)kept, rounded, true);
    need(kept[0] == 0 && kept[1] == rounded[0] && kept[2 * LANES - 1] == rounded[0], "halves", kept[1], rounded[0]);
    const Floats count = __builtin_convertvector(lanes_from(1), Floats);
    need(sum_of(count) == LANES * (LANES + 1) / 2 && most_of(count) == LANES, "lanes", sum_of(count), most_of(count));
    const Words low = zipped<0>((Words)lanes_from(0), (Words)lanes_from(100), Lanes{});
    need(low[0] == 0 && low[1] == 100 && low[LANES - 1] == 100 + LANES / 2 - 1, "zipped", low[1], 100);
    std::printf("%d lanes: fine\n", LANES);
}
