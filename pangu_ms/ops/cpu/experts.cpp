// The routed experts' product: y[n] = sum_k weight[n, k] * down(silu(gate x[n]) * up x[n]) with the matrices of expert
// id[n, k], read where they lie; and the same of one expert that all tokens go through.
#include <algorithm>

#include "call.h"
#include "experts.h"
#include "product.h"
#include "threads.h"

constexpr int64_t TOGETHER = 4 * LANES;                 // tokens of an expert that one thread takes at a time

// One or two tokens: x rows by token(i), y rows by out(i).
template <class In, class Out>
static void few(const Matrices& w, int64_t tokens, const In& in, const Out& out, float* memory) {
    float *x = memory, *gate = x + tokens * w.hidden, *up = gate + tokens * w.width;
    for (int64_t t = 0; t < tokens; t++) memcpy(x + t * w.hidden, in(t), w.hidden * sizeof(float));
    const auto into = [&](float* to) { return [=](int64_t f, int64_t t, float v) { to[t * w.width + f] = v; }; };
    few_dots(w.gate, 0, w.width, x, tokens, w.hidden, into(gate));
    few_dots(w.up, 0, w.width, x, tokens, w.hidden, into(up));
#pragma omp simd
    for (int64_t i = 0; i < tokens * w.width; i++) gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
    few_dots(w.down, 0, w.hidden, gate, tokens, w.width, [&](int64_t h, int64_t t, float v) { out(t)[h] = v; });
}

template <class In, class Out>
static void many(const Matrices& w, int64_t tokens, const In& in, const Out& out, float* memory) {
    const int64_t panels = panels_of(tokens), area = w.width * LANES;
    float *x = memory, *gate = x + panels * w.hidden * LANES, *up = gate + panels * area;
    for (int64_t p = 0; p < panels; p++)
        pack_panel([&](int64_t i) { return p * LANES + i < tokens ? in(p * LANES + i) : nullptr; }, w.hidden,
                   x + p * w.hidden * LANES);
    const auto into = [area](float* to) {
        return [=](int64_t f, int rows, int64_t p, const Lanes* v) {
            for (int r = 0; r < rows; r++) store(to + p * area + (f + r) * LANES, v[r]);
        };
    };
    many_dots(w.gate, w.hidden, 0, w.width, packed_panels(x, w.hidden), panels, w.hidden, into(gate));
    many_dots(w.up, w.hidden, 0, w.width, packed_panels(x, w.hidden), panels, w.hidden, into(up));
#pragma omp simd
    for (int64_t i = 0; i < panels * area; i++) gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
    const Panels inner = packed_panels(gate, w.width);
    const auto to_rows = [&](int64_t h, int rows, int64_t p, const Lanes* v) {
        for (int64_t i = 0; i < LANES && p * LANES + i < tokens; i++)
            for (int r = 0; r < rows; r++) out(p * LANES + i)[h + r] = v[r][i];
    };
    many_dots(w.down, w.width, 0, w.hidden, inner, panels, w.width, to_rows);
}

template <class In, class Out>
static void swiglu_product(const Matrices& w, int64_t tokens, const In& in, const Out& out) {
    const int64_t lanes = tokens <= FEW ? tokens : panels_of(tokens) * LANES;
    float* memory = scratch(WORK_OWN, lanes * (w.hidden + 2 * w.width));
    tokens <= FEW ? few(w, tokens, in, out, memory) : many(w, tokens, in, out, memory);
}

// x [..., H], ids int32 [..., K], weights [..., K], gate and up [E, F, H], down [E, H, F] -> y [..., H]
OPERATOR(Experts) {
    const int64_t k = call.dim(1, -1), rows = call.size(1) / k, experts = call.dim(3, 0), width = call.dim(3, 1),
                  hidden = call.dim(3, 2), pairs = rows * k, matrix = width * hidden;
    const float *x = call.floats(0), *weights = call.floats(2), *gate = call.floats(3), *up = call.floats(4),
                *down = call.floats(5);
    float* y = call.floats(6);
    const int32_t* ids = call.ints(1);
    const Plan plan = by_expert(ids, pairs, experts, TOGETHER);
    float* results = scratch(OPERATOR_OWN, pairs * hidden);                     // [R * K, H]
    parallel(plan.pieces.size(), [&](int64_t i) {
        const auto [e, first, last] = plan.pieces[i];
        swiglu_product({gate + e * matrix, up + e * matrix, down + e * matrix, hidden, width}, last - first,
                       [&](int64_t t) { return x + plan.order[first + t] / k * hidden; },
                       [&](int64_t t) { return results + plan.order[first + t] * hidden; });
    });
    in_chunks(rows, hidden * k, [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            float* to = y + row * hidden;
            std::fill(to, to + hidden, 0.0f);
            for (int64_t p = row * k; p < (row + 1) * k; p++) {
                if (!is_here(ids[p], experts)) continue;
#pragma omp simd
                for (int64_t h = 0; h < hidden; h++) to[h] += weights[p] * results[p * hidden + h];
            }
        }
    });
}

ONE_SHAPE(Experts) { return shape_of(0, ndims, shapes); }

// x [..., H], gate and up [F, H], down [H, F] -> y [..., H]
OPERATOR(FeedForward) {
    const int64_t width = call.dim(1, 0), hidden = call.dim(1, 1), rows = call.size(0) / hidden;
    const float *x = call.floats(0), *gate = call.floats(1), *up = call.floats(2), *down = call.floats(3);
    float* y = call.floats(4);
    if (rows > FEW) {
        parallel((rows + TOGETHER - 1) / TOGETHER, [=](int64_t piece) {
            const int64_t first = piece * TOGETHER;
            swiglu_product({gate, up, down, hidden, width}, std::min(TOGETHER, rows - first),
                           [=](int64_t t) { return x + (first + t) * hidden; },
                           [=](int64_t t) { return y + (first + t) * hidden; });
        });
        return;
    }
    float *inner = scratch(OPERATOR_OWN, 2 * rows * width), *other = inner + rows * width;
    in_chunks(width, 2 * hidden, [=](int64_t first, int64_t last) {
        few_dots(gate, first, last, x, rows, hidden, [=](int64_t f, int64_t t, float v) { inner[t * width + f] = v; });
        few_dots(up, first, last, x, rows, hidden, [=](int64_t f, int64_t t, float v) { other[t * width + f] = v; });
        for (int64_t t = 0; t < rows; t++) {
#pragma omp simd
            for (int64_t i = t * width + first; i < t * width + last; i++) inner[i] *= sigmoid(inner[i]) * other[i];
        }
    });
    in_chunks(hidden, width, [=](int64_t first, int64_t last) {
        few_dots(down, first, last, inner, rows, width, [=](int64_t h, int64_t t, float v) { y[t * hidden + h] = v; });
    });
}

ONE_SHAPE(FeedForward) { return shape_of(0, ndims, shapes); }
