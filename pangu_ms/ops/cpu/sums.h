// Sums over rows for the gradients of parameters: in chunks of a fixed size, added up in order, so that they have the
// same bits with any number of threads.
#pragma once
#include <algorithm>
#include <cstdint>

#include "threads.h"

// work(first, last, sums) adds to sums [width] what the rows first .. last-1 give; the total goes to `out` [width].
template <class F>
void sum_over_rows(int64_t rows, int64_t width, float* out, const F& work) {
    constexpr int64_t CHUNK = 64;
    const int64_t chunks = (rows + CHUNK - 1) / CHUNK;
    float* partial = scratch(OPERATOR_OWN, chunks * width);
    parallel(chunks, [&](int64_t c) {
        float* sums = partial + c * width;
        std::fill(sums, sums + width, 0.0f);
        work(c * CHUNK, std::min((c + 1) * CHUNK, rows), sums);
    });
    std::fill(out, out + width, 0.0f);
    for (int64_t c = 0; c < chunks; c++) {
#pragma omp simd
        for (int64_t i = 0; i < width; i++) out[i] += partial[c * width + i];
    }
}
