// Uses torch's thread pool through C functions that libtorch exports (torch >= 2.10), looked up at run time.
#pragma once

#include <cstdint>

namespace longshort {

// Looks the functions up in the libtorch at `path`, which must be loaded already. False if it does not have them.
bool find_torch_threads(const char* path);

// torch.get_num_threads(); 1 without torch.
int64_t torch_threads();

// Splits [0, count) over torch's threads, each of which calls body(begin, end, context) for its part.
void torch_parallel(int64_t count, void (*body)(int64_t, int64_t, void*), void* context);

}  // namespace longshort
