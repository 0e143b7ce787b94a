// The residual of N streams: read, write, merge. Streams are [B, T, N, H].
#include <algorithm>
#include <vector>

#include "call.h"
#include "hyper_connection.h"

// x = sum_i gate[i] * stream[i]
static void weighted_sum(const float* gate, const float* streams, int64_t n, int64_t hidden, float* x) {
    std::fill(x, x + hidden, 0.0f);
    for (int64_t i = 0; i < n; i++) {
#pragma omp simd
        for (int64_t h = 0; h < hidden; h++) x[h] += gate[i] * streams[i * hidden + h];
    }
}

// Logits [n, n] -> softmax over rows, which is the first step over rows; then columns, rows, columns and so on.
static void sinkhorn(const float* logits, int64_t n, int64_t rounds, float* a) {
    for (int64_t i = 0; i < n; i++) {
        const float* row = logits + i * n;
        const float top = *std::max_element(row, row + n);
        float total = 0;
        for (int64_t j = 0; j < n; j++) total += a[i * n + j] = exponential(row[j] - top);
        for (int64_t j = 0; j < n; j++) a[i * n + j] = a[i * n + j] / total + GATE_EPS;
    }
    for (int64_t round = 0; round < rounds; round++) {
        for (int64_t i = 0; i < n && round; i++) {
            float total = GATE_EPS;
            for (int64_t j = 0; j < n; j++) total += a[i * n + j];
            for (int64_t j = 0; j < n; j++) a[i * n + j] /= total;
        }
        for (int64_t j = 0; j < n; j++) {
            float total = GATE_EPS;
            for (int64_t i = 0; i < n; i++) total += a[i * n + j];
            for (int64_t i = 0; i < n; i++) a[i * n + j] /= total;
        }
    }
}

// streams, gamma [N*H], phi [N*(N+2), N*H], alpha [3], beta [N*(N+2)], eps, rounds
// -> x [B, T, H], post [B, T, N, 1], mix [B, T, N, N]
OPERATOR(HyperConnectionRead) {
    const int64_t n = call.dim(0, 2), hidden = call.dim(0, 3), width = n * hidden, gates = n * (n + 2);
    const float *streams = call.floats(0), *gamma = call.floats(1), *phi = call.floats(2), *alpha = call.floats(3),
                *beta = call.floats(4), eps = call.real(5);
    const int64_t rounds = call.whole(6);
    float *x = call.floats(7), *post = call.floats(8), *mix = call.floats(9);
    by_block(call.dim(0, 0) * call.dim(0, 1), [=](int64_t first, int64_t tokens) {
        std::vector<float> products(tokens * gates);
        gate_products(streams + first * width, tokens, width, gamma, phi, gates, eps, products.data());
        for (int64_t t = 0; t < tokens; t++) {
            float* m = products.data() + t * gates;
            for (int64_t g = 0; g < gates; g++) m[g] = m[g] * alpha[std::min<int64_t>(g / n, 2)] + beta[g];
            for (int64_t i = 0; i < n; i++) {
                m[i] = sigmoid(m[i]) + GATE_EPS;
                post[(first + t) * n + i] = 2 * sigmoid(m[n + i]);
            }
            weighted_sum(m, streams + (first + t) * width, n, hidden, x + (first + t) * hidden);
            sinkhorn(m + 2 * n, n, rounds, mix + (first + t) * n * n);
        }
    });
}

MANY_SHAPES(HyperConnectionRead) {
    if (ndims[0] != 4) return {{-2}, {-2}, {-2}};
    const int64_t *s = shapes[0];
    return {{s[0], s[1], s[3]}, {s[0], s[1], s[2], 1}, {s[0], s[1], s[2], s[2]}};
}

// y [B, T, H], post, mix, streams -> post[j] * y + sum_i mix[i, j] * streams[i], [B, T, N, H]
OPERATOR(HyperConnectionWrite) {
    const int64_t n = call.dim(3, 2), hidden = call.dim(3, 3), width = n * hidden;
    const float *y = call.floats(0), *post = call.floats(1), *mix = call.floats(2), *streams = call.floats(3);
    float* out = call.floats(4);
    in_chunks(call.dim(3, 0) * call.dim(3, 1), n * width, [=](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; t++)
            for (int64_t j = 0; j < n; j++) {
                float* to = out + t * width + j * hidden;
                const float gate = post[t * n + j];
#pragma omp simd
                for (int64_t h = 0; h < hidden; h++) to[h] = gate * y[t * hidden + h];
                for (int64_t i = 0; i < n; i++) {
                    const float* from = streams + t * width + i * hidden;
                    const float part = mix[(t * n + i) * n + j];
#pragma omp simd
                    for (int64_t h = 0; h < hidden; h++) to[h] += part * from[h];
                }
            }
    });
}

ONE_SHAPE(HyperConnectionWrite) { return shape_of(3, ndims, shapes); }

// streams, gamma [N*H], phi [N, N*H], alpha [1], beta [N], eps -> [B, T, H]
OPERATOR(HyperConnectionMerge) {
    const int64_t n = call.dim(0, 2), hidden = call.dim(0, 3), width = n * hidden;
    const float *streams = call.floats(0), *gamma = call.floats(1), *phi = call.floats(2), *alpha = call.floats(3),
                *beta = call.floats(4), eps = call.real(5);
    float* y = call.floats(6);
    by_block(call.dim(0, 0) * call.dim(0, 1), [=](int64_t first, int64_t tokens) {
        std::vector<float> gates(tokens * n);
        gate_products(streams + first * width, tokens, width, gamma, phi, n, eps, gates.data());
        for (int64_t t = 0; t < tokens; t++) {
            float* m = gates.data() + t * n;
            for (int64_t i = 0; i < n; i++) m[i] = sigmoid(m[i] * alpha[0] + beta[i]) + GATE_EPS;
            weighted_sum(m, streams + (first + t) * width, n, hidden, y + (first + t) * hidden);
        }
    });
}

ONE_SHAPE(HyperConnectionMerge) {
    if (ndims[0] != 4) return {-2};
    return {shapes[0][0], shapes[0][1], shapes[0][3]};
}
