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

// One token's products [N*(N+2)], which are overwritten, and streams -> x [H], post [N], mix [N, N].
static void read_token(float* m, const float* streams, const float* alpha, const float* beta, int64_t n, int64_t hidden,
                       int64_t rounds, float* x, float* post, float* mix) {
    for (int64_t g = 0; g < n * (n + 2); g++) m[g] = m[g] * alpha[std::min<int64_t>(g / n, 2)] + beta[g];
    for (int64_t i = 0; i < n; i++) {
        m[i] = sigmoid(m[i]) + GATE_EPS;
        post[i] = 2 * sigmoid(m[n + i]);
    }
    weighted_sum(m, streams, n, hidden, x);
    sinkhorn(m + 2 * n, n, rounds, mix);
}

// out[j] = post[j] * y + sum_i mix[i, j] * streams[i]
static void write_token(const float* y, const float* post, const float* mix, const float* streams, int64_t n,
                        int64_t hidden, float* out) {
    for (int64_t j = 0; j < n; j++) {
        float* to = out + j * hidden;
#pragma omp simd
        for (int64_t h = 0; h < hidden; h++) to[h] = post[j] * y[h];
        for (int64_t i = 0; i < n; i++) {
            const float part = mix[i * n + j];
#pragma omp simd
            for (int64_t h = 0; h < hidden; h++) to[h] += part * streams[i * hidden + h];
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
        for (int64_t t = first; t < first + tokens; t++)
            read_token(products.data() + (t - first) * gates, streams + t * width, alpha, beta, n, hidden, rounds,
                       x + t * hidden, post + t * n, mix + t * n * n);
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
            write_token(y + t * hidden, post + t * n, mix + t * n * n, streams + t * width, n, hidden, out + t * width);
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

// ---- decoding: reading with the norm behind it, writing with the norm before it, for few tokens

// The inputs norm [H], gamma, phi, alpha, beta, eps, rounds, eps of the norm of a read, from input `i` on.
static void few_reads(const Call& call, int i, const float* streams, int64_t tokens, int64_t n, int64_t hidden,
                      float* x, float* post, float* mix) {
    const int64_t width = n * hidden, gates = n * (n + 2);
    const float* phi = call.floats(i + 2);
    float *normed = scratch(OPERATOR_OWN, tokens * (width + gates)), *products = normed + tokens * width;
    for (int64_t t = 0; t < tokens; t++)
        rms_norm(streams + t * width, call.floats(i + 1), call.real(i + 5), width, normed + t * width);
    in_chunks(gates, 4 * width, [=](int64_t first, int64_t last) {
        few_dots(phi, first, last, normed, tokens, width, [=](int64_t g, int64_t t, float v) {
            products[t * gates + g] = v;
        });
    });
    for (int64_t t = 0; t < tokens; t++) {
        read_token(products + t * gates, streams + t * width, call.floats(i + 3), call.floats(i + 4), n, hidden,
                   call.whole(i + 6), x + t * hidden, post + t * n, mix + t * n * n);
        rms_norm(x + t * hidden, call.floats(i), call.real(i + 7), hidden, x + t * hidden);
    }
}

// The inputs y, norm [H], post, mix, streams of a write, and the eps of its norm -> streams
static void few_writes(const Call& call, float eps, float* out) {
    const int64_t n = call.dim(4, 2), hidden = call.dim(4, 3), tokens = call.dim(4, 0) * call.dim(4, 1);
    float* normed = scratch(OPERATOR_OWN, hidden);
    for (int64_t t = 0; t < tokens; t++) {
        rms_norm(call.floats(0) + t * hidden, call.floats(1), eps, hidden, normed);
        write_token(normed, call.floats(2) + t * n, call.floats(3) + t * n * n, call.floats(4) + t * n * hidden, n,
                    hidden, out + t * n * hidden);
    }
}

// streams, then the inputs of a read -> x, post, mix
OPERATOR(DecodingRead) {
    few_reads(call, 1, call.floats(0), call.dim(0, 0) * call.dim(0, 1), call.dim(0, 2), call.dim(0, 3), call.floats(9),
              call.floats(10), call.floats(11));
}

MANY_SHAPES(DecodingRead) { return HyperConnectionReadInferShape(ndims, shapes, nullptr); }

// the inputs of a write, eps -> streams
OPERATOR(DecodingWrite) { few_writes(call, call.real(5), call.floats(6)); }

ONE_SHAPE(DecodingWrite) { return shape_of(4, ndims, shapes); }

// the inputs of a write, then those of the next read, whose last eps is of both norms -> streams, x, post, mix
OPERATOR(DecodingTurn) {
    few_writes(call, call.real(12), call.floats(13));
    few_reads(call, 5, call.floats(13), call.dim(4, 0) * call.dim(4, 1), call.dim(4, 2), call.dim(4, 3),
              call.floats(14), call.floats(15), call.floats(16));
}

MANY_SHAPES(DecodingTurn) {
    std::vector<Shape> read = HyperConnectionReadInferShape(ndims + 4, shapes + 4, nullptr);
    read.insert(read.begin(), shape_of(4, ndims, shapes));
    return read;
}
