// Grouped-query attention over keys and values where they lie, in blocks of rows: a softmax is begun with the first
// rows, and made smaller whenever later ones bring a larger score.
#include <algorithm>
#include <vector>

#include "attention.h"
#include "call.h"
#include "matrix.h"

constexpr int64_t TOGETHER = 128;                       // queries of a group that meet the same rows
constexpr int64_t BLOCK = 256;                          // rows at once: scores stay in the second-level cache
constexpr int64_t PART = 1024;                          // rows for one thread, where queries are few

// Queries of the tokens first .. first + count - 1 of a sequence, and rows low .. high - 1 of it; the part that
// `begins` meets the sinks too.
struct Piece {
    int64_t b, first, count, low, high;
    bool begins;
};

static std::vector<Piece> pieces_of(const Grouped& g) {
    const int64_t tokens = std::max<int64_t>(1, TOGETHER / g.each()), blocks = (g.length + tokens - 1) / tokens;
    std::vector<Piece> whole(g.batch * blocks), found;
    parallel(whole.size(), [&](int64_t i) {
        const int64_t b = i / blocks, first = i % blocks * tokens, count = std::min(tokens, g.length - first);
        const auto [low, high] = seen_rows(g.seen(b, first), count, g.sinks, g.total());
        whole[i] = {b, first, count, low - g.sinks, high - g.sinks, true};
    });
    for (const Piece& piece : whole) {
        const int64_t part = blocks > 1 ? g.rows : PART;
        for (int64_t at = piece.low; at == piece.low || at < piece.high; at += part)
            found.push_back({piece.b, piece.first, piece.count, at, std::min(at + part, piece.high),
                             at == piece.low});
    }
    return found;
}

// What queries have met so far: their largest score, the sum of e^(score - top), and with that weight of the values.
struct Met {
    float *top, *total, *mean;                          // [queries], [queries], [queries, V]

    Met(float* memory, int64_t queries) : top(memory), total(top + queries), mean(total + queries) {}
};

// q [B, T, heads, K], keys, values, sinks of both, visible, scale: see `Grouped` -> y [B, T, heads * V]
OPERATOR(GroupedAttention) {
    const Grouped g(call);
    const int64_t each = g.each();
    const std::vector<Piece> pieces = pieces_of(g);
    const int64_t size = pieces[0].count * each * (2 + g.value);
    float *results = scratch(OPERATOR_OWN, pieces.size() * g.groups * size), *y = call.floats(7);
    const auto met = [&](int64_t i, int64_t group) {
        return Met(results + (i * g.groups + group) * size, pieces[i].count * each);
    };
    parallel(pieces.size() * g.groups, [&](int64_t item) {
        const int64_t group = item % g.groups;
        const Piece& piece = pieces[item / g.groups];
        const int64_t queries = piece.count * each;
        float *q = scratch(WORK_OWN, queries * (g.width + BLOCK)), *score = q + queries * g.width;
        const Met to = met(item / g.groups, group);
        for (int64_t t = 0; t < piece.count; t++)       // the heads of a group lie one behind the other
            memcpy(q + t * each * g.width,
                   call.floats(0) + (((piece.b * g.length + piece.first + t) * g.heads) + group * each) * g.width,
                   each * g.width * sizeof(float));
        std::fill(to.top, to.top + queries, -1e30f);
        std::fill(to.total, to.mean + queries * g.value, 0.0f);
        // Rows low .. high - 1 of what begins at `keys` and `values` and at place `start` of the mask.
        const auto meet = [&](const float* keys, const float* values, int64_t start, int64_t low, int64_t high) {
            const int64_t key_step = g.groups * g.width, value_step = g.groups * g.value;
            for (int64_t at = low; at < high; at += BLOCK) {
                const int64_t n = std::min(BLOCK, high - at);
                multiply(rows_of(q, g.width), columns_of(keys + at * key_step + group * g.width, key_step), queries, n,
                         g.width, score, BLOCK);
                for (int64_t i = 0; i < queries; i++) {
                    float *line = score + i * BLOCK, *mean = to.mean + i * g.value;
                    const bool* seen = g.seen(piece.b, piece.first + i / each) + start + at;
                    const float top = scores(line, seen, g.scale, n, to.top[i], line),
                                kept = exponential(to.top[i] - top);
                    to.top[i] = top;
                    to.total[i] = to.total[i] * kept + exponentials(top, n, line);
                    if (kept == 1.0f) continue;
#pragma omp simd
                    for (int64_t c = 0; c < g.value; c++) mean[c] *= kept;
                }
                multiply(rows_of(score, BLOCK), rows_of(values + at * value_step + group * g.value, value_step),
                         queries, g.value, n, to.mean, g.value, true);
            }
        };
        if (piece.begins) meet(call.floats(3), call.floats(4), 0, 0, g.sinks);
        const int64_t before = piece.b * g.rows * g.groups;
        meet(call.floats(1) + before * g.width, call.floats(2) + before * g.value, g.sinks, piece.low, piece.high);
    });
    // The parts of a query's rows lie one behind the other.
    std::vector<int64_t> begin;
    for (size_t i = 0; i < pieces.size(); i++)
        if (pieces[i].begins) begin.push_back(i);
    begin.push_back(pieces.size());
    parallel((begin.size() - 1) * g.groups, [&](int64_t item) {
        const int64_t group = item % g.groups, first = begin[item / g.groups], last = begin[item / g.groups + 1];
        const Piece& piece = pieces[first];
        for (int64_t i = 0; i < piece.count * each; i++) {
            float *to = y + ((piece.b * g.length + piece.first + i / each) * g.heads + group * each + i % each) * g.value,
                  top = -1e30f, total = 0;
            for (int64_t p = first; p < last; p++) top = std::max(top, met(p, group).top[i]);
            for (int64_t p = first; p < last; p++) {
                const Met part = met(p, group);
                total += part.total[i] * exponential(part.top[i] - top);
            }
            for (int64_t p = first; p < last; p++) {
                const Met part = met(p, group);
                const float share = exponential(part.top[i] - top) / total, *mean = part.mean + i * g.value;
#pragma omp simd
                for (int64_t c = 0; c < g.value; c++) to[c] = p == first ? share * mean[c] : to[c] + share * mean[c];
            }
        }
    });
}

ONE_SHAPE(GroupedAttention) {
    if (ndims[0] != 4) return {-2};
    return {shapes[0][0], shapes[0][1], shapes[0][2] * shapes[4][2]};
}
