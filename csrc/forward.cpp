// The forward pass: softmax(scores) · v with a running maximum and sum, queries in the lanes.
//
// A task is a block of queries of one head. It takes the keys that some of its queries see in blocks, which it packs.
// Each strip of 16 queries then takes the part of the block that it sees in chunks of keys, and for each chunk computes
// (keys × queries) the scores, the new maximum, exp and the weighted sum of the values.
#include "parallel.h"
#include "softmax.h"

namespace longshort::LONGSHORT_ISA {
namespace {

constexpr int kQueryBlock = 256;
constexpr int kChunk = 128;

// Keys that are packed at once. They and their values fill half of a small second-level cache.
template <int Stride>
constexpr int kKeyBlock = Stride <= 64 ? 384 : 24576 / Stride;

// The softmax of a strip's rows so far.
struct Softmax {
    Vec maximum[kStripVectors], sum[kStripVectors];
    // only for statistics
    Vec weighted[kStripVectors];   // Σ exp(x)·x with x = score - maximum
    Vec max_logit[kStripVectors];  // largest |logit|, NaN if one is
};

template <int Stride>
struct Buffers {
    Carver carver;
    float* const columns = carver.take(kQueryBlock * Stride);  // of the queries, strip by strip
    float* const sums = carver.take(kQueryBlock * Stride);     // Σ exp(score - maximum)·v of each query
    float* const keys = carver.take((kKeyBlock<Stride> + kRowStep) * Stride);
    float* const values = carver.take((kKeyBlock<Stride> + kRowStep) * Stride);
    float* const rows = carver.take(kStrip * Stride);
    float* const scores = carver.take((kChunk + kRowStep) * kStrip);
};

template <int Stride, bool kWithStatistics>
class Block {
public:
    Block(const Forward& call, int64_t b, int64_t head, int64_t first, int64_t count, float* memory)
        : call_(call),
          problem_(call.problem),
          b_(b),
          head_(head),
          first_(first),
          count_(count),
          kv_head_(head / problem_.group_size()),
          visibility_(problem_, b, kv_head_),
          bias_(problem_, head),
          buffers_{Carver(memory)} {}

    Statistics run() {
        const int64_t strips = parts_of(count_, kStrip);
        const Rows q(problem_.q, b_, head_), k(problem_.k, b_, kv_head_), v(problem_.v, b_, kv_head_);
        for (int64_t s = 0; s < strips; ++s) {
            pack_strip<Stride>(q, first_ + s * kStrip, rows_in(s), problem_.head_dim, buffers_.rows,
                               buffers_.columns + s * kStrip * Stride);
            softmax_[s] = {};
            for (Vec& maximum : softmax_[s].maximum) maximum = splat(kNoMaximum);
        }
        std::memset(buffers_.sums, 0, sizeof(float) * strips * kStrip * Stride);

        const Range queries = positions(0, count_);
        const SegmentSpan query_segments(visibility_.segments, queries);
        const Range in_band = visibility_.keys_of_some(queries);
        const Range keys = visibility_.with_sinks(in_band, queries.end);
        for (int64_t begin = keys.begin; begin < keys.end; begin += kKeyBlock<Stride>) {
            const Range block = keys.part(begin, kKeyBlock<Stride>);
            if (intersection(block, in_band).empty() && !visibility_.any_sink(block)) continue;
            if (!query_segments.overlaps(SegmentSpan(visibility_.segments, block))) continue;
            keys_ = k.packed<Stride>(block.begin, block.size(), problem_.kv_len, problem_.head_dim, buffers_.keys);
            values_ = v.packed<Stride>(block.begin, block.size(), problem_.kv_len, problem_.head_dim, buffers_.values);
            values_are_finite_ = all_finite<Stride>(values_, block.size(), problem_.head_dim);
            for (int64_t s = 0; s < strips; ++s) visit(s, block);
        }
        Statistics statistics;
        for (int64_t s = 0; s < strips; ++s) finish(s, statistics);
        return statistics;
    }

private:
    int64_t rows_in(int64_t s) const { return count_ - s * kStrip < kStrip ? count_ - s * kStrip : kStrip; }
    Range positions(int64_t begin, int64_t end) const {
        const int64_t first = problem_.first_position() + first_;
        return {first + begin, first + end};
    }

