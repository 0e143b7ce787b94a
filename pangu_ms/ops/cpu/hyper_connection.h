// What the hyper-connection's operators and their gradients share: tokens in blocks, and the products behind the gates.
#pragma once
#include <algorithm>

#include "norm.h"
#include "product.h"
#include "threads.h"

constexpr float GATE_EPS = 1e-6f;
constexpr int64_t TOGETHER = 2 * LANES;                 // tokens whose gates are one product

// m[t] = phi . (f * scale * gamma), f the flattened streams of a token: tokens [n, width], phi [gates, width].
inline void gate_products(const float* tokens, int64_t n, int64_t width, const float* gamma, const float* phi,
                          int64_t gates, float eps, float* m) {
    float* normed = scratch(WORK_OWN, (n + panels_of(n) * LANES) * width);
    for (int64_t t = 0; t < n; t++) rms_norm(tokens + t * width, gamma, eps, width, normed + t * width);
    if (n <= FEW) {
        few_dots(phi, 0, gates, normed, n, width, [=](int64_t g, int64_t t, float v) { m[t * gates + g] = v; });
        return;
    }
    float* panels = normed + n * width;
    for (int64_t p = 0; p < panels_of(n); p++)
        pack_panel([=](int64_t i) { return p * LANES + i < n ? normed + (p * LANES + i) * width : nullptr; }, width,
                   panels + p * width * LANES);
    const auto to_gates = [=](int64_t g, int rows, int64_t p, const Lanes* v) {
        for (int64_t i = 0; i < LANES && p * LANES + i < n; i++)
            for (int r = 0; r < rows; r++) m[(p * LANES + i) * gates + g + r] = v[r][i];
    };
    many_dots(phi, width, 0, gates, packed_panels(panels, width), panels_of(n), width, to_gates);
}

// work(first, tokens) over blocks of tokens that are handled together.
template <class F>
void by_block(int64_t tokens, const F& work) {
    parallel((tokens + TOGETHER - 1) / TOGETHER,
             [&](int64_t b) { work(b * TOGETHER, std::min(TOGETHER, tokens - b * TOGETHER)); });
}
