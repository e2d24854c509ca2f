// What the kernels are asked: plain structs of pointers and numbers, filled in by module.cpp.
#pragma once

#include <cstdint>

namespace longshort {

// Code in headers that is compiled for several instruction sets and not in a namespace of one: it must leave no
// function behind that the linker could take from the wrong one.
#define LONGSHORT_COMMON inline __attribute__((always_inline))

enum class DType { f32, bf16 };

// In bytes.
LONGSHORT_COMMON constexpr int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// A (batch, heads, length, head_dim) tensor; strides in elements.
struct Tensor {
    void* data;
    DType dtype;
    int64_t stride[4];

    // Where row `row` of a head of a sequence begins.
    LONGSHORT_COMMON char* row(int64_t b, int64_t head, int64_t row) const {
        return static_cast<char*>(data) + (b * stride[0] + head * stride[1] + row * stride[2]) * size_of(dtype);
    }
};

// Keys that a query at position i may see: those j with 0 <= i - j + shift < span, positions counted in keys.
struct Band {
    int64_t shift;
    int64_t span;
};

// Where the keys and values of one key/value head lie in a cache. Position p is in slot p % ring, or p where ring is 0;
// those before `first` are gone, but for the sinks among them: sink r of sequence b, at sink_positions[b][r], or -1 for
// none, is in slot r of a place of its own. Strides of heads are 0.
struct Store {
    Tensor k, v, sink_k, sink_v;
    int64_t ring, first, sinks;
    const int64_t* sink_positions;  // (batch, sinks)

    LONGSHORT_COMMON int64_t slot(int64_t position) const { return ring ? position % ring : position; }
};

// One call of attention, see AttentionCall in backends/call.py. Query i stands at position i + kv_len - q_len.
struct Problem {
    Tensor q, k, v;
    const Store* stores;  // (kv_heads,): keys and values are there, and not in k and v; or null
    int64_t batch, heads, kv_heads, q_len, kv_len, head_dim;
    const int64_t* windows;  // (kv_heads,), -1 is global
    bool causal;
    float scale;
    float softcap;              // 0: none
    const float* alibi_slopes;  // (heads,) or null
    const int32_t* segments;    // (batch, kv_len), -1 is padding; or null: one segment
    const uint8_t* sinks;       // (batch, kv_len), whether local heads see this key from afar; or null: none
    const int64_t* sinks_end;   // (batch,), one past the last of them

    LONGSHORT_COMMON int64_t group_size() const { return heads / kv_heads; }
    LONGSHORT_COMMON int64_t first_position() const { return kv_len - q_len; }

    LONGSHORT_COMMON Band band(int64_t kv_head) const {
        const int64_t window = windows[kv_head];
        if (causal) return {0, window < 0 ? kv_len : window};
        return window < 0 ? Band{kv_len, 2 * kv_len} : Band{window - 1, 2 * window - 1};
    }
    LONGSHORT_COMMON const int32_t* segments_of(int64_t b) const { return segments ? segments + b * kv_len : nullptr; }
    // A global head sees the sinks anyway.
    LONGSHORT_COMMON const uint8_t* sinks_of(int64_t b, int64_t kv_head) const {
        return sinks && windows[kv_head] >= 0 ? sinks + b * kv_len : nullptr;
    }
};

// Results other than out are contiguous; a row that sees nothing has out 0, row_max 0 and log_sum -inf.
struct Forward {
    Problem problem;
    Tensor out;
    float* row_max;    // (batch, heads, q_len): maximum of the scores; or null, with `log_sum`
    float* log_sum;    // (batch, heads, q_len): log of the sum of exp(score - row_max)
    float* max_logit;  // (heads,), with `entropy`, or null
    float* entropy;    // (heads,)
};

struct Backward {
    Problem problem;
    Tensor out, grad_out;
    const float* grad_lse;  // (batch, heads, q_len), or null
    const float* row_max;
    const float* log_sum;
    Tensor grad_q;  // fp32, zeros before
    Tensor grad_k, grad_v;
};

// The passes as compiled for one instruction set.
struct Kernels {
    const char* name;
    void (*forward)(const Forward&);
    void (*backward)(const Backward&);
    void (*decode)(const Forward&);
    double (*fma_peak)();  // FLOP/s of the calling thread
};

}  // namespace longshort
