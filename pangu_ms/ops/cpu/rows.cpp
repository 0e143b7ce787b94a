// The latent rows of the cache: the latent normed, then the key part that all heads share, turned.
#include "call.h"
#include "norm.h"
#include "rotate.h"
#include "threads.h"

// latent [B, T, L], kv [B, T, L + R], whose last R are the key part, weight [L], cos and sin [B, T, 1, R/2], eps,
// interleaved -> [B, T, L + R]
OPERATOR(LatentRows) {
    const int64_t length = call.dim(1, 1), latent = call.dim(0, 2), width = call.dim(1, 2), half = (width - latent) / 2;
    const bool shared = call.dim(3, 0) == 1, interleaved = *call.bools(6);  // shared: angles for all sequences
    const float *x = call.floats(0), *kv = call.floats(1), *weight = call.floats(2), *cosines = call.floats(3),
                *sines = call.floats(4), eps = call.real(5);
    float* y = call.floats(7);
    in_chunks(call.dim(1, 0) * length, width, [=](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            const int64_t angle = (shared ? row % length : row) * half;
            rms_norm(x + row * latent, weight, eps, latent, y + row * width);
            turn(kv + row * width + latent, cosines + angle, sines + angle, half, interleaved,
                 y + row * width + latent);
        }
    });
}

ONE_SHAPE(LatentRows) { return shape_of(1, ndims, shapes); }
