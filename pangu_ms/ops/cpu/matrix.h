// Products of matrices that lie in memory in any direction, for gradients: C = A B or C += A B, by one thread or by
// all, every sum always in the same order.
#pragma once
#include <algorithm>
#include <cstdint>

#include "lanes.h"
#include "threads.h"

// A matrix by the steps from one row to the next and from one column to the next.
struct Matrix {
    const float* data;
    int64_t row, column;

    Matrix from(int64_t first_row, int64_t first_column) const {
        return {data + first_row * row + first_column * column, row, column};
    }
};

inline Matrix rows_of(const float* data, int64_t width) { return {data, width, 1}; }
inline Matrix columns_of(const float* data, int64_t width) { return {data, 1, width}; }  // rows_of, transposed

// LANES vectors as the rows of a square -> its columns: blocks of HALF lanes change places, then smaller ones in them.
template <int HALF = LANES / 2>
inline void transpose(Lanes* v) {
    LaneIndex low, high;
    for (int i = 0; i < LANES; i++) {
        low[i] = i & HALF ? LANES + i - HALF : i;
        high[i] = i & HALF ? LANES + i : i + HALF;
    }
    for (int i = 0; i < LANES; i++) {
        if (i & HALF) continue;
        const Lanes a = v[i], b = v[i + HALF];
        v[i] = __builtin_shuffle(a, b, low);
        v[i + HALF] = __builtin_shuffle(a, b, high);
    }
    if constexpr (HALF > 1) transpose<HALF / 2>(v);
}

constexpr int PAIR = 2 * LANES;                         // columns of C at once
constexpr int64_t DEPTH = 256;                          // terms of a sum between two visits to C
constexpr int STEP = LANES == 16 ? 8 : 4;               // rows of C at once: their sums must fit the registers

// `depth` rows of `columns` <= PAIR columns -> packed [depth][PAIR], zeros behind the last column.
inline void pack_columns(const Matrix& b, int64_t depth, int64_t columns, float* packed) {
    int64_t i = 0;
    if (b.row == 1 && b.column != 1 && columns == PAIR)
        for (; i + LANES <= depth; i += LANES)
            for (int half = 0; half < PAIR; half += LANES) {
                Lanes square[LANES];
                for (int c = 0; c < LANES; c++) square[c] = load(b.data + i + (half + c) * b.column);
                transpose(square);
                for (int r = 0; r < LANES; r++) store(packed + (i + r) * PAIR + half, square[r]);
            }
    for (; i < depth; i++) {
        float* line = packed + i * PAIR;
        const float* from = b.data + i * b.row;
        if (b.column == 1 && columns == PAIR) memcpy(line, from, PAIR * sizeof(float));
        else
            for (int c = 0; c < PAIR; c++) line[c] = c < columns ? from[c * b.column] : 0.0f;
    }
}

template <int ROWS>
inline void multiply_tile(const Matrix& a, const float* packed, int64_t depth, int64_t columns, float* c, int64_t line,
                          bool add) {
    Lanes total[ROWS][2] = {};
    for (int64_t i = 0; i < depth; i++) {
        const Lanes left = load(packed + i * PAIR), right = load(packed + i * PAIR + LANES);
        for (int r = 0; r < ROWS; r++) {
            const Lanes value = Lanes{} + a.data[r * a.row + i * a.column];
            total[r][0] += value * left;
            total[r][1] += value * right;
        }
    }
    for (int r = 0; r < ROWS; r++) {
        float* to = c + r * line;
        if (columns == PAIR)
            for (int half = 0; half < 2; half++) {
                float* at = to + half * LANES;
                store(at, add ? load(at) + total[r][half] : total[r][half]);
            }
        else
            for (int64_t i = 0; i < columns; i++) to[i] = (add ? to[i] : 0.0f) + total[r][i / LANES][i % LANES];
    }
}

// C [rows, columns], its rows `line` apart, = A [rows, depth] B [depth, columns], or that added to C. By the thread
// that calls.
inline void multiply(const Matrix& a, const Matrix& b, int64_t rows, int64_t columns, int64_t depth, float* c,
                     int64_t line, bool add = false) {
    alignas(64) float packed[DEPTH * PAIR];
    for (int64_t column = 0; column < columns; column += PAIR) {
        const int64_t width = std::min<int64_t>(PAIR, columns - column);
        for (int64_t i = 0; i < depth; i += DEPTH) {
            const int64_t terms = std::min(DEPTH, depth - i);
            const bool more = add || i;
            pack_columns(b.from(i, column), terms, width, packed);
            int64_t row = 0;
            for (; row + STEP <= rows; row += STEP)
                multiply_tile<STEP>(a.from(row, i), packed, terms, width, c + row * line + column, line, more);
            if (row + 4 <= rows && STEP > 4) {
                multiply_tile<4>(a.from(row, i), packed, terms, width, c + row * line + column, line, more);
                row += 4;
            }
            for (; row + 2 <= rows; row += 2)
                multiply_tile<2>(a.from(row, i), packed, terms, width, c + row * line + column, line, more);
            for (; row < rows; row++)
                multiply_tile<1>(a.from(row, i), packed, terms, width, c + row * line + column, line, more);
        }
    }
    if (!depth && !add)
        for (int64_t row = 0; row < rows; row++) std::fill(c + row * line, c + row * line + columns, 0.0f);
}

// The same by all threads, cut into blocks of C.
inline void multiply_by_all(const Matrix& a, const Matrix& b, int64_t rows, int64_t columns, int64_t depth, float* c,
                            int64_t line, bool add = false) {
    constexpr int64_t HIGH = 128, WIDE = 2 * PAIR;
    const int64_t across = (columns + WIDE - 1) / WIDE, down = (rows + HIGH - 1) / HIGH;
    parallel(across * down, [=](int64_t item) {
        const int64_t row = item / across * HIGH, column = item % across * WIDE;
        multiply(a.from(row, 0), b.from(0, column), std::min(HIGH, rows - row), std::min(WIDE, columns - column), depth,
                 c + row * line + column, line, add);
    });
}
