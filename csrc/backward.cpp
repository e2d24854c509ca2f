// The backward pass, keys in the lanes. It computes the scores again, by the same sums as the forward pass.
//
// A task is a block of keys of one key/value head. It sums up their gradients over the queries that see some of them,
// one block of queries after the other. For each strip of 16 keys it computes (queries × keys) the scores, the
// probabilities P, dP = dO·vᵀ and dS = P·(dP - delta), then adds Pᵀ·dO to dv and dSᵀ·q to dk. After the last strip it
// adds dS·k to dq.
//
// The tasks of a head add to the same dq. A task adds to a block of queries only after the task before it has, so the
// order of the additions is always the same, and with it every bit.
#include <atomic>
#include <cmath>

#include "parallel.h"
#include "visibility.h"

namespace longshort::LONGSHORT_ISA {
namespace {

constexpr int kQueryBlock = 64;

template <int Stride>
constexpr int kKeyBlock = Stride <= 64 ? 128 : 8192 / Stride;

// Two numbers of a row that all blocks of keys need.
struct RowTerms {
    float delta;   // Σ_j P·dP
    float factor;  // 1 / Σ exp(score - row maximum)
};

template <int Stride>
struct Buffers {
    static constexpr int kKeys = kKeyBlock<Stride>;
    static constexpr int kKeyStride = kKeys + kStrip;  // not a power of two, with which rows would share cache sets

    Carver carver;
    float* const key_rows = carver.take(kKeys * Stride);
    float* const key_columns = carver.take(kKeys * Stride);
    float* const value_columns = carver.take(kKeys * Stride);
    float* const grad_keys = carver.take(kKeys * Stride);
    float* const grad_values = carver.take(kKeys * Stride);
    float* const queries = carver.take(kQueryBlock * Stride);
    float* const grad_outs = carver.take(kQueryBlock * Stride);
    float* const grad_queries = carver.take(kQueryBlock * Stride);
    float* const probabilities = carver.take(kQueryBlock * kStrip);  // of one strip
    float* const slopes = carver.take(kQueryBlock * kStrip);         // of one strip
    float* const grad_scores = carver.take(kQueryBlock * kKeyStride);
};

template <int Stride>
class KeyBlock {
public:
    // `done` counts the blocks of queries that this task has finished, `done_before` those of the task before it, null
    // for the first.
    KeyBlock(const Backward& call, const RowTerms* terms, int64_t b, int64_t kv_head, int64_t index,
             std::atomic<int64_t>* done_before, std::atomic<int64_t>* done, float* memory)
        : call_(call),
          problem_(call.problem),
          terms_(terms),
          b_(b),
          kv_head_(kv_head),
          keys_(Range{0, problem_.kv_len}.part(index * kKeys, kKeys)),
          done_before_(done_before),
          done_(done),
          visibility_(problem_, b, kv_head),
          segments_(visibility_.segments, keys_),
          any_sink_(visibility_.any_sink(keys_)),
          buffers_{Carver(memory)} {}

    void run() {
        const int64_t head_dim = problem_.head_dim, strips = parts_of(keys_.size(), kStrip);
        const size_t bytes = sizeof(float) * strips * kStrip * Stride;
        // values first: the rows of the keys then stay in key_rows
        pack_columns(Rows(problem_.v, b_, kv_head_), buffers_.value_columns);
        pack_columns(Rows(problem_.k, b_, kv_head_), buffers_.key_columns);
        keys_are_finite_ = all_finite<Stride>(buffers_.key_rows, keys_.size(), head_dim);
        std::memset(buffers_.grad_keys, 0, bytes);
        std::memset(buffers_.grad_values, 0, bytes);

        const int64_t blocks = parts_of(problem_.q_len, kQueryBlock), first = problem_.first_position();
        Range positions = visibility_.queries_of_some(keys_);
        if (any_sink_) positions = {problem_.causal ? keys_.begin : 0, problem_.kv_len};
        positions = intersection(positions, {first, problem_.kv_len});
        for (int64_t member = 0; member < problem_.group_size(); ++member) {
            const int64_t head = kv_head_ * problem_.group_size() + member;
            if (positions.empty()) break;
            for (int64_t block = (positions.begin - first) / kQueryBlock; block * kQueryBlock < positions.end - first;
                 ++block) {
                const Range rows = Range{0, problem_.q_len}.part(block * kQueryBlock, kQueryBlock);
                if (!visit(head, rows)) continue;
                wait_for(member * blocks + block + 1);
                add_grad_queries(head, rows);
                done_->store(member * blocks + block + 1, std::memory_order_release);
            }
        }
        const int64_t all = problem_.group_size() * blocks;
        wait_for(all);
        done_->store(all, std::memory_order_release);

        const Rows grad_k(call_.grad_k, b_, kv_head_), grad_v(call_.grad_v, b_, kv_head_);
        for (int64_t j = 0; j < keys_.size(); ++j) {
            grad_k.write<Stride>(keys_.begin + j, head_dim, problem_.scale, buffers_.grad_keys + j * Stride);
            grad_v.write<Stride>(keys_.begin + j, head_dim, 1.0f, buffers_.grad_values + j * Stride);
        }
    }

private:
    static constexpr int kKeys = Buffers<Stride>::kKeys, kKeyStride = Buffers<Stride>::kKeyStride;

