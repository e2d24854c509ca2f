// Python's door to the kernels: addresses and numbers in, nothing out. backends/cpu.py is its only caller.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

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
using Shape = std::array<int64_t, 6>;

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

// A problem and the memory that it points to.
struct OwnedProblem {
    std::vector<int64_t> windows;
    Segments segments;
    Problem problem;

    OwnedProblem(const TensorOf& q, const TensorOf& k, const TensorOf& v, const Shape& shape,
                 std::vector<int64_t> windows_of_kv_heads, int64_t sink_tokens, bool causal, double scale,
                 double softcap, uintptr_t alibi_slopes, uintptr_t segment_ids)
        : windows(std::move(windows_of_kv_heads)),
          segments(pointer<const int64_t>(segment_ids), shape[0], shape[4], sink_tokens) {
        problem.q = tensor(q);
        problem.k = tensor(k);
        problem.v = tensor(v);
        problem.stores = nullptr;
        problem.batch = shape[0];
        problem.heads = shape[1];
        problem.kv_heads = shape[2];
        problem.q_len = shape[3];
        problem.kv_len = shape[4];
        problem.head_dim = shape[5];
        problem.windows = windows.data();
        problem.causal = causal;
        problem.scale = float(scale);
        problem.softcap = float(softcap);
        problem.alibi_slopes = pointer<const float>(alibi_slopes);
        problem.segments = segments.numbers();
        problem.sinks = segments.sinks();
        problem.sinks_end = segments.sinks_end();
    }
};

void forward(const TensorOf& q, const TensorOf& k, const TensorOf& v, const TensorOf& out, const Shape& shape,
             std::vector<int64_t> windows, int64_t sink_tokens, bool causal, double scale, double softcap,
             uintptr_t alibi_slopes, uintptr_t segment_ids, uintptr_t row_max, uintptr_t log_sum, uintptr_t max_logit,
             uintptr_t entropy, bool decode) {
    nb::gil_scoped_release unlocked;
    const OwnedProblem owned(q, k, v, shape, std::move(windows), sink_tokens, causal, scale, softcap, alibi_slopes,
                             segment_ids);
    const Forward call{owned.problem,
                       tensor(out),
                       pointer<float>(row_max),
                       pointer<float>(log_sum),
                       pointer<float>(max_logit),
                       pointer<float>(entropy)};
    decode ? kernels->decode(call) : kernels->forward(call);
}

// (addresses of k and v, slots, ring, addresses of the sinks' k and v, sinks, address of their positions)
using StoreOf = std::array<int64_t, 8>;

// Appends k and v to the stores and attends to what is there; statistics are not written.
void attend_cached(const TensorOf& q, const TensorOf& k, const TensorOf& v, const TensorOf& out, const Shape& shape,
                   std::vector<int64_t> windows, int64_t sink_tokens, double scale, double softcap,
                   uintptr_t alibi_slopes, uintptr_t segment_ids, uintptr_t row_max, uintptr_t log_sum,
                   const std::vector<StoreOf>& stores, const std::vector<int64_t>& firsts,
                   const std::vector<int64_t>& group_of) {
    nb::gil_scoped_release unlocked;
    OwnedProblem owned(q, k, v, shape, std::move(windows), sink_tokens, true, scale, softcap, alibi_slopes,
                       segment_ids);
    std::vector<StoreGroup> groups;
    for (const auto& [k_at, v_at, slots, ring, sink_k, sink_v, sinks, positions] : stores)
        groups.push_back({pointer<void>(k_at), pointer<void>(v_at), slots, ring, firsts[groups.size()],
                          pointer<void>(sink_k), pointer<void>(sink_v), sinks, pointer<const int64_t>(positions)});
    const auto of_heads = stores_of_heads(groups, group_of, owned.problem.head_dim, owned.problem.k.dtype);
    owned.problem.stores = of_heads.data();
    append(owned.problem);
    kernels->decode({owned.problem, tensor(out), pointer<float>(row_max), pointer<float>(log_sum), nullptr, nullptr});
}

void backward(const TensorOf& q, const TensorOf& k, const TensorOf& v, const TensorOf& out, const TensorOf& grad_out,
              const Shape& shape, std::vector<int64_t> windows, int64_t sink_tokens, bool causal, double scale,
              double softcap, uintptr_t alibi_slopes, uintptr_t segment_ids, uintptr_t row_max, uintptr_t log_sum,
              uintptr_t grad_lse, const TensorOf& grad_q, const TensorOf& grad_k, const TensorOf& grad_v) {
    nb::gil_scoped_release unlocked;
    const OwnedProblem owned(q, k, v, shape, std::move(windows), sink_tokens, causal, scale, softcap, alibi_slopes,
                             segment_ids);
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
