// The rings of the cache, in place: read the rows before the new ones, then keep the last.
#include "call.h"
#include "threads.h"

// ring [B * R, D], new [B, T, D], order int32 [B, R], slots int32 [B, S], decode -> past [B, R, D]
// The last S of the rows past, new go to the slots of the ring.
OPERATOR(Remember) {
    const int64_t batch = call.dim(1, 0), length = call.dim(1, 1), dim = call.dim(1, 2), size = call.dim(2, 1),
                  kept = call.dim(3, 1);
    float *ring = call.floats(0), *past = call.floats(5);
    const float* fresh = call.floats(1);
    const int32_t *order = call.ints(2), *slots = call.ints(3);
    in_chunks(batch * size, dim, [=](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) memcpy(past + i * dim, ring + order[i] * dim, dim * sizeof(float));
    });
    in_chunks(batch * kept, dim, [=](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) {
            const int64_t b = i / kept, row = size + length - kept + i % kept;
            const float* from = row < size ? past + (b * size + row) * dim : fresh + (b * length + row - size) * dim;
            memcpy(ring + slots[i] * dim, from, dim * sizeof(float));
        }
    });
}

ONE_SHAPE(Remember) {
    if (ndims[1] != 3 || ndims[2] != 2) return {-2};
    return {shapes[1][0], shapes[2][1], shapes[1][2]};
}
