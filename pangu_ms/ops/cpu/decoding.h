// The few new tokens of a decoding step, and what their layers do to the cache in place: position p of a sequence lies
// in row p mod R of its R rows.
#pragma once
#include "call.h"
#include "rotate.h"

// The new tokens: position [B, T].
struct Tokens {
    const int32_t* position;
    int64_t batch, length;

    int64_t count() const { return batch * length; }
    int64_t at(int64_t token) const { return position[token]; }
    // Its row among `rows` of each sequence; positions before the text lie at the end.
    int64_t slot(int64_t token, int64_t rows) const {
        const int64_t rest = at(token) % rows;
        return token / length * rows + (rest < 0 ? rest + rows : rest);
    }
};

inline Tokens tokens_of(const Call& call, int i) { return {call.ints(i), call.dim(i, 0), call.dim(i, 1)}; }

// Cosines and sines [B or 1, T, 1, half] of a token.
struct Angles {
    const float *cosines, *sines;
    int64_t half, count;
    bool interleaved;

    void apply(int64_t token, const float* x, float* y) const {
        const int64_t at = token % count * half;        // one set for all sequences: their tokens begin again
        turn(x, cosines + at, sines + at, half, interleaved, y);
    }
    // The first channels of each head, in place: x [rows, width], heads of `head` channels.
    void apply_to_heads(float* x, int64_t rows, int64_t width, int64_t head) const {
        for (int64_t at = 0; at < rows * width; at += head) apply(at / width, x + at, x + at);
    }
};

inline Angles angles_of(const Call& call, int i, bool interleaved) {
    return {call.floats(i), call.floats(i + 1), call.dim(i, 3), call.dim(i, 0) * call.dim(i, 1), interleaved};
}

// The short convolution of x, whose rows are `stride` apart, and of the ring's rows before it -> y [B * T, C]; then the
// ring holds x. ring is input `i` of the call, the weight [C, 1, k] input i + 1; where both are absent y is x.
inline void ring_conv(const Call& call, int i, const Tokens& tokens, const float* x, int64_t stride, int64_t channels,
                      float* y) {
    if (!call.size(i + 1)) {
        for (int64_t token = 0; token < tokens.count(); token++)
            memcpy(y + token * channels, x + token * stride, channels * sizeof(float));
        return;
    }
    float* ring = call.floats(i);
    const float* weight = call.floats(i + 1);
    const int64_t rows = call.dim(i, 0) / tokens.batch, width = call.dim(i + 1, 2);
    for (int64_t token = 0; token < tokens.count(); token++) {
        float* to = y + token * channels;
        memcpy(to, x + token * stride, channels * sizeof(float));
        if (tokens.at(token) < width - 1) continue;
        for (int64_t j = 0; j < width; j++) {
            const int64_t back = width - 1 - j;
            const float* from = back <= token % tokens.length
                ? x + (token - back) * stride
                : ring + (token / tokens.length * rows + (tokens.at(token) - back) % rows) * channels;
#pragma omp simd
            for (int64_t c = 0; c < channels; c++) to[c] += from[c] * weight[c * width + j];
        }
    }
    for (int64_t token = 0; token < tokens.count(); token++)
        memcpy(ring + tokens.slot(token, rows) * channels, x + token * stride, channels * sizeof(float));
}
