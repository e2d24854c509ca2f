// Vectors of the instruction set that this file is compiled for, and the functions that softmax needs.
//
// All of it is in a namespace of that instruction set, since one library has the same functions for several sets.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
#define LONGSHORT_LANES 16
#elif defined(__AVX__)
#define LONGSHORT_LANES 8
#else
#define LONGSHORT_LANES 4
#endif

#define LONGSHORT_INLINE inline __attribute__((always_inline))
// For functions whose loops need all registers.
#define LONGSHORT_NOINLINE __attribute__((noinline))

namespace longshort::LONGSHORT_ISA {

constexpr int kLanes = LONGSHORT_LANES;
typedef float Vec __attribute__((vector_size(4 * LONGSHORT_LANES)));
typedef int32_t IVec __attribute__((vector_size(4 * LONGSHORT_LANES)));
typedef uint32_t UVec __attribute__((vector_size(4 * LONGSHORT_LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * LONGSHORT_LANES)));

LONGSHORT_INLINE Vec splat(float x) { return x - Vec{}; }

LONGSHORT_INLINE Vec load(const float* p) {
    Vec x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
LONGSHORT_INLINE IVec load(const int32_t* p) {
    IVec x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
LONGSHORT_INLINE void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
LONGSHORT_INLINE void store(int32_t* p, IVec x) { std::memcpy(p, &x, sizeof x); }

// Loads bf16, which is the upper half of fp32.
LONGSHORT_INLINE Vec load(const uint16_t* p) {
    HalfVec half;
    std::memcpy(&half, p, sizeof half);
    return (Vec)(__builtin_convertvector(half, UVec) << 16);
}
// Rounds to the nearest bf16, ties to even. NaN stays NaN.
LONGSHORT_INLINE void store(uint16_t* p, Vec x) {
    const UVec bits = (UVec)x;
    const UVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const HalfVec half = __builtin_convertvector(x == x ? rounded : (bits >> 16) | 0x40, HalfVec);
    std::memcpy(p, &half, sizeof half);
}
LONGSHORT_INLINE float to_float(float x) { return x; }
LONGSHORT_INLINE float to_float(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
LONGSHORT_INLINE void from_float(float x, float* p) { *p = x; }
LONGSHORT_INLINE void from_float(float x, uint16_t* p) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    *p = uint16_t(x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40);
}

// The larger of the two, or so_far if x is NaN.
LONGSHORT_INLINE Vec max_of(Vec x, Vec so_far) { return x > so_far ? x : so_far; }
LONGSHORT_INLINE Vec abs_of(Vec x) { return (Vec)((IVec)x & 0x7fffffff); }
// x in the lanes of the mask, 0 in the others, even if x is NaN there.
LONGSHORT_INLINE Vec keep_where(IVec mask, Vec x) { return (Vec)((IVec)x & mask); }
// The larger of |x| and so_far. NaN counts as the largest: its bits, as an integer, are above those of inf.
LONGSHORT_INLINE Vec max_size_of(Vec x, Vec so_far) {
    const IVec size = (IVec)abs_of(x);
    return (Vec)(size > (IVec)so_far ? size : (IVec)so_far);
}
LONGSHORT_INLINE float max_size_of(float a, float b) { return a > b || a != a ? a : b; }

template <class Fold>
LONGSHORT_INLINE float fold(Vec x, Fold combine) {
    float lanes[kLanes];
    std::memcpy(lanes, &x, sizeof x);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] = combine(lanes[i], lanes[i + width]);
    return lanes[0];
}
LONGSHORT_INLINE float sum_of(Vec x) {
    return fold(x, [](float a, float b) { return a + b; });
}

// Below this, exp() is taken to be 0. The result would be denormal, and denormals are slow.
constexpr float kSmallestExponent = -87.0f;

// exp(x) for x <= 0, exactly 1 at 0, 0 below kSmallestExponent, NaN for NaN. Relative error 2e-7 at most.
//
// exp(x) = 2^n · 2^r, where n is the integer nearest to x/ln 2. Adding 1.5·2^23 + 127 to x/ln 2 rounds it and leaves
// n + 127, the exponent of 2^n, in the low bits. 2^r on [-1/2, 1/2] is a polynomial, a minimax fit (relative error
// 9e-8) with 2^0 = 1 exact.
LONGSHORT_INLINE Vec exp_of(Vec x) {
    const Vec shifted = x * 1.44269504f + 12583039.0f;
    const Vec r = x * 1.44269504f - (shifted - 12583039.0f);
    Vec y = r * 0.0013264727f + 0.009671513f;
    y = y * r + 0.055507336f;
    y = y * r + 0.24022242f;
    y = y * r + 0.693147f;
    y = y * r + 1.0f;
    y *= (Vec)((IVec)shifted << 23);
    return x < kSmallestExponent ? Vec{} : y;
}

// tanh(x) and its derivative. Near 0, tanh is an odd polynomial (minimax fit, relative error 4e-9). Elsewhere it is
// (1 - e)/(1 + e) with e = exp(-2|x|), and its derivative 4e/(1 + e)^2, which does not cancel as 1 - tanh^2 would.
struct Tangent {
    Vec value, slope;
};
LONGSHORT_INLINE Tangent tanh_of(Vec x) {
    const Vec a = abs_of(x), square = x * x;
    Vec near = square * -0.0057170456f + 0.020650588f;
    near = near * square - 0.053743497f;
    near = near * square + 0.13331491f;
    near = near * square - 0.33333284f;
    near = near * square * x + x;
    const Vec e = exp_of(a * -2.0f), inverse = 1.0f / (1.0f + e);
    const Vec far = (1.0f - e) * inverse;
    const Vec signed_far = (Vec)((IVec)far | ((IVec)x & INT32_MIN));
    const IVec is_near = a < 0.625f;
    return {is_near ? near : signed_far, is_near ? 1.0f - near * near : 4.0f * e * inverse * inverse};
}

// Transposes kLanes rows of kLanes floats, in log2(kLanes) rounds that swap ever larger off-diagonal blocks.
template <int Half, bool Upper, int... Lane>
LONGSHORT_INLINE Vec interleave(Vec a, Vec b, std::integer_sequence<int, Lane...>) {
    return __builtin_shufflevector(
        a, b,
        (Upper ? ((Lane & Half) ? kLanes + Lane : Lane + Half) : ((Lane & Half) ? kLanes + Lane - Half : Lane))...);
}
template <int Half>
LONGSHORT_INLINE void transpose_round(Vec (&rows)[kLanes]) {
    using Lanes = std::make_integer_sequence<int, kLanes>;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
        if (i & Half) continue;
        const Vec a = rows[i], b = rows[i + Half];
        rows[i] = interleave<Half, false>(a, b, Lanes{});
        rows[i + Half] = interleave<Half, true>(a, b, Lanes{});
    }
}
LONGSHORT_INLINE void transpose(Vec (&rows)[kLanes]) {
    transpose_round<1>(rows);
    transpose_round<2>(rows);
    if constexpr (kLanes >= 8) transpose_round<4>(rows);
    if constexpr (kLanes >= 16) transpose_round<8>(rows);
}

}  // namespace longshort::LONGSHORT_ISA
