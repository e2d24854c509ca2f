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
    std::vector<double> saved_out;  // out, rounded to its dtype, as the backward pass gets it
    Expected grad_q, grad_k, grad_v;
    Expected sum_of_grad_v;  // over the keys: (batch, kv_heads, head_dim)
};

Truth truth_of(const Case& c);

// Which queries see which keys.
class Visible {
public:
    explicit Visible(const Case& c);
    bool operator()(int64_t b, int64_t kv_head, int64_t position, int64_t key) const;

private:
    const Case& case_;
    std::vector<int64_t> rank_;  // of each key in its segment
};

}  // namespace longshort
