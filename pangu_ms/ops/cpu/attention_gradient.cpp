// Gradients of attention: of the masked softmax, and of the form that multiplies rows out to keys and values.
#include <algorithm>
#include <vector>

#include "attention.h"
#include "call.h"
#include "matrix.h"

// Of one row: the probabilities p and their gradient d -> d, the gradient of what the softmax was of, before its scale.
static void softmax_gradient(const float* p, float scale, int64_t width, const float* given, float* d) {
    float along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t i = 0; i < width; i++) along += p[i] * given[i];
#pragma omp simd
    for (int64_t i = 0; i < width; i++) d[i] = scale * p[i] * (given[i] - along);
}

// The arguments of MaskedSoftmax, dy -> dx
OPERATOR(MaskedSoftmaxGradient) {
    const int64_t width = call.dim(0, 3), rows = call.size(0) / width;
    const float *x = call.floats(0), scale = call.real(2), *dy = call.floats(3);
    const bool* visible = call.bools(1);
    float* dx = call.floats(4);
    const MaskRows mask(call, 1);
    in_chunks(rows, width * 8, [=](int64_t first, int64_t last) {
        float* p = scratch(WORK_OWN, width);
        for (int64_t row = first; row < last; row++) {
            softmax(x + row * width, visible + mask.at(row), scale, width, p);
            softmax_gradient(p, scale, width, dy + row * width, dx + row * width);
        }
    });
}

ONE_SHAPE(MaskedSoftmaxGradient) { return shape_of(0, ndims, shapes); }

// One head of one sequence. Queries are q_step floats apart, their outputs' gradients y_step.
struct Head {
    const float *q, *dy;                                // [length, width], [length, value]
    float* dq;
    const float *keys, *values;                         // [total, width], [total, value]
    float *dkeys, *dvalues;                             // added to
    int64_t q_step, y_step, width, value;
};

// Adds up the gradients that come from the queries first .. first + count - 1, from their probabilities computed anew.
static void queries_gradient(const Head& h, int64_t first, int64_t count, const bool* visible, int64_t sinks,
                             int64_t total, float scale, float* memory) {
    const auto [low, high] = seen_rows(visible + first * total, count, sinks, total);
    // The sinks, then the rows low .. high-1: what lies between is seen by no query here.
    const int64_t span = sinks + high - low;
    const struct { int64_t at, row, rows; } parts[2] = {{0, 0, sinks}, {sinks, low, high - low}};
    const Matrix q{h.q + first * h.q_step, h.q_step, 1}, dy{h.dy + first * h.y_step, h.y_step, 1};
    float *p = memory, *d = p + count * span, *dq = h.dq + first * h.q_step;
    for (const auto& [at, row, rows] : parts) {
        multiply(q, columns_of(h.keys + row * h.width, h.width), count, rows, h.width, p + at, span);
        multiply(dy, columns_of(h.values + row * h.value, h.value), count, rows, h.value, d + at, span);
    }
    std::vector<char> mask(span);
    for (int64_t t = 0; t < count; t++) {
        const bool* line = visible + (first + t) * total;
        for (const auto& [at, row, rows] : parts) std::copy(line + row, line + row + rows, mask.data() + at);
        softmax(p + t * span, reinterpret_cast<bool*>(mask.data()), scale, span, p + t * span);
    }
    for (const auto& [at, row, rows] : parts)
        multiply(columns_of(p + at, span), dy, rows, h.value, count, h.dvalues + row * h.value, h.value, true);
    for (int64_t t = 0; t < count; t++) softmax_gradient(p + t * span, scale, span, d + t * span, d + t * span);
    for (const auto& [at, row, rows] : parts) {
        multiply(rows_of(d + at, span), rows_of(h.keys + row * h.width, h.width), count, h.width, rows, dq, h.q_step,
                 at > 0);
        multiply(columns_of(d + at, span), q, rows, h.width, count, h.dkeys + row * h.width, h.width, true);
    }
}

