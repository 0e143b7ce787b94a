// Attention: the masked softmax, and the absorbed form, which reads latent rows as they lie in the cache.
#include <algorithm>
#include <vector>

#include "attention.h"
#include "call.h"
#include "product.h"
#include "threads.h"

// x [A, B, C, S], visible bool, each of its first three dimensions as in x or 1, scale -> y [A, B, C, S]
OPERATOR(MaskedSoftmax) {
    const int64_t rows = call.size(0) / call.dim(0, 3), width = call.dim(0, 3);
    const float *x = call.floats(0), scale = call.real(2);
    const bool* visible = call.bools(1);
    float* y = call.floats(3);
    const MaskRows mask(call, 1);
    in_chunks(rows, width * 8, [=](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            softmax(x + row * width, visible + mask.at(row), scale, width, y + row * width);
        }
    });
}

ONE_SHAPE(MaskedSoftmax) { return shape_of(0, ndims, shapes); }

inline void add(float part, const float* from, int64_t n, float* to) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] += part * from[i];
}

// q [B, T, heads, nope + rope], sinks [S0, D] or absent, keys [..., D] for each sequence or each query,
// visible bool [B, T, 1, S0 + S], kv_b [heads * (nope + value), latent], scale -> [B, T, heads * value]
// D = latent + rope
OPERATOR(AbsorbedAttention) {
    const int64_t batch = call.dim(0, 0), length = call.dim(0, 1), heads = call.dim(0, 2), head_dim = call.dim(0, 3),
                  sinks = call.dim(1, 0), dim = call.dim(2, -1), latent = call.dim(4, 1),
                  total = call.dim(3, 3), own = total - sinks, rope = dim - latent, nope = head_dim - rope,
                  value = call.dim(4, 0) / heads - nope, groups = call.size(2) / (own * dim);
    const float *q = call.floats(0), *sink = call.floats(1), *keys = call.floats(2), *kv_b = call.floats(4),
                scale = call.real(5);
    const bool* visible = call.bools(3);
    const bool shared = call.dim(3, 0) == 1;
    float* y = call.floats(6);
    // LANES heads at a time share the rows that they read.
    const int64_t parts = panels_of(heads), columns = latent / LANES, rest = latent - columns * LANES;
    parallel(batch * length * parts, [=](int64_t item) {
        const int64_t row = item / parts, head = item % parts * LANES, count = std::min<int64_t>(LANES, heads - head);
        const float *from = q + (row * heads + head) * head_dim,
                    *rows = keys + (groups == batch ? row / length : row) * own * dim;
        const bool* seen = visible + (shared ? row % length : row) * total;
        float *query = scratch(WORK_OWN, LANES * (2 * dim + latent + total)), *packed = query + LANES * dim,
              *mean = packed + LANES * dim, *score = mean + LANES * latent;
        std::fill(query, query + count * dim, 0.0f);
        for (int64_t h = 0; h < count; h++) {
            const float* up = kv_b + (head + h) * (nope + value) * latent;
            for (int64_t i = 0; i < nope; i++) add(from[h * head_dim + i], up + i * latent, latent, query + h * dim);
            memcpy(query + h * dim + latent, from + h * head_dim + nope, rope * sizeof(float));
        }
        pack_panel([=](int64_t h) { return h < count ? query + h * dim : nullptr; }, dim, packed);
        const auto into = [=](int64_t at) {
            return [=](int64_t s, int n, int64_t, const Lanes* v) {
                for (int64_t h = 0; h < count; h++)
                    for (int r = 0; r < n; r++) score[h * total + at + s + r] = v[r][h];
            };
        };
        many_dots(sink, dim, 0, sinks, {packed, LANES, 0}, 1, dim, into(0));
        many_dots(rows, dim, 0, own, {packed, LANES, 0}, 1, dim, into(sinks));
        for (int64_t h = 0; h < count; h++) softmax(score + h * total, seen, scale, total, score + h * total);
        std::fill(mean, mean + count * latent, 0.0f);
        const auto sum_up = [=](int64_t h, int n, int64_t c, const Lanes* v) {
            for (int r = 0; r < n; r++) {
                float* to = mean + (h + r) * latent + c * LANES;
                store(to, load(to) + v[r]);
            }
        };
        many_dots(score, total, 0, count, {sink, dim, LANES}, columns, sinks, sum_up);
        many_dots(score + sinks, total, 0, count, {rows, dim, LANES}, columns, own, sum_up);
        for (int64_t h = 0; h < count; h++) {
            float* to = mean + h * latent;
            for (int64_t s = 0; s < total && rest; s++) {
                const float* line = s < sinks ? sink + s * dim : rows + (s - sinks) * dim;
                add(score[h * total + s], line + columns * LANES, rest, to + columns * LANES);
            }
            const float* down = kv_b + ((head + h) * (nope + value) + nope) * latent;
            few_dots(down, 0, value, to, 1, latent, [=](int64_t v, int64_t, float sum) {
                y[(row * heads + head + h) * value + v] = sum;
            });
        }
    });
}

