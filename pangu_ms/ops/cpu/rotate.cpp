// Half-split rotary embedding of the dimensions start .. start + 2h - 1 of each head; the others pass through.
#include "call.h"
#include "rotate.h"
#include "threads.h"

// x [B, T, heads, D], cos and sin [B, T, 1, h], start -> y [B, T, heads, D]
OPERATOR(Rotate) {
    const int64_t length = call.dim(0, 1), heads = call.dim(0, 2), dim = call.dim(0, 3), half = call.dim(1, 3);
    const bool shared = call.dim(1, 0) == 1;            // one set of angles for all sequences
    const float *x = call.floats(0), *cosines = call.floats(1), *sines = call.floats(2);
    const int64_t start = call.whole(3);
    float* y = call.floats(4);
    in_chunks(call.dim(0, 0) * length, heads * dim, [=](int64_t begin, int64_t end) {
        memcpy(y + begin * heads * dim, x + begin * heads * dim, (end - begin) * heads * dim * sizeof(float));
        for (int64_t row = begin; row < end; row++) {
            const int64_t angle = (shared ? row % length : row) * half;
            const float *c = cosines + angle, *s = sines + angle;
            for (int64_t head = 0; head < heads; head++) {
                const int64_t at = (row * heads + head) * dim + start;
                turn(x + at, c, s, half, y + at);
            }
        }
    });
}

ONE_SHAPE(Rotate) { return shape_of(0, ndims, shapes); }