    // Attends from a strip to its part of a packed block of keys.
    void visit(int64_t s, Range block) {
        const Range queries = positions(s * kStrip, s * kStrip + rows_in(s));
        const SegmentSpan segments(visibility_.segments, queries);
        const Range keys = visibility_.trim(block, queries, segments);
        if (keys.empty()) return;
        const StripLanes lanes(queries, visibility_);
        for (int64_t begin = keys.begin; begin < keys.end; begin += kChunk) {
            const Range chunk = keys.part(begin, kChunk);
            Range unmasked = intersection(visibility_.keys_of_all(queries), chunk);
            if (unmasked.empty() || !segments.is_same(SegmentSpan(visibility_.segments, chunk)))
                unmasked = {chunk.end, chunk.end};
            attend(s, chunk, chunk.begin - block.begin, unmasked, lanes);
        }
    }

    void attend(int64_t s, Range keys, int64_t offset, Range unmasked, const StripLanes& lanes) {
        Softmax& softmax = softmax_[s];
        float* sums = buffers_.sums + s * kStrip * Stride;
        dot<Stride, kStrip>(keys_ + offset * Stride, buffers_.columns + s * kStrip * Stride, keys.size(),
                            problem_.head_dim, problem_.scale, buffers_.scores);
        Vec before[kStripVectors];
        for (int i = 0; i < kStripVectors; ++i) before[i] = softmax.maximum[i];
        const Range before_unmasked{keys.begin, unmasked.begin}, after{unmasked.end, keys.end};
        if (bias_.none()) {
            score<true, kWithStatistics>(before_unmasked, keys.begin, lanes, softmax);
            score<false, kWithStatistics>(unmasked, keys.begin, lanes, softmax);
            score<true, kWithStatistics>(after, keys.begin, lanes, softmax);
        } else {
            if constexpr (kWithStatistics) record_logits(keys, lanes, softmax);
            bias_.apply(keys.begin, keys.size(), lanes, buffers_.scores, nullptr);
            score<true, false>(before_unmasked, keys.begin, lanes, softmax);
            score<false, false>(unmasked, keys.begin, lanes, softmax);
            score<true, false>(after, keys.begin, lanes, softmax);
        }
        rescale(before, softmax, sums);
        exponentials(keys.size(), softmax);
        const Range queries = positions(s * kStrip, s * kStrip + rows_in(s));
        const auto seen = [&](int64_t j, int64_t r) {
            return r < queries.size() && visibility_.sees(queries.begin + r, keys.begin + j);
        };
        weighted_sum<kStrip, 1, Stride>(values_are_finite_, buffers_.scores, values_ + offset * Stride, keys.size(),
                                        kStrip, problem_.head_dim, sums, seen);
    }

    LONGSHORT_INLINE IVec mask(int64_t j, int i, const StripLanes& lanes) const {
        const IVec distance = lanes.position[i] - int32_t(j);
        IVec seen = visibility_.in_band(distance);
        if (visibility_.sinks && visibility_.sinks[j]) seen |= visibility_.not_later(distance);
        if (visibility_.segments) seen &= (lanes.segment[i] == visibility_.segments[j]) & (lanes.segment[i] >= 0);
        return seen;
    }

    // Hides the scores of keys that are not seen and finds the maximum. Record: the scores are the logits, so find the
    // largest logit too.
    template <bool Masked, bool Record>
    LONGSHORT_INLINE void score(Range keys, int64_t origin, const StripLanes& lanes, Softmax& softmax) {
        Vec maximum[kStripVectors], max_logit[kStripVectors];
        for (int i = 0; i < kStripVectors; ++i) maximum[i] = softmax.maximum[i], max_logit[i] = softmax.max_logit[i];
        for (int64_t j = keys.begin; j < keys.end; ++j) {
#pragma GCC unroll 4
            for (int i = 0; i < kStripVectors; ++i) {
                float* at = buffers_.scores + (j - origin) * kStrip + i * kLanes;
                Vec x = load(at);
                if constexpr (Masked) {
                    const IVec seen = mask(j, i, lanes);
                    if constexpr (Record) max_logit[i] = max_size_of(keep_where(seen, x), max_logit[i]);
                    x = seen ? x : splat(kHidden);
                    store(at, x);
                } else if constexpr (Record) {
                    max_logit[i] = max_size_of(x, max_logit[i]);
                }
                maximum[i] = max_of(x, maximum[i]);
            }
        }
        for (int i = 0; i < kStripVectors; ++i) softmax.maximum[i] = maximum[i], softmax.max_logit[i] = max_logit[i];
    }

    void record_logits(Range keys, const StripLanes& lanes, Softmax& softmax) const {
        for (int64_t j = keys.begin; j < keys.end; ++j)
            for (int i = 0; i < kStripVectors; ++i) {
                const Vec logit = load(buffers_.scores + (j - keys.begin) * kStrip + i * kLanes);
                softmax.max_logit[i] = max_size_of(keep_where(mask(j, i, lanes), logit), softmax.max_logit[i]);
            }
    }

