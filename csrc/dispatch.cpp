#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace longshort {

#define LONGSHORT_DECLARE(isa)    \
    namespace isa {               \
    extern const Kernels kernels; \
    }
#if defined(__x86_64__)
LONGSHORT_DECLARE(v4)
LONGSHORT_DECLARE(v3)
LONGSHORT_DECLARE(v1)
#else
LONGSHORT_DECLARE(native)
#endif

namespace {

struct Build {
    const Kernels* kernels;
    bool runs_here;
};

// All builds, the fastest first.
std::vector<Build> builds() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");  // and lzcnt, movbe and f16c, which all of these processors have
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return {{&v4::kernels, v4}, {&v3::kernels, v3}, {&v1::kernels, true}};
#else
    return {{&native::kernels, true}};
#endif
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Build& build : builds())
        if (build.runs_here) names.push_back(build.kernels->name);
    return names;
}

const Kernels& choose_kernels() {
    const char* wanted = std::getenv("LONGSHORT_CPU");
    std::string names;
    for (const Build& build : builds()) {
        if (!build.runs_here) continue;
        if (!wanted || !*wanted || std::strcmp(wanted, build.kernels->name) == 0) return *build.kernels;
        names += std::string(names.empty() ? "" : ", ") + build.kernels->name;
    }
    throw std::runtime_error(std::string("LONGSHORT_CPU must be one of ") + names + " on this processor, got " +
                             wanted);
}

}  // namespace longshort
