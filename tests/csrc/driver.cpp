// Runs the kernels of each instruction set that this processor has on random problems and compares with the truth:
//
//     driver CASES SEED THREADS
//
// Case i is drawn from seed SEED + i. Built with sanitizers by `make sanitize`; LONGSHORT_CPU has no effect.
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>
#include <tuple>

#include "../../csrc/dispatch.h"
#include "../../csrc/parallel.h"
#include "../../csrc/stores.h"
#include "threads.h"
#include "truth.h"

// Anything that a sanitizer finds ends the program with SIGABRT, whose handler prints the current case.
#define LONGSHORT_SANITIZER_OPTIONS(function)                                  \
    extern "C" __attribute__((visibility("default"))) const char* function() { \
        return "abort_on_error=1:halt_on_error=1";                             \
    }
LONGSHORT_SANITIZER_OPTIONS(__asan_default_options)
LONGSHORT_SANITIZER_OPTIONS(__tsan_default_options)
LONGSHORT_SANITIZER_OPTIONS(__ubsan_default_options)

namespace longshort {
namespace {

// A case takes a second or two. A worker that waits for another in vain would take for ever.
constexpr unsigned kMostSeconds = 120;

// The most rows of one key/value head, q_len × group size, that decode is tested with.
constexpr int64_t kDecodingRows = 16;

std::string at_hand;  // what to print about the current run when it fails

void print_case(int signal_number) {
    (void)!write(STDERR_FILENO, at_hand.data(), at_hand.size());
    // not _exit(), in which ThreadSanitizer would wait for a lock that it holds while it reports
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "%s\n", what.c_str());
    std::abort();
}

// Whether all bits are the same, except for the sign and the payload of NaN.
bool same(const std::vector<double>& a, const std::vector<double>& b) {
    const auto equal = [](double x, double y) {
        return x == y ? std::signbit(x) == std::signbit(y) : x != x && y != y;
    };
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), equal);
}

std::vector<double> as_doubles(const std::vector<float>& values) { return {values.begin(), values.end()}; }

// The results of a forward pass.
struct Outputs {
    Memory out;
    std::vector<float> row_max, log_sum, max_logit, entropy;  // the last two are empty without statistics

    Outputs(const Case& c, bool statistics)
        : out(c.out_layout.allocate(c.query_shape(), c.out_dtype)),
          row_max(c.batch * c.heads * c.q_len, NAN),
          log_sum(row_max),
          max_logit(statistics ? c.heads : 0, NAN),
          entropy(max_logit) {}

    Forward call(const Problem& problem) {
        const bool statistics = !entropy.empty();
        return {problem,
                out.tensor(),
                row_max.data(),
                log_sum.data(),
                statistics ? max_logit.data() : nullptr,
                statistics ? entropy.data() : nullptr};
    }
};

struct Gradients {
    Memory grad_q, grad_k, grad_v;

    explicit Gradients(const Case& c)
        : grad_q(c.grad_q_layout.allocate(c.query_shape(), DType::f32)),
          grad_k(c.grad_k_layout.allocate(c.key_shape(), c.dtype)),
          grad_v(c.grad_v_layout.allocate(c.key_shape(), c.dtype)) {
        grad_q.write(std::vector<double>(grad_q.size()));
    }

    Backward call(const Case& c, const Outputs& outputs) const {
        const float* grad_lse = c.grad_lse.empty() ? nullptr : c.grad_lse.data();
        return {c.problem(),     outputs.out.tensor(),   c.grad_out.tensor(),
                grad_lse,        outputs.row_max.data(), outputs.log_sum.data(),
                grad_q.tensor(), grad_k.tensor(),        grad_v.tensor()};
    }
};

// A cache with the keys and values of a case, except for the last q_len, which are yet to be appended. Heads of one
// window are a group.
class Cache {
public:
    explicit Cache(const Case& c) : case_(c), past_(c.kv_len - c.q_len) {
        std::vector<StoreGroup> groups;
        std::vector<int64_t> group_of;
        std::vector<std::vector<int64_t>> heads;
        for (int64_t head = 0; head < c.kv_heads; ++head) {
            size_t at = 0;
            while (at < heads.size() && c.windows[heads[at][0]] != c.windows[head]) ++at;
            if (at == heads.size()) heads.emplace_back();
            heads[at].push_back(head);
            group_of.push_back(int64_t(at));
        }
        for (const auto& own : heads) groups.push_back(fill(own));
        stores_ = stores_of_heads(groups, group_of, c.head_dim, c.dtype);
    }