    void pack_columns(const Rows& rows, float* columns) {
        rows.pack<Stride>(keys_.begin, keys_.size(), problem_.head_dim, buffers_.key_rows);
        const int64_t strips = parts_of(keys_.size(), kStrip);
        std::memset(buffers_.key_rows + keys_.size() * Stride, 0,
                    sizeof(float) * (strips * kStrip - keys_.size()) * Stride);
        for (int64_t s = 0; s < strips; ++s)
            transpose_strip<Stride>(buffers_.key_rows + s * kStrip * Stride, problem_.head_dim,
                                    columns + s * kStrip * Stride);
    }

    void wait_for(int64_t blocks) const {
        for (int turns = 0; done_before_ && done_before_->load(std::memory_order_acquire) < blocks; ++turns)
            relax(turns);
    }

    // Does everything for a block of queries except adding to grad_q. False if no query sees a key.
    bool visit(int64_t head, Range rows) {
        const int64_t first = problem_.first_position();
        const Range positions{rows.begin + first, rows.end + first};
        const SegmentSpan segments(visibility_.segments, positions);
        if (!segments.overlaps(segments_)) return false;
        if (!any_sink_ && intersection(positions, visibility_.queries_of_some(keys_)).empty()) return false;
        pack_queries(head, rows);
        const int64_t steps = parts_of(rows.size(), kRowStep);
        for (int64_t step = 0; step < steps; ++step) seen_[step] = {kKeys, 0};
        bool any = false;
        for (int64_t begin = keys_.begin; begin < keys_.end; begin += kStrip)
            any |= visit_strip(head, keys_.part(begin, kStrip), positions, segments);
        if (!any) return false;
        std::memset(buffers_.grad_queries, 0, sizeof(float) * steps * kRowStep * Stride);
        for (int64_t step = 0; step < steps; ++step) {
            const Range keys = seen_[step];
            if (keys.empty()) continue;
            const int64_t row = step * kRowStep;
            weighted_sum<1, kKeyStride, Stride>(
                keys_are_finite_, buffers_.grad_scores + row * kKeyStride + keys.begin,
                buffers_.key_rows + keys.begin * Stride, keys.size(), kRowStep, problem_.head_dim,
                buffers_.grad_queries + row * Stride,
                [&](int64_t j, int64_t r) { return sees(positions, row + r, keys.begin + j); });
        }
        return true;
    }

    void pack_queries(int64_t head, Range rows) {
        const int64_t head_dim = problem_.head_dim, count = rows.size();
        queries_ =
            Rows(problem_.q, b_, head).packed<Stride>(rows.begin, count, problem_.q_len, head_dim, buffers_.queries);
        grad_outs_ = Rows(call_.grad_out, b_, head)
                         .packed<Stride>(rows.begin, count, problem_.q_len, head_dim, buffers_.grad_outs);
        queries_are_finite_ = all_finite<Stride>(queries_, count, head_dim);
        grad_outs_are_finite_ = all_finite<Stride>(grad_outs_, count, head_dim);
        const int64_t first = (b_ * problem_.heads + head) * problem_.q_len + rows.begin;
        for (int64_t r = 0; r < count; ++r) {
            row_max_[r] = call_.row_max[first + r];
            factor_[r] = terms_[first + r].factor;
            delta_[r] = terms_[first + r].delta;
            grad_lse_[r] = call_.grad_lse ? call_.grad_lse[first + r] : 0.0f;
        }
        std::memset(buffers_.grad_scores, 0, sizeof(float) * round_up(count, kRowStep) * kKeyStride);
    }

