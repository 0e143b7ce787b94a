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
