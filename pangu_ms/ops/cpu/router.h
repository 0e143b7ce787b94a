// What the router and its gradient share: the experts of one token.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "call.h"
#include "lanes.h"

// Scores by softmax over all experts instead of a sigmoid of each; one expert of each of k equal groups instead of the k
// best of all; weights divided by their sum.
struct Rule {
    bool softmax, grouped, normalise;
};

// Its three, from input i of a call on.
inline Rule rule_of(const Call& call, int i) { return {*call.bools(i), *call.bools(i + 1), *call.bools(i + 2)}; }

struct Choice {
    std::vector<float> score, key;                      // [E]
    std::vector<int32_t> order;                         // [E], the chosen first: best first, or group by group

    explicit Choice(int64_t experts) : score(experts), key(experts), order(experts) {}

    // Takes k experts by a token's logits [E]. -> the sum of their scores
    float choose(const float* logits, const float* bias, int64_t k, Rule rule) {
        rule.softmax ? softmax(logits) : sigmoids(logits);
        for (size_t e = 0; e < score.size(); e++) key[e] = score[e] + bias[e];  // the bias selects, it does not weigh
        if (rule.grouped) {
            const int64_t size = score.size() / k;
            for (int64_t g = 0; g < k; g++)
                order[g] = std::max_element(&key[g * size], &key[g * size] + size) - key.data();
        } else {
            std::iota(order.begin(), order.end(), 0);
            std::partial_sort(order.begin(), order.begin() + k, order.end(),
                              [&](int32_t a, int32_t b) { return key[a] > key[b] || (key[a] == key[b] && a < b); });
        }
        float total = 1e-20f;
        for (int64_t i = 0; i < k; i++) total += score[order[i]];
        return total;
    }

private:
    void sigmoids(const float* logits) {
        for (size_t e = 0; e < score.size(); e++) score[e] = sigmoid(logits[e]);
    }

    void softmax(const float* logits) {
        const float largest = *std::max_element(logits, logits + score.size());
        double total = 0;
        for (size_t e = 0; e < score.size(); e++) total += score[e] = exponential(logits[e] - largest);
        for (float& one : score) one /= total;
    }
};

// logits [rows, experts], bias [experts], scale [k] -> ids and weights [rows, k] of the experts that are chosen.
void route(const float* logits, const float* bias, const float* scale, Rule rule, int64_t rows, int64_t experts,
           int64_t k, int32_t* ids, float* weights);
