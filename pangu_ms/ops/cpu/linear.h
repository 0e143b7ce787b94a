// x [m, k], weight [n, k], bias [n] or null -> y [m, n]
#pragma once
#include <cstdint>

void linear(const float* x, const float* weight, int64_t m, int64_t k, int64_t n, float* y,
            const float* bias = nullptr);
