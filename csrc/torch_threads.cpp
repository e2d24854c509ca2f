#include "torch_threads.h"

#include <dlfcn.h>

#include <stdexcept>

namespace longshort {
namespace {

using Body = void (*)(int64_t, int64_t, void*);
int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain, Body body, void* context) = nullptr;
int32_t (*get_num_threads)(uint32_t* count) = nullptr;

}  // namespace

bool find_torch_threads(const char* path) {
    if (void* library = dlopen(path, RTLD_NOW | RTLD_NOLOAD)) {
        parallel_for = reinterpret_cast<decltype(parallel_for)>(dlsym(library, "torch_parallel_for"));
        get_num_threads = reinterpret_cast<decltype(get_num_threads)>(dlsym(library, "torch_get_num_threads"));
    }
    return parallel_for && get_num_threads;
}

int64_t torch_threads() {
    uint32_t count = 1;
    if (get_num_threads && get_num_threads(&count) != 0) throw std::runtime_error("torch_get_num_threads failed");
    return count;
}

void torch_parallel(int64_t count, Body body, void* context) {
    if (parallel_for(0, count, 1, body, context) != 0) throw std::runtime_error("torch_parallel_for failed");
}

}  // namespace longshort