    // The problem with only the new keys and values in k and v.
    Problem problem() const {
        Problem problem = case_.problem();
        problem.k = newest(problem.k);
        problem.v = newest(problem.v);
        problem.stores = stores_.data();
        return problem;
    }

private:
    int64_t size() const { return size_of(case_.dtype); }

    Tensor newest(Tensor tensor) const {
        tensor.data = tensor.row(0, 0, past_);
        return tensor;
    }

    StoreGroup fill(const std::vector<int64_t>& heads) {
        const int64_t window = case_.windows[heads[0]], count = int64_t(heads.size());
        // as many as the first query sees and the new ones; sometimes more
        const int64_t ring = window < 0 ? 0 : window + case_.q_len - 1 + int64_t(case_.seed % 3);
        const int64_t first = ring && case_.kv_len > ring ? case_.kv_len - ring : 0;
        const int64_t slots = ring && ring < case_.kv_len ? ring : case_.kv_len;
        std::vector<std::vector<int64_t>> sinks(case_.batch);
        size_t most = 0;
        for (int64_t b = 0; b < case_.batch; ++b) {
            for (int64_t j = 0; window >= 0 && case_.sink_tokens && j < first; ++j)
                if (case_.segments->sinks()[b * case_.kv_len + j]) sinks[b].push_back(j);
            most = std::max(most, sinks[b].size());
        }
        auto& positions = positions_.emplace_back(new int64_t[case_.batch * most]);
        std::fill_n(positions.get(), case_.batch * most, -1);
        for (int64_t b = 0; b < case_.batch; ++b)
            std::copy(sinks[b].begin(), sinks[b].end(), positions.get() + b * most);
        StoreGroup group{nullptr, nullptr, slots, ring, first, nullptr, nullptr, int64_t(most), positions.get()};
        const Problem whole = case_.problem();
        for (const auto& [from, store, sink_store] :
             {std::tuple{&whole.k, &group.k, &group.sink_k}, std::tuple{&whole.v, &group.v, &group.sink_v}}) {
            char* data = allocate(count * slots);
            char* sink_data = allocate(count * int64_t(most));
            std::memset(sink_data, 0, case_.batch * count * most * case_.head_dim * size());
            for (int64_t plane = 0; plane < case_.batch * count; ++plane) {
                const int64_t b = plane / count, head = heads[plane % count];
                for (int64_t j = std::max<int64_t>(0, ring ? past_ - ring : 0); j < past_; ++j)
                    copy(*from, b, head, j, data, plane * slots + (ring ? j % ring : j));
                for (size_t r = 0; r < sinks[b].size(); ++r)
                    copy(*from, b, head, sinks[b][r], sink_data, plane * int64_t(most) + int64_t(r));
            }
            *store = data;
            *sink_store = sink_data;
        }
        return group;
    }

    char* allocate(int64_t rows) {
        return bytes_.emplace_back(new char[case_.batch * rows * case_.head_dim * size()]).get();
    }

    void copy(const Tensor& from, int64_t b, int64_t head, int64_t position, char* to, int64_t row) const {
        const char* source = from.row(b, head, position);
        for (int64_t d = 0; d < case_.head_dim; ++d)
            std::memcpy(to + (row * case_.head_dim + d) * size(), source + d * from.stride[3] * size(), size());
    }

    const Case& case_;
    const int64_t past_;
    std::vector<Store> stores_;
    std::vector<std::unique_ptr<char[]>> bytes_;  // each of exactly its extent, for AddressSanitizer
    std::vector<std::unique_ptr<int64_t[]>> positions_;
};

// A case, and the same with NaN or inf in a row of one of its inputs. Results that do not see that row must keep every
// bit, and results that see NaN must be NaN.
class Planted {
public:
    Planted(const Case& c, const Kernels& kernels) : before_(c), after_(c), kernels_(kernels) {
        Random random(c.seed);
        const std::array<std::pair<const char*, Memory Case::*>, 4> inputs = {
            {{"q", &Case::q}, {"k", &Case::k}, {"v", &Case::v}, {"grad_out", &Case::grad_out}}};
        const auto [name, input] = inputs[random() % inputs.size()];
        const float values[] = {NAN, INFINITY, -INFINITY};
        value_ = values[random() % 3];
        name_ = name;
        Memory& changed = after_.*input;
        changed = changed.copy();
        const int64_t row = int64_t(random() % (changed.size() / c.head_dim));
        for (int64_t d = 0; d < c.head_dim; ++d) changed.set(row * c.head_dim + d, value_);
        find_reach(changed_rows(before_.*input, changed));
    }