    // Rescales the sums so far to the new maximum.
    LONGSHORT_INLINE void rescale(const Vec (&before)[kStripVectors], Softmax& softmax, float* sums) {
        float factors[kStrip];
        for (int i = 0; i < kStripVectors; ++i) {
            const Vec x = before[i] - softmax.maximum[i];
            const Vec factor = exp_of(x);
            if constexpr (kWithStatistics) {
                const Vec moved = softmax.weighted[i] + x * softmax.sum[i];
                softmax.weighted[i] = factor == 0.0f ? Vec{} : factor * moved;
            }
            softmax.sum[i] *= factor;
            store(factors + i * kLanes, factor);
        }
        for (int r = 0; r < kStrip; ++r) {
            if (factors[r] == 1.0f) continue;
            for (int64_t d = 0; d < problem_.head_dim; d += kLanes)
                store(sums + r * Stride + d, load(sums + r * Stride + d) * factors[r]);
        }
    }

    LONGSHORT_INLINE void exponentials(int64_t count, Softmax& softmax) {
        Vec sum[kStripVectors], weighted[kStripVectors];
        for (int i = 0; i < kStripVectors; ++i) sum[i] = softmax.sum[i], weighted[i] = softmax.weighted[i];
        for (int64_t j = 0; j < count; ++j) {
#pragma GCC unroll 4
            for (int i = 0; i < kStripVectors; ++i) {
                float* at = buffers_.scores + j * kStrip + i * kLanes;
                const Vec x = load(at) - softmax.maximum[i];
                const Vec e = exp_of(x);
                store(at, e);
                sum[i] += e;
                if constexpr (kWithStatistics) weighted[i] += x < kSmallestExponent ? Vec{} : e * x;
            }
        }
        for (int i = 0; i < kStripVectors; ++i) softmax.sum[i] = sum[i], softmax.weighted[i] = weighted[i];
    }

    void finish(int64_t s, Statistics& statistics) {
        const Softmax& softmax = softmax_[s];
        float maximum[kStrip], sum[kStrip], weighted[kStrip], max_logit[kStrip];
        for (int i = 0; i < kStripVectors; ++i) {
            store(maximum + i * kLanes, softmax.maximum[i]);
            store(sum + i * kLanes, softmax.sum[i]);
            store(weighted + i * kLanes, softmax.weighted[i]);
            store(max_logit + i * kLanes, softmax.max_logit[i]);
        }
        for (int64_t r = 0; r < rows_in(s); ++r)
            finish_row<Stride>(call_, visibility_, b_, head_, first_ + s * kStrip + r,
                               {maximum[r], sum[r], weighted[r], max_logit[r]},
                               buffers_.sums + (s * kStrip + r) * Stride, statistics);
    }

    const Forward& call_;
    const Problem& problem_;
    const int64_t b_, head_, first_, count_, kv_head_;
    const Visibility visibility_;
    const Bias bias_;
    const Buffers<Stride> buffers_;
    const float *keys_, *values_;
    bool values_are_finite_;
    Softmax softmax_[kQueryBlock / kStrip];
};

template <int Stride>
void run(const Forward& call) {
    const Problem& problem = call.problem;
    const int64_t blocks = parts_of(problem.q_len, kQueryBlock);
    const int64_t parts = problem.batch * blocks;  // tasks of a head
    std::unique_ptr<Statistics[]> statistics(call.entropy ? new Statistics[problem.heads * parts] : nullptr);
    const std::unique_ptr<int64_t[]> order = kv_heads_by_reach(problem);
    for_each_task(problem.heads * parts, Buffers<Stride>{}.carver.taken(), [&](int64_t task, float* memory) {
        const int64_t nth = task / parts, group = problem.group_size();
        const int64_t head = order[nth / group] * group + nth % group, b = task % parts / blocks;
        const int64_t block = blocks - 1 - task % blocks;  // the one that sees most keys first
        const int64_t first = block * kQueryBlock;
        const int64_t count = problem.q_len - first < kQueryBlock ? problem.q_len - first : kQueryBlock;
        if (statistics) {
            statistics[head * parts + b * blocks + block] =
                Block<Stride, true>(call, b, head, first, count, memory).run();
        } else {
            Block<Stride, false>(call, b, head, first, count, memory).run();
        }
    });
    if (statistics) write_statistics(call, statistics.get(), parts);
}

}  // namespace

void forward(const Forward& call) { LONGSHORT_FOR_HEAD_DIM(call.problem.head_dim, run, call); }

}  // namespace longshort::LONGSHORT_ISA
