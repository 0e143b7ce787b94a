// Half-split rotary embedding of one vector: x [2 * half], dimension i is paired with half + i.
#pragma once
#include <cstdint>

inline void turn(const float* x, const float* cosines, const float* sines, int64_t half, float* y) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float first = x[i], second = x[half + i];  // y may be x
        y[i] = first * cosines[i] - second * sines[i];
        y[half + i] = second * cosines[i] + first * sines[i];
    }
}

// The opposite turn, which is also the gradient of `turn`.
inline void turn_back(const float* y, const float* cosines, const float* sines, int64_t half, float* x) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        x[i] = y[i] * cosines[i] + y[half + i] * sines[i];
        x[half + i] = y[half + i] * cosines[i] - y[i] * sines[i];
    }
}
