// Gradient of the chosen experts' weights; the choice itself has none.
#include "call.h"
#include "router.h"
#include "threads.h"

// The arguments of Route, dids (unused), dweights [..., k] -> dlogits
OPERATOR(RouteGradient) {
    const int64_t experts = call.dim(0, -1), k = call.size(2);
    const float *logits = call.floats(0), *bias = call.floats(1), *scale = call.floats(2), *dweights = call.floats(7);
    const Rule rule = rule_of(call, 3);
    float* dlogits = call.floats(8);
    in_chunks(call.size(0) / experts, experts * 8, [=](int64_t begin, int64_t end) {
        Choice choice(experts);
        for (int64_t row = begin; row < end; row++) {
            const float sum = choice.choose(logits + row * experts, bias, k, rule),
                        total = rule.normalise ? sum : 1.0f;
            const float* d = dweights + row * k;
            float *to = dlogits + row * experts, along = 0;
            for (int64_t i = 0; i < k && rule.normalise; i++)
                along += d[i] * scale[i] * choice.score[choice.order[i]] / total;
            std::fill(to, to + experts, 0.0f);
            float others = 0;                           // what the scores' own sum takes from every expert
            for (int64_t i = 0; i < k; i++) {
                const float score = choice.score[choice.order[i]], dscore = (d[i] * scale[i] - along) / total;
                to[choice.order[i]] = dscore * score * (rule.softmax ? 1 : 1 - score);
                others += dscore * score;
            }
            for (int64_t e = 0; e < experts && rule.softmax; e++) to[e] -= others * choice.score[e];
        }
    });
}

ONE_SHAPE(RouteGradient) { return shape_of(0, ndims, shapes); }
