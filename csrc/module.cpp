// The Python module `_kernels`, which only backends/cpu.py calls. It passes tensors as addresses and strides.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "dispatch.h"
#include "segments.h"
#include "stores.h"
#include "torch_threads.h"

namespace nb = nanobind;

namespace longshort {
namespace {

const Kernels* kernels = nullptr;

// (address, is bf16, strides in elements)
using TensorOf = std::tuple<uintptr_t, bool, std::array<int64_t, 4>>;
// (batch, heads, kv_heads, q_len, kv_len, head_dim)
using ShapeOf = std::array<int64_t, 6>;
// (q, k, v, shape, windows of the key/value heads, sink_tokens, causal, scale, softcap, address of alibi_slopes,
// address of segment_ids), as `_problem` in backends/cpu.py builds it
using ProblemOf = std::tuple<TensorOf, TensorOf, TensorOf, ShapeOf, std::vector<int64_t>, int64_t, bool, double, double,
                             uintptr_t, uintptr_t>;
// (addresses of k and v, slots, ring, addresses of the sinks' k and v, sinks, address of their positions)
using StoreOf = std::array<int64_t, 8>;

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

Tensor tensor(const TensorOf& of) {
    const auto& [address, is_bf16, strides] = of;
    Tensor result{pointer<void>(address), is_bf16 ? DType::bf16 : DType::f32, {}};
    for (int i = 0; i < 4; ++i) result.stride[i] = strides[i];
    return result;
}

// A problem and the memory that it points to. It may be moved, but not copied.
struct OwnedProblem {
    std::vector<int64_t> windows;
    Segments segments;
    Problem problem;
};

OwnedProblem owned_problem(const ProblemOf& of) {
    const auto& [q, k, v, shape, windows, sink_tokens, causal, scale, softcap, alibi_slopes, segment_ids] = of;
    const auto& [batch, heads, kv_heads, q_len, kv_len, head_dim] = shape;
    OwnedProblem owned{windows, Segments(pointer<const int64_t>(segment_ids), batch, kv_len, sink_tokens), {}};
    // a longer window has the same effect, but might not fit into the 32 bits in which the kernels count positions
    for (int64_t& window : owned.windows) window = std::min(window, kv_len);
    Problem& problem = owned.problem;
    problem.q = tensor(q);
    problem.k = tensor(k);
    problem.v = tensor(v);
    problem.stores = nullptr;
    problem.batch = batch;
    problem.heads = heads;
    problem.kv_heads = kv_heads;
    problem.q_len = q_len;
    problem.kv_len = kv_len;
    problem.head_dim = head_dim;
    problem.windows = owned.windows.data();
    problem.causal = causal;
    problem.scale = float(scale);
    problem.softcap = float(softcap);
    problem.alibi_slopes = pointer<const float>(alibi_slopes);
    problem.segments = owned.segments.numbers();
    problem.sinks = owned.segments.sinks();
    problem.sinks_end = owned.segments.sinks_end();
    return owned;
}

void forward(const ProblemOf& problem, const TensorOf& out, uintptr_t row_max, uintptr_t log_sum, uintptr_t max_logit,
             uintptr_t entropy, bool decode) {
    nb::gil_scoped_release unlocked;
    const OwnedProblem owned = owned_problem(problem);
    Forward call;
    call.problem = owned.problem;
    call.out = tensor(out);
    call.row_max = pointer<float>(row_max);
    call.log_sum = pointer<float>(log_sum);
    call.max_logit = pointer<float>(max_logit);
    call.entropy = pointer<float>(entropy);
    decode ? kernels->decode(call) : kernels->forward(call);
}

// Appends k and v to the stores, then attends to the keys in them. Computes no statistics.
void attend_cached(const ProblemOf& problem, const TensorOf& out, uintptr_t row_max, uintptr_t log_sum,
                   const std::vector<StoreOf>& stores, const std::vector<int64_t>& firsts,
                   const std::vector<int64_t>& group_of) {
    nb::gil_scoped_release unlocked;
    OwnedProblem owned = owned_problem(problem);
    std::vector<StoreGroup> groups;
    for (const auto& [k_at, v_at, slots, ring, sink_k, sink_v, sinks, positions] : stores)
        groups.push_back({pointer<void>(k_at), pointer<void>(v_at), slots, ring, firsts[groups.size()],
                          pointer<void>(sink_k), pointer<void>(sink_v), sinks, pointer<const int64_t>(positions)});
    const auto of_heads = stores_of_heads(groups, group_of, owned.problem.head_dim, owned.problem.k.dtype);
    owned.problem.stores = of_heads.data();
    append(owned.problem);
    kernels->decode({owned.problem, tensor(out), pointer<float>(row_max), pointer<float>(log_sum), nullptr, nullptr});
}

void backward(const ProblemOf& problem, const TensorOf& out, uintptr_t row_max, uintptr_t log_sum,
              const TensorOf& grad_out, uintptr_t grad_lse, const TensorOf& grad_q, const TensorOf& grad_k,
              const TensorOf& grad_v) {
    nb::gil_scoped_release unlocked;
    const OwnedProblem owned = owned_problem(problem);
    kernels->backward({owned.problem, tensor(out), tensor(grad_out), pointer<const float>(grad_lse),
                       pointer<const float>(row_max), pointer<const float>(log_sum), tensor(grad_q), tensor(grad_k),
                       tensor(grad_v)});
}

}  // namespace
}  // namespace longshort

NB_MODULE(_kernels, module) {
    using namespace longshort;
    kernels = &choose_kernels();
    module.attr("instruction_set") = kernels->name;
    module.attr("instruction_sets") = nb::cast(instruction_sets());
    module.def("find_torch_threads", &find_torch_threads);
    module.def("forward", &longshort::forward);
    module.def("attend_cached", &longshort::attend_cached);
    module.def("backward", &longshort::backward);
    module.def("fma_peak", [] { return kernels->fma_peak(); }, nb::call_guard<nb::gil_scoped_release>());
}
