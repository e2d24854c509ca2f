#include "stores.h"

#include <cstring>

namespace longshort {
namespace {

// One head of contiguous (batch, heads, length, head_dim), as a tensor whose stride of heads is 0.
Tensor plane(void* data, int64_t heads, int64_t head, int64_t length, int64_t head_dim, DType dtype) {
    const int64_t size = length * head_dim;
    return {static_cast<char*>(data) + head * size * size_of(dtype), dtype, {heads * size, 0, head_dim, 1}};
}

void copy_row(const Tensor& from, int64_t b, int64_t head, int64_t index, const Tensor& to, int64_t slot,
              int64_t head_dim) {
    const char* source = from.row(b, head, index);
    char* target = to.row(b, 0, slot);
    const int64_t size = size_of(to.dtype), step = from.stride[3] * size;
    if (from.stride[3] == 1) {
        std::memcpy(target, source, head_dim * size);
        return;
    }
    for (int64_t d = 0; d < head_dim; ++d) std::memcpy(target + d * size, source + d * step, size);
}

}  // namespace

std::vector<Store> stores_of_heads(const std::vector<StoreGroup>& groups, const std::vector<int64_t>& group_of,
                                   int64_t head_dim, DType dtype) {
    std::vector<int64_t> sizes(groups.size(), 0), seen(groups.size(), 0);
    for (const int64_t group : group_of) ++sizes[group];
    std::vector<Store> stores;
    for (const int64_t at : group_of) {
        const StoreGroup& group = groups[at];
        const auto own = [&](void* data, int64_t length) {
            return plane(data, sizes[at], seen[at], length, head_dim, dtype);
        };
        stores.push_back({own(group.k, group.slots), own(group.v, group.slots), own(group.sink_k, group.sinks),
                          own(group.sink_v, group.sinks), group.ring, group.first, group.sinks, group.sink_positions});
        ++seen[at];
    }
    return stores;
}

void append(const Problem& problem) {
    for (int64_t b = 0; b < problem.batch; ++b)
        for (int64_t head = 0; head < problem.kv_heads; ++head)
            for (int64_t i = 0; i < problem.q_len; ++i) {
                const Store& store = problem.stores[head];
                const int64_t slot = store.slot(problem.first_position() + i);
                copy_row(problem.k, b, head, i, store.k, slot, problem.head_dim);
                copy_row(problem.v, b, head, i, store.v, slot, problem.head_dim);
            }
}

}  // namespace longshort
