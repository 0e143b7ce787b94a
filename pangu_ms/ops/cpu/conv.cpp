// The short convolution: y_t = x_t + (open_t ? sum_j weight[:, j] * seen_{t-k+1+j} : 0), seen = past, then x.
#include "call.h"
#include "threads.h"

// x [B, T, C], past [B, P, C], weight [C, 1, k], open bool [B, T, 1] -> y [B, T, C]
OPERATOR(ShortConv) {
    const int64_t batch = call.dim(0, 0), length = call.dim(0, 1), channels = call.dim(0, 2), before = call.dim(1, 1),
                  width = call.dim(2, 2);
    const float *x = call.floats(0), *past = call.floats(1), *weight = call.floats(2);
    const bool* open = call.bools(3);
    const bool shared = call.dim(3, 0) == 1;            // one rule for all sequences
    float* y = call.floats(4);
    in_chunks(batch * length, channels * width, [=](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            const int64_t b = row / length, t = row % length;
            float* to = y + row * channels;
            memcpy(to, x + row * channels, channels * sizeof(float));
            if (!open[shared ? t : row]) continue;
            for (int64_t j = 0; j < width; j++) {
                const int64_t at = t - width + 1 + j;   // below 0: before this call
                const float* from = at < 0 ? past + (b * before + before + at) * channels
                                           : x + (b * length + at) * channels;
#pragma omp simd
                for (int64_t c = 0; c < channels; c++) to[c] += from[c] * weight[c * width + j];
            }
        }
    });
}

ONE_SHAPE(ShortConv) { return shape_of(0, ndims, shapes); }