ONE_SHAPE(AbsorbedAttention) {
    if (ndims[0] != 4 || ndims[2] < 3) return {-2};
    const int64_t *q = shapes[0], heads = q[2], rope = shapes[2][ndims[2] - 1] - shapes[4][1];
    return {q[0], q[1], shapes[4][0] - heads * (q[3] - rope)};
}

// The arguments of AbsorbedAttention, but keys [B, S, D]: every row is multiplied out to the keys and values of a head.
// largest: [heads], the largest score of each head, or null.
static void expanded_attention(const Call& call, float* largest) {
    const int64_t batch = call.dim(0, 0), length = call.dim(0, 1), heads = call.dim(0, 2), head_dim = call.dim(0, 3),
                  sinks = call.dim(1, 0), dim = call.dim(2, -1), latent = call.dim(4, 1),
                  total = call.dim(3, 3), own = total - sinks, rope = dim - latent, nope = head_dim - rope,
                  value = call.dim(4, 0) / heads - nope, panels = panels_of(total), wide = panels * LANES,
                  columns = panels_of(value), blocks = (length + QUERIES - 1) / QUERIES;
    const float *q = call.floats(0), *sink = call.floats(1), *keys = call.floats(2), *kv_b = call.floats(4),
                scale = call.real(5);
    const bool* visible = call.bools(3);
    const bool shared = call.dim(3, 0) == 1;
    float* y = call.floats(6);
    // Of one head: keys in panels of rows, [panels][head_dim][LANES]; values in panels of columns,
    // [columns][wide][LANES]. And the largest score of each block of queries.
    float *turned = scratch(OPERATOR_OWN, wide * head_dim + columns * LANES * (wide + latent) + blocks),
          *values = turned + wide * head_dim, *up = values + columns * LANES * wide,
          *tops = up + columns * LANES * latent;
    for (int64_t b = 0; b < batch; b++) {
        const auto key = [=](int64_t s) {
            return s < sinks ? sink + s * dim : s < total ? keys + (b * own + s - sinks) * dim : nullptr;
        };
        for (int64_t head = 0; head < heads; head++) {
            const float *to_key = kv_b + head * (nope + value) * latent, *to_value = to_key + nope * latent;
            for (int64_t c = 0; c < columns; c++) {
                const float* from = to_value + c * LANES * latent;
                pack_panel([=](int64_t i) { return c * LANES + i < value ? from + i * latent : nullptr; }, latent,
                           up + c * LANES * latent);
            }
            parallel(panels, [=](int64_t p) {
                float *rows = scratch(WORK_OWN, LANES * 2 * dim), *packed = rows + LANES * dim;
                for (int64_t i = 0; i < LANES; i++)
                    if (const float* row = key(p * LANES + i)) memcpy(rows + i * dim, row, dim * sizeof(float));
                    else std::fill(rows + i * dim, rows + (i + 1) * dim, 0.0f);
                pack_panel([=](int64_t i) { return rows + i * dim; }, dim, packed);
                float* to = turned + p * head_dim * LANES;
                const auto to_keys = [=](int64_t d, int n, int64_t, const Lanes* v) {
                    for (int r = 0; r < n; r++) store(to + (d + r) * LANES, v[r]);
                };
                many_dots(to_key, latent, 0, nope, {packed, LANES, 0}, 1, latent, to_keys);
                memcpy(to + nope * LANES, packed + latent * LANES, rope * LANES * sizeof(float));
                const auto to_values = [=](int64_t s, int n, int64_t c, const Lanes* v) {
                    for (int r = 0; r < n; r++) store(values + (c * wide + p * LANES + s + r) * LANES, v[r]);
                };
                many_dots(rows, dim, 0, LANES, packed_panels(up, latent), columns, latent, to_values);
            });
            parallel(blocks, [=](int64_t block) {
                const int64_t first = block * QUERIES, count = std::min(QUERIES, length - first);
                const bool* seen = visible + ((shared ? 0 : b * length) + first) * total;
                const auto [low, high] = seen_rows(seen, count, sinks, total);
                const int64_t always = panels_of(sinks), begin = std::max(always, low / LANES),
                              end = std::max(begin, panels_of(high)), span = (always + end - begin) * LANES;
                float* score = scratch(WORK_OWN, count * span);
                std::vector<char> mask(span);
                tops[block] = -INFINITY;
                const float* from = q + ((b * length + first) * heads + head) * head_dim;
                const auto into = [=](int64_t at) {
                    return [=](int64_t t, int n, int64_t p, const Lanes* v) {
                        for (int r = 0; r < n; r++) store(score + (t + r) * span + (at + p) * LANES, v[r]);
                    };
                };
                many_dots(from, heads * head_dim, 0, count, packed_panels(turned, head_dim), always, head_dim, into(0));
                many_dots(from, heads * head_dim, 0, count, packed_panels(turned + begin * head_dim * LANES, head_dim),
                          end - begin, head_dim, into(always));
                for (int64_t t = 0; t < count; t++) {
                    const bool *line = seen + t * total, *stop = line + total;
                    std::copy(line, std::min(line + always * LANES, stop), mask.begin());
                    std::copy(std::min(line + begin * LANES, stop), std::min(line + end * LANES, stop),
                              mask.begin() + always * LANES);
                    const float top = softmax(score + t * span, reinterpret_cast<bool*>(mask.data()), scale, span,
                                              score + t * span);
                    tops[block] = std::max(tops[block], top);
                }
                float* to = y + ((b * length + first) * heads + head) * value;
                for (int64_t c = 0; c < columns; c++) {
                    const int64_t lanes = std::min<int64_t>(LANES, value - c * LANES);
                    const float* panel = values + c * wide * LANES;
                    const auto add = [=](bool more) {
                        return [=](int64_t t, int n, int64_t, const Lanes* v) {
                            for (int r = 0; r < n; r++)
                                for (int64_t i = 0; i < lanes; i++) {
                                    float& sum = to[(t + r) * heads * value + c * LANES + i];
                                    sum = more ? sum + v[r][i] : v[r][i];
                                }
                        };
                    };
                    many_dots(score, span, 0, count, {panel, LANES, 0}, 1, always * LANES, add(false));
                    many_dots(score + always * LANES, span, 0, count, {panel + begin * LANES * LANES, LANES, 0}, 1,
                              (end - begin) * LANES, add(true));
                }
            });
            if (!largest) continue;
            const float top = *std::max_element(tops, tops + blocks);
            largest[head] = b == 0 ? top : std::max(largest[head], top);
        }
    }
}

OPERATOR(ExpandedAttention) { expanded_attention(call, nullptr); }

ONE_SHAPE(ExpandedAttention) { return AbsorbedAttentionInferShape(ndims, shapes, nullptr); }

// -> also the largest score of each head, [heads]
OPERATOR(ExpandedAttentionLargest) { expanded_attention(call, call.floats(7)); }

MANY_SHAPES(ExpandedAttentionLargest) {
    return {AbsorbedAttentionInferShape(ndims, shapes, nullptr), {ndims[0] == 4 ? shapes[0][2] : -1}};
}
