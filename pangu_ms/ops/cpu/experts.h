// What the experts' product and its gradient share: one expert's matrices, and the pairs of token and choice by expert.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

struct Matrices {
    const float *gate, *up, *down;                      // of one expert: [F, H], [F, H], [H, F]
    int64_t hidden, width;
};

inline bool is_here(int32_t id, int64_t experts) { return 0 <= id && id < experts; }

// Pairs p of ids [P], expert by expert: those of e are order[start[e] .. start[e + 1] - 1], and those of experts that
// are not here are left out. One thread takes a piece of that list at a time.
struct Plan {
    struct Piece { int64_t expert, first, last; };
    std::vector<int64_t> start, order;
    std::vector<Piece> pieces;
};

inline Plan by_expert(const int32_t* ids, int64_t pairs, int64_t experts, int64_t together) {
    Plan plan{std::vector<int64_t>(experts + 1), std::vector<int64_t>(pairs), {}};
    auto& start = plan.start;
    for (int64_t p = 0; p < pairs; p++)
        if (is_here(ids[p], experts)) start[ids[p] + 1]++;
    for (int64_t e = 0; e < experts; e++) start[e + 1] += start[e];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (int64_t p = 0; p < pairs; p++)
        if (is_here(ids[p], experts)) plan.order[next[ids[p]]++] = p;
    for (int64_t e = 0; e < experts; e++)
        for (int64_t p = start[e]; p < start[e + 1]; p += together)
            plan.pieces.push_back({e, p, std::min(p + together, start[e + 1])});
    return plan;
}
