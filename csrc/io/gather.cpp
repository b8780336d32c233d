#include "gather.h"

#include <cstring>

namespace kdfast {
namespace {

constexpr int64_t kAhead = 16;  // ranges between a prefetch and its copy: about the latency of memory

int64_t load(const unsigned char* p) {
  int64_t value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

bool inside(const Mapped* sources, int64_t source_count, int64_t owner, int64_t begin, int64_t length) {
  return owner >= 0 && owner < source_count && begin >= 0 && length >= 0 && length <= sources[owner].size &&
         begin <= sources[owner].size - length;
}

}  // namespace

int64_t copy_ranges(const Mapped* sources, int64_t source_count, const int64_t* owners, const int64_t* ranges,
                    int64_t count, unsigned char* out, int64_t out_size) {
  int64_t at = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t next = i + kAhead;
    if (next < count && inside(sources, source_count, owners[next], ranges[2 * next], 1)) {
      __builtin_prefetch(sources[owners[next]].data + ranges[2 * next]);
    }
    const int64_t begin = ranges[2 * i], length = ranges[2 * i + 1];
    if (!inside(sources, source_count, owners[i], begin, length) || length > out_size - at) return i;
    if (length) std::memcpy(out + at, sources[owners[i]].data + begin, size_t(length));
    at += length;
  }
  return count;
}

void last_at_most(const unsigned char* table, int64_t rows, int64_t stride, const int64_t* values, int64_t count,
                  int64_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    int64_t low = 0, high = rows;  // rows before `low` are at most the value, those from `high` on are larger
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (load(table + middle * stride) <= values[i]) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    out[i] = low - 1;
  }
}

}  // namespace kdfast
