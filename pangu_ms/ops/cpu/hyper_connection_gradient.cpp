// Gradients of the residual of N streams: read, write, merge. Streams are [B, T, N, H]; the gradients of what an
// operator gave follow its arguments.
#include <algorithm>
#include <vector>

#include "call.h"
#include "hyper_connection.h"
#include "matrix.h"

// The part that read and merge share: gate values p = alpha m + beta, m = phi . normed streams.
// Arguments 0 to 4 are streams, gamma, phi, alpha, beta, and their gradients are given from `out` on. Each alpha has N
// gates but the last, which has the rest. each(first, tokens, p, dp, dstreams) turns the values p [tokens, gates] of a
// block into their gradients dp and writes into dstreams what reaches the streams past the gates.
template <class Each>
static void gates_gradient(const Call& call, int out, int64_t gates, float eps, const Each& each) {
    const int64_t n = call.dim(0, 2), width = n * call.dim(0, 3), tokens = call.dim(0, 0) * call.dim(0, 1),
                  branches = call.size(3);
    const float *streams = call.floats(0), *gamma = call.floats(1), *phi = call.floats(2), *alpha = call.floats(3),
                *beta = call.floats(4);
    float *dstreams = call.floats(out), *dgamma = call.floats(out + 1), *dphi = call.floats(out + 2),
          *dalpha = call.floats(out + 3), *dbeta = call.floats(out + 4);
    const auto branch = [=](int64_t gate) { return std::min(gate / n, branches - 1); };
    // Of each token: gradients of m times the norm's scale; m and the gradients of p.
    float *scaled = scratch(OPERATOR_OWN, 3 * tokens * gates), *products = scaled + tokens * gates,
          *dvalues = products + tokens * gates;
    by_block(tokens, [=](int64_t first, int64_t count) {
        float *m = products + first * gates, *dp = dvalues + first * gates, *ds = dstreams + first * width;
        gate_products(streams + first * width, count, width, gamma, phi, gates, eps, m);
        std::vector<float> values(count * gates), dm(count * gates);
        for (int64_t t = 0; t < count; t++)
            for (int64_t g = 0; g < gates; g++)
                values[t * gates + g] = m[t * gates + g] * alpha[branch(g)] + beta[g];
        each(first, count, values.data(), dp, ds);
        for (int64_t t = 0; t < count; t++)
            for (int64_t g = 0; g < gates; g++) dm[t * gates + g] = dp[t * gates + g] * alpha[branch(g)];
        float* dz = scratch(WORK_OWN, count * width);                           // gradient of the normed streams
        multiply(rows_of(dm.data(), gates), rows_of(phi, width), count, width, gates, dz, width);
        for (int64_t t = 0; t < count; t++) {
            const float *f = streams + (first + t) * width, scale = rms_scale(f, eps, width);
            float along = 0;                                                    // dz . normed = dm . m
            for (int64_t g = 0; g < gates; g++) {
                along += dm[t * gates + g] * m[t * gates + g];
                scaled[(first + t) * gates + g] = dm[t * gates + g] * scale;
            }
            const float pull = along / width * scale;
#pragma omp simd
            for (int64_t c = 0; c < width; c++)
                ds[t * width + c] += scale * (gamma[c] * dz[t * width + c] - pull * f[c]);
        }
    });
    // dphi = gamma * s, dgamma = sum over gates of phi * s, where s = sum over tokens of dm * scale * streams.
    multiply_by_all(columns_of(scaled, gates), rows_of(streams, width), gates, width, tokens, dphi, width);
    std::fill(dgamma, dgamma + width, 0.0f);
    for (int64_t g = 0; g < gates; g++) {
        float* line = dphi + g * width;
#pragma omp simd
        for (int64_t c = 0; c < width; c++) {
            dgamma[c] += phi[g * width + c] * line[c];
            line[c] *= gamma[c];
        }
    }
    std::vector<double> sums(2 * gates);                                        // of dp, then of dp * m
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t g = 0; g < gates; g++) {
            sums[g] += dvalues[t * gates + g];
            sums[gates + g] += dvalues[t * gates + g] * products[t * gates + g];
        }
    std::vector<double> by_branch(branches);
    for (int64_t g = 0; g < gates; g++) {
        dbeta[g] = sums[g];
        by_branch[branch(g)] += sums[gates + g];
    }
    std::copy(by_branch.begin(), by_branch.end(), dalpha);
}

