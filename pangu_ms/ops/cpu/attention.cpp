// Attention: the masked softmax, and the absorbed form, which reads latent rows as they lie in the cache.
#include <algorithm>

#include "call.h"
#include "lanes.h"
#include "threads.h"

// softmax(x * scale) of the entries that `seen` marks; the others become 0.
static void softmax(const float* x, const bool* seen, float scale, int64_t width, float* y) {
    float top = -INFINITY, total = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < width; i++) {
        y[i] = seen[i] ? x[i] * scale : -INFINITY;
        top = y[i] > top ? y[i] : top;
    }
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < width; i++) total += y[i] = exponential(y[i] - top);
    const float share = 1.0f / total;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) y[i] *= share;
}

// x [A, B, C, S], visible bool, each of its first three dimensions as in x or 1, scale -> y [A, B, C, S]
OPERATOR(MaskedSoftmax) {
    const int64_t rows = call.size(0) / call.dim(0, 3), width = call.dim(0, 3);
    const float *x = call.floats(0), scale = call.real(2);
    const bool* visible = call.bools(1);
    float* y = call.floats(3);
    const int64_t dims[3] = {call.dim(0, 0), call.dim(0, 1), call.dim(0, 2)};
    int64_t stride[3], step = width;
    for (int axis = 2; axis >= 0; axis--) {
        stride[axis] = call.dim(1, axis) == 1 ? 0 : step;
        step *= call.dim(1, axis);
    }
    in_chunks(rows, width * 8, [=](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            const int64_t c = row % dims[2], b = row / dims[2] % dims[1], a = row / dims[2] / dims[1];
            softmax(x + row * width, visible + a * stride[0] + b * stride[1] + c * stride[2], scale, width,
                    y + row * width);
        }
    });
}

ONE_SHAPE(MaskedSoftmax) { return shape_of(0, ndims, shapes); }

inline float dot(const float* a, const float* b, int64_t n) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) total += a[i] * b[i];
    return total;
}

inline void add(float part, const float* from, int64_t n, float* to) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] += part * from[i];
}

// q [B, T, heads, nope + rope], sinks [S0, D], keys [..., D] for each sequence or each query, visible bool [B, T, 1, S0 + S],
// kv_b [heads * (nope + value), latent], scale -> [B, T, heads * value]; D = latent + rope
OPERATOR(AbsorbedAttention) {
    const int64_t batch = call.dim(0, 0), length = call.dim(0, 1), heads = call.dim(0, 2), head_dim = call.dim(0, 3),
                  sinks = call.dim(1, 0), dim = call.dim(1, 1), latent = call.dim(4, 1), total = call.dim(3, 3),
                  own = total - sinks, rope = dim - latent, nope = head_dim - rope,
                  value = call.dim(4, 0) / heads - nope, groups = call.size(2) / (own * dim);
    const float *q = call.floats(0), *sink = call.floats(1), *keys = call.floats(2), *kv_b = call.floats(4),
                scale = call.real(5);
    const bool* visible = call.bools(3);
    const bool shared = call.dim(3, 0) == 1;
    float* y = call.floats(6);
    parallel(batch * length * heads, [=](int64_t item) {
        const int64_t head = item % heads, row = item / heads;
        const float *from = q + item * head_dim, *up = kv_b + head * (nope + value) * latent,
                    *rows = keys + (groups == batch ? row / length : row) * own * dim;
        const bool* seen = visible + (shared ? row % length : row) * total;
        float *query = scratch(WORK_OWN, dim + latent + total), *mean = query + dim, *score = mean + latent;
        std::fill(query, query + latent, 0.0f);
        for (int64_t i = 0; i < nope; i++) add(from[i], up + i * latent, latent, query);
        memcpy(query + latent, from + nope, rope * sizeof(float));
        const auto key = [=](int64_t s) { return s < sinks ? sink + s * dim : rows + (s - sinks) * dim; };
        for (int64_t s = 0; s < total; s++) score[s] = seen[s] ? dot(query, key(s), dim) : 0.0f;
        softmax(score, seen, scale, total, score);
        std::fill(mean, mean + latent, 0.0f);
        for (int64_t s = 0; s < total; s++)
            if (seen[s]) add(score[s], key(s), latent, mean);
        for (int64_t v = 0; v < value; v++) y[item * value + v] = dot(mean, up + (nope + v) * latent, latent);
    });
}

ONE_SHAPE(AbsorbedAttention) {
    if (ndims[0] != 4) return {-2};
    const int64_t *q = shapes[0], heads = q[2], rope = shapes[1][1] - shapes[4][1];
    return {q[0], q[1], shapes[4][0] - heads * (q[3] - rope)};
}
