// The attention of a decoding step over the rows that the cache keeps, in absorbed form, with the output's convolution
// and projection behind it.
#include <algorithm>
#include <vector>

#include "attention.h"
#include "call.h"
#include "decoding.h"
#include "linear.h"
#include "norm.h"
#include "product.h"
#include "threads.h"

// q [B, T, heads * (nope + P)], turned, sinks [S0, L] and [S0, P], norm [L] of the first, kept [B * R, L + P],
// kv_b [heads * (nope + value), L], ring [B * R2, C], conv [C, 1, k], C = heads * value, weight [H, C], position,
// window (0: none), scale, eps -> y [B, T, H]
OPERATOR(DecodingAttention) {
    const Tokens tokens = tokens_of(call, 9);
    const int64_t length = tokens.length, rows = tokens.count(), latent = call.dim(1, 1), rope = call.dim(2, 1),
                  sinks = call.dim(1, 0), dim = latent + rope, places = call.dim(4, 0) / tokens.batch,
                  channels = call.dim(6, 1), up_rows = call.dim(5, 0),
                  heads = (call.dim(0, 2) - up_rows + channels) / rope, head_dim = call.dim(0, 2) / heads,
                  nope = head_dim - rope, value = channels / heads, window = call.whole(10),
                  panels = panels_of(length * heads);
    const float *q = call.floats(0), *kept = call.floats(4), *kv_b = call.floats(5), scale = call.real(11);
    float* memory = scratch(COMPOSED_OWN, sinks * dim + rows * (heads * (dim + latent) + 2 * channels));
    float *sink = memory, *query = sink + sinks * dim, *mean = query + rows * heads * dim,
          *out = mean + rows * heads * latent, *mixed = out + rows * channels;
    for (int64_t s = 0; s < sinks; s++) {
        rms_norm(call.floats(1) + s * latent, call.floats(3), call.real(12), latent, sink + s * dim);
        memcpy(sink + s * dim + latent, call.floats(2) + s * rope, rope * sizeof(float));
    }
    // The keys' half of kv_b goes to the query, the values' half to the output: kept rows are read as they lie.
    in_chunks(heads, nope * latent, [=](int64_t first, int64_t last) {
        for (int64_t head = first; head < last; head++)
            for (int64_t row = 0; row < rows; row++) {
                const float *from = q + (row * heads + head) * head_dim, *up = kv_b + head * (nope + value) * latent;
                float* to = query + (row * heads + head) * dim;
                std::fill(to, to + latent, 0.0f);
                for (int64_t i = 0; i < nope; i++) {
                    const float part = from[i];
#pragma omp simd
                    for (int64_t c = 0; c < latent; c++) to[c] += part * up[i * latent + c];
                }
                memcpy(to + latent, from + nope, rope * sizeof(float));
            }
    });
    // The queries of all heads and tokens of a sequence read the same rows: LANES of them share what is read.
    parallel(tokens.batch * panels, [=](int64_t item) {
        const int64_t b = item / panels, first = item % panels * LANES,
                      count = std::min<int64_t>(LANES, length * heads - first),
                      last = tokens.at((b + 1) * length - 1), own = std::clamp<int64_t>(last + 1, 0, places),
                      total = sinks + own, columns = latent / LANES;
        const float *from = query + (b * length * heads + first) * dim, *keys = kept + b * places * dim;
        float *packed = scratch(WORK_OWN, LANES * (dim + total)), *score = packed + LANES * dim,
              *to = mean + (b * length * heads + first) * latent;
        pack_panel([=](int64_t i) { return i < count ? from + i * dim : nullptr; }, dim, packed);
        const auto into = [=](int64_t at) {
            return [=](int64_t s, int n, int64_t, const Lanes* v) {
                for (int64_t i = 0; i < count; i++)
                    for (int r = 0; r < n; r++) score[i * total + at + s + r] = v[r][i];
            };
        };
        many_dots(sink, dim, 0, sinks, {packed, LANES, 0}, 1, dim, into(0));
        many_dots(keys, dim, 0, own, {packed, LANES, 0}, 1, dim, into(sinks));
        std::vector<char> seen(total, 1);
        for (int64_t i = 0; i < count; i++) {
            const int64_t at = tokens.at(b * length + (first + i) / heads);
            if (i == 0 || (first + i) % heads == 0)
                for (int64_t s = 0; s < own; s++) {
                    const int64_t rest = (last - s) % places, back = at - last + rest;  // from the query to the row
                    seen[sinks + s] = back >= 0 && back <= at && (!window || back < window);
                }
            softmax(score + i * total, reinterpret_cast<bool*>(seen.data()), scale, total, score + i * total);
        }
        std::fill(to, to + count * latent, 0.0f);
        const auto sum_up = [=](int64_t i, int n, int64_t c, const Lanes* v) {
            for (int r = 0; r < n; r++) {
                float* sum = to + (i + r) * latent + c * LANES;
                store(sum, load(sum) + v[r]);
            }
        };
        many_dots(score, total, 0, count, {sink, dim, LANES}, columns, sinks, sum_up);
        many_dots(score + sinks, total, 0, count, {keys, dim, LANES}, columns, own, sum_up);
        for (int64_t i = 0; i < count; i++)
            for (int64_t s = 0; s < total; s++) {
                const float* line = s < sinks ? sink + s * dim : keys + (s - sinks) * dim;
                for (int64_t c = columns * LANES; c < latent; c++)
                    to[i * latent + c] += score[i * total + s] * line[c];
            }
    });
    in_chunks(heads, value * latent, [=](int64_t first, int64_t last) {
        for (int64_t head = first; head < last; head++)
            for (int64_t row = 0; row < rows; row++)
                few_dots(kv_b + (head * (nope + value) + nope) * latent, 0, value,
                         mean + (row * heads + head) * latent, 1, latent,
                         [=](int64_t v, int64_t, float sum) { out[row * channels + head * value + v] = sum; });
    });
    ring_conv(call, 6, tokens, out, channels, mixed);
    linear(mixed, call.floats(8), rows, channels, call.dim(8, 0), call.floats(13));
}

ONE_SHAPE(DecodingAttention) {
    if (ndims[0] != 3) return {-2};
    return {shapes[0][0], shapes[0][1], shapes[8][0]};
}

// out [B, T, C], ring [B * R, C], conv [C, 1, k], weight [H, C], position -> y [B, T, H]
OPERATOR(DecodingOutput) {
    const Tokens tokens = tokens_of(call, 4);
    const int64_t channels = call.dim(3, 1), rows = tokens.count();
    float* mixed = scratch(COMPOSED_OWN, rows * channels);
    ring_conv(call, 1, tokens, call.floats(0), channels, mixed);
    linear(mixed, call.floats(3), rows, channels, call.dim(3, 0), call.floats(5));
}

ONE_SHAPE(DecodingOutput) {
    if (ndims[0] != 3) return {-2};
    return {shapes[0][0], shapes[0][1], shapes[3][0]};
}
