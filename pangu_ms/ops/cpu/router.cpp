// Sigmoid scores of the experts, the k best by score + bias, and their weights.
#include "call.h"
#include "router.h"
#include "threads.h"

// logits [..., E], bias [E], scale [k], normalise -> ids int32 [..., k], weights [..., k]
OPERATOR(Route) {
    const int64_t experts = call.dim(0, -1), k = call.size(2);
    const float *logits = call.floats(0), *bias = call.floats(1), *scale = call.floats(2);
    const bool normalise = *call.bools(3);
    int32_t* ids = static_cast<int32_t*>(call.data[4]);
    float* weights = call.floats(5);
    in_chunks(call.size(0) / experts, experts * 8, [=](int64_t begin, int64_t end) {
        Choice choice(experts);
        for (int64_t row = begin; row < end; row++) {
            const float sum = choice.choose(logits + row * experts, bias, k), total = normalise ? sum : 1.0f;
            for (int64_t i = 0; i < k; i++) {
                const int32_t id = choice.order[i];
                ids[row * k + i] = id;
                weights[row * k + i] = choice.score[id] / total * scale[i];
            }
        }
    });
}

MANY_SHAPES(Route) {
    Shape shape = shape_of(0, ndims, shapes);
    if (shape.back() != -2) shape.back() = shapes[2][0];
    return {shape, shape};
}
