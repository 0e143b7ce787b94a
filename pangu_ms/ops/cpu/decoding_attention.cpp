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

// All rows of a sequence as they lie, for all of its tokens.
struct Window {
    const Tokens& tokens;
    const float* kept;
    int64_t dim, places, window;

    // Without a window tokens before the text see its first row: of nothing at all there is no softmax.
    int64_t place(int64_t token) const { return window ? tokens.at(token) : std::max<int64_t>(tokens.at(token), 0); }
    int64_t together() const { return tokens.length; }
    int64_t last(int64_t group) const { return place((group + 1) * tokens.length - 1); }
    int64_t count(int64_t group) const { return std::clamp<int64_t>(last(group) + 1, 0, places); }
    int64_t block() const { return places; }
    int64_t copied() const { return 0; }
    const float* rows(int64_t group, int64_t at, int64_t, float*) const { return kept + (group * places + at) * dim; }
    void mark(int64_t group, int64_t token, char* seen) const {
        const int64_t at = place(token);
        for (int64_t s = 0; s < count(group); s++) {
            const int64_t rest = (last(group) - s) % places, back = at - last(group) + rest;  // from query to row
            seen[s] = back >= 0 && back <= at && (!window || back < window);
        }
    }
};

// The rows that one token has chosen, brought together a few at a time.
struct Chosen {
    const Tokens& tokens;
    const float* kept;
    int64_t dim, places;
    const int32_t* chosen;
    int64_t choices;

    int64_t together() const { return 1; }
    int64_t count(int64_t) const { return choices; }
    int64_t block() const { return 64; }
    int64_t copied() const { return block() * dim; }
    const float* rows(int64_t token, int64_t at, int64_t n, float* copy) const {
        const float* from = kept + token / tokens.length * places * dim;
        for (int64_t i = 0; i < n; i++)
            memcpy(copy + i * dim, from + chosen[token * choices + at + i] * dim, dim * sizeof(float));
        return copy;
    }
    void mark(int64_t, int64_t token, char* seen) const {
        for (int64_t s = 0; s < choices; s++) seen[s] = chosen[token * choices + s] <= tokens.at(token);
    }
};

// q [B, T, heads * (nope + P)], turned, sinks [S0, L] and [S0, P], norm [L] of the first, or these absent,
// kept [B * R, L + P], kv_b [heads * (nope + value), L], ring [B * R2, C], conv [C, 1, k], C = heads * value, or these
// absent, weight [H, C], position, what tells which rows a query sees, scale, eps -> y [B, T, H]
//
// `reader` hands them out: groups of `together` tokens read the same `count` rows, `block` at a time, and of these
// `mark` says which a token sees; the sinks all do.
template <class Reader>
static void attend(const Call& call, const Tokens& tokens, const Reader& reader) {
    const int64_t rows = tokens.count(), latent = call.dim(5, 1), dim = call.dim(4, 1), rope = dim - latent,
                  sinks = call.dim(1, 0), channels = call.dim(8, 1), up_rows = call.dim(5, 0),
                  heads = (call.dim(0, 2) - up_rows + channels) / rope, head_dim = call.dim(0, 2) / heads,
                  nope = head_dim - rope, value = channels / heads, queries = reader.together() * heads,
                  panels = panels_of(queries), columns = latent / LANES;
    const float *q = call.floats(0), *kv_b = call.floats(5), scale = call.real(11);
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
    // The queries of all heads and tokens of a group read the same rows: LANES of them share what is read.
    parallel(rows / reader.together() * panels, [&](int64_t item) {
        const int64_t group = item / panels, first = item % panels * LANES, own = reader.count(group),
                      count = std::min<int64_t>(LANES, queries - first), total = sinks + own;
        const float* from = query + (group * queries + first) * dim;
        float *packed = scratch(WORK_OWN, LANES * (dim + total) + reader.copied()), *score = packed + LANES * dim,
              *copy = score + LANES * total, *to = mean + (group * queries + first) * latent;
        pack_panel([=](int64_t i) { return i < count ? from + i * dim : nullptr; }, dim, packed);
        const auto in_blocks = [&](const auto& work) {
            work(0, sinks, sink);
            for (int64_t at = 0; at < own; at += reader.block()) {
                const int64_t n = std::min(reader.block(), own - at);
                work(sinks + at, n, reader.rows(group, at, n, copy));
            }
        };
        in_blocks([=](int64_t at, int64_t n, const float* lines) {
            many_dots(lines, dim, 0, n, {packed, LANES, 0}, 1, dim, [=](int64_t s, int tile, int64_t, const Lanes* v) {
                for (int64_t i = 0; i < count; i++)
                    for (int r = 0; r < tile; r++) score[i * total + at + s + r] = v[r][i];
            });
        });
        std::vector<char> seen(total, 1);
        for (int64_t i = 0; i < count; i++) {
            if (i == 0 || (first + i) % heads == 0)
                reader.mark(group, group * reader.together() + (first + i) / heads, seen.data() + sinks);
            softmax(score + i * total, reinterpret_cast<bool*>(seen.data()), scale, total, score + i * total);
        }
        std::fill(to, to + count * latent, 0.0f);
        in_blocks([=](int64_t at, int64_t n, const float* lines) {
            many_dots(score + at, total, 0, count, {lines, dim, LANES}, columns, n,
                      [=](int64_t i, int tile, int64_t c, const Lanes* v) {
                for (int r = 0; r < tile; r++) {
                    float* sum = to + (i + r) * latent + c * LANES;
                    store(sum, load(sum) + v[r]);
                }
            });
            for (int64_t i = 0; i < count; i++)
                for (int64_t s = 0; s < n; s++)
                    for (int64_t c = columns * LANES; c < latent; c++)
                        to[i * latent + c] += score[i * total + at + s] * lines[s * dim + c];
        });
    });
    in_chunks(heads, value * latent, [=](int64_t first, int64_t last) {
        for (int64_t head = first; head < last; head++)
            for (int64_t row = 0; row < rows; row++)
                few_dots(kv_b + (head * (nope + value) + nope) * latent, 0, value,
                         mean + (row * heads + head) * latent, 1, latent,
                         [=](int64_t v, int64_t, float sum) { out[row * channels + head * value + v] = sum; });
    });
    ring_conv(call, 6, tokens, out, channels, channels, mixed);
    linear(mixed, call.floats(8), rows, channels, call.dim(8, 0), call.floats(13));
}

// The arguments of `attend` with the window (0: none)
OPERATOR(DecodingAttention) {
    const Tokens tokens = tokens_of(call, 9);
    attend(call, tokens, Window{tokens, call.floats(4), call.dim(4, 1), call.dim(4, 0) / tokens.batch, call.whole(10)});
}

ONE_SHAPE(DecodingAttention) {
    if (ndims[0] != 3) return {-2};
    return {shapes[0][0], shapes[0][1], shapes[8][0]};
}

// The arguments of `attend` with the chosen positions int32 [B, T, K], of which a query sees those up to its own
OPERATOR(DecodingChosen) {
    const Tokens tokens = tokens_of(call, 9);
    attend(call, tokens, Chosen{tokens, call.floats(4), call.dim(4, 1), call.dim(4, 0) / tokens.batch, call.ints(10),
                                call.dim(10, 2)});
}

ONE_SHAPE(DecodingChosen) { return DecodingAttentionInferShape(ndims, shapes, nullptr); }
