// Gradients of the norm, the latent rows that hold a norm, and the elementwise SwiGLU.
#include "call.h"
#include "lanes.h"
#include "norm.h"
#include "rotate.h"
#include "sums.h"

// x [..., D], weight [D], eps, dy -> dx, dweight
OPERATOR(RmsNormGradient) {
    const int64_t width = call.size(1), rows = call.size(0) / width;
    const float *x = call.floats(0), *weight = call.floats(1), eps = call.real(2), *dy = call.floats(3);
    float* dx = call.floats(4);
    sum_over_rows(rows, width, call.floats(5), [=](int64_t first, int64_t last, float* dweight) {
        for (int64_t r = first * width; r < last * width; r += width)
            rms_norm_gradient(x + r, weight, eps, width, dy + r, dx + r, dweight);
    });
}

SHAPES_OF(RmsNormGradient, 0, 1)

// The arguments of LatentRows, dy [B, T, L + R] -> dlatent, dkv, dweight
OPERATOR(LatentRowsGradient) {
    const int64_t length = call.dim(1, 1), latent = call.dim(0, 2), width = call.dim(1, 2), half = (width - latent) / 2;
    const bool shared = call.dim(3, 0) == 1, interleaved = *call.bools(6);  // shared: angles for all sequences
    const float *x = call.floats(0), *weight = call.floats(2), *cosines = call.floats(3), *sines = call.floats(4),
                eps = call.real(5), *dy = call.floats(7);
    float *dx = call.floats(8), *dkv = call.floats(9);
    sum_over_rows(call.dim(1, 0) * length, latent, call.floats(10), [=](int64_t first, int64_t last, float* dweight) {
        for (int64_t row = first; row < last; row++) {
            const int64_t angle = (shared ? row % length : row) * half;
            const float* d = dy + row * width;
            float* to = dkv + row * width;
            rms_norm_gradient(x + row * latent, weight, eps, latent, d, dx + row * latent, dweight);
            std::fill(to, to + latent, 0.0f);           // of kv, only the key part is read
            turn_back(d + latent, cosines + angle, sines + angle, half, interleaved, to + latent);
        }
    });
}

SHAPES_OF(LatentRowsGradient, 0, 1, 2)

// gate, up, dy [...] -> dgate, dup
OPERATOR(SwigluGradient) {
    const float *gate = call.floats(0), *up = call.floats(1), *dy = call.floats(2);
    float *dgate = call.floats(3), *dup = call.floats(4);
    in_chunks(call.size(0), 8, [=](int64_t first, int64_t last) {
#pragma omp simd
        for (int64_t i = first; i < last; i++) {
            const float s = sigmoid(gate[i]), silu = gate[i] * s;
            dgate[i] = dy[i] * up[i] * (s + silu * (1 - s));
            dup[i] = dy[i] * silu;
        }
    });
}

SHAPES_OF(SwigluGradient, 0, 1)
