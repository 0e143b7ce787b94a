// parallel(count, work): work(i) for i = 0 .. count-1, on the threads of the machine.
#pragma once
#include <cstdint>

using Work = void (*)(const void* closure, int64_t i);

void run_parallel(int64_t count, Work work, const void* closure);

template <class F>
void parallel(int64_t count, const F& work) {
    run_parallel(count, [](const void* closure, int64_t i) { (*static_cast<const F*>(closure))(i); }, &work);
}

// work(first, last) over ranges of 0 .. count-1, each worth waking a helper for; `cost` is one item's number of steps.
template <class F>
void in_chunks(int64_t count, int64_t cost, const F& work) {
    const int64_t chunk = 1 + 65536 / cost, chunks = (count + chunk - 1) / chunk;
    parallel(chunks, [&](int64_t c) { work(c * chunk, c + 1 < chunks ? (c + 1) * chunk : count); });
}

// Memory for the calling thread until it asks again, kept between calls: fresh memory would be cleared page by page. It
// begins on a cache line, so that vectors may lie in it.
// An operator, the pieces of work it is cut into, and one that is made of operators have their own.
enum Owner { OPERATOR_OWN, WORK_OWN, COMPOSED_OWN };
float* scratch(Owner owner, int64_t floats);
