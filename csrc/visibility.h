// Which keys a query sees: as ranges, which allow to skip keys that no query sees, and as masks for the rest.
#pragma once

#include <memory>

#include "tile.h"

namespace longshort::LONGSHORT_ISA {

struct Range {
    int64_t begin, end;
    bool empty() const { return begin >= end; }
    int64_t size() const { return end - begin; }
    // The part from `at`, of at most `count` positions.
    Range part(int64_t at, int64_t count) const { return {at, at + count < end ? at + count : end}; }
};
LONGSHORT_INLINE Range intersection(Range a, Range b) {
    return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}
// Cuts off positions at both ends of a range up to the first that is wanted.
template <class Wanted>
LONGSHORT_INLINE Range shrunk(Range range, const Wanted& wanted) {
    while (!range.empty() && !wanted(range.begin)) ++range.begin;
    while (!range.empty() && !wanted(range.end - 1)) --range.end;
    return range;
}

// The smallest and largest segment of a range of positions. Two ranges share a segment only if their spans overlap.
struct SegmentSpan {
    int32_t lowest = INT32_MAX, highest = INT32_MIN;

    SegmentSpan(const int32_t* segments, Range positions) {
        if (!segments) {
            lowest = highest = 0;
            return;
        }
        for (int64_t i = positions.begin; i < positions.end; ++i) {
            lowest = segments[i] < lowest ? segments[i] : lowest;
            highest = segments[i] > highest ? segments[i] : highest;
        }
    }
    bool overlaps(const SegmentSpan& other) const {
        return lowest <= other.highest && other.lowest <= highest && highest >= 0 && other.highest >= 0;
    }
    // Whether both spans are one and the same segment, so that segments hide nothing.
    bool is_same(const SegmentSpan& other) const {
        return lowest == highest && lowest >= 0 && other.lowest == lowest && other.highest == highest;
    }
    bool contains(int32_t segment) const { return lowest <= segment && segment <= highest; }
};

// What the queries of one head of one sequence see.
struct Visibility {
    Band band;
    bool causal;
    int64_t kv_len;
    const int32_t* segments;
    const uint8_t* sinks;
    int64_t sinks_end;  // 0 without sinks

    Visibility(const Problem& problem, int64_t b, int64_t kv_head)
        : band(problem.band(kv_head)),
          causal(problem.causal),
          kv_len(problem.kv_len),
          segments(problem.segments_of(b)),
          sinks(problem.sinks_of(b, kv_head)),
          sinks_end(sinks ? problem.sinks_end[b] : 0) {}

    // Keys in the band of some query, or of every query, of a range. Sinks are not counted.
    Range keys_of_some(Range queries) const {
        return intersection({queries.begin + band.shift - band.span + 1, queries.end + band.shift}, {0, kv_len});
    }
    Range keys_of_all(Range queries) const {
        return {queries.end + band.shift - band.span, queries.begin + band.shift + 1};
    }
    // Queries whose band has some key, or every key, of a range.
    Range queries_of_some(Range keys) const { return {keys.begin - band.shift, keys.end - 1 - band.shift + band.span}; }
    Range queries_of_all(Range keys) const { return {keys.end - 1 - band.shift, keys.begin - band.shift + band.span}; }
    bool any_sink(Range keys) const {
        for (int64_t j = keys.begin; j < keys.end && j < sinks_end; ++j)
            if (sinks[j]) return true;
        return false;
    }

    // A range of keys, extended to the sinks that queries before `end` may see.
    Range with_sinks(Range keys, int64_t end) const {
        if (sinks_end == 0) return keys;
        const int64_t last = causal && end < sinks_end ? end : sinks_end;
        return {0, last > keys.end ? last : keys.end};
    }

    // `keys` without those at both ends that no query of these positions and segments sees.
    Range trim(Range keys, Range queries, const SegmentSpan& query_segments) const {
        const Range in_band = keys_of_some(queries);
        if (!sinks) keys = intersection(keys, in_band);
        if (!sinks && !segments) return keys;
        const auto seen = [&](int64_t j) {
            const bool near = (j >= in_band.begin && j < in_band.end) || (sinks && sinks[j]);
            return near && (!segments || (segments[j] >= 0 && query_segments.contains(segments[j])));
        };
        return shrunk(keys, seen);
    }

    // `queries` without those at both ends that see no key of these positions and segments.
    Range trim_queries(Range queries, Range keys, const SegmentSpan& key_segments) const {
        if (!any_sink(keys)) queries = intersection(queries, queries_of_some(keys));
        if (!segments) return queries;
        const auto sees = [&](int64_t i) { return segments[i] >= 0 && key_segments.contains(segments[i]); };
        return shrunk(queries, sees);
    }

    // Whether one query sees one key. The masks below are the same for the lanes of a vector.
    bool sees(int64_t query, int64_t key) const {
        const int64_t distance = query - key;
        const bool near = distance + band.shift >= 0 && distance + band.shift < band.span;
        const bool far = sinks && sinks[key] && (!causal || distance >= 0);
        return (near || far) && (!segments || (segments[query] >= 0 && segments[query] == segments[key]));
    }

