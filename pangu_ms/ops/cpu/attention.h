// What the attention operators and their gradients share: the masked softmax of a row, and where masks lie.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "call.h"
#include "lanes.h"

constexpr int64_t QUERIES = 64;                         // of one head that one thread takes at a time

// x * scale of the entries that `seen` marks, and minus infinity -> the largest of them, and of `top`.
inline float scores(const float* x, const bool* seen, float scale, int64_t width, float top, float* y) {
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < width; i++) {
        y[i] = seen[i] ? x[i] * scale : -INFINITY;
        top = y[i] > top ? y[i] : top;
    }
    return top;
}

// y becomes e^(y - top) -> the sum.
inline float exponentials(float top, int64_t width, float* y) {
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < width; i++) total += y[i] = exponential(y[i] - top);
    return total;
}

// softmax(x * scale) of the entries that `seen` marks; the others become 0 -> the largest of x * scale.
inline float softmax(const float* x, const bool* seen, float scale, int64_t width, float* y) {
    const float top = scores(x, seen, scale, width, -INFINITY, y), share = 1.0f / exponentials(top, width, y);
#pragma omp simd
    for (int64_t i = 0; i < width; i++) y[i] *= share;
    return top;
}

// A mask [A, B, C, S] for argument 0 [A, B, C, S], each of its first three dimensions as there or 1.
struct MaskRows {
    int64_t dims[3], stride[3];

    MaskRows(const Call& call, int argument) {
        int64_t step = call.dim(0, 3);
        for (int axis = 2; axis >= 0; axis--) {
            dims[axis] = call.dim(0, axis);
            stride[axis] = call.dim(argument, axis) == 1 ? 0 : step;
            step *= call.dim(argument, axis);
        }
    }

    int64_t at(int64_t row) const {  // where the mask of a row begins
        return row / dims[2] / dims[1] * stride[0] + row / dims[2] % dims[1] * stride[1] + row % dims[2] * stride[2];
    }
};

// The first row behind the sinks that one of `count` queries sees, and the end of the last; mask [count, total].
inline std::pair<int64_t, int64_t> seen_rows(const bool* mask, int64_t count, int64_t sinks, int64_t total) {
    std::vector<char> any(total);
    for (int64_t t = 0; t < count; t++) {
#pragma omp simd
        for (int64_t s = 0; s < total; s++) any[s] |= mask[t * total + s];
    }
    int64_t low = sinks, high = total;
    while (high > sinks && !any[high - 1]) high--;
    while (low < high && !any[low]) low++;
    return {low, high};
}

// Grouped-query attention: q [B, T, heads, K], keys [B, S, G, K] and values [B, S, G, V] in rows of any shape, sinks
// [S0, G, K] and [S0, G, V], visible bool [B or 1, T, 1, S0 + S], scale. Query head n reads the keys of group
// n / (heads / G).
struct Grouped {
    int64_t batch, length, heads, groups, width, value, sinks, rows;
    const bool* visible;
    float scale;
    bool shared;                                        // one mask for all sequences

    explicit Grouped(const Call& call)
        : batch(call.dim(0, 0)), length(call.dim(0, 1)), heads(call.dim(0, 2)), groups(call.dim(3, 1)),
          width(call.dim(3, 2)), value(call.dim(4, 2)), sinks(call.dim(3, 0)),
          rows(call.size(1) / (batch * groups * width)), visible(call.bools(5)), scale(call.real(6)),
          shared(call.dim(5, 0) == 1) {}

    int64_t each() const { return heads / groups; }
    int64_t total() const { return sinks + rows; }
    const bool* seen(int64_t b, int64_t token) const { return visible + ((shared ? 0 : b * length) + token) * total(); }
};
