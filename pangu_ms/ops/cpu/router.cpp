// Scores of the experts, the k that are chosen by score + bias, and their weights.
#include "call.h"
#include "router.h"
#include "threads.h"

void route(const float* logits, const float* bias, const float* scale, Rule rule, int64_t rows, int64_t experts,
           int64_t k, int32_t* ids, float* weights) {
    in_chunks(rows, experts * 8, [=](int64_t begin, int64_t end) {
        Choice choice(experts);
        for (int64_t row = begin; row < end; row++) {
            const float sum = choice.choose(logits + row * experts, bias, k, rule),
                        total = rule.normalise ? sum : 1.0f;
            for (int64_t i = 0; i < k; i++) {
                const int32_t id = choice.order[i];
                ids[row * k + i] = id;
                weights[row * k + i] = choice.score[id] / total * scale[i];
            }
        }
    });
}

// logits [..., E], bias [E], scale [k], softmax, grouped, normalise -> ids int32 [..., k], weights [..., k]
OPERATOR(Route) {
    const int64_t experts = call.dim(0, -1);
    route(call.floats(0), call.floats(1), call.floats(2), rule_of(call, 3), call.size(0) / experts, experts,
          call.size(2), static_cast<int32_t*>(call.data[6]), call.floats(7));
}

MANY_SHAPES(Route) {
    Shape shape = shape_of(0, ndims, shapes);
    if (shape.back() != -2) shape.back() = shapes[2][0];
    return {shape, shape};
}
