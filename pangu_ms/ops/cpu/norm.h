// The norm of one row.
#pragma once
#include <cmath>
#include <cstdint>

// 1 / sqrt(mean(x^2) + eps)
inline float rms_scale(const float* x, float eps, int64_t width) {
    float square = 0;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < width; i++) square += x[i] * x[i];
    return 1.0f / sqrtf(square / width + eps);
}

inline void rms_norm(const float* x, const float* weight, float eps, int64_t width, float* y) {
    const float scale = rms_scale(x, eps, width);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) y[i] = x[i] * scale * weight[i];
}

// From dy: dx, and what this row adds to dweight.
inline void rms_norm_gradient(const float* x, const float* weight, float eps, int64_t width, const float* dy, float* dx,
                              float* dweight) {
    const float scale = rms_scale(x, eps, width);
    float along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t i = 0; i < width; i++) along += dy[i] * weight[i] * x[i];
    const float pull = along / width * scale * scale;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        dx[i] = scale * (dy[i] * weight[i] - pull * x[i]);
        dweight[i] += dy[i] * x[i] * scale;
    }
}
