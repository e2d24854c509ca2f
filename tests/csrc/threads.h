// Replaces torch's thread pool in the driver: ThreadSanitizer understands std::thread, but not torch's OpenMP.
#pragma once

#include <cstdint>

namespace longshort {

// Sets what torch_threads() returns.
void use_threads(int64_t count);

}  // namespace longshort
