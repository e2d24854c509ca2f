// The two matrix products of attention on register tiles, and the copies that pack their operands.
//
// Packed rows have a stride that the compiler knows: `Stride` floats, which is head_dim rounded up to 16, 32, 64, 128
// or 256. They are zero from head_dim up to the next full vector.
#pragma once

#include "interface.h"
#include "vector.h"

namespace longshort::LONGSHORT_ISA {

constexpr int kStrip = 16;
constexpr int kStripVectors = kStrip / kLanes;

// Sizes of tiles, rows × vectors, whose sums fill the registers except for those of the operands.
#if LONGSHORT_LANES == 16
constexpr int kDotRows = 16, kSumVectors = 4, kSumRows = 4;
#elif LONGSHORT_LANES == 8
constexpr int kDotRows = 6, kSumVectors = 2, kSumRows = 6;
#elif defined(__aarch64__)
constexpr int kDotRows = 4, kSumVectors = 4, kSumRows = 4;
#else
constexpr int kDotRows = 1, kSumVectors = 2, kSumRows = 4;
#endif
// The least number of queries that the sums of the backward pass take at once.
constexpr int kRowStep = 4;
static_assert(kStrip % kSumRows % kRowStep == 0);

// The number of parts of at most `size` that make n.
constexpr int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
constexpr int64_t round_up(int64_t n, int64_t step) { return parts_of(n, step) * step; }

// The type of sums over head_dim. It is fp32 if multiply-adds are fused; if not, fp64, because rounding the products
// too would double the error, which matters when logits are large.
#if defined(__FMA__) || defined(__aarch64__)
typedef Vec DotVec;
typedef float DotFloat;
LONGSHORT_INLINE DotVec load_dot(const float* p) { return load(p); }
LONGSHORT_INLINE void store_dot(float* p, DotVec sum, float factor) { store(p, sum * factor); }
#else
typedef double DotVec __attribute__((vector_size(16)));
typedef double DotFloat;
LONGSHORT_INLINE DotVec load_dot(const float* p) { return DotVec{p[0], p[1]}; }
LONGSHORT_INLINE void store_dot(float* p, DotVec sum, float factor) {
    p[0] = float(sum[0]) * factor;
    p[1] = float(sum[1]) * factor;
}
#endif
constexpr int kDotLanes = sizeof(DotVec) / sizeof(DotFloat);

// Sums over head_dim are made in blocks that are then added up, as in matrix libraries: shorter chains err less.
constexpr int kDotBlock = 16;

// out[r][lane] = factor · Σ_d rows[r][d] · columns[d][lane]. The order of the sum does not depend on the tile, so that
// the backward pass gets the forward pass's scores again, bit for bit, though other operands are in its lanes.
template <int Rows, int Stride, int OutStride>
LONGSHORT_INLINE void dot_tile(const float* rows, const float* columns, int64_t head_dim, float factor, float* out) {
    constexpr int kVectors = kStrip / kDotLanes;
    DotVec total[Rows][kVectors] = {};
    for (int64_t begin = 0; begin < head_dim; begin += kDotBlock) {
        const int64_t end = begin + kDotBlock < head_dim ? begin + kDotBlock : head_dim;
        DotVec sum[Rows][kVectors] = {};
        for (int64_t d = begin; d < end; ++d) {
            DotVec column[kVectors];
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) column[v] = load_dot(columns + d * kStrip + v * kDotLanes);
#pragma GCC unroll 16
            for (int r = 0; r < Rows; ++r) {
                const DotVec x = DotFloat(rows[r * Stride + d]) - DotVec{};
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; ++v) sum[r][v] += x * column[v];
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) total[r][v] += sum[r][v];
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) store_dot(out + r * OutStride + v * kDotLanes, total[r][v], factor);
}

// out[lane] = Σ_d a[d][lane] · b[d][lane], with the same roundings as in dot_tile.
LONGSHORT_NOINLINE inline void dot_of_lanes(const float* a, const float* b, int64_t head_dim, float* out) {
    for (int lane = 0; lane < kStrip; lane += kDotLanes) {
        DotVec total{};
        for (int64_t begin = 0; begin < head_dim; begin += kDotBlock) {
            const int64_t end = begin + kDotBlock < head_dim ? begin + kDotBlock : head_dim;
            DotVec sum{};
            for (int64_t d = begin; d < end; ++d)
                sum += load_dot(a + d * kStrip + lane) * load_dot(b + d * kStrip + lane);
            total += sum;
        }
        store_dot(out + lane, total, 1.0f);
    }
}

// dot_tile for `count` rows. If count is odd, one more row is read and written.
template <int Stride, int OutStride>
LONGSHORT_NOINLINE void dot(const float* rows, const float* columns, int64_t count, int64_t head_dim, float factor,
                            float* out) {
    int64_t r = 0;
    const auto tile = [&](auto tile_rows) {
        constexpr int kRows = decltype(tile_rows)::value;
        dot_tile<kRows, Stride, OutStride>(rows + r * Stride, columns, head_dim, factor, out + r * OutStride);
        r += kRows;
    };
    while (r + kDotRows <= count) tile(std::integral_constant<int, kDotRows>{});
    while (count - r > 2) tile(std::integral_constant<int, 4>{});
    if (r < count) tile(std::integral_constant<int, 2>{});
}

