// A product with a weight, with or without a bias.
#include <algorithm>

#include "call.h"
#include "linear.h"
#include "product.h"
#include "threads.h"

void linear(const float* x, const float* weight, int64_t m, int64_t k, int64_t n, float* y,
            const float* bias) {
    const auto plus = [=](int64_t row, float v) { return bias ? v + bias[row] : v; };
    if (m <= FEW) {
        in_chunks(n, k, [=](int64_t first, int64_t last) {
            few_dots(weight, first, last, x, m, k,
                     [=](int64_t row, int64_t t, float v) { y[t * n + row] = plus(row, v); });
        });
        return;
    }
    const int64_t panels = panels_of(m);
    float* packed = scratch(OPERATOR_OWN, panels * k * LANES);
    parallel(panels, [=](int64_t p) {
        pack_panel([=](int64_t lane) { return p * LANES + lane < m ? x + (p * LANES + lane) * k : nullptr; }, k,
                   packed + p * k * LANES);
    });
    // Blocks of panels that stay in the second-level cache, times blocks of weight rows.
    const int64_t depth = std::max<int64_t>(2, 131072 / (k * LANES) / 2 * 2), wide = 64;
    const int64_t blocks = (panels + depth - 1) / depth, columns = (n + wide - 1) / wide;
    parallel(blocks * columns, [=](int64_t item) {
        const int64_t from = item / columns * depth, first = item % columns * wide;
        many_dots(weight, k, first, std::min(first + wide, n), packed_panels(packed + from * k * LANES, k),
                  std::min(depth, panels - from), k, [=](int64_t row, int rows, int64_t panel, const Lanes* v) {
            const int64_t start = (from + panel) * LANES;
            for (int64_t t = 0; t < LANES && start + t < m; t++)
                for (int r = 0; r < rows; r++) y[(start + t) * n + row + r] = plus(row + r, v[r][t]);
        });
    });
}

// x [..., K], weight [N, K] -> y [..., N]
OPERATOR(Linear) {
    const int64_t k = call.dim(1, 1);
    linear(call.floats(0), call.floats(1), call.size(0) / k, k, call.dim(1, 0), call.floats(2));
}

ONE_SHAPE(Linear) {
    Shape shape = shape_of(0, ndims, shapes);
    if (shape.back() != -2) shape.back() = shapes[1][0];
    return shape;
}

// x [..., K], weight [N, K], bias [N] -> y [..., N]
OPERATOR(LinearBias) {
    const int64_t k = call.dim(1, 1);
    linear(call.floats(0), call.floats(1), call.size(0) / k, k, call.dim(1, 0), call.floats(3), call.floats(2));
}

ONE_SHAPE(LinearBias) { return LinearInferShape(ndims, shapes, nullptr); }
