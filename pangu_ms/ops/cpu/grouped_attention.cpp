// Grouped-query attention over keys and values where they lie, in blocks of rows: a softmax is begun with the first
// rows, and made smaller whenever later ones bring a larger score.
#include <algorithm>
#include <vector>

#include "attention.h"
#include "call.h"
#include "matrix.h"
#include "product.h"

constexpr int64_t TOGETHER = 128;                       // queries of a group that meet the same rows
constexpr int64_t BLOCK = 256;                          // rows at once: scores stay in the second-level cache
constexpr int64_t FEW_BLOCK = 16;                       // where queries are few: of all groups, in the order of memory
constexpr int64_t PART = 128;                           // rows for one thread then

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

// The scores of queries q [queries, K] and n keys that are `step` apart, a line of them for each query.
static void keys_of(const float* q, const float* keys, int64_t step, int64_t queries, int64_t n, int64_t width,
                    float* score) {
    if (queries > FEW) multiply(rows_of(q, width), columns_of(keys, step), queries, n, width, score, BLOCK);
    else few_dots(keys, step, 0, n, q, queries, width,
                  [=](int64_t row, int64_t query, float v) { score[query * BLOCK + row] = v; });
}

// mean [queries, V] += the n values, `step` apart, with weights that `keys_of` has laid out. Of few queries each takes
// whole rows, WIDE vectors at a time.
static void add_values(const float* weight, const float* values, int64_t step, int64_t queries, int64_t n,
                       int64_t width, float* mean) {
    constexpr int WIDE = 8;
    int64_t done = 0;
    for (; queries <= FEW && done + WIDE * LANES <= width; done += WIDE * LANES)
        for (int64_t i = 0; i < queries; i++) {
            Lanes sums[1][WIDE];
            panel_tile<1, WIDE>(weight + i * BLOCK, 0, n, {values + done, step, LANES}, sums);
            for (int p = 0; p < WIDE; p++) {
                float* to = mean + i * width + done + p * LANES;
                store(to, load(to) + sums[0][p]);
            }
        }
    multiply(rows_of(weight, BLOCK), rows_of(values + done, step), queries, width - done, n, mean + done, width, true);
}

// q [B, T, heads, K], keys, values, sinks of both, visible, scale: see `Grouped` -> y [B, T, heads * V]
// largest: [heads], the largest score of each head, or null.
static void grouped_attention(const Call& call, float* largest) {
    const Grouped g(call);
    const int64_t each = g.each(), key_step = g.groups * g.width, value_step = g.groups * g.value;
    const std::vector<Piece> pieces = pieces_of(g);
    const int64_t size = pieces[0].count * each * (2 + g.value);
    float *results = scratch(OPERATOR_OWN, pieces.size() * g.groups * size), *y = call.floats(7);
    const auto met = [&](int64_t i, int64_t group) {
        return Met(results + (i * g.groups + group) * size, pieces[i].count * each);
    };
    // Few queries meet a row's keys of all groups together, as memory has them; many, a group's keys alone.
    const bool few = pieces[0].count * each <= FEW;
    const int64_t block = few ? FEW_BLOCK : BLOCK, beside = few ? g.groups : 1;
    parallel(pieces.size() * g.groups / beside, [&](int64_t item) {
        const int64_t first = item * beside % g.groups, i = item * beside / g.groups;
        const Piece& piece = pieces[i];
        const int64_t queries = piece.count * each;
        float *q = scratch(WORK_OWN, queries * (beside * g.width + BLOCK)), *score = q + queries * beside * g.width;
        for (int64_t group = first; group < first + beside; group++) {
            for (int64_t t = 0; t < piece.count; t++)   // the heads of a group lie one behind the other
                memcpy(q + ((group - first) * queries + t * each) * g.width,
                       call.floats(0) + ((piece.b * g.length + piece.first + t) * g.heads + group * each) * g.width,
                       each * g.width * sizeof(float));
            const Met to = met(i, group);
            std::fill(to.top, to.top + queries, -1e30f);
            std::fill(to.total, to.mean + queries * g.value, 0.0f);
        }
        // The rows of a group that begin at `keys` and `values`, and at place `at` of the mask.
        const auto meet = [&](int64_t group, const float* keys, const float* values, int64_t at, int64_t n) {
            const Met to = met(i, group);
            keys_of(q + (group - first) * queries * g.width, keys, key_step, queries, n, g.width, score);
            for (int64_t j = 0; j < queries; j++) {
                float *line = score + j * BLOCK, *mean = to.mean + j * g.value;
                const bool* seen = g.seen(piece.b, piece.first + j / each) + at;
                const float top = scores(line, seen, g.scale, n, to.top[j], line),
                            kept = exponential(to.top[j] - top);
                to.top[j] = top;
                to.total[j] = to.total[j] * kept + exponentials(top, n, line);
                if (kept == 1.0f) continue;
#pragma omp simd
                for (int64_t c = 0; c < g.value; c++) mean[c] *= kept;
            }
            add_values(score, values, value_step, queries, n, g.value, to.mean);
        };
        const auto meet_all = [&](int key, int64_t row, int64_t at, int64_t rows) {
            for (int64_t done = 0; done < rows; done += block)
                for (int64_t group = first; group < first + beside; group++)
                    meet(group, call.floats(key) + (row + done) * key_step + group * g.width,
                         call.floats(key + 1) + (row + done) * value_step + group * g.value, at + done,
                         std::min(block, rows - done));
        };
        if (piece.begins) meet_all(3, 0, 0, g.sinks);
        meet_all(1, piece.b * g.rows + piece.low, g.sinks + piece.low, piece.high - piece.low);
    });
    // The parts of a query's rows lie one behind the other.
    std::vector<int64_t> begin;
    for (size_t i = 0; i < pieces.size(); i++)
        if (pieces[i].begins) begin.push_back(i);
    begin.push_back(pieces.size());
    std::vector<float> tops((begin.size() - 1) * g.heads, -INFINITY);           // of the queries of each piece
    parallel((begin.size() - 1) * g.groups, [&](int64_t item) {
        const int64_t group = item % g.groups, first = begin[item / g.groups], last = begin[item / g.groups + 1];
        const Piece& piece = pieces[first];
        for (int64_t i = 0; i < piece.count * each; i++) {
            const int64_t token = piece.b * g.length + piece.first + i / each, head = group * each + i % each;
            float *to = y + (token * g.heads + head) * g.value, top = -1e30f, total = 0;
            for (int64_t p = first; p < last; p++) top = std::max(top, met(p, group).top[i]);
            float& peak = tops[item / g.groups * g.heads + head];
            peak = std::max(peak, top);
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
    if (!largest) return;
    std::copy(tops.begin(), tops.begin() + g.heads, largest);
    for (size_t i = g.heads; i < tops.size(); i++) largest[i % g.heads] = std::max(largest[i % g.heads], tops[i]);
}

OPERATOR(GroupedAttention) { grouped_attention(call, nullptr); }

ONE_SHAPE(GroupedAttention) {
    if (ndims[0] != 4) return {-2};
    return {shapes[0][0], shapes[0][1], shapes[0][2] * shapes[4][2]};
}

// -> also the largest score of each head, [heads]
OPERATOR(GroupedAttentionLargest) { grouped_attention(call, call.floats(8)); }

MANY_SHAPES(GroupedAttentionLargest) {
    return {GroupedAttentionInferShape(ndims, shapes, nullptr), {ndims[0] == 4 ? shapes[0][2] : -1}};
}
