// What a decoding step does to its few new tokens, several operators in one: a launch costs more than most of them.
// The tensors of the cache are written in place: position p of a sequence lies in row p mod R of its R rows.
#include <algorithm>
#include <vector>

#include "call.h"
#include "decoding.h"
#include "linear.h"
#include "norm.h"
#include "product.h"
#include "router.h"
#include "threads.h"

// x [B, T, H], down [Q, H], ring [B * R, Q], conv [Q, 1, k], norm [Q], up [heads * D, Q], position, cos, sin, nope,
// eps, interleaved -> q_latent [B, T, Q], q [B, T, heads * D]
OPERATOR(DecodingQuery) {
    const Tokens tokens = tokens_of(call, 6);
    const Angles angles = angles_of(call, 7, *call.bools(11));
    const int64_t hidden = call.dim(1, 1), rank = call.dim(1, 0), width = call.dim(5, 0), nope = call.whole(9),
                  head = nope + 2 * angles.half, rows = tokens.count();
    float *in = scratch(COMPOSED_OWN, 2 * rows * rank), *latent = call.floats(12), *q = call.floats(13);
    linear(call.floats(0), call.floats(1), rows, hidden, rank, in);
    ring_conv(call, 2, tokens, in, rank, rank, in + rows * rank);
    for (int64_t row = 0; row < rows; row++)
        rms_norm(in + (rows + row) * rank, call.floats(4), call.real(10), rank, latent + row * rank);
    linear(latent, call.floats(5), rows, rank, width, q);
    for (int64_t at = 0; at < rows * width; at += head) angles.apply(at / width, q + at + nope, q + at + nope);
}

MANY_SHAPES(DecodingQuery) {
    if (ndims[0] != 3) return {{-2}, {-2}};
    return {{shapes[0][0], shapes[0][1], shapes[1][0]}, {shapes[0][0], shapes[0][1], shapes[5][0]}};
}

// x [B, T, H], down [L + P, H], ring [B * R, L], conv [L, 1, k], norm [L], kept [B * S, L + P], position, cos, sin,
// eps, interleaved -> the latent rows [B, T, L + P], which `kept` then holds
OPERATOR(DecodingRow) {
    const Tokens tokens = tokens_of(call, 6);
    const Angles angles = angles_of(call, 7, *call.bools(10));
    const int64_t hidden = call.dim(1, 1), width = call.dim(1, 0), latent = call.size(4), rows = tokens.count(),
                  places = call.dim(5, 0) / tokens.batch;
    float *kv = scratch(COMPOSED_OWN, rows * (width + latent)), *mixed = kv + rows * width, *kept = call.floats(5),
          *y = call.floats(11);
    linear(call.floats(0), call.floats(1), rows, hidden, width, kv);
    ring_conv(call, 2, tokens, kv, width, latent, mixed);
    for (int64_t row = 0; row < rows; row++) {
        rms_norm(mixed + row * latent, call.floats(4), call.real(9), latent, y + row * width);
        angles.apply(row, kv + row * width + latent, y + row * width + latent);
        memcpy(kept + tokens.slot(row, places) * width, y + row * width, width * sizeof(float));
    }
}

ONE_SHAPE(DecodingRow) {
    if (ndims[0] != 3) return {-2};
    return {shapes[0][0], shapes[0][1], shapes[1][0]};
}

