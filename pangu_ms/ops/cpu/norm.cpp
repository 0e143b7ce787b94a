// Root-mean-square norm, and the elementwise SwiGLU.
#include "call.h"
#include "norm.h"
#include "lanes.h"
#include "threads.h"

// x [..., D], weight [D], eps -> y [..., D]
OPERATOR(RmsNorm) {
    const int64_t width = call.size(1), rows = call.size(0) / width;
    const float *x = call.floats(0), *weight = call.floats(1), eps = call.real(2);
    float* y = call.floats(3);
    in_chunks(rows, width, [=](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) rms_norm(x + r * width, weight, eps, width, y + r * width);
    });
}

ONE_SHAPE(RmsNorm) { return shape_of(0, ndims, shapes); }

// gate, up [...] -> silu(gate) * up [...]
OPERATOR(Swiglu) {
    const float *gate = call.floats(0), *up = call.floats(1);
    float* y = call.floats(2);
    in_chunks(call.size(0), 8, [=](int64_t first, int64_t last) {
#pragma omp simd
        for (int64_t i = first; i < last; i++) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
    });
}

ONE_SHAPE(Swiglu) { return shape_of(0, ndims, shapes); }
