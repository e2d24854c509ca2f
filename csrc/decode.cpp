// The forward pass for a few queries and many keys. Memory is what limits it, so keys and values are read once, in
// place, for all heads that share them, and are split over the threads.
//
// The keys of a key/value head come in pieces: one, or several if they are in a cache. A task is a chunk of a piece. It
// computes a partial softmax for each row, that is, for each query of each head of the group. At the end the partial
// results of a row are joined in the order of their chunks.
#include <vector>

#include "parallel.h"
#include "softmax.h"

namespace longshort::LONGSHORT_ISA {
namespace {

constexpr int kChunk = 512;

// A row's softmax over one chunk of keys. values: Σ exp(x)·v, packed.
template <int Stride>
struct Partial {
    Row row;
    float values[Stride];
};

// Rows of keys or values, read in place or packed into a buffer, as their layout and dtype require.
template <int Stride>
struct Source {
    Source(const Rows& rows_, int64_t head_dim_, float* buffer_)
        : rows(rows_),
          head_dim(head_dim_),
          buffer(buffer_),
          in_place(rows.dtype == DType::f32 && rows.dim_stride == 1 && head_dim % kLanes == 0),
          stride(in_place ? rows.stride : Stride) {}

    const float* strip(Range keys) const {
        if (in_place) return reinterpret_cast<const float*>(rows.data) + keys.begin * rows.stride;
        rows.pack<Stride>(keys.begin, keys.size(), head_dim, buffer);
        return buffer;
    }

    const Rows rows;
    const int64_t head_dim;
    float* const buffer;
    const bool in_place;
    const int64_t stride;
};

// Keys of one plane that lie side by side in memory. Row r is at position r + shift or, for sinks, at positions[r].
struct Piece {
    Range keys;  // rows
    Rows k, v;
    int64_t shift;
    const int64_t* positions;
    int64_t first_chunk;  // counted over all pieces

    int64_t chunks() const { return parts_of(keys.size(), kChunk); }
};

template <int Stride>
struct Buffers {
    int64_t rows;
    Carver carver;
    float* const queries = carver.take(rows * Stride);
    float* const keys = carver.take(kStrip * Stride);  // of one strip
    float* const values = carver.take(kStrip * Stride);
};

template <int Stride>
class Chunk {
public:
    Chunk(const Forward& call, int64_t b, int64_t kv_head, const Piece& piece, Partial<Stride>* partials, float* memory)
        : problem_(call.problem),
          b_(b),
          kv_head_(kv_head),
          rows_(problem_.group_size() * problem_.q_len),
          visibility_(problem_, b, kv_head),
          buffers_{rows_, Carver(memory)},
          piece_(piece),
          keys_(piece.k, problem_.head_dim, buffers_.keys),
          values_(piece.v, problem_.head_dim, buffers_.values),
          partials_(partials) {}

    void run(Range keys) {
        const int64_t head_dim = problem_.head_dim;
        for (int64_t member = 0; member < problem_.group_size(); ++member)
            Rows(problem_.q, b_, kv_head_ * problem_.group_size() + member)
                .pack<Stride>(0, problem_.q_len, head_dim, buffers_.queries + member * problem_.q_len * Stride);
        for (int64_t r = 0; r < rows_; ++r) partials_[r] = {{kNoMaximum, 0, 0, 0}, {}};
        for (int64_t begin = keys.begin; begin < keys.end; begin += kStrip) {
            const Range strip = keys.part(begin, kStrip), at{strip.begin + piece_.shift, strip.end + piece_.shift};
            const Seen seen = piece_.positions ? Seen::some : seen_of(at);
            if (seen == Seen::none) continue;
            const StripLanes lanes = piece_.positions ? StripLanes::of_sinks(piece_.positions, strip, visibility_)
                                                      : StripLanes(at, visibility_);
            const float* key_rows = keys_.strip(strip);
            const float* value_rows = values_.strip(strip);
            for (int64_t r = 0; r < rows_; ++r)
                seen == Seen::all ? attend<false>(r, strip.size(), lanes, key_rows, value_rows)
                                  : attend<true>(r, strip.size(), lanes, key_rows, value_rows);
        }
    }

private:
    enum class Seen { none, some, all };  // of the pairs of a query and a key of a strip

    Seen seen_of(Range keys) const {
        const Range queries{problem_.first_position(), problem_.kv_len};
        const SegmentSpan of_queries(visibility_.segments, queries), of_keys(visibility_.segments, keys);
        const bool in_band = !intersection(keys, visibility_.keys_of_some(queries)).empty();
        if ((!in_band && !visibility_.any_sink(keys)) || !of_queries.overlaps(of_keys)) return Seen::none;
        const bool in_all = intersection(keys, visibility_.keys_of_all(queries)).size() == kStrip;
        return in_all && of_queries.is_same(of_keys) ? Seen::all : Seen::some;
    }

