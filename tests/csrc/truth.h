// Attention and its gradients from their definition, in double precision.
#pragma once

#include "cases.h"

namespace longshort {

struct Expected {
    std::vector<double> value, tolerance;

    explicit Expected(int64_t size = 0) : value(size), tolerance(size) {}
};

struct Truth {
    Expected out, row_max, lse, max_logit, entropy;
    std::vector<double> saved_out;  // out, rounded to its dtype: what the backward pass is given
    Expected grad_q, grad_k, grad_v;
    Expected sum_of_grad_v;  // over the keys: (batch, kv_heads, head_dim)
};

Truth truth_of(const Case& c);

}  // namespace longshort
