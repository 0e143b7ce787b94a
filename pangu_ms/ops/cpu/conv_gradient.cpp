// Gradient of the short convolution.
#include <vector>

#include "call.h"
#include "sums.h"

// The arguments of ShortConv, dy [B, T, C] -> dx, dpast, dweight
OPERATOR(ShortConvGradient) {
    const int64_t batch = call.dim(0, 0), length = call.dim(0, 1), channels = call.dim(0, 2), before = call.dim(1, 1),
                  width = call.dim(2, 2);
    const float *x = call.floats(0), *past = call.floats(1), *weight = call.floats(2), *dy = call.floats(4);
    const bool* open = call.bools(3);
    const bool shared = call.dim(3, 0) == 1;            // one rule for all sequences
    float *dx = call.floats(5), *dpast = call.floats(6), *dweight = call.floats(7);
    std::vector<float> taps(width * channels), sums(width * channels);          // by tap: [k, C]
    for (int64_t c = 0; c < channels; c++)
        for (int64_t j = 0; j < width; j++) taps[j * channels + c] = weight[c * width + j];
    // Adds to `to` what the row at `at` of sequence b, below 0 before this call, gives to the rows it is a tap of.
    const auto gather = [=, &taps](int64_t b, int64_t at, float* to) {
        for (int64_t j = 0; j < width; j++) {
            const int64_t t = at + width - 1 - j;
            if (t < 0 || t >= length || !open[(shared ? 0 : b * length) + t]) continue;
            const float *tap = taps.data() + j * channels, *from = dy + (b * length + t) * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) to[c] += tap[c] * from[c];
        }
    };
    sum_over_rows(batch * length, width * channels, sums.data(), [=](int64_t first, int64_t last, float* sum) {
        for (int64_t row = first; row < last; row++) {
            const int64_t b = row / length, t = row % length;
            const float* d = dy + row * channels;
            memcpy(dx + row * channels, d, channels * sizeof(float));
            gather(b, t, dx + row * channels);
            if (!open[shared ? t : row]) continue;
            for (int64_t j = 0; j < width; j++) {
                const int64_t at = t - width + 1 + j;
                const float* from = at < 0 ? past + (b * before + before + at) * channels
                                           : x + (b * length + at) * channels;
                float* to = sum + j * channels;
#pragma omp simd
                for (int64_t c = 0; c < channels; c++) to[c] += d[c] * from[c];
            }
        }
    });
    std::fill(dpast, dpast + batch * before * channels, 0.0f);
    for (int64_t row = 0; row < batch * before; row++)
        gather(row / before, row % before - before, dpast + row * channels);
    for (int64_t c = 0; c < channels; c++)
        for (int64_t j = 0; j < width; j++) dweight[c * width + j] = sums[j * channels + c];
}

SHAPES_OF(ShortConvGradient, 0, 1, 2)