// x = sum_i (sigmoid(p[i]) + eps) * stream[i]: gradients of p [n] and, first written here, of the streams.
static void weighted_sum_gradient(const float* p, const float* streams, const float* dx, int64_t n, int64_t hidden,
                                  float* dp, float* dstreams) {
    for (int64_t i = 0; i < n; i++) {
        const float gate = sigmoid(p[i]), *stream = streams + i * hidden;
        float *to = dstreams + i * hidden, along = 0;
#pragma omp simd reduction(+ : along)
        for (int64_t h = 0; h < hidden; h++) {
            along += dx[h] * stream[h];
            to[h] = (gate + GATE_EPS) * dx[h];
        }
        dp[i] = along * gate * (1 - gate);
    }
}

// Logits [n * n] and the gradient d [n * n] of what Sinkhorn makes of them -> d of the logits, LANES tokens at once.
// memory holds the matrix after each step, and one over each sum that the step divided by.
static void sinkhorn_gradient(const Lanes* logits, int64_t n, int64_t rounds, Lanes* d, Lanes* memory) {
    const int64_t area = n * n, steps = 2 * rounds - 1, place = area + n;       // columns, rows, columns, ..., columns
    const auto group = [=](int64_t step, int64_t k, int64_t i) { return step % 2 ? k * n + i : i * n + k; };
    const Lanes zero{}, one = zero + 1.0f;
    Lanes *softmax = memory, *start = softmax + area;
    for (int64_t k = 0; k < n; k++) {
        Lanes top = logits[k * n], total = zero;
        for (int64_t i = 1; i < n; i++) top = logits[k * n + i] > top ? logits[k * n + i] : top;
        for (int64_t i = 0; i < n; i++) {
            Lanes& value = softmax[k * n + i];
            value = logits[k * n + i] - top;
#pragma omp simd
            for (int lane = 0; lane < LANES; lane++) value[lane] = exponential(value[lane]);
            total += value;
        }
        for (int64_t i = 0; i < n; i++) {
            softmax[k * n + i] /= total;
            start[k * n + i] = softmax[k * n + i] + GATE_EPS;
        }
    }
    for (int64_t step = 0; step < steps; step++) {
        const Lanes* from = start + step * place;
        Lanes *to = start + (step + 1) * place, *share = to + area;
        for (int64_t k = 0; k < n; k++) {
            Lanes total = zero + GATE_EPS;
            for (int64_t i = 0; i < n; i++) total += from[group(step, k, i)];
            share[k] = one / total;
            for (int64_t i = 0; i < n; i++) to[group(step, k, i)] = from[group(step, k, i)] * share[k];
        }
    }
    for (int64_t step = steps - 1; step >= 0; step--) {
        const Lanes *to = start + (step + 1) * place, *share = to + area;
        for (int64_t k = 0; k < n; k++) {
            Lanes along = zero;
            for (int64_t i = 0; i < n; i++) along += d[group(step, k, i)] * to[group(step, k, i)];
            for (int64_t i = 0; i < n; i++) d[group(step, k, i)] = (d[group(step, k, i)] - along) * share[k];
        }
    }
    for (int64_t k = 0; k < n; k++) {
        Lanes along = zero;
        for (int64_t i = 0; i < n; i++) along += d[k * n + i] * softmax[k * n + i];
        for (int64_t i = 0; i < n; i++) d[k * n + i] = softmax[k * n + i] * (d[k * n + i] - along);
    }
}