// sums[r][vector] += Σ_x weights[x·StrideX + r·StrideR] · rows[x][vector]
template <int Rows, int Vectors, int StrideX, int StrideR, int Stride>
LONGSHORT_INLINE void sum_tile(const float* weights, const float* rows, int64_t count, float* sums) {
    Vec sum[Rows][Vectors];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[r][v] = load(sums + r * Stride + v * kLanes);
    for (int64_t x = 0; x < count; ++x) {
        Vec row[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) row[v] = load(rows + x * Stride + v * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
            const Vec weight = splat(weights[x * StrideX + r * StrideR]);
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) sum[r][v] += weight * row[v];
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) store(sums + r * Stride + v * kLanes, sum[r][v]);
}

// sum_tile for `row_count` sums (kRowStep or kStrip) and all vectors of head_dim.
template <int StrideX, int StrideR, int Stride>
LONGSHORT_NOINLINE void weighted_sum(const float* weights, const float* rows, int64_t count, int64_t row_count,
                                     int64_t head_dim, float* sums) {
    constexpr int kVectors = kSumVectors * kLanes < Stride ? kSumVectors : Stride / kLanes;
    constexpr int kRows = kSumRows * kSumVectors / kVectors;
    int64_t d = 0;
    for (; d + kVectors * kLanes <= round_up(head_dim, kLanes); d += kVectors * kLanes) {
        int64_t r = 0;
        for (; r + kRows <= row_count; r += kRows)
            sum_tile<kRows, kVectors, StrideX, StrideR, Stride>(weights + r * StrideR, rows + d, count,
                                                                sums + r * Stride + d);
        for (; r < row_count; r += kRowStep)
            sum_tile<kRowStep, kVectors, StrideX, StrideR, Stride>(weights + r * StrideR, rows + d, count,
                                                                   sums + r * Stride + d);
    }
    for (; d < head_dim; d += kLanes)
        for (int64_t r = 0; r < row_count; r += kRowStep)
            sum_tile<kRowStep, 1, StrideX, StrideR, Stride>(weights + r * StrideR, rows + d, count,
                                                            sums + r * Stride + d);
}

// Whether packed rows are free of NaN and inf, the only x for which 0 · x is not 0.
template <int Stride>
LONGSHORT_NOINLINE bool all_finite(const float* rows, int64_t count, int64_t head_dim) {
    constexpr int kSums = Stride / kLanes < 4 ? Stride / kLanes : 4;
    Vec sums[kSums] = {};
    for (int64_t r = 0; r < count; ++r) {
        const float* row = rows + r * Stride;
        int64_t d = 0;
        for (; d + kSums * kLanes <= head_dim; d += kSums * kLanes)
#pragma GCC unroll 4
            for (int i = 0; i < kSums; ++i) sums[i] += load(row + d + i * kLanes) * 0.0f;
        for (; d < head_dim; d += kLanes) sums[0] += load(row + d) * 0.0f;
    }
    for (int i = 1; i < kSums; ++i) sums[0] += sums[i];
    return sum_of(sums[0]) == 0.0f;
}

// weighted_sum of rows that need not be finite. A weight of 0 does not hide NaN and inf, so a row x that has one is
// added only to the sums r for which sees(x, r). All other sums get the same bits as if row x were finite.
template <int StrideX, int StrideR, int Stride, class Sees>
LONGSHORT_NOINLINE void weighted_sum_of_seen(const float* weights, const float* rows, int64_t count, int64_t row_count,
                                             int64_t head_dim, float* sums, const Sees& sees) {
    for (int64_t x = 0; x < count; ++x) {
        const float* row = rows + x * Stride;
        const bool finite = all_finite<Stride>(row, 1, head_dim);
        for (int64_t r = 0; r < row_count; ++r) {
            if (!finite && !sees(x, r)) continue;
            const Vec weight = splat(weights[x * StrideX + r * StrideR]);
            float* sum = sums + r * Stride;
            for (int64_t d = 0; d < head_dim; d += kLanes) store(sum + d, load(sum + d) + weight * load(row + d));
        }
    }
}

// weighted_sum of rows that may or may not be finite, in the fast way if they are.
template <int StrideX, int StrideR, int Stride, class Sees>
LONGSHORT_INLINE void weighted_sum(bool finite, const float* weights, const float* rows, int64_t count,
                                   int64_t row_count, int64_t head_dim, float* sums, const Sees& sees) {
    finite ? weighted_sum<StrideX, StrideR, Stride>(weights, rows, count, row_count, head_dim, sums)
           : weighted_sum_of_seen<StrideX, StrideR, Stride>(weights, rows, count, row_count, head_dim, sums, sees);
}

// The rows of one head and sequence of a tensor.
struct Rows {
    char* data;
    DType dtype;
    int64_t stride, dim_stride;

    Rows(const Tensor& tensor, int64_t b, int64_t head)
        : data(tensor.row(b, head, 0)), dtype(tensor.dtype), stride(tensor.stride[2]), dim_stride(tensor.stride[3]) {}

