// Gradient of a product with a weight.
#include "call.h"
#include "matrix.h"

// x [..., K], weight [N, K], dy [..., N] -> dx, dweight
OPERATOR(LinearGradient) {
    const int64_t k = call.dim(1, 1), n = call.dim(1, 0), m = call.size(0) / k;
    const float *x = call.floats(0), *weight = call.floats(1), *dy = call.floats(2);
    multiply_by_all(rows_of(dy, n), rows_of(weight, k), m, k, n, call.floats(3), k);
    multiply_by_all(columns_of(dy, n), rows_of(x, k), n, k, m, call.floats(4), k);
}

SHAPES_OF(LinearGradient, 0, 1)