// The arguments of ExpandedAttention, dy [B, T, heads * value] -> dq, dsinks, dkeys, dkv_b
OPERATOR(ExpandedAttentionGradient) {
    const int64_t batch = call.dim(0, 0), length = call.dim(0, 1), heads = call.dim(0, 2), head_dim = call.dim(0, 3),
                  sinks = call.absent(1) ? 0 : call.dim(1, 0), dim = call.dim(2, -1), latent = call.dim(4, 1),
                  total = call.dim(3, 3), own = total - sinks, rope = dim - latent, nope = head_dim - rope,
                  each = call.dim(4, 0) / heads, value = each - nope, wide = heads * each;
    const float *q = call.floats(0), *sink = call.floats(1), *keys = call.floats(2), *kv_b = call.floats(4),
                scale = call.real(5), *dy = call.floats(6);
    const bool* visible = call.bools(3);
    const bool shared = call.dim(3, 0) == 1;
    float *dq = call.floats(7), *dsinks = call.floats(8), *dkeys = call.floats(9), *dkv_b = call.floats(10);
    // Rows [B, total, D], sinks first, and their gradients; the keys and values that they are multiplied out to,
    // [B, total, heads * (nope + value)], which become gradients in place; gradients of the key part that the heads
    // share, by head.
    float *rows = scratch(OPERATOR_OWN, batch * total * (2 * dim + wide + heads * rope)),
          *drows = rows + batch * total * dim, *kv = drows + batch * total * dim, *drope = kv + batch * total * wide;
    for (int64_t b = 0; b < batch; b++) {
        std::copy(sink, sink + sinks * dim, rows + b * total * dim);
        std::copy(keys + b * own * dim, keys + (b + 1) * own * dim, rows + (b * total + sinks) * dim);
    }
    multiply_by_all(rows_of(rows, dim), columns_of(kv_b, latent), batch * total, wide, latent, kv, wide);
    parallel(batch * heads, [=](int64_t item) {
        const int64_t b = item / heads, head = item % heads, size = head_dim + value, start = head * head_dim;
        float *key = scratch(WORK_OWN, total * 2 * size + 2 * QUERIES * total), *values = key + total * head_dim,
              *dkey = key + total * size, *dvalue = dkey + total * head_dim, *memory = dkey + total * size;
        std::fill(dkey, memory, 0.0f);
        for (int64_t s = 0; s < total; s++) {
            const float* from = kv + (b * total + s) * wide + head * each;
            std::copy(from, from + nope, key + s * head_dim);
            std::copy(from + nope, from + each, values + s * value);
            const float* turned = rows + (b * total + s) * dim + latent;
            std::copy(turned, turned + rope, key + s * head_dim + nope);
        }
        const Head h{q + b * length * heads * head_dim + start, dy + (b * length * heads + head) * value,
                     dq + b * length * heads * head_dim + start, key, values, dkey, dvalue, heads * head_dim,
                     heads * value, head_dim, value};
        for (int64_t first = 0; first < length; first += QUERIES)
            queries_gradient(h, first, std::min(QUERIES, length - first), visible + (shared ? 0 : b * length * total),
                             sinks, total, scale, memory);
        for (int64_t s = 0; s < total; s++) {
            float *to = kv + (b * total + s) * wide + head * each, *d = dkey + s * head_dim;
            std::copy(d, d + nope, to);
            std::copy(dvalue + s * value, dvalue + (s + 1) * value, to + nope);
            std::copy(d + nope, d + head_dim, drope + ((b * total + s) * heads + head) * rope);
        }
    });
    multiply_by_all(columns_of(kv, wide), rows_of(rows, dim), wide, latent, batch * total, dkv_b, latent);
    multiply_by_all(rows_of(kv, wide), rows_of(kv_b, latent), batch * total, latent, wide, drows, dim);
    for (int64_t s = 0; s < batch * total; s++)
        for (int64_t i = 0; i < rope; i++) {
            float& sum = drows[s * dim + latent + i];
            sum = 0;
            for (int64_t head = 0; head < heads; head++) sum += drope[(s * heads + head) * rope + i];
        }
    std::fill(dsinks, dsinks + call.size(1), 0.0f);
    for (int64_t b = 0; b < batch; b++) {
        const float* from = drows + b * total * dim;
        for (int64_t i = 0; i < sinks * dim; i++) dsinks[i] += from[i];
        std::copy(from + sinks * dim, from + total * dim, dkeys + b * own * dim);
    }
}

SHAPES_OF(ExpandedAttentionGradient, 0, 1, 2, 4)
