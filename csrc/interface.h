// The arguments of the kernels: plain structs of pointers and numbers, which module.cpp fills in.
//
// Terms used in csrc/. The sizes (batch, heads, ...) are in Problem.
//
// row         a query of one head: a row of the matrix of scores. Also a query, key or value as head_dim numbers.
// column      element d of each of the 16 rows of a strip, side by side: columns[d][lane].
// plane       one head of one sequence, as a number: b * heads + head, or b * kv_heads + kv_head.
// strip       16 queries (forward.cpp) or keys (backward.cpp, decode.cpp), one in each lane of one or more vectors.
// block       queries or keys that a task works on, or that are packed together; a strip is a part of one.
// step        4 rows (kRowStep), the least that the sums over rows take at once; blocks are padded to it.
// chunk       in forward.cpp, keys of a block whose scores a strip computes at once; in decode.cpp, keys of a task.
// piece       in decode.cpp, keys of a plane that lie one after the other in memory; a chunk is a part of one.
// task        work that a thread claims and does in one go.
// packed      copied to fp32 rows with a stride that the compiler knows (`Stride`).
// group       query heads that share a key/value head, its members; in a cache, key/value heads that share a window.
// segment     keys and queries of a sequence that may see each other; several make a packed sequence.
// sink        one of the first keys of a segment, which local heads see from any distance.
// slot        the row of a Store that has the key, or the value, of one position.
//
// Tensor      a view of a tensor's memory, as in torch.
// Band        the distances between query and key that a head's window allows.
// Store       the keys and values of one key/value head in a cache; a ring of slots if the head is local.
// StoreGroup  the same for a group of heads, as Python describes it.
// Problem     one call of attention: tensors, sizes, windows and options.
// Forward     a Problem and the results of its forward pass. Backward is the same for the backward pass.
// Kernels     the passes for one instruction set.
// Segments    the segments and sinks of all sequences, from segment ids.
// Range       positions or rows begin ... end - 1.
// SegmentSpan the smallest and the largest segment of a range.
// Visibility  the keys that the queries of a plane see: Band, segments and sinks together.
// StripLanes  the positions, segments and sinks of a strip, lane by lane.
// Bias        what turns a logit into a score: softcap and ALiBi.
// Tangent     the value of a function and its slope.
// Rows        the rows of a plane of a tensor: packs, writes and adds to them.
// Carver      hands out the buffers of a task from its thread's scratch memory.
// Buffers     all buffers of a task.
// Row         the softmax of a row so far: maximum, sums and largest logit. Softmax is that of a strip's rows.
// Statistics  the largest logit and the entropy of rows of one head, summed over them.
// Block       forward.cpp: a task, which is a block of queries of one head.
// KeyBlock    backward.cpp: a task, which is a block of keys of one key/value head.
// RowTerms    backward.cpp: two numbers of a row that all blocks of keys need.
// Place       backward.cpp: the plane and the block of keys of a task.
// Piece       decode.cpp: a piece, with the positions of its keys.
// Chunk       decode.cpp: a task, which is a chunk of keys for all rows of their group.
// Partial     decode.cpp: the result of a chunk for one row, a Row and the weighted sum of values.
// Source      decode.cpp: keys or values of a piece, strip by strip, read in place if their layout allows it.
#pragma once

#include <cstdint>

namespace longshort {

// For functions in headers outside of LONGSHORT_ISA. They are compiled for several instruction sets, so they are always
// inlined: the linker would keep one copy for all, perhaps of a set that the processor does not have.
#define LONGSHORT_COMMON inline __attribute__((always_inline))

enum class DType { f32, bf16 };

// The size of an element in bytes.
LONGSHORT_COMMON constexpr int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// A (batch, heads, length, head_dim) tensor; strides in elements.
struct Tensor {
    void* data;
    DType dtype;
    int64_t stride[4];

    // The address of a row's first element.
    LONGSHORT_COMMON char* row(int64_t b, int64_t head, int64_t row) const {
        return static_cast<char*>(data) + (b * stride[0] + head * stride[1] + row * stride[2]) * size_of(dtype);
    }
};

// A query at position i may see the keys j with 0 <= i - j + shift < span. Positions are those of keys.
struct Band {
    int64_t shift;
    int64_t span;
};

// The keys and values of one key/value head in a cache. Position p is in slot p % ring, or in slot p if ring is 0.
// Positions before `first` have been overwritten, except that their sinks have been copied to sink_k and sink_v: row r
// of sequence b there is from position sink_positions[b][r], or unused if that is -1. All strides of heads are 0.
struct Store {
    Tensor k, v, sink_k, sink_v;
    int64_t ring, first, sinks;
    const int64_t* sink_positions;  // (batch, sinks)

    LONGSHORT_COMMON int64_t slot(int64_t position) const { return ring ? position % ring : position; }
};

// One call of attention, see AttentionCall in backends/call.py. Query i is at position i + kv_len - q_len.
struct Problem {
    Tensor q, k, v;
    const Store* stores;  // (kv_heads,), which hold the keys and values in place of k and v; or null
    int64_t batch, heads, kv_heads, q_len, kv_len, head_dim;
    const int64_t* windows;  // (kv_heads,), -1 is global
    bool causal;
    float scale;
    float softcap;              // 0: none
    const float* alibi_slopes;  // (heads,) or null
    const int32_t* segments;    // (batch, kv_len), -1 is padding; or null: one segment
    const uint8_t* sinks;       // (batch, kv_len), whether the key is a sink; or null: none
    const int64_t* sinks_end;   // (batch,), one past the last sink

    LONGSHORT_COMMON int64_t group_size() const { return heads / kv_heads; }
    LONGSHORT_COMMON int64_t first_position() const { return kv_len - q_len; }

    LONGSHORT_COMMON Band band(int64_t kv_head) const {
        const int64_t window = windows[kv_head];
        if (causal) return {0, window < 0 ? kv_len : window};
        return window < 0 ? Band{kv_len, 2 * kv_len} : Band{window - 1, 2 * window - 1};
    }
    LONGSHORT_COMMON const int32_t* segments_of(int64_t b) const { return segments ? segments + b * kv_len : nullptr; }
    // Null for a global head, which sees every key anyway.
    LONGSHORT_COMMON const uint8_t* sinks_of(int64_t b, int64_t kv_head) const {
        return sinks && windows[kv_head] >= 0 ? sinks + b * kv_len : nullptr;
    }
};

// A forward pass. Results other than out are contiguous. A row that sees no key has out 0, row_max 0 and log_sum -inf.
struct Forward {
    Problem problem;
    Tensor out;
    float* row_max;    // (batch, heads, q_len), maximum of the scores; null if log_sum is
    float* log_sum;    // (batch, heads, q_len), log of the sum of exp(score - row_max); or null
    float* max_logit;  // (heads,); null if entropy is
    float* entropy;    // (heads,); or null: no statistics
};

// A backward pass, with what the forward pass returned.
struct Backward {
    Problem problem;
    Tensor out, grad_out;
    const float* grad_lse;  // (batch, heads, q_len), gradient of row_max + log_sum; or null
    const float* row_max;
    const float* log_sum;
    Tensor grad_q;  // fp32; must be zeros before the call
    Tensor grad_k, grad_v;
};

// The passes, compiled for one instruction set.
struct Kernels {
    const char* name;
    void (*forward)(const Forward&);
    void (*backward)(const Backward&);
    void (*decode)(const Forward&);
    double (*fma_peak)();  // FLOP/s of the calling thread
};

}  // namespace longshort
