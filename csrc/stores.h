// The caches of all key/value heads of a layer, from how Python describes them group by group.
#pragma once

#include <array>
#include <vector>

#include "interface.h"

namespace longshort {

// Heads that share a window: addresses of (batch, heads, slots, head_dim) keys and values and of their (batch, heads,
// sinks, head_dim) sinks, contiguous; the rest as in Store.
struct StoreGroup {
    void *k, *v;
    int64_t slots, ring, first;
    void *sink_k, *sink_v;
    int64_t sinks;
    const int64_t* sink_positions;
};

// One store for each key/value head; `group_of` names its group, in which heads come in their order.
std::vector<Store> stores_of_heads(const std::vector<StoreGroup>& groups, const std::vector<int64_t>& group_of,
                                   int64_t head_dim, DType dtype);

// Writes the new keys and values, (batch, kv_heads, q_len, head_dim) of the stores' dtype, to the slots of the last
// q_len positions.
void append(const Problem& problem);

}  // namespace longshort
