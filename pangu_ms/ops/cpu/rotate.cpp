// Rotary embedding of the dimensions start .. start + 2h - 1 of each head; the others pass through; and its angles.
#include <algorithm>

#include "call.h"
#include "rotate.h"
#include "threads.h"

// x [B, T, heads, D], cos and sin [B, T, 1, h], start, interleaved -> y [B, T, heads, D]
OPERATOR(Rotate) {
    const int64_t length = call.dim(0, 1), heads = call.dim(0, 2), dim = call.dim(0, 3), half = call.dim(1, 3);
    const bool shared = call.dim(1, 0) == 1;            // one set of angles for all sequences
    const float *x = call.floats(0), *cosines = call.floats(1), *sines = call.floats(2);
    const int64_t start = call.whole(3);
    const bool interleaved = *call.bools(4);
    float* y = call.floats(5);
    in_chunks(call.dim(0, 0) * length, heads * dim, [=](int64_t begin, int64_t end) {
        memcpy(y + begin * heads * dim, x + begin * heads * dim, (end - begin) * heads * dim * sizeof(float));
        for (int64_t row = begin; row < end; row++) {
            const int64_t angle = (shared ? row % length : row) * half;
            const float *c = cosines + angle, *s = sines + angle;
            for (int64_t head = 0; head < heads; head++) {
                const int64_t at = (row * heads + head) * dim + start;
                turn(x + at, c, s, half, interleaved, y + at);
            }
        }
    });
}

ONE_SHAPE(Rotate) { return shape_of(0, ndims, shapes); }

// position int32 [B, T], coarse [.., 2h] and fine [S, 2h]: cosines, then sines, of multiples of S and of 0 .. S - 1
// -> cos and sin [B, T, 1, h] of the sums
OPERATOR(RotaryAngles) {
    const int64_t stride = call.dim(2, 0), half = call.dim(2, 1) / 2, last = call.dim(1, 0) - 1;
    in_chunks(call.size(0), 4 * half, [=](int64_t first, int64_t end) {
        for (int64_t i = first; i < end; i++) {
            const int64_t position = std::max(call.ints(0)[i], 0);
            const float *a = call.floats(1) + std::min(position / stride, last) * 2 * half,
                        *b = call.floats(2) + position % stride * 2 * half;
            float *cosines = call.floats(3) + i * half, *sines = call.floats(4) + i * half;
#pragma omp simd
            for (int64_t j = 0; j < half; j++) {
                cosines[j] = a[j] * b[j] - a[half + j] * b[half + j];
                sines[j] = a[half + j] * b[j] + a[j] * b[half + j];
            }
        }
    });
}

MANY_SHAPES(RotaryAngles) {
    if (ndims[0] != 2) return {{-2}, {-2}};
    const Shape shape{shapes[0][0], shapes[0][1], 1, shapes[2][1] / 2};
    return {shape, shape};
}
