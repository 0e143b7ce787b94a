// Products with weights [N, K] that are read where they lie, in two forms.
//
// Few tokens: every weight row is multiplied with each token, lanes along K; as fast as memory delivers the rows.
// Many tokens: lanes along tokens. The tokens are laid out in panels [K][LANES] first, and so is the result, which
// makes the result of one product the input of the next.
#pragma once
#include <cstdint>

#include "lanes.h"

constexpr int FEW = 2;                                  // up to so many tokens the first form is faster
constexpr int TILE = LANES == 16 ? 8 : 4;               // weight rows at once: their sums must fit the registers

// One weight row times M tokens; x has rows of k. each(row, token, value) takes the results. One row at a time, because
// a single stream is what memory delivers fastest; 4 sums in flight hide the latency of an addition.
template <int M, class Each>
inline void dot_row(const float* weight, const float* x, int64_t k, int64_t row, int64_t token, const Each& each) {
    constexpr int FLIGHT = 4;
    Lanes total[M][FLIGHT] = {};
    int64_t i = 0;
    for (; i + FLIGHT * LANES <= k; i += FLIGHT * LANES)
        for (int f = 0; f < FLIGHT; f++) {
            __builtin_prefetch(weight + i + f * LANES + 1024);
            const Lanes w = load(weight + i + f * LANES);
            for (int m = 0; m < M; m++) total[m][f] += w * load(x + m * k + i + f * LANES);
        }
    for (; i + LANES <= k; i += LANES)
        for (int m = 0; m < M; m++) total[m][0] += load(weight + i) * load(x + m * k + i);
    for (int m = 0; m < M; m++) {
        float value = sum((total[m][0] + total[m][1]) + (total[m][2] + total[m][3]));
        for (int64_t rest = i; rest < k; rest++) value += weight[rest] * x[m * k + rest];
        each(row, token + m, value);
    }
}

// Weight rows first .. last-1 times m tokens x [m, k].
template <class Each>
inline void few_dots(const float* weight, int64_t first, int64_t last, const float* x, int64_t m, int64_t k,
                     const Each& each) {
    for (int64_t row = first; row < last; row++) {
        const float* w = weight + row * k;
        int64_t t = 0;
        for (; t + 2 <= m; t += 2) dot_row<2>(w, x + t * k, k, row, t, each);
        if (t < m) dot_row<1>(w, x + t * k, k, row, t, each);
    }
}

inline int64_t panels_of(int64_t tokens) { return (tokens + LANES - 1) / LANES; }

// Token rows -> one panel [k][LANES]; lanes that have no token hold zeros. row(i) is the i-th token's row, or null.
template <class Row>
inline void pack_panel(const Row& row, int64_t k, float* panel) {
    for (int lane = 0; lane < LANES; lane++) {
        const float* x = row(lane);
        for (int64_t i = 0; i < k; i++) panel[i * LANES + lane] = x ? x[i] : 0.0f;
    }
}

// Panels of LANES columns: `line` from one of the K lines to the next, `step` from one panel to the next. Packed ones
// are {data, LANES, K * LANES}; rows of a matrix [K, D] as they lie are {data, D, LANES}.
struct Panels {
    const float* data;
    int64_t line, step;
};

// ROWS weight rows, `stride` apart, times PANELS neighbouring panels -> out [ROWS][PANELS].
template <int ROWS, int PANELS>
inline void panel_tile(const float* weight, int64_t stride, int64_t k, Panels panel, Lanes out[ROWS][PANELS]) {
    Lanes total[ROWS][PANELS] = {};
    for (int64_t i = 0; i < k; i++) {
        Lanes in[PANELS];
        for (int p = 0; p < PANELS; p++) in[p] = load(panel.data + p * panel.step + i * panel.line);
        for (int r = 0; r < ROWS; r++) {
            const Lanes w = Lanes{} + weight[r * stride + i];
            for (int p = 0; p < PANELS; p++) total[r][p] += w * in[p];
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++) out[r][p] = total[r][p];
}

inline Panels packed_panels(const float* data, int64_t k) { return {data, LANES, k * LANES}; }

// Weight rows first .. last-1, `stride` apart, times `panels` panels. each(row, rows, panel, values) takes the sums of
// `rows` weight rows from `row` on with one panel, values [rows][LANES].
template <class Each>
inline void many_dots(const float* weight, int64_t stride, int64_t first, int64_t last, Panels panel, int64_t panels,
                      int64_t k, const Each& each) {
    Lanes out[TILE][2], one[TILE];
    for (int64_t row = first; row < last; row += TILE) {
        const int rows = static_cast<int>(row + TILE <= last ? TILE : last - row);
        const float* w = weight + row * stride;
        int64_t p = 0;
        for (; p + 2 <= panels; p += 2) {
            const Panels in{panel.data + p * panel.step, panel.line, panel.step};
            if (rows == TILE) panel_tile<TILE, 2>(w, stride, k, in, out);
            else for (int r = 0; r < rows; r++) panel_tile<1, 2>(w + r * stride, stride, k, in, out + r);
            for (int half = 0; half < 2; half++) {
                for (int r = 0; r < rows; r++) one[r] = out[r][half];
                each(row, rows, p + half, one);
            }
        }
        if (p < panels) {
            const Panels in{panel.data + p * panel.step, panel.line, panel.step};
            Lanes(*single)[1] = reinterpret_cast<Lanes(*)[1]>(one);
            if (rows == TILE) panel_tile<TILE, 1>(w, stride, k, in, single);
            else for (int r = 0; r < rows; r++) panel_tile<1, 1>(w + r * stride, stride, k, in, single + r);
            each(row, rows, p, one);
        }
    }
}
