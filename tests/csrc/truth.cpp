#include "truth.h"

#include <algorithm>
#include <cmath>
#include <map>

namespace longshort {
namespace {

// How far fp32 may be off, in roundings of 2^-24 of the size of the numbers. The size of a sum is the sum of the
// absolute values of its terms.
//
// - A logit has head_dim roundings, which partly cancel, and exp() has about four. Together 4 are observed and 16
//   allowed. An error of z in a score is a relative error of z in exp(score), so anything computed from probabilities
//   may be off by that many roundings times 1 + the largest size of a score in the row.
// - A sum of n terms can drift by half a rounding of the sum so far at each step.
constexpr double kRounding = 0x1p-24;
double of_scores(double size) { return 16 * kRounding * (1 + size); }
double of_sum(double terms) { return terms / 2 * kRounding; }
// exp() is 0 where the result would be denormal.
constexpr double kSmallest = 1e-30;

double rounding_to(DType dtype) { return dtype == DType::bf16 ? 0x1p-8 : kRounding; }

struct Pair {
    int64_t key;
    double score, slope, probability, x;  // slope: d score / d logit; x: score - row maximum
};

class Computation {
public:
    explicit Computation(const Case& of)
        : c(of), q(c.q.read()), k(c.k.read()), v(c.v.read()), grad_out(c.grad_out.read()), sees(c) {
        const int64_t rows = c.batch * c.heads * c.q_len;
        truth.out = truth.grad_q = Expected(q.size());
        truth.grad_k = truth.grad_v = Expected(k.size());
        truth.row_max = truth.lse = Expected(rows);
        truth.max_logit = truth.entropy = Expected(c.heads);
        truth.sum_of_grad_v = Expected(c.batch * c.kv_heads * c.head_dim);
        truth.saved_out.resize(q.size());
        rows_that_see.resize(c.heads);
    }

    Truth run() {
        for (int64_t b = 0; b < c.batch; ++b)
            for (int64_t head = 0; head < c.heads; ++head)
                for (int64_t row = 0; row < c.q_len; ++row) attend(b, head, row);
        for (int64_t head = 0; head < c.heads; ++head) {
            const double count = std::max<double>(1, rows_that_see[head]);
            truth.entropy.value[head] /= count;
            truth.entropy.tolerance[head] /= count;
        }
        allow(truth.out, c.out_dtype);
        allow(truth.grad_q, DType::f32);
        allow(truth.grad_k, c.dtype);
        allow(truth.grad_v, c.dtype);
        sum_grad_v();
        return std::move(truth);
    }

private:
    void attend(int64_t b, int64_t head, int64_t row) {
        const int64_t kv_head = head / c.group_size(), d_count = c.head_dim, position = c.kv_len - c.q_len + row;
        const int64_t at = (b * c.heads + head) * c.q_len + row, keys = (b * c.kv_heads + kv_head) * c.kv_len;
        const double* query = &q[at * d_count];
        pairs.clear();
        double row_max = -INFINITY, score_size = 0;
        for (int64_t j = 0; j < c.kv_len; ++j) {
            if (!sees(b, kv_head, position, j)) continue;
            double logit = 0, logit_size = 0;
            for (int64_t d = 0; d < d_count; ++d) {
                const double product = query[d] * k[(keys + j) * d_count + d] * c.scale;
                logit += product;
                logit_size += std::abs(product);
            }
            keep_maximum(truth.max_logit.value[head], std::abs(logit));
            Pair pair{keys + j, logit, 1, 0, 0};
            if (c.softcap > 0) {
                const double tangent = std::tanh(logit / c.softcap);
                pair.score = c.softcap * tangent;
                pair.slope = 1 - tangent * tangent;
            }
            const double penalty = c.slopes.empty() ? 0.0 : c.slopes[head] * double(std::abs(position - j));
            pair.score -= penalty;
            keep_maximum(row_max, pair.score);
            if (std::isfinite(logit_size)) {
                score_size = std::max(score_size, logit_size + std::abs(penalty));
                truth.max_logit.tolerance[head] = std::max(truth.max_logit.tolerance[head], of_scores(logit_size));
            }
            pairs.push_back(pair);
        }
        if (pairs.empty()) {
            truth.lse.value[at] = -INFINITY;
            return;
        }
        const double tolerance = of_scores(score_size) + of_sum(double(pairs.size()));
        double sum = 0;
        for (Pair& pair : pairs) {
            pair.x = pair.score - row_max;
            sum += pair.probability = std::exp(pair.x);
        }
        truth.row_max.value[at] = row_max;
        truth.lse.value[at] = row_max + std::log(sum);
        truth.row_max.tolerance[at] = truth.lse.tolerance[at] = tolerance;
        double entropy = std::log(sum), mean_x = 0;
        std::vector<double> out(d_count), out_size(d_count);
        for (Pair& pair : pairs) {
            pair.probability /= sum;
            if (pair.probability != 0) mean_x += pair.probability * pair.x;
            for (int64_t d = 0; d < d_count; ++d) {
                const double term = pair.probability * v[pair.key * d_count + d];
                out[d] += term;
                out_size[d] += std::abs(term);
            }
        }
        truth.entropy.value[head] += entropy - mean_x;
        truth.entropy.tolerance[head] += tolerance * (1 + std::abs(mean_x));
        ++rows_that_see[head];
        for (int64_t d = 0; d < d_count; ++d) {
            truth.out.value[at * d_count + d] = out[d];
            truth.out.tolerance[at * d_count + d] = tolerance * out_size[d];
            truth.saved_out[at * d_count + d] = rounded(out[d], c.out_dtype);
        }
        differentiate(at, (b * c.kv_heads + kv_head), tolerance);
    }

