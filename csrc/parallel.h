// Runs tasks on torch's own threads, and gives them scratch memory. There are as many workers as torch has threads;
// they claim the tasks one by one, in order.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "interface.h"

namespace longshort {

// Calls worker(context) on up to `count` threads at once; returns when all have returned.
void run_workers(int64_t count, void (*worker)(void*), void* context);

// Memory of the calling thread, 64-byte aligned. It is kept for the next call, and is zeros when it is new.
float* scratch(size_t floats);

// Hands out parts of a piece of memory, one after the other. Without memory it only counts, so that one list of buffers
// says how much memory they need as well as where they are:
//
//     struct Buffers {
//         Carver carver;
//         float* const keys = carver.take(64);
//         float* const values = carver.take(128);
//     };
//     const Buffers buffers{Carver(scratch(Buffers{}.carver.taken()))};
class Carver {
public:
    constexpr Carver() = default;
    LONGSHORT_COMMON constexpr explicit Carver(float* memory) : memory_(memory) {}

    LONGSHORT_COMMON constexpr float* take(int64_t floats) {
        float* const part = memory_ ? memory_ + taken_ : nullptr;
        taken_ += floats;
        return part;
    }
    LONGSHORT_COMMON constexpr int64_t taken() const { return taken_; }

private:
    float* memory_ = nullptr;
    int64_t taken_ = 0;
};

// Passes the time of a worker that waits for another; `turns` counts its calls.
void relax(int turns);

// Calls task(i, memory) for i in [0, count), with `floats` numbers of the worker's own memory. A task may wait for
// tasks before it, because those are done or running: a worker claims no task before it has its memory.
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
