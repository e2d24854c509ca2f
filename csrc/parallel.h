// Work on torch's own threads: tasks are claimed one by one, in their order, by as many workers as torch has threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "interface.h"

namespace longshort {

// Calls worker(context) on up to `count` threads at once; returns when all have returned.
void run_workers(int64_t count, void (*worker)(void*), void* context);

// Memory of the calling thread, 64-byte aligned, kept for its next call; zeros when it is new.
float* scratch(size_t floats);

// For a worker that waits for another one.
void relax(int turns);

// task(i, memory) for i in [0, count), `memory` being `floats` numbers of the worker's own. A task may wait for tasks
// before it, since those are done or running: a worker that gets no memory claims none.
template <class Task>
LONGSHORT_COMMON void for_each_task(int64_t count, size_t floats, const Task& task) {
    struct Context {
        const Task& task;
        int64_t count;
        size_t floats;
        std::atomic<int64_t> next;
    } context{task, count, floats, {0}};
    const auto worker = [](void* pointer) {
        Context& shared = *static_cast<Context*>(pointer);
        float* memory = scratch(shared.floats);
        for (int64_t i; (i = shared.next.fetch_add(1, std::memory_order_relaxed)) < shared.count;)
            shared.task(i, memory);
    };
    run_workers(count, worker, &context);
}

}  // namespace longshort
