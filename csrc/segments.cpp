#include "segments.h"

#include <algorithm>
#include <unordered_map>

namespace longshort {

Segments::Segments(const int64_t* ids, int64_t batch, int64_t kv_len, int64_t sink_tokens) {
    if (sink_tokens > 0) sinks_.assign(batch * kv_len, 0);
    sinks_end_.assign(batch, ids ? 0 : std::min(sink_tokens, kv_len));
    if (!ids) {
        for (int64_t b = 0; b < batch && sink_tokens > 0; ++b)
            std::fill_n(sinks_.begin() + b * kv_len, sinks_end_[b], uint8_t{1});
        return;
    }
    numbers_.resize(batch * kv_len);
    for (int64_t b = 0; b < batch; ++b) {
        struct Segment {
            int32_t number;
            int64_t length;
        };
        std::unordered_map<int64_t, Segment> seen;
        Segment* current = nullptr;
        for (int64_t j = b * kv_len; j < (b + 1) * kv_len; ++j) {
            if (ids[j] < 0) {
                numbers_[j] = -1;
                continue;
            }
            const bool continues = j > b * kv_len && ids[j] == ids[j - 1];
            if (!continues) current = &seen.try_emplace(ids[j], Segment{int32_t(seen.size()), 0}).first->second;
            numbers_[j] = current->number;
            if (current->length++ < sink_tokens) {
                sinks_[j] = 1;
                sinks_end_[b] = j - b * kv_len + 1;
            }
        }
    }
}

}  // namespace longshort