    // Masks of lanes, from the distances query position - key position.
    LONGSHORT_INLINE IVec in_band(IVec distance) const {
        return (IVec)((UVec)(distance + int32_t(band.shift)) < uint32_t(band.span));
    }
    LONGSHORT_INLINE IVec not_later(IVec distance) const { return causal ? distance >= 0 : ~IVec{}; }
};

// The score of a pair that is not seen. Its exp() is 0 against any row maximum, which starts at kNoMaximum.
constexpr float kHidden = -2e38f;  // no score of a call may be below -1e38
constexpr float kNoMaximum = -1e38f;

// What is in the lanes of a strip. Lanes without a query or key have a position that no band reaches.
struct StripLanes {
    IVec position[kStripVectors], segment[kStripVectors], sink[kStripVectors];

    StripLanes(Range range, const Visibility& visibility)
        : StripLanes(range, visibility, [](int64_t at) { return at; }) {}

    // For the sinks in rows `range`. Row r is at positions[r], and unused if that is negative.
    static StripLanes of_sinks(const int64_t* positions, Range range, const Visibility& visibility) {
        return StripLanes(range, visibility, [positions](int64_t row) { return positions[row]; });
    }

private:
    template <class PositionOf>
    StripLanes(Range range, const Visibility& visibility, PositionOf position_of) {
        int32_t positions[kStrip], segments[kStrip], sinks[kStrip];
        for (int lane = 0; lane < kStrip; ++lane) {
            const int64_t row = range.begin + lane, at = row < range.end ? position_of(row) : -1;
            const bool inside = at >= 0;
            positions[lane] = inside ? int32_t(at) : kNowhere;
            segments[lane] = inside && visibility.segments ? visibility.segments[at] : -1;
            sinks[lane] = inside && visibility.sinks && visibility.sinks[at] ? -1 : 0;
        }
        for (int v = 0; v < kStripVectors; ++v) {
            position[v] = load(positions + v * kLanes);
            segment[v] = load(segments + v * kLanes);
            sink[v] = load(sinks + v * kLanes);
        }
    }

public:
    // Mask of the keys in the lanes of vector i that the query at position `query` sees.
    LONGSHORT_INLINE IVec seen_from(int64_t query, int i, const Visibility& visibility) const {
        const IVec distance = int32_t(query) - position[i];
        IVec seen = visibility.in_band(distance);
        if (visibility.sinks) seen |= sink[i] & visibility.not_later(distance);
        if (visibility.segments) seen &= (segment[i] == visibility.segments[query]) & (segment[i] >= 0);
        return seen;
    }

private:
    static constexpr int32_t kNowhere = -(1 << 30);
};

// Turns a logit into a score: softcap, then ALiBi.
struct Bias {
    float softcap, slope;

    Bias(const Problem& problem, int64_t head)
        : softcap(problem.softcap), slope(problem.alibi_slopes ? problem.alibi_slopes[head] : 0.0f) {}

    bool none() const { return softcap == 0.0f && slope == 0.0f; }

    // The capped logit and its derivative.
    LONGSHORT_INLINE Tangent cap(Vec logit) const {
        if (softcap == 0.0f) return {logit, splat(1.0f)};
        const Tangent tangent = tanh_of(logit / softcap);
        return {softcap * tangent.value, tangent.slope};
    }
    LONGSHORT_INLINE Vec distance_penalty(IVec distance) const {
        return slope * abs_of(__builtin_convertvector(distance, Vec));
    }

    // Turns logits (rows at consecutive positions × strip) into scores, in place, and writes the derivatives of the
    // scores unless that is null. It is never inlined, so that both passes get the same bits.
    LONGSHORT_NOINLINE void apply(int64_t position, int64_t count, const StripLanes& lanes, float* scores,
                                  float* derivatives) const {
        for (int64_t end = position + count; position < end; ++position)
            for (int i = 0; i < kStripVectors; ++i, scores += kLanes) {
                const Tangent capped = cap(load(scores));
                store(scores, capped.value - distance_penalty(lanes.position[i] - int32_t(position)));
                if (derivatives) store(std::exchange(derivatives, derivatives + kLanes), capped.slope);
            }
    }
};

// Key/value heads, those that see most keys first: global ones, then by window.
inline std::unique_ptr<int64_t[]> kv_heads_by_reach(const Problem& problem) {
    std::unique_ptr<int64_t[]> order(new int64_t[problem.kv_heads]);
    const auto reach = [&](int64_t head) { return problem.windows[head] < 0 ? problem.kv_len : problem.windows[head]; };
    for (int64_t head = 0; head < problem.kv_heads; ++head) {
        int64_t at = head;
        for (; at > 0 && reach(order[at - 1]) < reach(head); --at) order[at] = order[at - 1];
        order[at] = head;
    }
    return order;
}

}  // namespace longshort::LONGSHORT_ISA