    // Adds the part of one row to the gradients.
    void differentiate(int64_t at, int64_t plane, double tolerance) {
        const int64_t d_count = c.head_dim;
        const double* grad = &grad_out[at * d_count];
        const double rows = double(c.q_len * c.group_size());  // that may see one key
        const double without_scores = of_scores(0) + of_sum(rows + double(pairs.size()));
        double delta = c.grad_lse.empty() ? 0.0 : -double(c.grad_lse[at]), delta_size = std::abs(delta);
        double probabilities = 0;
        for (const Pair& pair : pairs) probabilities += pair.probability;
        const double one = std::isnan(probabilities) ? NAN : 1;
        for (int64_t d = 0; d < d_count; ++d) {
            const double product = grad[d] * truth.saved_out[at * d_count + d];
            delta += product;
            delta_size += std::abs(product);
            truth.sum_of_grad_v.value[plane * d_count + d] += one * grad[d];
            truth.sum_of_grad_v.tolerance[plane * d_count + d] += without_scores * std::abs(grad[d]);
        }
        const double in_column = tolerance + of_sum(rows);
        for (const Pair& pair : pairs) {
            const double* value = &v[pair.key * d_count];
            double product = 0, size = delta_size;
            for (int64_t d = 0; d < d_count; ++d) {
                product += grad[d] * value[d];
                size += std::abs(grad[d] * value[d]);
            }
            const double grad_logit = pair.probability * (product - delta) * pair.slope * c.scale;
            // the slope of softcap is 1 - t², t² at most 1: its size is about 1
            const double grad_logit_size = pair.probability * size * std::abs(c.scale);
            for (int64_t d = 0; d < d_count; ++d) {
                const double key = k[pair.key * d_count + d], query = q[at * d_count + d];
                truth.grad_q.value[at * d_count + d] += grad_logit * key;
                truth.grad_q.tolerance[at * d_count + d] += tolerance * grad_logit_size * std::abs(key);
                truth.grad_k.value[pair.key * d_count + d] += grad_logit * query;
                truth.grad_k.tolerance[pair.key * d_count + d] += in_column * grad_logit_size * std::abs(query);
                truth.grad_v.value[pair.key * d_count + d] += pair.probability * grad[d];
                truth.grad_v.tolerance[pair.key * d_count + d] += in_column * pair.probability * std::abs(grad[d]);
            }
        }
    }

    // Allows for the rounding to a dtype.
    static void allow(Expected& expected, DType dtype) {
        for (size_t i = 0; i < expected.value.size(); ++i)
            expected.tolerance[i] +=
                kSmallest + rounding_to(dtype) * (std::abs(expected.value[i]) + expected.tolerance[i]);
    }

    // The probabilities of a row sum up to 1 much more precisely than each is known, if the backward pass gets exactly
    // the scores of the forward pass. With large scores this would show if it did not.
    void sum_grad_v() {
        for (int64_t plane = 0; plane < c.batch * c.kv_heads; ++plane)
            for (int64_t j = 0; j < c.kv_len; ++j)
                for (int64_t d = 0; d < c.head_dim; ++d) {
                    const int64_t from = (plane * c.kv_len + j) * c.head_dim + d;
                    truth.sum_of_grad_v.tolerance[plane * c.head_dim + d] +=
                        kSmallest + rounding_to(c.dtype) * std::abs(truth.grad_v.value[from]);
                }
    }

    static void keep_maximum(double& maximum, double x) {
        if (!(x <= maximum) && maximum == maximum) maximum = x;  // NaN stays
    }

    const Case& c;
    const std::vector<double> q, k, v, grad_out;
    const Visible sees;
    std::vector<int64_t> rows_that_see;
    std::vector<Pair> pairs;
    Truth truth;
};

}  // namespace

Truth truth_of(const Case& c) { return Computation(c).run(); }

Visible::Visible(const Case& c) : case_(c), rank_(c.batch * c.kv_len) {
    for (int64_t b = 0; b < c.batch; ++b) {
        std::map<int64_t, int64_t> keys_so_far;
        for (int64_t j = b * c.kv_len; j < (b + 1) * c.kv_len; ++j)
            rank_[j] = keys_so_far[c.ids.empty() ? 0 : c.ids[j]]++;
    }
}

bool Visible::operator()(int64_t b, int64_t kv_head, int64_t position, int64_t key) const {
    const int64_t first = b * case_.kv_len, window = case_.windows[kv_head];
    if (!case_.ids.empty()) {
        const int64_t id = case_.ids[first + position];
        if (id < 0 || id != case_.ids[first + key]) return false;
    }
    if (case_.causal && key > position) return false;
    return window < 0 || std::abs(position - key) < window || rank_[first + key] < case_.sink_tokens;
}

}  // namespace longshort