    template <bool Masked>
    void attend(int64_t r, int64_t count, const StripLanes& lanes, const float* key_rows, const float* value_rows) {
        float scores[kStrip];
        logits(buffers_.queries + r * Stride, key_rows, count, scores);
        const int64_t position = problem_.first_position() + r % problem_.q_len;
        Row& row = partials_[r].row;
        Vec maximum = splat(row.maximum), max_logit = splat(row.max_logit);
        int32_t seen[kStrip];
        for (int i = 0; i < kStripVectors; ++i) {
            const IVec mask = Masked ? lanes.seen_from(position, i, visibility_) : ~IVec{};
            store(seen + i * kLanes, mask);
            max_logit = max_size_of(keep_where(mask, load(scores + i * kLanes)), max_logit);
        }
        Bias(problem_, kv_head_ * problem_.group_size() + r / problem_.q_len)
            .apply(position, 1, lanes, scores, nullptr);
        for (int i = 0; i < kStripVectors; ++i) {
            Vec x = load(scores + i * kLanes);
            if constexpr (Masked) store(scores + i * kLanes, x = load(seen + i * kLanes) ? x : splat(kHidden));
            maximum = max_of(x, maximum);
        }
        const auto larger = [](float a, float b) { return a > b ? a : b; };
        const float new_maximum = fold(maximum, larger);
        Vec sum{}, weighted{};
        for (int i = 0; i < kStripVectors; ++i) {
            const Vec x = load(scores + i * kLanes) - new_maximum;
            const Vec e = exp_of(x);
            store(scores + i * kLanes, e);
            sum += e;
            weighted += x < kSmallestExponent ? Vec{} : e * x;
        }
        const float moved = row.maximum - new_maximum, factor = exp_of(splat(moved))[0];
        const float old_weighted = factor == 0.0f ? 0.0f : factor * (row.weighted + moved * row.sum);
        const float new_max_logit = fold(max_logit, [](float a, float b) { return max_size_of(a, b); });
        row = {new_maximum, row.sum * factor + sum_of(sum), old_weighted + sum_of(weighted), new_max_logit};
        add_values<Masked>(scores, seen, value_rows, count, factor, partials_[r].values);
    }

    // Computes scale · query · key for each key of a strip.
    LONGSHORT_INLINE void logits(const float* query, const float* key_rows, int64_t count, float* to) const {
        for (int64_t first = 0; first < count; first += kLanes) {
            Vec products[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
                // lanes past the last key repeat it, and are hidden later
                const int64_t j = first + i < count ? first + i : count - 1;
                const float* key = key_rows + j * keys_.stride;
                Vec sum{};
                for (int64_t d = 0; d < problem_.head_dim; d += kLanes) sum += load(query + d) * load(key + d);
                products[i] = sum;
            }
            transpose(products);
            for (int i = 1; i < kLanes; ++i) products[0] += products[i];
            store(to + first, products[0] * problem_.scale);
        }
    }

    // sums = sums · factor + Σ weights · values. Keys that are not seen are left out: a weight of 0 would not hide NaN.
    template <bool Masked>
    LONGSHORT_INLINE void add_values(const float* weights, const int32_t* seen, const float* value_rows, int64_t count,
                                     float factor, float* sums) const {
        constexpr int kVectors = Stride / kLanes < 8 ? Stride / kLanes : 8;
        const int64_t vectors = (problem_.head_dim + kLanes - 1) / kLanes;
        for (int64_t first = 0; first < vectors; first += kVectors) {
            Vec sum[kVectors];
            const int64_t here = vectors - first < kVectors ? vectors - first : kVectors;
            if (here == kVectors) {
                for (int v = 0; v < kVectors; ++v) sum[v] = load(sums + (first + v) * kLanes) * factor;
                for (int64_t j = 0; j < count; ++j) {
                    if (Masked && !seen[j]) continue;
                    for (int v = 0; v < kVectors; ++v)
                        sum[v] += weights[j] * load(value_rows + j * values_.stride + (first + v) * kLanes);
                }
                for (int v = 0; v < kVectors; ++v) store(sums + (first + v) * kLanes, sum[v]);
                continue;
            }
            for (int64_t v = first; v < first + here; ++v) {
                Vec one = load(sums + v * kLanes) * factor;
                for (int64_t j = 0; j < count; ++j)
                    if (!Masked || seen[j]) one += weights[j] * load(value_rows + j * values_.stride + v * kLanes);
                store(sums + v * kLanes, one);
            }
        }
    }