// The arguments of HyperConnectionRead, dx, dpost, dmix -> dstreams, dgamma, dphi, dalpha, dbeta
OPERATOR(HyperConnectionReadGradient) {
    const int64_t n = call.dim(0, 2), hidden = call.dim(0, 3), width = n * hidden, area = n * n, gates = n * (n + 2),
                  rounds = call.whole(6);
    const float *streams = call.floats(0), *dx = call.floats(7), *dpost = call.floats(8), *dmix = call.floats(9);
    const auto block = [=](int64_t first, int64_t tokens, const float* p, float* dp, float* dstreams) {
        for (int64_t t = 0; t < tokens; t++) {
            const float* value = p + t * gates;
            weighted_sum_gradient(value, streams + (first + t) * width, dx + (first + t) * hidden, n, hidden,
                                  dp + t * gates, dstreams + t * width);
            for (int64_t i = 0; i < n; i++) {
                const float gate = sigmoid(value[n + i]);
                dp[t * gates + n + i] = 2 * dpost[(first + t) * n + i] * gate * (1 - gate);
            }
        }
        Lanes* logits = reinterpret_cast<Lanes*>(scratch(WORK_OWN, LANES * (3 * area + 2 * rounds * (area + n))));
        Lanes *d = logits + area, *memory = d + area;
        for (int64_t from = 0; from < tokens; from += LANES) {
            const int64_t lanes = std::min<int64_t>(LANES, tokens - from);
            std::fill(logits, memory, Lanes{});
            for (int64_t i = 0; i < area; i++)
                for (int64_t t = 0; t < lanes; t++) {
                    logits[i][t] = p[(from + t) * gates + 2 * n + i];
                    d[i][t] = dmix[(first + from + t) * area + i];
                }
            sinkhorn_gradient(logits, n, rounds, d, memory);
            for (int64_t i = 0; i < area; i++)
                for (int64_t t = 0; t < lanes; t++) dp[(from + t) * gates + 2 * n + i] = d[i][t];
        }
    };
    gates_gradient(call, 10, gates, call.real(5), block);
}

SHAPES_OF(HyperConnectionReadGradient, 0, 1, 2, 3, 4)

// The arguments of HyperConnectionMerge, dy -> dstreams, dgamma, dphi, dalpha, dbeta
OPERATOR(HyperConnectionMergeGradient) {
    const int64_t n = call.dim(0, 2), hidden = call.dim(0, 3), width = n * hidden;
    const float *streams = call.floats(0), *dy = call.floats(6);
    gates_gradient(call, 7, n, call.real(5), [=](int64_t first, int64_t tokens, const float* p, float* dp, float* ds) {
        for (int64_t t = 0; t < tokens; t++)
            weighted_sum_gradient(p + t * n, streams + (first + t) * width, dy + (first + t) * hidden, n, hidden,
                                  dp + t * n, ds + t * width);
    });
}

SHAPES_OF(HyperConnectionMergeGradient, 0, 1, 2, 3, 4)

// y, post, mix, streams, dout [B, T, N, H] -> dy, dpost, dmix, dstreams
OPERATOR(HyperConnectionWriteGradient) {
    const int64_t n = call.dim(3, 2), hidden = call.dim(3, 3), width = n * hidden;
    const float *y = call.floats(0), *post = call.floats(1), *mix = call.floats(2), *streams = call.floats(3),
                *dout = call.floats(4);
    float *dy = call.floats(5), *dpost = call.floats(6), *dmix = call.floats(7), *dstreams = call.floats(8);
    const auto dot = [=](const float* a, const float* b) {
        float total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t h = 0; h < hidden; h++) total += a[h] * b[h];
        return total;
    };
    const auto sum = [=](const float* parts, const float* d, float* to) {  // over j of parts[j] * d[j]
        std::fill(to, to + hidden, 0.0f);
        for (int64_t j = 0; j < n; j++) {
            const float part = parts[j], *from = d + j * hidden;
#pragma omp simd
            for (int64_t h = 0; h < hidden; h++) to[h] += part * from[h];
        }
    };
    in_chunks(call.dim(3, 0) * call.dim(3, 1), 2 * n * width, [=](int64_t first, int64_t last) {
        for (int64_t t = first; t < last; t++) {
            const float *d = dout + t * width, *stream = streams + t * width;
            sum(post + t * n, d, dy + t * hidden);
            for (int64_t j = 0; j < n; j++) dpost[t * n + j] = dot(d + j * hidden, y + t * hidden);
            for (int64_t i = 0; i < n; i++) {
                sum(mix + (t * n + i) * n, d, dstreams + t * width + i * hidden);
                for (int64_t j = 0; j < n; j++) dmix[(t * n + i) * n + j] = dot(stream + i * hidden, d + j * hidden);
            }
        }
    });
}

SHAPES_OF(HyperConnectionWriteGradient, 0, 1, 2, 3)
