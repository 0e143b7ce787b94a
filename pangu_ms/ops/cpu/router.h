// What the router and its gradient share: the experts of one token.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "lanes.h"

struct Choice {
    std::vector<float> score, key;                      // [E]
    std::vector<int32_t> order;                         // [E], the chosen first, best first

    explicit Choice(int64_t experts) : score(experts), key(experts), order(experts) {}

    // Takes the k best of a token's logits [E]. -> the sum of their scores
    float choose(const float* logits, const float* bias, int64_t k) {
        for (size_t e = 0; e < score.size(); e++) {
            score[e] = sigmoid(logits[e]);
            key[e] = score[e] + bias[e];                // the bias selects, it does not weigh
        }
        std::iota(order.begin(), order.end(), 0);
        std::partial_sort(order.begin(), order.begin() + k, order.end(),
                          [&](int32_t a, int32_t b) { return key[a] > key[b] || (key[a] == key[b] && a < b); });
        float total = 1e-20f;
        for (int64_t i = 0; i < k; i++) total += score[order[i]];
        return total;
    }
};

// logits [rows, experts], bias [experts], scale [k] -> ids and weights [rows, k]: the k best by sigmoid score + bias.
void route(const float* logits, const float* bias, const float* scale, bool normalise, int64_t rows, int64_t experts,
           int64_t k, int32_t* ids, float* weights);
