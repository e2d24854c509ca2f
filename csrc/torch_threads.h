// torch's thread pool through the C functions that libtorch exports (torch >= 2.10), found at run time.
#pragma once

#include <cstdint>

namespace longshort {

// Looks the functions up in the libtorch at this path, which this process has loaded; false if they are not there.
bool find_torch_threads(const char* path);

// What torch.get_num_threads() says; 1 without torch.
int64_t torch_threads();

// body(begin, end, context) over [0, count) on torch's threads, one part each.
void torch_parallel(int64_t count, void (*body)(int64_t, int64_t, void*), void* context);

}  // namespace longshort
