// One helper thread for each further core. A helper that has nothing to do looks for work a little while, because the
// next operator follows within microseconds, then sleeps.
#include "threads.h"

#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int LOOKS = 2000;

class Pool {
  public:
    Pool() {
        for (unsigned i = 1; i < std::thread::hardware_concurrency(); i++) std::thread([this] { help(); }).detach();
    }

    void run(int64_t count, Work work, const void* closure) {
        std::unique_lock<std::mutex> alone(mutex_, std::try_to_lock);
        if (count < 2 || !alone) {  // another operator has the helpers
            for (int64_t i = 0; i < count; i++) work(closure, i);
            return;
        }
        Job job{count, work, closure};
        job_.store(&job);
        round_.fetch_add(1);
        round_.notify_all();
        job.take();
        job_.store(nullptr);  // helpers that come now find nothing; those that are in it are waited for
        while (inside_.load()) relax();
    }

  private:
    struct Job {
        int64_t count;
        Work work;
        const void* closure;
        std::atomic<int64_t> next{0};

        void take() {
            for (int64_t i; (i = next.fetch_add(1)) < count;) work(closure, i);
        }
    };

    void help() {
        for (uint32_t seen = 0;;) {
            for (int look = 0; look < LOOKS && round_.load() == seen; look++) relax();
            round_.wait(seen);
            seen = round_.load();
            inside_.fetch_add(1);
            if (Job* job = job_.load()) job->take();
            inside_.fetch_sub(1);
        }
    }

    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    std::mutex mutex_;
    std::atomic<uint32_t> round_{0};
    std::atomic<Job*> job_{nullptr};
    std::atomic<int> inside_{0};
};

}  // namespace

void run_parallel(int64_t count, Work work, const void* closure) {
    static Pool* pool = new Pool;  // never destroyed: its threads run until the process ends
    pool->run(count, work, closure);
}

float* scratch(Owner owner, int64_t floats) {
    thread_local std::vector<float> memory[3];
    constexpr int64_t line = 64 / sizeof(float);
    if (static_cast<int64_t>(memory[owner].size()) < floats + line) memory[owner].resize(floats + line);
    const auto address = reinterpret_cast<uintptr_t>(memory[owner].data());
    return reinterpret_cast<float*>((address + 63) / 64 * 64);
}