// x [B, T, H]; of queries, then keys, then values: weight [N * D, G * D or G * Dv, H] and bias [..] or [0]: there is
// none; or the first weight and bias hold the rows of all three, and the others are [0]; norm [D] of each head's keys, or
// [0]; kept keys [B * S, G * D] and values [B * S, G * Dv], position, cos, sin, width [D], whose shape alone counts, eps,
// interleaved -> q [B, T, N, D]. Of each head of q and keys the first 2 * half channels are turned; keys and values are
// then kept.
OPERATOR(DecodingGroupedRows) {
    const Tokens tokens = tokens_of(call, 10);
    const Angles angles = angles_of(call, 11, *call.bools(15));
    const int64_t hidden = call.dim(0, 2), head = call.dim(13, 0), rows = tokens.count(),
                  places = call.dim(8, 0) / tokens.batch,
                  widths[3] = {call.dim(16, 2) * head, call.dim(8, 1), call.dim(9, 1)};
    float *keys = scratch(COMPOSED_OWN, rows * (widths[1] + widths[2])), *values = keys + rows * widths[1],
          *made[3] = {call.floats(16), keys, values};
    const float *weight = nullptr, *bias = nullptr;
    for (int i = 0; i < 3; i++) {
        const int at = 1 + 2 * i;
        if (call.size(at)) weight = call.floats(at), bias = call.size(at + 1) ? call.floats(at + 1) : nullptr;
        linear(call.floats(0), weight, rows, hidden, widths[i], made[i], bias);
        weight += widths[i] * hidden;                   // where the next rows lie, if they have no weight of their own
        if (bias) bias += widths[i];
    }
    for (int64_t at = 0; call.size(7) && at < rows * widths[1]; at += head)
        rms_norm(keys + at, call.floats(7), call.real(14), head, keys + at);
    for (int i = 0; i < 2; i++) angles.apply_to_heads(made[i], rows, widths[i], head);
    for (int i = 1; i < 3; i++)
        for (int64_t row = 0; row < rows; row++)
            memcpy(call.floats(7 + i) + tokens.slot(row, places) * widths[i], made[i] + row * widths[i],
                   widths[i] * sizeof(float));
}

ONE_SHAPE(DecodingGroupedRows) {
    if (ndims[0] != 3) return {-2};
    const int64_t others = ndims[3] == 2 ? 0 : shapes[8][1] + shapes[9][1];     // rows of keys and values
    return {shapes[0][0], shapes[0][1], (shapes[1][0] - others) / shapes[13][0], shapes[13][0]};
}

// embedding [B, T, H], norm [H], hidden [B, T, H], norm [H], projection [H, 2 * H], eps -> x [B, T, H]
OPERATOR(DecodingJoin) {
    const int64_t hidden = call.dim(4, 0), rows = call.size(0) / hidden;
    float* both = scratch(COMPOSED_OWN, rows * 2 * hidden);
    for (int64_t row = 0; row < rows; row++)
        for (int half = 0; half < 2; half++)
            rms_norm(call.floats(2 * half) + row * hidden, call.floats(2 * half + 1), call.real(5), hidden,
                     both + (2 * row + half) * hidden);
    linear(both, call.floats(4), rows, 2 * hidden, hidden, call.floats(6));
}

ONE_SHAPE(DecodingJoin) { return shape_of(0, ndims, shapes); }

// y [B, T, H], norm [H] of y, x [B, T, H], eps -> x and the norm of y added
OPERATOR(DecodingAdd) {
    const int64_t hidden = call.size(1);
    for (int64_t at = 0; at < call.size(0); at += hidden) {
        const float* x = call.floats(2) + at;
        float* sum = call.floats(4) + at;
        rms_norm(call.floats(0) + at, call.floats(1), call.real(3), hidden, sum);
#pragma omp simd
        for (int64_t i = 0; i < hidden; i++) sum[i] += x[i];
    }
}

ONE_SHAPE(DecodingAdd) { return shape_of(0, ndims, shapes); }

// x and y [B, T, H], norm of y, [H] or [0]: it has none, norm [H] of the sum, eps -> the sum, and its norm
OPERATOR(DecodingResidual) {
    const int64_t hidden = call.size(3);
    const float eps = call.real(4);
    for (int64_t at = 0; at < call.size(0); at += hidden) {
        const float *x = call.floats(0) + at, *y = call.floats(1) + at;
        float* sum = call.floats(5) + at;
        if (call.size(2)) rms_norm(y, call.floats(2), eps, hidden, sum);
        else memcpy(sum, y, hidden * sizeof(float));
#pragma omp simd
        for (int64_t i = 0; i < hidden; i++) sum[i] += x[i];
        rms_norm(sum, call.floats(3), eps, hidden, call.floats(6) + at);
    }
}

MANY_SHAPES(DecodingResidual) { return {shape_of(0, ndims, shapes), shape_of(0, ndims, shapes)}; }

