// The driver's stand-in for torch's thread pool: ThreadSanitizer sees std::thread, and not torch's OpenMP.
#pragma once

#include <cstdint>

namespace longshort {

// What torch_threads() says from now on.
void use_threads(int64_t count);

}  // namespace longshort
