// Random problems, and the memory of their tensors.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/interface.h"
#include "../../csrc/segments.h"

namespace longshort {

using Random = std::mt19937_64;
using Sizes = std::array<int64_t, 4>;  // batch, heads, length, head_dim

// To nearest, ties to even.
double rounded(double x, DType dtype);

// A tensor in a heap allocation of exactly its extent, so that AddressSanitizer notices an access one element too far.
// Copies share the allocation. All its bits are ones at first, which is NaN.
class Memory {
public:
    Memory() = default;
    Memory(Sizes shape, Sizes strides, int64_t lead, DType dtype);

    Tensor tensor() const;
    // All elements, (batch, heads, length, head_dim) contiguous.
    std::vector<double> read() const;
    void write(const std::vector<double>& values) const;
    void set(int64_t element, double value) const;
    Memory copy() const;
    // Whether all bits between the elements are still ones.
    bool gaps_are_untouched() const;

    int64_t size() const { return shape_[0] * shape_[1] * shape_[2] * shape_[3]; }
    std::string describe() const;

private:
    int64_t offset(int64_t element) const;

    Sizes shape_{}, strides_{};
    int64_t lead_ = 0, extent_ = 0;  // elements before the first, and up to the last
    DType dtype_ = DType::f32;
    std::shared_ptr<char[]> bytes_;
};

// How a tensor lies in memory.
struct Layout {
    Sizes strides;
    int64_t lead;

    Memory allocate(Sizes shape, DType dtype) const { return {shape, strides, lead, dtype}; }
};

struct Case {
    uint64_t seed;
    int64_t batch, heads, kv_heads, q_len, kv_len, head_dim, sink_tokens;
    std::vector<int64_t> windows;  // of the key/value heads
    bool causal, statistics;
    float scale, softcap;
    DType dtype, out_dtype;
    std::vector<float> slopes;    // may be empty
    std::vector<int64_t> ids;     // may be empty
    std::vector<float> grad_lse;  // may be empty
    Memory q, k, v, grad_out;
    Layout out_layout, grad_q_layout, grad_k_layout, grad_v_layout;
    std::string logits, not_finite;  // what is special about the values, or empty
    std::shared_ptr<Segments> segments;

    Sizes query_shape() const { return {batch, heads, q_len, head_dim}; }
    Sizes key_shape() const { return {batch, kv_heads, kv_len, head_dim}; }
    int64_t group_size() const { return heads / kv_heads; }
    Problem problem() const;
    std::string describe() const;
};

// Draws a case, always the same for a seed.
Case random_case(uint64_t seed);

}  // namespace longshort
