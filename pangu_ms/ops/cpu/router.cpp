// Sigmoid scores of the experts, the k best by score + bias, and their weights.
#include <algorithm>
#include <numeric>
#include <vector>

#include "call.h"
#include "lanes.h"
#include "threads.h"

// logits [..., E], bias [E], scale [k], normalise -> ids int32 [..., k], weights [..., k]
OPERATOR(Route) {
    const int64_t experts = call.dim(0, -1), k = call.size(2);
    const float *logits = call.floats(0), *bias = call.floats(1), *scale = call.floats(2);
    const bool normalise = *call.bools(3);
    int32_t* ids = static_cast<int32_t*>(call.data[4]);
    float* weights = call.floats(5);
    in_chunks(call.size(0) / experts, experts * 8, [=](int64_t begin, int64_t end) {
        std::vector<float> score(experts), key(experts);
        std::vector<int32_t> order(experts);
        for (int64_t row = begin; row < end; row++) {
            const float* logit = logits + row * experts;
            for (int64_t e = 0; e < experts; e++) {
                score[e] = sigmoid(logit[e]);
                key[e] = score[e] + bias[e];            // the bias selects, it does not weigh
            }
            std::iota(order.begin(), order.end(), 0);
            std::partial_sort(order.begin(), order.begin() + k, order.end(),
                              [&](int32_t a, int32_t b) { return key[a] > key[b] || (key[a] == key[b] && a < b); });
            float total = 1e-20f;
            for (int64_t i = 0; i < k; i++) total += score[order[i]];
            for (int64_t i = 0; i < k; i++) {
                ids[row * k + i] = order[i];
                weights[row * k + i] = score[order[i]] / (normalise ? total : 1.0f) * scale[i];
            }
        }
    });
}

MANY_SHAPES(Route) {
    Shape shape = shape_of(0, ndims, shapes);
    if (shape.back() != -2) shape.back() = shapes[2][0];
    return {shape, shape};
}
