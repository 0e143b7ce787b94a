// Rotary embedding of one vector x [2 * half]: dimension i is paired with half + i, interleaved 2 * i with 2 * i + 1.
#pragma once
#include <cstdint>

// way: 1 forth, -1 back. y may be x.
template <int64_t STRIDE>
inline void turn_pairs(const float* x, const float* cosines, const float* sines, int64_t half, int64_t apart, float way,
                       float* y) {
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float first = x[STRIDE * i], second = x[STRIDE * i + apart], sine = way * sines[i];
        y[STRIDE * i] = first * cosines[i] - second * sine;
        y[STRIDE * i + apart] = second * cosines[i] + first * sine;
    }
}

inline void turn(const float* x, const float* cosines, const float* sines, int64_t half, bool interleaved, float* y,
                 float way = 1) {
    if (interleaved) turn_pairs<2>(x, cosines, sines, half, 1, way, y);
    else turn_pairs<1>(x, cosines, sines, half, half, way, y);
}

// The opposite turn, which is also the gradient of `turn`.
inline void turn_back(const float* y, const float* cosines, const float* sines, int64_t half, bool interleaved,
                      float* x) {
    turn(y, cosines, sines, half, interleaved, x, -1);
}
