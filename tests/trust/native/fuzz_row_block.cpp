// Row blocks: check_index, locate_row and decode_row, with layouts that the input chooses. A block of which all is
// accepted is the one that an encoder makes of its rows.
#include <stdexcept>
#include <vector>

#include "input.h"
#include "row_block.h"

using namespace kdfast::codec;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in{data, size};
  RowLayout layout;
  layout.field_bits.resize(1 + in.take() % 3);
  for (uint32_t& bits : layout.field_bits) bits = in.take() % 19;
  layout.value_bits = in.take() % 19;
  layout.rank_bits = in.take() % 25;
  layout.classes = in.take() & 1;
  const int32_t total = int32_t(in.take(2)), most = int32_t(in.take(2)), vocab = 1 + int32_t(in.take(3));
  const int64_t rows = in.take(2) % 400, length = int64_t(in.size);
  bool good = rows > 0;
  try {
    check_index(in.data, length, rows);
  } catch (const std::invalid_argument&) {
    good = false;
  }
  DecodedEntries decoded;
  for (int64_t row = 0; row < rows; ++row) {
    try {
      const Span span = locate_row(in.data, length, rows, row);
      require(span.begin >= 0 && span.length >= 0 && span.begin + span.length <= length);
      decode_row(in.data + span.begin, size_t(span.length), size_t(length - span.begin), layout, most, vocab, total,
                 decoded);
    } catch (const std::invalid_argument&) {
      good = false;
      break;  // what a row has left behind is not taken
    }
  }
  if (!good) return 0;
  for (int32_t rank : decoded.ranks) require(rank >= 0 && rank < vocab);
  const EntriesView view{decoded.fields.data(), decoded.ranks.data(), decoded.values.data(), rows};
  const std::vector<uint8_t> block = encode_row_block(view, layout);
  require(block.size() == in.size && std::equal(block.begin(), block.end(), in.data));
  return 0;
}
