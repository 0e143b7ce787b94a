// Vectors of the width the machine has, their sum, and the exponential.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Lanes __attribute__((vector_size(4 * LANES)));
typedef int32_t LaneIndex __attribute__((vector_size(4 * LANES)));

inline Lanes load(const float* p) {
    Lanes v;
    memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Lanes v) { memcpy(p, &v, sizeof v); }

inline float sum(Lanes v) {
    for (int half = LANES / 2; half; half /= 2) {
        LaneIndex from;
        for (int i = 0; i < LANES; i++) from[i] = (i + half) % LANES;
        v += __builtin_shuffle(v, from);
    }
    return v[0];
}

// The sums of four vectors: two are folded into one, half of its lanes each, then two of those, then the lanes.
inline Lanes fold(Lanes a, Lanes b, int width) {
    LaneIndex left, right;
    for (int i = 0; i < LANES; i++) {
        const int from = (i / width) % 2 * LANES + i / (2 * width) * 2 * width + i % width;
        left[i] = from;
        right[i] = from + width;
    }
    return __builtin_shuffle(a, b, left) + __builtin_shuffle(a, b, right);
}

inline void sum_four(Lanes a, Lanes b, Lanes c, Lanes d, float out[4]) {
    Lanes all = fold(fold(a, b, 1), fold(c, d, 1), 2);  // lane i holds a part of sum i % 4
    for (int half = LANES / 2; half >= 4; half /= 2) {
        LaneIndex from;
        for (int i = 0; i < LANES; i++) from[i] = (i + half) % LANES;
        all += __builtin_shuffle(all, from);
    }
    for (int i = 0; i < 4; i++) out[i] = all[i];
}

// e^x to one unit in the last place: 2^n e^r with |r| <= ln 2 / 2. Branch-free, so that loops over it vectorise.
// 0 below -87 (where float32 gets denormal), e^88 above 88.
inline float exponential(float x) {
    float bounded = x < -87.0f ? -87.0f : x;              // fmaxf would not vectorise; NaN stays NaN
    bounded = bounded > 88.0f ? 88.0f : bounded;
    const float shift = 12582912.0f;                      // 1.5 * 2^23: adding it rounds to a whole number
    float n = (bounded * 1.44269504088896341f + shift) - shift;
    float r = bounded - n * 0.693145751953125f;           // ln 2 in two parts: the first product is exact
    r = r - n * 1.42860682030941723212e-6f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r;
    int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : power + power * p;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