    const Problem& problem_;
    const int64_t b_, kv_head_, rows_;
    const Visibility visibility_;
    const Buffers<Stride> buffers_;
    const Piece& piece_;
    const Source<Stride> keys_, values_;
    Partial<Stride>* const partials_;
};

// Adds the pieces with the keys that some query of a plane may see: sinks that have left the ring, then by position.
void add_pieces(const Problem& problem, int64_t b, int64_t kv_head, std::vector<Piece>& pieces) {
    const Visibility visibility(problem, b, kv_head);
    const Range in_band = visibility.keys_of_some({problem.first_position(), problem.kv_len});
    const auto add = [&](Range keys, const Rows& k, const Rows& v, int64_t shift, const int64_t* positions) {
        const int64_t chunk = pieces.empty() ? 0 : pieces.back().first_chunk + pieces.back().chunks();
        if (!keys.empty()) pieces.push_back({keys, k, v, shift, positions, chunk});
    };
    if (!problem.stores) {
        const Range keys = visibility.with_sinks(in_band, problem.kv_len);
        return add(keys, Rows(problem.k, b, kv_head), Rows(problem.v, b, kv_head), 0, nullptr);
    }
    const Store& store = problem.stores[kv_head];
    if (store.sinks)
        add({0, store.sinks}, Rows(store.sink_k, b, 0), Rows(store.sink_v, b, 0), 0,
            store.sink_positions + b * store.sinks);
    const Range kept{store.first, problem.kv_len};
    const Rows k(store.k, b, 0), v(store.v, b, 0);
    for (Range keys = visibility.sinks ? kept : intersection(kept, in_band); !keys.empty();) {
        const int64_t slot = store.slot(keys.begin), shift = keys.begin - slot;
        const int64_t end = store.ring && shift + store.ring < keys.end ? shift + store.ring : keys.end;
        add({slot, end - shift}, k, v, shift, nullptr);
        keys.begin = end;
    }
}

template <int Stride>
void run(const Forward& call) {
    const Problem& problem = call.problem;
    const int64_t planes = problem.batch * problem.kv_heads, rows = problem.group_size() * problem.q_len;
    std::vector<Piece> pieces;
    std::vector<int64_t> first_chunks, first_pieces;  // of each plane; the last first_chunks is their end
    const auto chunks = [&] { return pieces.empty() ? 0 : pieces.back().first_chunk + pieces.back().chunks(); };
    for (int64_t plane = 0; plane < planes; ++plane) {
        first_chunks.push_back(chunks());
        first_pieces.push_back(int64_t(pieces.size()));
        add_pieces(problem, plane / problem.kv_heads, plane % problem.kv_heads, pieces);
    }
    first_chunks.push_back(chunks());
    const int64_t tasks = chunks();
    const std::unique_ptr<Partial<Stride>[]> partials(new Partial<Stride>[tasks * rows]);
    for_each_task(tasks, Buffers<Stride>{rows, Carver()}.carver.taken(), [&](int64_t task, float* memory) {
        size_t at = pieces.size() - 1;
        while (pieces[at].first_chunk > task) --at;
        int64_t plane = planes - 1;
        while (first_pieces[plane] > int64_t(at)) --plane;
        const Piece& piece = pieces[at];
        Chunk<Stride>(call, plane / problem.kv_heads, plane % problem.kv_heads, piece, partials.get() + task * rows,
                      memory)
            .run(piece.keys.part(piece.keys.begin + (task - piece.first_chunk) * kChunk, kChunk));
    });

    const std::unique_ptr<Statistics[]> statistics(new Statistics[problem.heads * problem.batch]);
    for (int64_t plane = 0; plane < planes; ++plane) {
        const int64_t b = plane / problem.kv_heads, kv_head = plane % problem.kv_heads;
        const Visibility visibility(problem, b, kv_head);
        for (int64_t r = 0; r < rows; ++r) {
            const auto partial = [&](int64_t chunk) -> const Partial<Stride>& { return partials[chunk * rows + r]; };
            Row total{kNoMaximum, 0, 0, 0};
            float values[Stride] = {};
            for (int64_t chunk = first_chunks[plane]; chunk < first_chunks[plane + 1]; ++chunk) {
                const Row& row = partial(chunk).row;
                if (!(total.maximum >= row.maximum)) total.maximum = row.maximum;
                total.max_logit = max_size_of(row.max_logit, total.max_logit);
            }
            for (int64_t chunk = first_chunks[plane]; chunk < first_chunks[plane + 1]; ++chunk) {
                const Partial<Stride>& part = partial(chunk);
                const float moved = part.row.maximum - total.maximum, factor = exp_of(splat(moved))[0];
                total.sum += factor * part.row.sum;  // NaN stays NaN even if the factor is 0
                if (factor != 0.0f) total.weighted += factor * (part.row.weighted + moved * part.row.sum);
                for (int64_t d = 0; d < Stride; d += kLanes)
                    store(values + d, load(values + d) + load(part.values + d) * factor);
            }
            const int64_t head = kv_head * problem.group_size() + r / problem.q_len;
            finish_row<Stride>(call, visibility, b, head, r % problem.q_len, total, values,
                               statistics[head * problem.batch + b]);
        }
    }
    if (call.entropy) write_statistics(call, statistics.get(), problem.batch);
}

}  // namespace

void decode(const Forward& call) { LONGSHORT_FOR_HEAD_DIM(call.problem.head_dim, run, call); }

}  // namespace longshort::LONGSHORT_ISA
