// Gradients of a product with a weight, with or without a bias.
#include "call.h"
#include "matrix.h"
#include "sums.h"

static void gradient(const Call& call, const float* dy, float* dx, float* dweight) {
    const int64_t k = call.dim(1, 1), n = call.dim(1, 0), m = call.size(0) / k;
    const float *x = call.floats(0), *weight = call.floats(1);
    multiply_by_all(rows_of(dy, n), rows_of(weight, k), m, k, n, dx, k);
    multiply_by_all(columns_of(dy, n), rows_of(x, k), n, k, m, dweight, k);
}

// x [..., K], weight [N, K], dy [..., N] -> dx, dweight
OPERATOR(LinearGradient) { gradient(call, call.floats(2), call.floats(3), call.floats(4)); }

SHAPES_OF(LinearGradient, 0, 1)

// x [..., K], weight [N, K], bias [N], dy [..., N] -> dx, dweight, dbias
OPERATOR(LinearBiasGradient) {
    const int64_t n = call.size(2);
    const float* dy = call.floats(3);
    gradient(call, dy, call.floats(4), call.floats(5));
    sum_over_rows(call.size(3) / n, n, call.floats(6), [=](int64_t first, int64_t last, float* sums) {
        for (int64_t row = first; row < last; row++) {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) sums[i] += dy[row * n + i];
        }
    });
}

SHAPES_OF(LinearBiasGradient, 0, 1, 2)
