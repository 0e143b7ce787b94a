// Gradient of the rotary embedding: the opposite turn.
#include "call.h"
#include "rotate.h"
#include "threads.h"

// The arguments of Rotate, dy [B, T, heads, D] -> dx
OPERATOR(RotateGradient) {
    const int64_t length = call.dim(0, 1), heads = call.dim(0, 2), dim = call.dim(0, 3), half = call.dim(1, 3);
    const bool shared = call.dim(1, 0) == 1;            // one set of angles for all sequences
    const float *cosines = call.floats(1), *sines = call.floats(2), *dy = call.floats(5);
    const int64_t start = call.whole(3);
    const bool interleaved = *call.bools(4);
    float* dx = call.floats(6);
    in_chunks(call.dim(0, 0) * length, heads * dim, [=](int64_t begin, int64_t end) {
        memcpy(dx + begin * heads * dim, dy + begin * heads * dim, (end - begin) * heads * dim * sizeof(float));
        for (int64_t row = begin; row < end; row++) {
            const int64_t angle = (shared ? row % length : row) * half;
            for (int64_t head = 0; head < heads; head++) {
                const int64_t at = (row * heads + head) * dim + start;
                turn_back(dy + at, cosines + angle, sines + angle, half, interleaved, dx + at);
            }
        }
    });
}

ONE_SHAPE(RotateGradient) { return shape_of(0, ndims, shapes); }
