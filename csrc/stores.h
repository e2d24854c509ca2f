// Makes the stores of a layer's key/value heads from the groups that Python describes, and appends to them.
#pragma once

#include <array>
#include <vector>

#include "interface.h"

namespace longshort {

// The store of key/value heads that share a window. k and v are (batch, heads, slots, head_dim), sink_k and sink_v
// (batch, heads, sinks, head_dim), all contiguous; the rest is as in Store.
struct StoreGroup {
    void *k, *v;
    int64_t slots, ring, first;
    void *sink_k, *sink_v;
    int64_t sinks;
    const int64_t* sink_positions;
};

// Returns the store of each key/value head. group_of: the group of each head; a group has its heads in their order.
std::vector<Store> stores_of_heads(const std::vector<StoreGroup>& groups, const std::vector<int64_t>& group_of,
                                   int64_t head_dim, DType dtype);

// Writes the problem's k and v, (batch, kv_heads, q_len, head_dim) in the dtype of the stores, to the slots of the last
// q_len positions.
void append(const Problem& problem);

}  // namespace longshort
