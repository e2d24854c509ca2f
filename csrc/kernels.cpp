// The table of passes of one instruction set, and a measurement of its peak speed.
#include <chrono>

#include "interface.h"
#include "vector.h"

#define LONGSHORT_STRING_OF(x) #x
#define LONGSHORT_STRING(x) LONGSHORT_STRING_OF(x)

namespace longshort::LONGSHORT_ISA {

void forward(const Forward&);
void backward(const Backward&);
void decode(const Forward&);

namespace {

// Times independent multiply-adds in registers, for about 20 ms.
double fma_peak() {
    using Clock = std::chrono::steady_clock;
    constexpr int kChains = 12, kRounds = 20000;
    Vec sum[kChains];
    for (int i = 0; i < kChains; ++i) sum[i] = splat(1.0f + 1e-3f * float(i));
    volatile float unknown = 0.999f;  // so that the compiler cannot compute the result
    const Vec factor = splat(unknown), term = splat(1.0f - unknown);
    double best = 0;
    for (const auto stop = Clock::now() + std::chrono::milliseconds(20); Clock::now() < stop;) {
        const auto start = Clock::now();
        for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 12
            for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * factor + term;
        }
        const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
        const double speed = 2.0 * kLanes * kChains * kRounds / seconds;
        best = speed > best ? speed : best;
    }
    for (int i = 1; i < kChains; ++i) sum[0] += sum[i];
    volatile float keep = sum_of(sum[0]);
    (void)keep;
    return best;
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {LONGSHORT_STRING(LONGSHORT_ISA), forward, backward, decode, fma_peak};

}  // namespace longshort::LONGSHORT_ISA
