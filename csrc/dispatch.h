// Chooses the build of the kernels that runs on this processor.
#pragma once

#include <string>
#include <vector>

#include "interface.h"

namespace longshort {

// The fastest build that this processor can run, or the one that the environment variable LONGSHORT_CPU names
// (as `Kernels::name`). Throws std::runtime_error if there is no such build or the processor cannot run it.
const Kernels& choose_kernels();

// Names of the builds that this processor can run, the fastest first.
std::vector<std::string> instruction_sets();

}  // namespace longshort
