// The language model's head with its cross entropy, and the gradient: logits live for a block of rows alone. Rows whose
// mask is 0 are left out.
#include <string>
#include <vector>

#include "call.h"
#include "matrix.h"

constexpr int64_t ROWS = 64;                            // that one thread takes at a time
constexpr int64_t BLOCK = 1 << 22;                      // logits kept at once for the gradient of the weight

// A label comes from data: one that is no word would be read, and written, outside of the logits.
static std::vector<int64_t> counted_rows(const float* mask, const int32_t* labels, int64_t rows, int64_t words) {
    std::vector<int64_t> counted;
    for (int64_t row = 0; row < rows; row++) {
        if (mask[row] == 0) continue;
        if (labels[row] < 0 || labels[row] >= words)
            throw std::out_of_range("label " + std::to_string(labels[row]) + " of row " + std::to_string(row) +
                                    " is outside the vocabulary of " + std::to_string(words) +
                                    "; train with the tokenizer of the model");
        counted.push_back(row);
    }
    return counted;
}

// Logits [words] -> e^(logit - the largest); `top` takes the largest, the result is the sum.
static float exponentials(float* logits, int64_t words, float& top) {
    float largest = -INFINITY, total = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t v = 0; v < words; v++) largest = logits[v] > largest ? logits[v] : largest;
#pragma omp simd reduction(+ : total)
    for (int64_t v = 0; v < words; v++) total += logits[v] = exponential(logits[v] - largest);
    top = largest;
    return total;
}

// hidden [..., H], weight [V, H], labels int32 [...], mask [...] -> mask * -log softmax(weight . hidden)[label] [...]
OPERATOR(CrossEntropy) {
    const int64_t words = call.dim(1, 0), size = call.dim(1, 1), rows = call.size(2);
    const float *hidden = call.floats(0), *weight = call.floats(1), *mask = call.floats(3);
    const int32_t* labels = call.ints(2);
    float* loss = call.floats(4);
    const auto counted = counted_rows(mask, labels, rows, words);
    const int64_t total = counted.size();
    std::fill(loss, loss + rows, 0.0f);
    parallel((total + ROWS - 1) / ROWS, [&](int64_t block) {
        const int64_t first = block * ROWS, count = std::min(ROWS, total - first);
        float *logits = scratch(WORK_OWN, count * (words + size)), *in = logits + count * words;
        for (int64_t i = 0; i < count; i++)
            memcpy(in + i * size, hidden + counted[first + i] * size, size * sizeof(float));
        multiply(rows_of(in, size), columns_of(weight, size), count, words, size, logits, words);
        for (int64_t i = 0; i < count; i++) {
            const int64_t row = counted[first + i];
            float *line = logits + i * words, top;
            const float chosen = line[labels[row]], sum = exponentials(line, words, top);
            loss[row] = mask[row] * (logf(sum) + (top - chosen));
        }
    });
}

ONE_SHAPE(CrossEntropy) { return shape_of(2, ndims, shapes); }

// The arguments of CrossEntropy, dloss [...] -> dhidden, dweight
OPERATOR(CrossEntropyGradient) {
    const int64_t words = call.dim(1, 0), size = call.dim(1, 1), rows = call.size(2), line = words + LANES;
    const float *hidden = call.floats(0), *weight = call.floats(1), *mask = call.floats(3), *dloss = call.floats(4);
    const int32_t* labels = call.ints(2);
    float *dhidden = call.floats(5), *dweight = call.floats(6);
    const auto counted = counted_rows(mask, labels, rows, words);
    const int64_t total = counted.size(), together = std::max<int64_t>(1, BLOCK / words / ROWS) * ROWS;
    // Gradients of the logits, a little more than the words apart: lines a power of 2 apart would fall into the same
    // sets of the caches when they are read by column.
    const int64_t most = std::min(together, total);
    float *dlogits = scratch(OPERATOR_OWN, most * (line + size)), *in = dlogits + most * line;
    std::fill(dhidden, dhidden + rows * size, 0.0f);
    std::fill(dweight, dweight + words * size, 0.0f);
    for (int64_t start = 0; start < total; start += together) {
        const int64_t here = std::min(together, total - start);
        parallel((here + ROWS - 1) / ROWS, [&](int64_t block) {
            const int64_t first = block * ROWS, count = std::min(ROWS, here - first);
            float *d = dlogits + first * line, *x = in + first * size, *dx = scratch(WORK_OWN, count * size);
            const auto row = [&](int64_t i) { return counted[start + first + i]; };
            for (int64_t i = 0; i < count; i++) memcpy(x + i * size, hidden + row(i) * size, size * sizeof(float));
            multiply(rows_of(x, size), columns_of(weight, size), count, words, size, d, line);
            for (int64_t i = 0; i < count; i++) {
                float *to = d + i * line, top;
                const float part = mask[row(i)] * dloss[row(i)], share = part / exponentials(to, words, top);
#pragma omp simd
                for (int64_t v = 0; v < words; v++) to[v] *= share;
                to[labels[row(i)]] -= part;
            }
            multiply(rows_of(d, line), rows_of(weight, size), count, size, words, dx, size);
            for (int64_t i = 0; i < count; i++) memcpy(dhidden + row(i) * size, dx + i * size, size * sizeof(float));
        });
        multiply_by_all(columns_of(dlogits, line), rows_of(in, size), words, size, here, dweight, size, true);
    }
}

SHAPES_OF(CrossEntropyGradient, 0, 1)