    void run() {
        at_hand = "with " + std::to_string(value_) + " in a row of " + name_ + " of " + kernels_.name + ", " +
                  before_.describe() + "\n";
        alarm(kMostSeconds);
        const auto forward = [&](const Case& c, Outputs& outputs) { kernels_.forward(outputs.call(c.problem())); };
        const auto decode = [&](const Case& c, Outputs& outputs) { kernels_.decode(outputs.call(c.problem())); };
        const auto decode_cached = [&](const Case& c, Outputs& outputs) {
            const Cache cache(c);
            append(cache.problem());
            kernels_.decode(outputs.call(cache.problem()));
        };
        const auto [before, after] = compare(forward);
        if (before_.q_len * before_.group_size() <= kDecodingRows) {
            compare(decode);
            if (before_.causal) compare(decode_cached);
        }
        Gradients gradients_before(before_), gradients_after(after_);
        kernels_.backward(gradients_before.call(before_, before));
        kernels_.backward(gradients_after.call(after_, after));
        compare("grad_q", gradients_before.grad_q.read(), gradients_after.grad_q.read(), rows_, true);
        compare("grad_k", gradients_before.grad_k.read(), gradients_after.grad_k.read(), keys_, true);
        compare("grad_v", gradients_before.grad_v.read(), gradients_after.grad_v.read(), keys_, name_ != "v");
        alarm(0);
    }

private:
    static bool equal(double x, double y) { return x == y || (x != x && y != y); }

    // The rows that the change affects: several if the input has strides of 0.
    std::vector<bool> changed_rows(const Memory& before, const Memory& after) const {
        const std::vector<double> values = before.read(), changed = after.read();
        std::vector<bool> rows(values.size() / before_.head_dim);
        for (size_t i = 0; i < values.size(); ++i)
            if (!equal(values[i], changed[i])) rows[i / before_.head_dim] = true;
        return rows;
    }

    // Finds the queries that see a changed row, or that are changed and see any key, and the keys that one of them
    // sees.
    void find_reach(const std::vector<bool>& changed) {
        const Case& c = before_;
        const Visible sees(c);
        const bool in_keys = name_ == "k" || name_ == "v";
        rows_.resize(c.batch * c.heads * c.q_len);
        heads_.resize(c.heads);
        keys_.resize(c.batch * c.kv_heads * c.kv_len);
        for (int64_t b = 0; b < c.batch; ++b)
            for (int64_t head = 0; head < c.heads; ++head)
                for (int64_t i = 0; i < c.q_len; ++i) {
                    const int64_t at = (b * c.heads + head) * c.q_len + i, kv_head = head / c.group_size();
                    const int64_t position = c.kv_len - c.q_len + i, keys = (b * c.kv_heads + kv_head) * c.kv_len;
                    for (int64_t j = 0; j < c.kv_len && !rows_[at]; ++j)
                        rows_[at] = (in_keys ? changed[keys + j] : changed[at]) && sees(b, kv_head, position, j);
                    if (!rows_[at]) continue;
                    heads_[head] = true;
                    for (int64_t j = 0; j < c.kv_len; ++j)
                        if (sees(b, kv_head, position, j)) keys_[keys + j] = true;
                }
    }

    template <class Pass>
    std::pair<Outputs, Outputs> compare(const Pass& pass) const {
        Outputs before(before_, true), after(after_, true);
        pass(before_, before);
        pass(after_, after);
        const bool in_scores = name_ == "q" || name_ == "k";
        compare("out", before.out.read(), after.out.read(), rows_, in_scores || name_ == "v");
        compare("log_sum", as_doubles(before.log_sum), as_doubles(after.log_sum), rows_, in_scores);
        compare("max_logit", as_doubles(before.max_logit), as_doubles(after.max_logit), heads_, in_scores);
        compare("entropy", as_doubles(before.entropy), as_doubles(after.entropy), heads_, in_scores);
        return {before, after};
    }

