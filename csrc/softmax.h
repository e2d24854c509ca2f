// Finishes the softmax of a row, and the statistics of a head.
#pragma once

#include <cmath>

#include "visibility.h"

namespace longshort::LONGSHORT_ISA {

// A row's softmax so far, where x = score - maximum.
struct Row {
    float maximum;
    float sum;        // Σ exp(x)
    float weighted;   // Σ exp(x)·x
    float max_logit;  // largest |logit|, NaN if one is
};

// Statistics of some rows of one head; entropy is the sum over the rows.
struct Statistics {
    float max_logit = 0;
    double entropy = 0;
    int64_t rows = 0;

    void add(float logit, double entropy_of_rows, int64_t count) {
        max_logit = max_size_of(logit, max_logit);
        entropy += entropy_of_rows;
        rows += count;
    }
};

// Writes a row's results. weighted_values: Σ exp(x)·v, packed.
template <int Stride>
LONGSHORT_INLINE void finish_row(const Forward& call, const Visibility& visibility, int64_t b, int64_t head,
                                 int64_t row, Row result, const float* weighted_values, Statistics& statistics) {
    const Problem& problem = call.problem;
    const int64_t at = (b * problem.heads + head) * problem.q_len + row;
    const bool sees = !visibility.segments || visibility.segments[problem.first_position() + row] >= 0;
    // any row but padding sees a key: its own; if all its scores are -inf, its softmax is 0/0
    const float sum = sees && result.sum == 0.0f ? NAN : result.sum;
    const float log_sum = sees ? std::log(sum) : -INFINITY;
    if (call.row_max) {
        call.row_max[at] = sees ? result.maximum : 0.0f;
        call.log_sum[at] = log_sum;
    }
    Rows(call.out, b, head).write<Stride>(row, problem.head_dim, sees ? 1.0f / sum : 0.0f, weighted_values);
    if (!call.entropy || !sees) return;
    // log of the sum minus the mean of x: unlike in lse - Σ p·score, nothing large cancels
    statistics.add(result.max_logit, log_sum - result.weighted / sum, 1);
}

// Writes the statistics of each head, joined from statistics[head][part] in the order of the parts.
inline void write_statistics(const Forward& call, const Statistics* statistics, int64_t parts) {
    for (int64_t head = 0; head < call.problem.heads; ++head) {
        Statistics total;
        for (int64_t i = head * parts; i < (head + 1) * parts; ++i)
            total.add(statistics[i].max_logit, statistics[i].entropy, statistics[i].rows);
        call.max_logit[head] = total.max_logit;
        call.entropy[head] = total.rows ? float(total.entropy / double(total.rows)) : 0.0f;
    }
}

}  // namespace longshort::LONGSHORT_ISA