    // Does the same for one strip of keys and the packed queries, which are at `positions`.
    bool visit_strip(int64_t head, Range keys, Range positions, const SegmentSpan& query_segments) {
        const SegmentSpan key_segments(visibility_.segments, keys);
        const Range seeing = visibility_.trim_queries(positions, keys, key_segments);
        if (seeing.empty()) return false;
        // counted from the start of the block, in whole steps; only the last step may be shorter
        const Range rows = intersection(
            {(seeing.begin - positions.begin) / kRowStep * kRowStep, round_up(seeing.end - positions.begin, kRowStep)},
            {0, positions.size()});
        Range unmasked{rows.end, rows.end};
        if (keys.size() == kStrip && key_segments.is_same(query_segments)) {
            const Range all = visibility_.queries_of_all(keys);
            const Range full = intersection({all.begin - positions.begin, all.end - positions.begin}, rows);
            if (!full.empty()) unmasked = full;
        }
        const int64_t offset = keys.begin - keys_.begin;
        for (int64_t step = rows.begin / kRowStep; step * kRowStep < rows.end; ++step) {
            Range& seen = seen_[step];
            seen = {offset < seen.begin ? offset : seen.begin, offset + kStrip > seen.end ? offset + kStrip : seen.end};
        }
        const float* query_rows = queries_ + rows.begin * Stride;
        const float* grad_out_rows = grad_outs_ + rows.begin * Stride;
        float* grad_scores = buffers_.grad_scores + rows.begin * kKeyStride + offset;
        dot<Stride, kStrip>(query_rows, buffers_.key_columns + offset * Stride, rows.size(), problem_.head_dim,
                            problem_.scale, buffers_.probabilities + rows.begin * kStrip);
        dot<Stride, kKeyStride>(grad_out_rows, buffers_.value_columns + offset * Stride, rows.size(), problem_.head_dim,
                                1.0f, grad_scores);
        const StripLanes lanes(keys, visibility_);
        const Bias bias(problem_, head);
        const float* slopes = bias.softcap == 0.0f ? nullptr : buffers_.slopes;
        if (!bias.none())
            bias.apply(positions.begin + rows.begin, rows.size(), lanes, buffers_.probabilities + rows.begin * kStrip,
                       slopes ? buffers_.slopes + rows.begin * kStrip : nullptr);
        scores_to_gradients<true>({rows.begin, unmasked.begin}, offset, positions.begin, lanes, slopes);
        scores_to_gradients<false>(unmasked, offset, positions.begin, lanes, slopes);
        scores_to_gradients<true>({unmasked.end, rows.end}, offset, positions.begin, lanes, slopes);
        const auto seen = [&](int64_t r, int64_t j) { return sees(positions, rows.begin + r, offset + j); };
        weighted_sum<kStrip, 1, Stride>(grad_outs_are_finite_, buffers_.probabilities + rows.begin * kStrip,
                                        grad_out_rows, rows.size(), kStrip, problem_.head_dim,
                                        buffers_.grad_values + offset * Stride, seen);
        weighted_sum<kKeyStride, 1, Stride>(queries_are_finite_, grad_scores, query_rows, rows.size(), kStrip,
                                            problem_.head_dim, buffers_.grad_keys + offset * Stride, seen);
        return true;
    }

    // Whether a query, a row of the block at `positions`, sees a key of this block. False past the end of either.
    bool sees(Range positions, int64_t row, int64_t key) const {
        return row < positions.size() && key < keys_.size() &&
               visibility_.sees(positions.begin + row, keys_.begin + key);
    }

    // Turns scores into P and dP into dS, in place. slopes: derivatives of the scores by the logits, null if all are 1.
    template <bool Masked>
    LONGSHORT_INLINE void scores_to_gradients(Range rows, int64_t offset, int64_t first_position,
                                              const StripLanes& lanes, const float* slopes) {
        for (int64_t r = rows.begin; r < rows.end; ++r) {
#pragma GCC unroll 4
            for (int i = 0; i < kStripVectors; ++i) {
                float* p_at = buffers_.probabilities + r * kStrip + i * kLanes;
                float* ds_at = buffers_.grad_scores + r * kKeyStride + offset + i * kLanes;
                Vec p = exp_of(load(p_at) - row_max_[r]) * factor_[r];
                // dP - delta comes first: it is exactly 0 for a row that sees only one key
                Vec ds = p * (load(ds_at) - delta_[r] + grad_lse_[r]);
                if (slopes) ds *= load(slopes + r * kStrip + i * kLanes);
                if constexpr (Masked) {  // last, because anything above may be NaN
                    const IVec seen = lanes.seen_from(first_position + r, i, visibility_);
                    p = keep_where(seen, p), ds = keep_where(seen, ds);
                }
                store(p_at, p);
                store(ds_at, ds);
            }
        }
    }

    void add_grad_queries(int64_t head, Range rows) {
        const Rows grad_q(call_.grad_q, b_, head);
        for (int64_t r = 0; r < rows.size(); ++r)
            grad_q.add(rows.begin + r, problem_.head_dim, problem_.scale, buffers_.grad_queries + r * Stride);
    }