    // Compares one result. reached: for each of its equal parts, whether that sees the changed row. changes: whether it
    // must then become NaN if that row is.
    void compare(const char* name, const std::vector<double>& before, const std::vector<double>& after,
                 const std::vector<bool>& reached, bool changes) const {
        for (size_t i = 0; i < before.size(); ++i) {
            const bool sees = reached[i / (before.size() / reached.size())];
            if (!sees && !equal(before[i], after[i])) fail(std::string(name) + " sees what it may not");
            if (sees && changes && value_ != value_ && after[i] == after[i]) fail(std::string(name) + " lost a NaN");
        }
    }

    const Case before_;
    Case after_;
    const Kernels& kernels_;
    std::string name_;
    float value_;
    std::vector<bool> rows_, heads_, keys_;
};

class Check {
public:
    Check(const Case& c, const Truth& truth, const Kernels& kernels, int64_t threads)
        : case_(c), problem_(c.problem()), truth_(truth), kernels_(kernels), threads_(threads) {}

    void run() {
        const Outputs outputs =
            run_forward("forward", [&](Outputs& outputs) { kernels_.forward(outputs.call(problem_)); });
        if (case_.q_len * case_.group_size() <= kDecodingRows) {
            run_forward("decode", [&](Outputs& outputs) { kernels_.decode(outputs.call(problem_)); });
            if (case_.causal) run_forward("decode from a cache", [&](Outputs& outputs) { decode_cached(outputs); });
        }
        outputs.out.write(truth_.saved_out);
        run_backward(outputs);
    }

    double largest_error() const { return largest_error_; }

private:
    // Runs a pass on two threads at once, with several workers each, then on this thread alone.
    //
    // New threads get new scratch memory of exactly the size that they ask for, so AddressSanitizer notices an access
    // past its end. The scratch memory of this thread is from earlier calls, and is filled with NaN, because no result
    // may depend on what is in it.
    template <class Results, class Pass>
    std::array<Results, 3> run_thrice(const char* name, std::array<Results, 3> results, const Pass& pass) {
        at_hand = std::string("in ") + name + " of " + kernels_.name + ", " + case_.describe() + "\n";
        alarm(kMostSeconds);
        use_threads(threads_);
        std::thread first([&] { pass(results[0]); }), second([&] { pass(results[1]); });
        first.join();
        second.join();
        use_threads(1);
        constexpr size_t kMostScratch = 1 << 18;  // more than any pass asks for
        std::fill_n(scratch(kMostScratch), kMostScratch, NAN);
        pass(results[2]);
        alarm(0);
        return results;
    }

    void decode_cached(Outputs& outputs) const {
        const Cache cache(case_);
        const Problem problem = cache.problem();
        append(problem);
        kernels_.decode(outputs.call(problem));
    }

    template <class Pass>
    Outputs run_forward(const char* name, const Pass& pass) {
        const bool statistics = case_.statistics;
        const auto results = run_thrice<Outputs>(
            name, {Outputs(case_, statistics), Outputs(case_, statistics), Outputs(case_, true)}, pass);
        const Outputs& alone = results[2];
        for (const Outputs& other : {results[0], results[1]}) {
            require_same("out", other.out.read(), alone.out.read());
            require_same("row_max", as_doubles(other.row_max), as_doubles(alone.row_max));
            require_same("log_sum", as_doubles(other.log_sum), as_doubles(alone.log_sum));
            if (other.entropy.empty()) continue;
            require_same("max_logit", as_doubles(other.max_logit), as_doubles(alone.max_logit));
            require_same("entropy", as_doubles(other.entropy), as_doubles(alone.entropy));
        }
        require_gaps("out", alone.out);
        compare("out", alone.out.read(), truth_.out);
        std::vector<double> row_max = as_doubles(alone.row_max), lse = as_doubles(alone.log_sum);
        for (size_t i = 0; i < lse.size(); ++i) {
            lse[i] += row_max[i];
            if (std::isnan(lse[i])) row_max[i] = NAN;  // the maximum of a row with NaN may be that of its other scores
        }
        compare("row_max", row_max, truth_.row_max);
        compare("lse", lse, truth_.lse);
        compare("max_logit", as_doubles(alone.max_logit), truth_.max_logit);
        compare("entropy", as_doubles(alone.entropy), truth_.entropy);
        return alone;
    }

