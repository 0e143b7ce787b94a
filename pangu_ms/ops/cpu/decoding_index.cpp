// DSA's indexer in a decoding step: its keys of the new tokens, and the rows that each of them selects.
#include <algorithm>
#include <functional>
#include <vector>

#include "call.h"
#include "decoding.h"
#include "linear.h"
#include "norm.h"
#include "product.h"
#include "threads.h"

// x [B, T, H], weight [D, H], norm [D], kept [B * S, D], position, cos, sin are arguments 0 to 6
// -> key [B * T, D], which `kept` then holds
static void index_rows(const Call& call, float eps, float* key) {
    const Tokens tokens = tokens_of(call, 4);
    const Angles angles = angles_of(call, 5, false);
    const int64_t dim = call.dim(1, 0), rows = tokens.count(), places = call.dim(3, 0) / tokens.batch;
    linear(call.floats(0), call.floats(1), rows, call.dim(1, 1), dim, key);
    for (int64_t row = 0; row < rows; row++, key += dim) {
        rms_norm(key, call.floats(2), eps, dim, key);
        angles.apply(row, key, key);
        memcpy(call.floats(3) + tokens.slot(row, places) * dim, key, dim * sizeof(float));
    }
}

// The arguments of `index_rows`, eps -> the new keys [B, T, D]
OPERATOR(DecodingIndexRow) { index_rows(call, call.real(7), call.floats(8)); }

ONE_SHAPE(DecodingIndexRow) {
    if (ndims[0] != 3) return {-2};
    return {shapes[0][0], shapes[0][1], shapes[1][0]};
}

// The positions of the `count` largest of x [n], in order; of equal ones the first. By the smallest of them, which is
// found in linear time.
static void pick(const float* x, int64_t n, int64_t count, int32_t* chosen) {
    std::vector<float> copy(x, x + n);
    std::nth_element(copy.begin(), copy.begin() + count - 1, copy.end(), std::greater<float>());
    const float least = copy[count - 1];
    int64_t equal = count - std::count_if(x, x + n, [=](float value) { return value > least; });
    for (int64_t i = 0; i < n; i++)
        if (x[i] > least || (x[i] == least && equal-- > 0)) *chosen++ = static_cast<int32_t>(i);
}

// The arguments of `index_rows`, q_latent [B, T, Q], to_q [heads * D, Q], to_weight [heads, H], all int32 [K], eps
// -> the positions int32 [B, T, K] of the best rows; `all`, which is 0 to K - 1, for a query that sees no more than K
OPERATOR(DecodingSelect) {
    const Tokens tokens = tokens_of(call, 4);
    const Angles angles = angles_of(call, 5, false);
    const int64_t dim = call.dim(1, 0), heads = call.dim(9, 0), rows = tokens.count(), k = call.dim(10, 0),
                  places = call.dim(3, 0) / tokens.batch, queries = tokens.length * heads, panels = panels_of(queries);
    int64_t most = 0;                                   // rows that a query sees
    for (int64_t row = 0; row < rows; row++) most = std::max(most, tokens.at(row) + 1);
    float *key = scratch(COMPOSED_OWN, rows * (dim + heads * dim + heads + most) + panels * dim * LANES),
          *query = key + rows * dim, *weight = query + rows * heads * dim, *score = weight + rows * heads,
          *packed = score + rows * most;
    index_rows(call, call.real(11), key);
    linear(call.floats(7), call.floats(8), rows, call.dim(8, 1), heads * dim, query);
    for (int64_t i = 0; i < rows * heads; i++) angles.apply(i / heads, query + i * dim, query + i * dim);
    linear(call.floats(0), call.floats(9), rows, call.dim(9, 1), heads, weight);

    for (int64_t b = 0; b < tokens.batch; b++) {
        const float *from = query + b * queries * dim, *by = weight + b * queries,
                    *keys = call.floats(3) + b * places * dim;
        float* sums = score + b * tokens.length * most;
        for (int64_t p = 0; p < panels; p++)
            pack_panel([=](int64_t i) { return p * LANES + i < queries ? from + (p * LANES + i) * dim : nullptr; }, dim,
                       packed + p * dim * LANES);
        in_chunks(tokens.at((b + 1) * tokens.length - 1) + 1, queries * dim, [=](int64_t first, int64_t last) {
            for (int64_t t = 0; t < tokens.length; t++)
                std::fill(sums + t * most + first, sums + t * most + last, 0.0f);
            many_dots(keys, dim, first, last, packed_panels(packed, dim), panels, dim,
                      [=](int64_t s, int n, int64_t p, const Lanes* v) {
                for (int64_t i = p * LANES; i < std::min((p + 1) * LANES, queries); i++)
                    for (int r = 0; r < n; r++) {
                        const float value = v[r][i - p * LANES];
                        sums[i / heads * most + s + r] += by[i] * (value > 0 ? value : 0.0f);
                    }
            });
        });
    }
    const int32_t* all = call.ints(10);
    int32_t* chosen = static_cast<int32_t*>(call.data[12]);
    parallel(rows, [=](int64_t row) {
        float* x = score + row * most;
        int32_t* to = chosen + row * k;
        const int64_t seen = tokens.at(row) + 1;
        for (int64_t s = 0; s < seen; s++) x[s] = std::max(-INFINITY, x[s]);     // NaN has no place in an order
        if (seen > k) pick(x, seen, k, to);
        else memcpy(to, all, k * sizeof(int32_t));
    });
}

ONE_SHAPE(DecodingSelect) {
    if (ndims[0] != 3) return {-2};
    return {shapes[0][0], shapes[0][1], shapes[10][0]};
}
