// Products with weights [N, K] that are read where they lie, in two forms.
//
// Few tokens: every weight row is multiplied with each token, lanes along K; as fast as memory delivers the rows.
// Many tokens: lanes along tokens. The tokens are laid out in panels [K][LANES] first, and so is the result, which
// makes the result of one product the input of the next.
#pragma once
#include <cstdint>

#include "lanes.h"

constexpr int FEW = 8;                                  // up to so many tokens the first form is faster
constexpr int TILE = LANES == 16 ? 8 : 4;               // weight rows at once: their sums must fit the registers

// ROWS weight rows, `stride` apart, times M tokens, 4 sums in all: x[m] are the tokens' rows of k, out [ROWS * M] goes
// row by row. The four are added up across their lanes together, and each has its additions in flight.
template <int ROWS, int M>
inline void dot_tile(const float* weight, int64_t stride, const float* const x[M], int64_t k, float out[4]) {
    static_assert(ROWS * M == 4);
    constexpr int FLIGHT = 2;
    // The next rows, or later in these.
    const int64_t ahead = stride > k ? 4 * stride : ROWS * k > 1024 && ROWS * k < 4096 ? ROWS * k : 1024;
    Lanes total[4][FLIGHT] = {};
    int64_t i = 0;
    for (; i + FLIGHT * LANES <= k; i += FLIGHT * LANES)
        for (int f = 0; f < FLIGHT; f++)
            for (int r = 0; r < ROWS; r++) {
                const float* from = weight + r * stride + i + f * LANES;
                __builtin_prefetch(from + ahead);
                const Lanes w = load(from);
                for (int m = 0; m < M; m++) total[r * M + m][f] += w * load(x[m] + i + f * LANES);
            }
    for (; i + LANES <= k; i += LANES)
        for (int r = 0; r < ROWS; r++)
            for (int m = 0; m < M; m++) total[r * M + m][0] += load(weight + r * stride + i) * load(x[m] + i);
    sum_four(total[0][0] + total[0][1], total[1][0] + total[1][1], total[2][0] + total[2][1],
             total[3][0] + total[3][1], out);
    for (; i < k; i++)
        for (int r = 0; r < ROWS; r++)
            for (int m = 0; m < M; m++) out[r * M + m] += weight[r * stride + i] * x[m][i];
}

// Weight rows first .. last-1, `stride` apart, times m tokens x [m, k]; each(row, token, value) takes the results. The
// tokens take turns with 4 rows at most, so that memory delivers these once.
template <class Each>
inline void few_dots(const float* weight, int64_t stride, int64_t first, int64_t last, const float* x, int64_t m,
                     int64_t k, const Each& each) {
    float out[4];
    for (int64_t row = first; row < last; row += 4) {
        const int64_t rows = row + 4 <= last ? 4 : last - row;
        const float* w = weight + row * stride;
        for (int64_t t = 0; t < m; t += 4) {
            const int64_t count = m - t < 4 ? m - t : 4;
            const float* in[4];                         // where there are fewer, the last one again
            for (int64_t i = 0; i < 4; i++) in[i] = x + (i < count ? t + i : m - 1) * k;
            if (count == 1 && rows == 4) {
                dot_tile<4, 1>(w, stride, in, k, out);
                for (int64_t r = 0; r < 4; r++) each(row + r, t, out[r]);
            } else if (count == 2 && rows == 4) {
                for (int64_t r = 0; r < 4; r += 2) {
                    dot_tile<2, 2>(w + r * stride, stride, in, k, out);
                    for (int64_t i = 0; i < 4; i++) each(row + r + i / 2, t + i % 2, out[i]);
                }
            } else {
                for (int64_t r = 0; r < rows; r++) {
                    dot_tile<1, 4>(w + r * stride, stride, in, k, out);
                    for (int64_t i = 0; i < count; i++) each(row + r, t + i, out[i]);
                }
            }
        }
    }
}

template <class Each>
inline void few_dots(const float* weight, int64_t first, int64_t last, const float* x, int64_t m, int64_t k,
                     const Each& each) {
    few_dots(weight, k, first, last, x, m, k, each);
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
