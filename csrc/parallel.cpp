#include "parallel.h"

#include <sched.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "torch_threads.h"

namespace longshort {

void run_workers(int64_t count, void (*worker)(void*), void* context) {
    const int64_t threads = torch_threads();
    if (count <= 1 || threads <= 1) return worker(context);
    struct Job {
        void (*worker)(void*);
        void* context;
    } job{worker, context};
    torch_parallel(
        threads < count ? threads : count,
        [](int64_t begin, int64_t end, void* pointer) {
            const Job& job = *static_cast<Job*>(pointer);
            for (int64_t i = begin; i < end; ++i) job.worker(job.context);
        },
        &job);
}

float* scratch(size_t floats) {
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    thread_local std::unique_ptr<float, Free> memory;
    thread_local size_t capacity = 0;
    if (floats > capacity) {
        const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
        memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
        capacity = memory ? floats : 0;
        if (!memory) throw std::bad_alloc();
        std::memset(memory.get(), 0, bytes);
    }
    return memory.get();
}

void relax(int turns) {
    if (turns >= 64) {
        sched_yield();  // the worker that this one waits for may need the core
        return;
    }
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

}  // namespace longshort
