// Gradients of the experts' product and of one expert for all tokens: products in place on every expert's matrices.
#include <algorithm>
#include <vector>

#include "call.h"
#include "experts.h"
#include "matrix.h"

// What one run of SwiGLU over rows of tokens needs and gives, for R rows. Rows of one expert lie together.
struct Rows {
    const float *x, *dy;                                // [R, H]
    float *inner, *dgate, *dup;                         // [R, F]: silu(gate x) up x, and gradients of gate x and up x
    float* dx;                                          // [R, H]
};

// The gradients of `rows` rows from row `first` on. dweight: null, or where each row's weight is replaced by its
// gradient, after inner and the gradients were multiplied by the weight.
static void swiglu_gradient(const Matrices& w, const Rows& r, int64_t first, int64_t rows, float* dweight) {
    const int64_t hidden = w.hidden, width = w.width;
    const float *x = r.x + first * hidden, *dy = r.dy + first * hidden;
    float *up = scratch(WORK_OWN, 2 * rows * width), *dinner = up + rows * width, *gate = r.inner + first * width,
          *dgate = r.dgate + first * width, *dup = r.dup + first * width, *dx = r.dx + first * hidden;
    multiply(rows_of(x, hidden), columns_of(w.gate, hidden), rows, width, hidden, gate, width);
    multiply(rows_of(x, hidden), columns_of(w.up, hidden), rows, width, hidden, up, width);
    multiply(rows_of(dy, hidden), rows_of(w.down, width), rows, width, hidden, dinner, width);
    for (int64_t t = 0; t < rows; t++) {
        const float weight = dweight ? dweight[first + t] : 1.0f;
        float along = 0;                                // dinner . inner = dy . y: the gradient of the weight
#pragma omp simd reduction(+ : along)
        for (int64_t i = t * width; i < (t + 1) * width; i++) {
            const float s = sigmoid(gate[i]), silu = gate[i] * s, d = weight * dinner[i];
            dup[i] = d * silu;
            dgate[i] = d * up[i] * (s + silu * (1 - s));
            gate[i] = silu * up[i];
            along += dinner[i] * gate[i];
            gate[i] *= weight;
        }
        if (dweight) dweight[first + t] = along;
    }
    multiply(rows_of(dgate, width), rows_of(w.gate, hidden), rows, hidden, width, dx, hidden);
    multiply(rows_of(dup, width), rows_of(w.up, hidden), rows, hidden, width, dx, hidden, true);
}

// A part of the rows of an expert's three matrices' gradients: sums over the tokens first .. last-1.
static void matrices_gradient(const Rows& r, int64_t hidden, int64_t width, int64_t first, int64_t last, int64_t part,
                              int64_t parts, float* dgate, float* dup, float* ddown) {
    const auto sums = [=](const float* a, int64_t rows, const float* b, int64_t columns, float* to) {  // a^T b
        const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
        multiply(columns_of(a + first * rows + begin, rows), rows_of(b + first * columns, columns), end - begin,
                 columns, last - first, to + begin * columns, columns);
    };
    sums(r.dgate, width, r.x, hidden, dgate);
    sums(r.dup, width, r.x, hidden, dup);
    sums(r.dy, hidden, r.inner, width, ddown);
}

constexpr int64_t ROWS_TOGETHER = 128;                  // that one thread takes at a time
constexpr int64_t PARTS = 4;                            // of an expert's matrices, so that one expert keeps all threads

// The arguments of Experts, dy -> dx, dweights, dgate, dup, ddown
OPERATOR(ExpertsGradient) {
    const int64_t k = call.dim(1, -1), tokens = call.size(1) / k, experts = call.dim(3, 0), width = call.dim(3, 1),
                  hidden = call.dim(3, 2), pairs = tokens * k, matrix = width * hidden;
    const float *x = call.floats(0), *weights = call.floats(2), *gate = call.floats(3), *up = call.floats(4),
                *down = call.floats(5), *dy = call.floats(6);
    float *dx = call.floats(7), *dweights = call.floats(8), *dgate = call.floats(9), *dup = call.floats(10),
          *ddown = call.floats(11);
    std::fill(dweights, dweights + pairs, 0.0f);
    const Plan plan = by_expert(call.ints(1), pairs, experts, ROWS_TOGETHER);
    // Of each pair, in the order of the plan.
    float *rows_x = scratch(OPERATOR_OWN, pairs * (3 * hidden + 3 * width + 1)), *rows_dy = rows_x + pairs * hidden,
          *rows_dx = rows_dy + pairs * hidden, *inner = rows_dx + pairs * hidden,
          *row_weights = inner + 3 * pairs * width;
    const Rows rows{rows_x, rows_dy, inner, inner + pairs * width, inner + 2 * pairs * width, rows_dx};
    parallel(plan.pieces.size(), [&](int64_t i) {
        const auto [e, first, last] = plan.pieces[i];
        for (int64_t at = first; at < last; at++) {
            const int64_t token = plan.order[at] / k * hidden;
            memcpy(rows_x + at * hidden, x + token, hidden * sizeof(float));
            memcpy(rows_dy + at * hidden, dy + token, hidden * sizeof(float));
            row_weights[at] = weights[plan.order[at]];
        }
        swiglu_gradient({gate + e * matrix, up + e * matrix, down + e * matrix, hidden, width}, rows, first,
                        last - first, row_weights);
        for (int64_t at = first; at < last; at++) dweights[plan.order[at]] = row_weights[at];
    });
    parallel(experts * PARTS, [&](int64_t item) {
        const int64_t e = item / PARTS;
        matrices_gradient(rows, hidden, width, plan.start[e], plan.start[e + 1], item % PARTS, PARTS,
                          dgate + e * matrix, dup + e * matrix, ddown + e * matrix);
    });
    std::vector<int64_t> place(pairs, -1);
    for (int64_t at = 0; at < plan.start[experts]; at++) place[plan.order[at]] = at;
    in_chunks(tokens, hidden * k, [&](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; t++) {
            float* to = dx + t * hidden;
            std::fill(to, to + hidden, 0.0f);
            for (int64_t p = t * k; p < (t + 1) * k; p++) {
                if (place[p] < 0) continue;
                const float* from = rows_dx + place[p] * hidden;
#pragma omp simd
                for (int64_t h = 0; h < hidden; h++) to[h] += from[h];
            }
        }
    });
}

SHAPES_OF(ExpertsGradient, 0, 2, 3, 4, 5)

// x, gate, up, down, dy -> dx, dgate, dup, ddown
OPERATOR(FeedForwardGradient) {
    const int64_t width = call.dim(1, 0), hidden = call.dim(1, 1), tokens = call.size(0) / hidden;
    const Matrices matrices{call.floats(1), call.floats(2), call.floats(3), hidden, width};
    float* inner = scratch(OPERATOR_OWN, 3 * tokens * width);
    const Rows rows{call.floats(0), call.floats(4), inner, inner + tokens * width, inner + 2 * tokens * width,
                    call.floats(5)};
    parallel((tokens + ROWS_TOGETHER - 1) / ROWS_TOGETHER, [=](int64_t piece) {
        const int64_t first = piece * ROWS_TOGETHER;
        swiglu_gradient(matrices, rows, first, std::min(ROWS_TOGETHER, tokens - first), nullptr);
    });
    constexpr int64_t parts = 4 * PARTS;
    parallel(parts, [&](int64_t part) {
        matrices_gradient(rows, hidden, width, 0, tokens, part, parts, call.floats(6), call.floats(7), call.floats(8));
    });
}

SHAPES_OF(FeedForwardGradient, 0, 1, 2, 3)
