#include "cases.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>

namespace longshort {
namespace {

int64_t between(Random& random, int64_t low, int64_t high) { return low + int64_t(random() % (high - low + 1)); }

bool chance(Random& random, double probability) { return double(random() >> 11) * 0x1p-53 < probability; }

template <class T>
T pick(Random& random, std::initializer_list<T> from) {
    return from.begin()[random() % from.size()];
}

Layout random_layout(Random& random, const Sizes& shape) {
    // dimensions from the outermost to the innermost: contiguous, as projections write them, transposed
    const Sizes contiguous = {0, 1, 2, 3}, projected = {0, 2, 1, 3}, transposed = {0, 1, 3, 2};
    const Sizes order = pick(random, {contiguous, contiguous, projected, projected, transposed});
    Layout layout{{}, chance(random, 0.2)};
    int64_t stride = chance(random, 0.15) ? 2 : 1;
    for (int i = 3; i >= 0; --i) {
        layout.strides[order[i]] = stride;
        stride = stride * shape[order[i]] + (chance(random, 0.1) ? between(random, 1, 5) : 0);
    }
    return layout;
}

using Expanded = std::array<bool, 4>;  // dimensions of stride 0

Memory random_tensor(Random& random, const Sizes& shape, DType dtype, double factor, Expanded expanded = {}) {
    Layout layout = random_layout(random, shape);
    for (int i = 0; i < 4; ++i)
        if (expanded[i]) layout.strides[i] = 0;
    const Memory memory = layout.allocate(shape, dtype);
    std::vector<double> values(memory.size());
    std::normal_distribution<double> normal;
    for (double& value : values) value = normal(random) * factor;
    memory.write(values);
    return memory;
}

void draw_sizes(Random& random, Case& c) {
    c.batch = between(random, 1, 3);
    c.kv_heads = between(random, 1, 4);
    int64_t group = pick<int64_t>(random, {1, 1, 2, 3, 5});
    c.head_dim = pick<int64_t>(random, {1, 8, 16, 17, 24, 31, 32, 64, 64, 80, 96, 128, 128, 255, 256, 0, 0, 0, 0});
    if (c.head_dim == 0) c.head_dim = between(random, 1, 256);
    const int64_t longest = pick<int64_t>(random, {40, 40, 300, 300, 1300});
    c.kv_len = between(random, longest == 40 ? 1 : longest / 3, longest);
    c.q_len = pick<int64_t>(random, {c.kv_len, c.kv_len, between(random, 1, c.kv_len), between(random, 1, 5)});
    c.q_len = std::min(c.q_len, c.kv_len);
    // (query, key) pairs × head_dim: many cases rather than large ones
    const int64_t most_work = pick<int64_t>(random, {1, 1, 2, 4, 12}) * 1'000'000;
    while (c.batch * c.kv_heads * group * c.q_len * c.kv_len * c.head_dim > most_work) {
        int64_t* const less[] = {&c.batch, &c.kv_heads, &group, &c.head_dim, &c.q_len};
        // the number of queries only sometimes, to keep several blocks of them
        int64_t& one = *less[random() % (chance(random, 0.2) ? 5 : 4)];
        one = (one + 1) / 2;
    }
    c.heads = c.kv_heads * group;
}

void draw_options(Random& random, Case& c) {
    // often several heads have the same window, since the kernels handle those together
    const auto window = [&] { return pick<int64_t>(random, {-1, -1, 1, 2, 3, 16, 17, 64, 100, 128, 300, 2000}); };
    const int64_t windows[] = {window(), window()};
    for (int64_t head = 0; head < c.kv_heads; ++head) c.windows.push_back(windows[random() % 2]);
    c.causal = chance(random, 0.6);
    c.statistics = chance(random, 0.5);
    c.scale = float(1 / std::sqrt(double(c.head_dim)));
    if (chance(random, 0.15)) c.scale = pick(random, {0.1f, 1.0f, -0.3f});
    c.softcap = chance(random, 0.25) ? pick(random, {1.5f, 20.0f}) : 0.0f;
    if (chance(random, 0.25)) {
        const int64_t lowest = chance(random, 0.5) ? -8 : 0;
        for (int64_t head = 0; head < c.heads; ++head) c.slopes.push_back(float(between(random, lowest, 8)) / 8);
    }
    c.sink_tokens = pick<int64_t>(random, {0, 0, 1, 3, 70, 300});
    if (chance(random, 0.4)) {
        const int64_t segments = pick<int64_t>(random, {0, 1, 3, 10});
        for (int64_t i = 0; i < c.batch * c.kv_len; ++i) c.ids.push_back(between(random, -2, segments - 1));
        if (chance(random, 0.6))
            for (int64_t b = 0; b < c.batch; ++b)
                std::sort(c.ids.begin() + b * c.kv_len, c.ids.begin() + (b + 1) * c.kv_len);
    }
    c.dtype = pick(random, {DType::f32, DType::bf16});
    c.out_dtype = chance(random, 0.2) ? DType::f32 : c.dtype;
    const int64_t* ids = c.ids.empty() ? nullptr : c.ids.data();
    c.segments = std::make_shared<Segments>(ids, c.batch, c.kv_len, c.sink_tokens);
}

void draw_values(Random& random, Case& c) {
    double factor = 1;
    if (chance(random, 0.15)) {
        c.logits = pick<std::string>(random, {"equal", "large", "huge"});
        // logits up to some 100, and some 10,000
        const double deviation = c.logits == "equal" ? 0 : c.logits == "large" ? 30 : 3000;
        factor = deviation / (c.scale * std::sqrt(double(c.head_dim)));
    }
    const auto sometimes = [&](double probability, Expanded which) {
        return chance(random, probability) ? which : Expanded{};
    };
    c.q = random_tensor(random, c.query_shape(), c.dtype, factor);
    c.k = random_tensor(random, c.key_shape(), c.dtype, 1, sometimes(0.1, {true}));
    c.v = random_tensor(random, c.key_shape(), c.dtype, 1, sometimes(0.1, {true, true}));
    // like the gradients of sums over head_dim, and of sums over everything
    const bool all = chance(random, 0.6);
    c.grad_out = random_tensor(random, c.query_shape(), c.out_dtype, 1, sometimes(0.3, {all, all, all, true}));
    std::normal_distribution<float> normal;
    if (chance(random, 0.5))
        for (int64_t i = 0; i < c.batch * c.heads * c.q_len; ++i) c.grad_lse.push_back(normal(random));
    if (c.logits.empty() && chance(random, 0.15)) {
        using Named = std::pair<const char*, const Memory*>;
        const auto [name, memory] =
            pick<Named>(random, {{"q", &c.q}, {"k", &c.k}, {"v", &c.v}, {"grad_out", &c.grad_out}});
        c.not_finite = name;
        const double all_bits = std::nan("0x7ffffffffffff"), infinity = INFINITY;
        const double not_finite = pick(random, {double(NAN), all_bits, infinity, -infinity});
        memory->set(between(random, 0, memory->size() - 1), not_finite);
    }
    c.out_layout = random_layout(random, c.query_shape());
    c.grad_q_layout = random_layout(random, c.query_shape());
    c.grad_k_layout = random_layout(random, c.key_shape());
    c.grad_v_layout = random_layout(random, c.key_shape());
}

}  // namespace

double rounded(double x, DType dtype) {
    const float single = float(x);
    if (dtype == DType::f32 || !std::isfinite(single)) return single;
    uint32_t bits;
    std::memcpy(&bits, &single, sizeof bits);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
    float half;
    std::memcpy(&half, &bits, sizeof half);
    return half;
}

Memory::Memory(Sizes shape, Sizes strides, int64_t lead, DType dtype)
    : shape_(shape), strides_(strides), lead_(lead), extent_(lead + 1), dtype_(dtype) {
    for (int i = 0; i < 4; ++i) extent_ += (shape[i] - 1) * strides[i];
    const int64_t bytes = extent_ * size_of(dtype);
    bytes_.reset(new char[bytes]);
    std::memset(bytes_.get(), 0xff, bytes);
}

int64_t Memory::offset(int64_t element) const {
    int64_t offset = lead_;
    for (int i = 3; i >= 0; --i) {
        offset += element % shape_[i] * strides_[i];
        element /= shape_[i];
    }
    return offset;
}

Tensor Memory::tensor() const {
    Tensor tensor{bytes_.get() + lead_ * size_of(dtype_), dtype_, {}};
    std::copy(strides_.begin(), strides_.end(), tensor.stride);
    return tensor;
}

std::vector<double> Memory::read() const {
    std::vector<double> values(size());
    for (int64_t i = 0; i < size(); ++i) {
        float value;
        if (dtype_ == DType::f32) {
            std::memcpy(&value, bytes_.get() + offset(i) * 4, 4);
        } else {
            uint16_t half;
            std::memcpy(&half, bytes_.get() + offset(i) * 2, 2);
            const uint32_t bits = uint32_t(half) << 16;
            std::memcpy(&value, &bits, 4);
        }
        values[i] = value;
    }
    return values;
}

void Memory::write(const std::vector<double>& values) const {
    for (int64_t i = 0; i < size(); ++i) set(i, values[i]);
}

void Memory::set(int64_t element, double value) const {
    const float single = float(rounded(value, dtype_));
    if (dtype_ == DType::f32) {
        std::memcpy(bytes_.get() + offset(element) * 4, &single, 4);
        return;
    }
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    const uint16_t half = uint16_t(bits >> 16);
    std::memcpy(bytes_.get() + offset(element) * 2, &half, 2);
}

Memory Memory::copy() const {
    const Memory other(shape_, strides_, lead_, dtype_);
    std::memcpy(other.bytes_.get(), bytes_.get(), extent_ * size_of(dtype_));
    return other;
}

bool Memory::gaps_are_untouched() const {
    std::vector<bool> used(extent_);
    for (int64_t i = 0; i < size(); ++i) used[offset(i)] = true;
    const int64_t bytes = size_of(dtype_);
    for (int64_t i = 0; i < extent_ * bytes; ++i)
        if (!used[i / bytes] && bytes_[i] != char(0xff)) return false;
    return true;
}

std::string Memory::describe() const {
    std::ostringstream text;
    text << (dtype_ == DType::f32 ? "f32" : "bf16") << " strides";
    for (const int64_t stride : strides_) text << ' ' << stride;
    return text.str();
}

Problem Case::problem() const {
    return {q.tensor(),
            k.tensor(),
            v.tensor(),
            nullptr,
            batch,
            heads,
            kv_heads,
            q_len,
            kv_len,
            head_dim,
            windows.data(),
            causal,
            scale,
            softcap,
            slopes.empty() ? nullptr : slopes.data(),
            segments->numbers(),
            segments->sinks(),
            segments->sinks_end()};
}

std::string Case::describe() const {
    std::ostringstream text;
    text << "seed " << seed << ": batch " << batch << ", heads " << heads << ", kv_heads " << kv_heads << ", q_len "
         << q_len << ", kv_len " << kv_len << ", head_dim " << head_dim << ", windows";
    for (const int64_t window : windows) text << ' ' << window;
    text << (causal ? ", causal" : ", not causal") << ", scale " << scale << ", softcap " << softcap << ", sink_tokens "
         << sink_tokens << (statistics ? ", statistics" : "");
    for (size_t i = 0; i < slopes.size(); ++i) text << (i ? " " : ", slopes ") << slopes[i];
    if (!ids.empty())
        text << (std::is_sorted(ids.begin(), ids.begin() + kv_len) ? ", sorted" : ", shuffled") << " segments up to "
             << *std::max_element(ids.begin(), ids.end());
    if (!logits.empty()) text << ", " << logits << " logits";
    if (!not_finite.empty()) text << ", not finite: " << not_finite;
    text << "; q " << q.describe() << "; k " << k.describe() << "; v " << v.describe() << "; grad_out "
         << grad_out.describe() << (grad_lse.empty() ? "" : "; grad_lse");
    return text.str();
}

Case random_case(uint64_t seed) {
    Random random(seed);
    Case c{};
    c.seed = seed;
    draw_sizes(random, c);
    draw_options(random, c);
    draw_values(random, c);
    return c;
}

}  // namespace longshort
