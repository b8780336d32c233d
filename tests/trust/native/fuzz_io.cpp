// Checksums, gathered copies and binary search, against what is slow and obvious.
#include <algorithm>
#include <vector>

#include "crc32c.h"
#include "gather.h"
#include "input.h"

namespace {

uint32_t slow_crc(const uint8_t* data, size_t size) {
  uint32_t crc = ~0u;
  for (size_t i = 0; i < size; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82F63B78u : 0u);
  }
  return ~crc;
}

int64_t number(Input& in) {
  const uint32_t kind = in.take();
  if (kind < 250) return int64_t(kind);
  const uint64_t high = in.take(4);
  return int64_t(high << 32 | in.take(4));
}

void gather(Input in) {
  const size_t count = in.take() % 20;
  std::vector<int64_t> owners, ranges;
  for (size_t i = 0; i < count; ++i) {
    owners.push_back(int64_t(in.take() % 4) - 1);
    ranges.push_back(number(in));
    ranges.push_back(number(in));
  }
  const std::vector<uint8_t> first(in.data, in.data + in.size), second(first.rbegin(), first.rend());
  const kdfast::Mapped sources[2] = {{first.data(), int64_t(first.size())}, {second.data(), int64_t(second.size())}};
  std::vector<uint8_t> out(200), expected;
  size_t fine = 0;
  for (; fine < count; ++fine) {
    const int64_t owner = owners[fine], begin = ranges[2 * fine], length = ranges[2 * fine + 1];
    if (owner < 0 || owner > 1 || begin < 0 || length < 0 || begin > int64_t(first.size()) ||
        length > int64_t(first.size()) - begin || length > int64_t(out.size() - expected.size()))
      break;
    const std::vector<uint8_t>& source = owner ? second : first;
    expected.insert(expected.end(), source.begin() + begin, source.begin() + begin + length);
  }
  const int64_t copied =
      kdfast::copy_ranges(sources, 2, owners.data(), ranges.data(), int64_t(count), out.data(), int64_t(out.size()));
  require(copied == int64_t(fine) && std::equal(expected.begin(), expected.end(), out.begin()));
}

void search(Input in) {
  std::vector<int64_t> table, values;
  for (uint32_t rows = in.take() % 30; rows > 0; --rows) table.push_back(number(in));
  std::sort(table.begin(), table.end());
  for (uint32_t n = in.take() % 10; n > 0; --n) values.push_back(number(in));
  std::vector<int64_t> found(values.size());
  kdfast::last_at_most(reinterpret_cast<const unsigned char*>(table.data()), int64_t(table.size()), 8, values.data(),
                       int64_t(values.size()), found.data());
  for (size_t i = 0; i < values.size(); ++i)
    require(found[i] == std::upper_bound(table.begin(), table.end(), values[i]) - table.begin() - 1);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in{data, size};
  const uint32_t kind = in.take();
  if (kind % 3 == 0) {
    const size_t cut = in.size ? kind % in.size : 0;
    const uint32_t whole = kdfast::crc32c(in.data, in.size);
    require(whole == slow_crc(in.data, in.size));
    require(whole == kdfast::crc32c(in.data + cut, in.size - cut, kdfast::crc32c(in.data, cut)));
  } else if (kind % 3 == 1) {
    gather(in);
  } else {
    search(in);
  }
  return 0;
}