    // Packs rows begin ... begin + count - 1.
    template <int Stride>
    void pack(int64_t begin, int64_t count, int64_t head_dim, float* to) const {
        dtype == DType::f32 ? pack_as<float, Stride>(begin, count, head_dim, to)
                            : pack_as<uint16_t, Stride>(begin, count, head_dim, to);
    }

    // Returns rows begin ... begin + count - 1 packed: in place if they are laid out like that already, else in
    // `buffer`. Up to kRowStep - 1 rows after them may be read too.
    template <int Stride>
    const float* packed(int64_t begin, int64_t count, int64_t length, int64_t head_dim, float* buffer) const {
        const bool in_place = dtype == DType::f32 && dim_stride == 1 && stride == Stride && head_dim == Stride;
        if (in_place && begin + count + kRowStep <= length)
            return reinterpret_cast<const float*>(data) + begin * stride;
        pack<Stride>(begin, count, head_dim, buffer);
        return buffer;
    }

    // Writes one packed row, times a factor, to row `row`.
    template <int Stride>
    LONGSHORT_INLINE void write(int64_t row, int64_t head_dim, float factor, const float* from) const {
        dtype == DType::f32 ? write_as<float, Stride>(row, head_dim, factor, from)
                            : write_as<uint16_t, Stride>(row, head_dim, factor, from);
    }

    // Adds one packed row, times a factor, to row `row`, which must be fp32.
    LONGSHORT_INLINE void add(int64_t row, int64_t head_dim, float factor, const float* from) const {
        float* to = reinterpret_cast<float*>(data) + row * stride;
        int64_t d = 0;
        if (dim_stride == 1)
            for (; d + kLanes <= head_dim; d += kLanes) store(to + d, load(to + d) + load(from + d) * factor);
        for (; d < head_dim; ++d) to[d * dim_stride] += from[d] * factor;
    }

private:
    template <class T, int Stride>
    LONGSHORT_INLINE void pack_as(int64_t begin, int64_t count, int64_t head_dim, float* to) const {
        const T* from = reinterpret_cast<const T*>(data) + begin * stride;
        if (dim_stride == 1 && head_dim == Stride) {  // the usual case, unrolled
            for (int64_t i = 0; i < count; ++i, from += stride, to += Stride)
#pragma GCC unroll 16
                for (int d = 0; d < Stride; d += kLanes) store(to + d, load(from + d));
            return;
        }
        for (int64_t i = 0; i < count; ++i, from += stride, to += Stride) {
            int64_t d = 0;
            if (dim_stride == 1)
                for (; d + kLanes <= head_dim; d += kLanes) store(to + d, load(from + d));
            for (; d < head_dim; ++d) to[d] = to_float(from[d * dim_stride]);
            for (; d % kLanes; ++d) to[d] = 0.0f;
        }
    }

    template <class T, int Stride>
    LONGSHORT_INLINE void write_as(int64_t row, int64_t head_dim, float factor, const float* from) const {
        T* to = reinterpret_cast<T*>(data) + row * stride;
        int64_t d = 0;
        if (dim_stride == 1 && head_dim == Stride) {
#pragma GCC unroll 16
            for (; d < Stride; d += kLanes) store(to + d, load(from + d) * factor);
            return;
        }
        if (dim_stride == 1)
            for (; d + kLanes <= head_dim; d += kLanes) store(to + d, load(from + d) * factor);
        for (; d < head_dim; ++d) from_float(from[d] * factor, to + d * dim_stride);
    }
};

// Transposes kStrip packed rows to columns[d][lane], for d up to the next full vector.
template <int Stride>
LONGSHORT_INLINE void transpose_strip(const float* rows, int64_t head_dim, float* columns) {
    for (int64_t d = 0; d < head_dim; d += kLanes)
        for (int v = 0; v < kStripVectors; ++v) {
            Vec block[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) block[i] = load(rows + (v * kLanes + i) * Stride + d);
            transpose(block);
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) store(columns + (d + i) * kStrip + v * kLanes, block[i]);
        }
}

// Packs up to kStrip rows from `begin` into `buffer` and transposes them to columns[d][lane].
template <int Stride>
LONGSHORT_INLINE void pack_strip(const Rows& rows, int64_t begin, int64_t count, int64_t head_dim, float* buffer,
                                 float* columns) {
    rows.pack<Stride>(begin, count, head_dim, buffer);
    transpose_strip<Stride>(buffer, head_dim, columns);
}

// Calls run<Stride>() with the smallest packed stride that holds head_dim.
#define LONGSHORT_FOR_HEAD_DIM(head_dim, run, ...)         \
    do {                                                   \
        if ((head_dim) <= 16) run<16>(__VA_ARGS__);        \
        else if ((head_dim) <= 32) run<32>(__VA_ARGS__);   \
        else if ((head_dim) <= 64) run<64>(__VA_ARGS__);   \
        else if ((head_dim) <= 128) run<128>(__VA_ARGS__); \
        else run<256>(__VA_ARGS__);                        \
    } while (false)

}  // namespace longshort::LONGSHORT_ISA