    void run_backward(const Outputs& outputs) {
        const auto results =
            run_thrice<Gradients>("backward", {Gradients(case_), Gradients(case_), Gradients(case_)},
                                  [&](Gradients& gradients) { kernels_.backward(gradients.call(case_, outputs)); });
        const Gradients& alone = results[2];
        for (const Gradients& other : {results[0], results[1]}) {
            require_same("grad_q", other.grad_q.read(), alone.grad_q.read());
            require_same("grad_k", other.grad_k.read(), alone.grad_k.read());
            require_same("grad_v", other.grad_v.read(), alone.grad_v.read());
        }
        require_gaps("grad_q", alone.grad_q);
        require_gaps("grad_k", alone.grad_k);
        require_gaps("grad_v", alone.grad_v);
        compare("grad_q", alone.grad_q.read(), truth_.grad_q);
        compare("grad_k", alone.grad_k.read(), truth_.grad_k);
        compare("grad_v", alone.grad_v.read(), truth_.grad_v);
        compare("sum of grad_v", sum_over_keys(alone.grad_v.read()), truth_.sum_of_grad_v);
    }

    std::vector<double> sum_over_keys(const std::vector<double>& grad_v) const {
        const int64_t plane = case_.kv_len * case_.head_dim;
        std::vector<double> sums(case_.batch * case_.kv_heads * case_.head_dim);
        for (size_t i = 0; i < grad_v.size(); ++i) sums[i / plane * case_.head_dim + i % case_.head_dim] += grad_v[i];
        return sums;
    }

    void require_same(const char* name, const std::vector<double>& several, const std::vector<double>& one) const {
        if (!same(several, one)) fail(std::string(name) + " depends on threads, statistics or old scratch memory");
    }

    void require_gaps(const char* name, const Memory& memory) const {
        if (!memory.gaps_are_untouched()) fail(std::string(name) + ": something wrote between its elements");
    }

    void compare(const char* name, const std::vector<double>& got, const Expected& expected) {
        for (size_t i = 0; i < got.size(); ++i) {
            const double wanted = expected.value[i], allowed = expected.tolerance[i];
            if (got[i] == wanted) continue;
            // either may come out: inf - inf, 0 · inf
            if (!case_.not_finite.empty() && !std::isfinite(wanted) && !std::isfinite(got[i])) continue;
            const double error = std::abs(got[i] - wanted);
            if (error <= allowed) {
                // bf16 always errs by up to half a rounding step
                if (case_.dtype == DType::f32) largest_error_ = std::max(largest_error_, error / allowed);
                continue;
            }
            char text[200];
            std::snprintf(text, sizeof text, "%s[%zu] is %.9g, should be %.9g, give or take %.3g", name, i, got[i],
                          wanted, allowed);
            fail(text);
        }
    }

    const Case& case_;
    const Problem problem_;
    const Truth& truth_;
    const Kernels& kernels_;
    const int64_t threads_;
    double largest_error_ = 0;
};

// The builds that dispatch.cpp runs on this processor.
std::vector<const Kernels*> all_kernels() {
    std::vector<const Kernels*> all;
    for (const char* name : {"v4", "v3", "v1", "native"}) {
        setenv("LONGSHORT_CPU", name, 1);
        try {
            all.push_back(&choose_kernels());
        } catch (const std::runtime_error&) {
        }
    }
    return all;
}

int run(int64_t cases, uint64_t first_seed, int64_t threads) {
    for (const int number : {SIGABRT, SIGALRM}) signal(number, print_case);
    const std::vector<const Kernels*> all = all_kernels();
    double largest_error = 0;
    for (int64_t i = 0; i < cases; ++i) {
        at_hand = "in drawing from seed " + std::to_string(first_seed + i) + "\n";
        const Case c = random_case(first_seed + i);
        const Truth truth = truth_of(c);
        for (const Kernels* kernels : all) {
            Check check(c, truth, *kernels, threads);
            check.run();
            Planted(c, *kernels).run();
            largest_error = std::max(largest_error, check.largest_error());
        }
    }
    std::printf("%lld cases from seed %llu on", static_cast<long long>(cases),
                static_cast<unsigned long long>(first_seed));
    for (const Kernels* kernels : all) std::printf(" %s", kernels->name);
    std::printf(": in fp32 the largest error is %.2f of what is allowed\n", largest_error);
    return 0;
}

}  // namespace
}  // namespace longshort

int main(int count, char** arguments) {
    if (count != 4) {
        std::fprintf(stderr, "usage: %s CASES SEED THREADS\n", arguments[0]);
        return 2;
    }
    const auto number = [&](int i) { return std::atoll(arguments[i]); };
    return longshort::run(number(1), number(2), number(3));
}
