// Entry blocks: decode_block and decode_field, with models of the golden caches. What is accepted obeys the bounds, and
// comes back when it is encoded again.
#include <algorithm>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <vector>

#include "entry_block.h"
#include "input.h"

using namespace kdfast::codec;

namespace {

struct Golden {
  uint32_t fields, total;
  int32_t max_entries, vocab;
  std::unique_ptr<Model> model;
};

std::vector<Golden> models;

void check(const DecodedEntries& rows, const Golden& golden, int64_t count, int32_t most, int32_t vocab) {
  require(int64_t(rows.fields.size()) == count * golden.fields && rows.ranks.size() == rows.values.size());
  size_t entry = 0;
  for (int64_t row = 0; row < count; ++row) {
    const int32_t entries = rows.fields[size_t(row) * golden.fields];
    require(entries >= 0 && entries <= most);
    int64_t before = -1, sum = 0;
    for (int32_t i = 0; i < entries; ++i, ++entry) {
      require(rows.ranks[entry] > before && rows.ranks[entry] < vocab && rows.values[entry] >= 0);
      before = rows.ranks[entry];
      sum += rows.values[entry] + 1;
    }
    require(!golden.total || sum == golden.total);
  }
  require(entry == rows.ranks.size());
}

bool encodable(const Numbers& numbers, int32_t limit) {
  return std::all_of(numbers.begin(), numbers.end(), [=](int32_t x) { return x >= 0 && x < limit; });
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  const char* path = std::getenv("KDFAST_FUZZ_MODELS");
  require(path != nullptr);
  std::ifstream file(path, std::ios::binary);
  uint32_t head[4];
  while (file.read(reinterpret_cast<char*>(head), sizeof head)) {
    std::vector<uint16_t> frequencies(size_t(contexts(head[0])) * 256);
    file.read(reinterpret_cast<char*>(frequencies.data()), std::streamsize(2 * frequencies.size()));
    models.push_back({head[0], head[1], int32_t(head[2]), int32_t(head[3]),
                      std::make_unique<Model>(head[0], head[1], frequencies.data())});
  }
  require(!models.empty());
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in{data, size};
  const Golden& golden = models[in.take() % models.size()];
  const uint32_t choice = in.take();
  const int64_t rows = in.take(2) % 400;
  const int32_t most = choice & 1 ? int32_t(in.take(2)) : golden.max_entries;
  const int32_t vocab = choice & 2 ? int32_t(in.take(3)) + 1 : golden.vocab;
  if (choice & 4) {
    std::vector<uint8_t> out(size_t(rows) + 1, 0);
    try {
      decode_field(in.data, in.size, rows, *golden.model, golden.fields - 1, out.data());
    } catch (const std::invalid_argument&) {
    }
    return 0;
  }
  DecodedEntries decoded, again;
  try {
    decode_block(in.data, in.size, rows, *golden.model, most, vocab, decoded);
  } catch (const std::invalid_argument&) {
    return 0;
  }
  check(decoded, golden, rows, most, vocab);
  if (!encodable(decoded.fields, kMaxNumber) || !encodable(decoded.values, kMaxNumber)) return 0;
  const std::vector<uint8_t> block =
      encode_block({decoded.fields.data(), decoded.ranks.data(), decoded.values.data(), rows}, *golden.model);
  decode_block(block.data(), block.size(), rows, *golden.model, most, vocab, again);
  require(again.fields == decoded.fields && again.ranks == decoded.ranks && again.values == decoded.values);
  return 0;
}
