// Turns segment ids into what the kernels use: small numbers, and which keys are sinks.
#pragma once

#include <cstdint>
#include <vector>

namespace longshort {

class Segments {
public:
    // ids: (batch, kv_len), contiguous, negative for padding; or null: one segment per sequence.
    Segments(const int64_t* ids, int64_t batch, int64_t kv_len, int64_t sink_tokens);

    // (batch, kv_len): segments numbered in the order of their first keys, -1 for padding; null without ids.
    const int32_t* numbers() const { return numbers_.empty() ? nullptr : numbers_.data(); }
    // (batch, kv_len): whether the key is one of the first sink_tokens of its segment; null without sinks.
    const uint8_t* sinks() const { return sinks_.empty() ? nullptr : sinks_.data(); }
    // (batch,): one past the last sink.
    const int64_t* sinks_end() const { return sinks_end_.data(); }

private:
    std::vector<int32_t> numbers_;
    std::vector<uint8_t> sinks_;
    std::vector<int64_t> sinks_end_;
};

}  // namespace longshort
