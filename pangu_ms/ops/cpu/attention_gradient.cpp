// Gradients of attention: of the masked softmax, of the form that multiplies rows out to keys and values, and of groups
// of heads.
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

// Rows [rows, width] and [rows, value], whose gradients are added to.
struct Rows {
    const float *keys, *values;
    float *dkeys, *dvalues;
};

// One head of one sequence. Queries are q_step floats apart, their outputs' gradients y_step, rows key_step and
// value_step.
struct Head {
    const float *q, *dy;                                // [length, width], [length, value]
    float* dq;
    Rows sinks, own;
    int64_t q_step, y_step, key_step, value_step, width, value;
};

// Adds up the gradients that come from the queries first .. first + count - 1, from their probabilities computed anew.
static void queries_gradient(const Head& h, int64_t first, int64_t count, const bool* visible, int64_t sinks,
                             int64_t total, float scale, float* memory) {
    const auto [low, high] = seen_rows(visible + first * total, count, sinks, total);
    // The sinks, then the rows low .. high-1: what lies between is seen by no query here.
    const int64_t span = sinks + high - low;
    const int64_t from = low - sinks, key = from * h.key_step, value = from * h.value_step;
    const struct { int64_t at, row, rows; Rows of; } parts[2] = {
        {0, 0, sinks, h.sinks},
        {sinks, low, high - low, {h.own.keys + key, h.own.values + value, h.own.dkeys + key, h.own.dvalues + value}}};
    const Matrix q{h.q + first * h.q_step, h.q_step, 1}, dy{h.dy + first * h.y_step, h.y_step, 1};
    float *p = memory, *d = p + count * span, *dq = h.dq + first * h.q_step;
    for (const auto& [at, row, rows, of] : parts) {
        multiply(q, columns_of(of.keys, h.key_step), count, rows, h.width, p + at, span);
        multiply(dy, columns_of(of.values, h.value_step), count, rows, h.value, d + at, span);
    }
    std::vector<char> mask(span);
    for (int64_t t = 0; t < count; t++) {
        const bool* line = visible + (first + t) * total;
        for (const auto& [at, row, rows, of] : parts) std::copy(line + row, line + row + rows, mask.data() + at);
        softmax(p + t * span, reinterpret_cast<bool*>(mask.data()), scale, span, p + t * span);
    }
    for (const auto& [at, row, rows, of] : parts)
        multiply(columns_of(p + at, span), dy, rows, h.value, count, of.dvalues, h.value_step, true);
    for (int64_t t = 0; t < count; t++) softmax_gradient(p + t * span, scale, span, d + t * span, d + t * span);
    for (const auto& [at, row, rows, of] : parts) {
        multiply(rows_of(d + at, span), rows_of(of.keys, h.key_step), count, h.width, rows, dq, h.q_step, at > 0);
        multiply(columns_of(d + at, span), q, rows, h.width, count, of.dkeys, h.key_step, true);
    }
}

// The arguments of ExpandedAttention, dy [B, T, heads * value] -> dq, dsinks, dkeys, dkv_b
OPERATOR(ExpandedAttentionGradient) {
    const int64_t batch = call.dim(0, 0), length = call.dim(0, 1), heads = call.dim(0, 2), head_dim = call.dim(0, 3),
                  sinks = call.dim(1, 0), dim = call.dim(2, -1), latent = call.dim(4, 1),
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
                     dq + b * length * heads * head_dim + start, {key, values, dkey, dvalue},
                     {key + sinks * head_dim, values + sinks * value, dkey + sinks * head_dim, dvalue + sinks * value},
                     heads * head_dim, heads * value, head_dim, value, head_dim, value};
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

// The arguments of GroupedAttention, dy [B, T, heads * V] -> dq, dkeys, dvalues, and of the sinks
OPERATOR(GroupedAttentionGradient) {
    const Grouped g(call);
    const float* dy = call.floats(7);
    for (int i = 9; i < 13; i++) std::fill(call.floats(i), call.floats(i) + call.size(i), 0.0f);
    const int64_t q_step = g.heads * g.width, y_step = g.heads * g.value, key_step = g.groups * g.width,
                  value_step = g.groups * g.value;
    // A group's sinks take their gradients from every sequence: one thread does them all.
    parallel(g.groups, [=](int64_t group) {
        float* memory = scratch(WORK_OWN, 2 * QUERIES * g.total());
        const int64_t key = group * g.width, value = group * g.value;
        const Rows sinks{call.floats(3) + key, call.floats(4) + value, call.floats(11) + key, call.floats(12) + value};
        for (int64_t b = 0; b < g.batch; b++) {
            const int64_t keys = b * g.rows * key_step + key, values = b * g.rows * value_step + value;
            const Rows own{call.floats(1) + keys, call.floats(2) + values, call.floats(9) + keys,
                           call.floats(10) + values};
            for (int64_t head = group * g.each(); head < (group + 1) * g.each(); head++) {
                const int64_t q = b * g.length * q_step + head * g.width;
                const Head h{call.floats(0) + q, dy + b * g.length * y_step + head * g.value, call.floats(8) + q, sinks,
                             own, q_step, y_step, key_step, value_step, g.width, g.value};
                for (int64_t first = 0; first < g.length; first += QUERIES)
                    queries_gradient(h, first, std::min(QUERIES, g.length - first), g.seen(b, 0), g.sinks, g.total(),
                                     g.scale, memory);
            }
        }
    });
}

SHAPES_OF(GroupedAttentionGradient, 0, 1, 2, 3, 4)
