#include "threads.h"

#include <algorithm>
#include <thread>
#include <vector>

#include "../../csrc/torch_threads.h"

namespace longshort {
namespace {

int64_t threads = 1;

}  // namespace

void use_threads(int64_t count) { threads = count; }

int64_t torch_threads() { return threads; }

// As in torch, the calling thread takes the first part.
void torch_parallel(int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
    const int64_t parts = std::min(threads, count);
    const auto run_part = [=](int64_t i) { body(i * count / parts, (i + 1) * count / parts, context); };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < parts; ++i) others.emplace_back(run_part, i);
    run_part(0);
    for (std::thread& other : others) other.join();
}

}  // namespace longshort