    const Backward& call_;
    const Problem& problem_;
    const RowTerms* const terms_;
    const int64_t b_, kv_head_;
    const Range keys_;
    std::atomic<int64_t>*const done_before_, *const done_;
    const Visibility visibility_;
    const SegmentSpan segments_;
    const bool any_sink_;
    const Buffers<Stride> buffers_;
    const float *queries_, *grad_outs_;
    bool keys_are_finite_, queries_are_finite_, grad_outs_are_finite_;
    float row_max_[kQueryBlock], factor_[kQueryBlock], delta_[kQueryBlock], grad_lse_[kQueryBlock];
    Range seen_[kQueryBlock / kRowStep];  // for each step, the keys of the block whose dS may not be 0
};

template <int Stride>
struct TermBuffers {
    Carver carver;
    float* const rows = carver.take(kStrip * Stride);
    float* const outs = carver.take(kStrip * Stride);
    float* const grad_outs = carver.take(kStrip * Stride);
};

// Computes delta of each row, Σ_j P·dP, as dO·out. It is summed with the same roundings as dP, so that dP - delta is
// exactly 0 for a row that sees only one key, however large the logits are.
template <int Stride>
void compute_terms(const Backward& call, RowTerms* terms) {
    const Problem& problem = call.problem;
    const int64_t blocks = parts_of(problem.q_len, kQueryBlock);
    for_each_task(problem.batch * problem.heads * blocks, TermBuffers<Stride>{}.carver.taken(),
                  [&](int64_t task, float* memory) {
                      const int64_t plane = task / blocks, b = plane / problem.heads, head = plane % problem.heads;
                      const TermBuffers<Stride> buffers{Carver(memory)};
                      const Range block = Range{0, problem.q_len}.part(task % blocks * kQueryBlock, kQueryBlock);
                      for (int64_t begin = block.begin; begin < block.end; begin += kStrip) {
                          const Range strip = block.part(begin, kStrip);
                          pack_strip<Stride>(Rows(call.out, b, head), strip.begin, strip.size(), problem.head_dim,
                                             buffers.rows, buffers.outs);
                          pack_strip<Stride>(Rows(call.grad_out, b, head), strip.begin, strip.size(), problem.head_dim,
                                             buffers.rows, buffers.grad_outs);
                          float deltas[kStrip];
                          dot_of_lanes(buffers.grad_outs, buffers.outs, problem.head_dim, deltas);
                          for (int64_t r = 0; r < strip.size(); ++r) {
                              const int64_t at = plane * problem.q_len + strip.begin + r;
                              terms[at] = {deltas[r], std::exp(-call.log_sum[at])};
                          }
                      }
                  });
}

// The block of keys that a task has, and its head. Heads of the same window take turns, block by block, so that a task
// seldom waits for the one before it in its head. The heads that see most keys come first.
struct Place {
    int64_t b, kv_head, block;

    Place(int64_t task, const Problem& problem, const int64_t* heads, int64_t blocks) {
        int64_t first = 0, end = 1;
        const auto same_window = [&] { return problem.windows[heads[end]] == problem.windows[heads[first]]; };
        while (end < problem.kv_heads && same_window()) ++end;
        while (task >= end * problem.batch * blocks) {
            first = end++;
            while (end < problem.kv_heads && same_window()) ++end;
        }
        const int64_t within = task - first * problem.batch * blocks, turns = end - first;
        kv_head = heads[first + within % turns];
        b = within / turns % problem.batch;
        block = within / (turns * problem.batch);
    }
};

template <int Stride>
void run(const Backward& call) {
    const Problem& problem = call.problem;
    const std::unique_ptr<RowTerms[]> terms(new RowTerms[problem.batch * problem.heads * problem.q_len]);
    compute_terms<Stride>(call, terms.get());
    const int64_t blocks = parts_of(problem.kv_len, kKeyBlock<Stride>);
    const int64_t planes = problem.batch * problem.kv_heads;
    const std::unique_ptr<int64_t[]> heads = kv_heads_by_reach(problem);
    const std::unique_ptr<std::atomic<int64_t>[]> done(new std::atomic<int64_t>[planes * blocks]());
    for_each_task(planes * blocks, Buffers<Stride>{}.carver.taken(), [&](int64_t task, float* memory) {
        const Place at(task, problem, heads.get(), blocks);
        std::atomic<int64_t>* counter = &done[(at.b * problem.kv_heads + at.kv_head) * blocks + at.block];
        KeyBlock<Stride>(call, terms.get(), at.b, at.kv_head, at.block, at.block ? counter - 1 : nullptr, counter,
                         memory)
            .run();
    });
}

}  // namespace

void backward(const Backward& call) { LONGSHORT_FOR_HEAD_DIM(call.problem.head_dim, run, call); }

}  // namespace longshort::LONGSHORT_ISA