// x [B, T, H], gate [E, H], bias [E], scale [K], factor [1, E] of the chosen, the routed experts' gate and up [E, F, H]
// and down [E, H, F], the shared one's gate and up [S, H] and down [H, S], softmax, grouped, normalise -> y [B, T, H],
// ids int32 and weights [B, T, K]
OPERATOR(DecodingExperts) {
    const int64_t experts = call.dim(1, 0), hidden = call.dim(1, 1), rows = call.size(0) / hidden, k = call.size(3),
                  width = call.dim(5, 1), shared = call.dim(8, 0), pairs = rows * k;
    const float *x = call.floats(0), *gates = call.floats(5), *ups = call.floats(6), *downs = call.floats(7);
    float *y = call.floats(14), *weights = call.floats(16);
    int32_t* ids = static_cast<int32_t*>(call.data[15]);

    float *logits = scratch(COMPOSED_OWN, rows * (experts + 2 * shared + hidden) + pairs * (2 * width + 2 * hidden)),
          *inner = logits + rows * experts, *own = inner + 2 * rows * shared, *gate = own + rows * hidden,
          *in = gate + 2 * pairs * width, *out = in + pairs * hidden;
    linear(x, call.floats(1), rows, hidden, experts, logits);
    route(logits, call.floats(2), call.floats(3), rule_of(call, 11), rows, experts, k, ids, weights);
    for (int64_t i = 0; i < pairs; i++) weights[i] *= call.floats(4)[ids[i]];

    // The pairs of (token, choice), expert by expert: what lies together reads the expert's matrices once.
    std::vector<int64_t> order(pairs), start;
    for (int64_t p = 0; p < pairs; p++) order[p] = p;
    std::stable_sort(order.begin(), order.end(), [=](int64_t a, int64_t b) { return ids[a] < ids[b]; });
    for (int64_t i = 0; i < pairs; i++) {
        if (i == 0 || ids[order[i]] != ids[order[i - 1]]) start.push_back(i);
        memcpy(in + i * hidden, x + order[i] / k * hidden, hidden * sizeof(float));
    }
    const int64_t groups = start.size();
    start.push_back(pairs);

    // Two rounds of pieces: the inner values of each group, then the outputs; the last group is the shared expert.
    constexpr int64_t PARTS = 4;
    const auto products = [=](const float* weight, int64_t first, int64_t last, const float* from, int64_t m, int64_t n,
                              int64_t wide, float* to) {
        few_dots(weight, first, last, from, m, n, [=](int64_t row, int64_t t, float v) { to[t * wide + row] = v; });
    };
    parallel((groups + 1) * PARTS, [&](int64_t item) {
        const int64_t g = item / PARTS, part = item % PARTS;
        const bool routed = g < groups;
        const int64_t m = routed ? start[g + 1] - start[g] : rows, wide = routed ? width : shared,
                      first = wide * part / PARTS, last = wide * (part + 1) / PARTS;
        const int64_t matrix = routed ? ids[order[start[g]]] * width * hidden : 0;
        const float *from = routed ? in + start[g] * hidden : x;
        float *a = routed ? gate + 2 * start[g] * width : inner, *b = a + m * wide;
        products(routed ? gates + matrix : call.floats(8), first, last, from, m, hidden, wide, a);
        products(routed ? ups + matrix : call.floats(9), first, last, from, m, hidden, wide, b);
        for (int64_t t = 0; t < m; t++) {
#pragma omp simd
            for (int64_t i = t * wide + first; i < t * wide + last; i++) a[i] *= sigmoid(a[i]) * b[i];
        }
    });
    parallel((groups + 1) * PARTS, [&](int64_t item) {
        const int64_t g = item / PARTS, part = item % PARTS;
        const bool routed = g < groups;
        const int64_t m = routed ? start[g + 1] - start[g] : rows, wide = routed ? width : shared,
                      first = hidden * part / PARTS, last = hidden * (part + 1) / PARTS;
        const float* weight = routed ? downs + ids[order[start[g]]] * width * hidden : call.floats(10);
        products(weight, first, last, routed ? gate + 2 * start[g] * width : inner, m, wide, hidden,
                 routed ? out + start[g] * hidden : own);
    });
    memcpy(y, own, rows * hidden * sizeof(float));
    for (int64_t i = 0; i < pairs; i++) {
        const int64_t p = order[i];
        float* to = y + p / k * hidden;
#pragma omp simd
        for (int64_t h = 0; h < hidden; h++) to[h] += weights[p] * out[i * hidden + h];
    }
}

MANY_SHAPES(DecodingExperts) {
    Shape shape = shape_of(0, ndims, shapes);
    if (shape.back() == -2) return {shape, shape, shape};
    Shape chosen = shape;
    chosen.back() = shapes[3][0];
    return {shape, chosen, chosen};
}
