#include "row_block.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bit_writer.h"

namespace kdfast::codec {

namespace {

constexpr uint32_t kClassBits[3] = {5, 9, 13};
constexpr uint32_t kClassStart[4] = {0, 32, 32 + 512, 32 + 512 + 8192};
constexpr int64_t kNarrow = 1 << 16;  // blocks with fewer bytes of rows have an index of 2 bytes a row, others of 4

[[noreturn]] void bad(const char* what) { throw std::invalid_argument(std::string("a row block ") + what); }

void put(BitWriter& out, uint32_t value, uint32_t bits) {
  if (bits < 32 && value >> bits) bad("cannot hold a number this large");
  out.put(value, bits);
}

// Reads a row's bits. Reading beyond its end yields other readable bytes or zeros, and makes `finish` throw.
class RowReader {
 public:
  RowReader(const uint8_t* data, size_t length, size_t readable)
      : data_(data), bits_(8 * uint64_t(length)), readable_(readable) {}

  // The next 57 bits at least.
  uint64_t peek() const {
    const uint64_t byte = at_ >> 3;
    uint64_t window = 0;
    if (byte + 8 <= readable_) {
      std::memcpy(&window, data_ + byte, 8);
    } else if (byte < readable_) {
      std::memcpy(&window, data_ + byte, readable_ - byte);
    }
    return window >> (at_ & 7);
  }
  void skip(uint32_t bits) { at_ += bits; }

  void finish() const {
    if (at_ > bits_) bad("is cut short");
    if (bits_ - at_ >= 8) bad("has a row with bytes left over");
    if (peek() & ((1u << (bits_ - at_)) - 1)) bad("has a row that is not filled up with zeros");
  }

 private:
  const uint8_t* data_;
  uint64_t bits_, at_ = 0;
  size_t readable_;
};

uint32_t low(uint64_t window, uint32_t bits) { return uint32_t(window) & ((1u << bits) - 1); }

void put_rank(BitWriter& out, uint32_t rank, const RowLayout& layout) {
  if (!layout.classes) return put(out, rank, layout.rank_bits);
  uint32_t kind = 0;
  while (kind < 3 && rank >= kClassStart[kind + 1]) ++kind;
  put(out, kind, 2);
  put(out, rank - kClassStart[kind], kind < 3 ? kClassBits[kind] : layout.rank_bits);
}

struct BitField {
  uint32_t number, bits;
};

BitField read_rank(uint64_t window, const RowLayout& layout) {
  if (!layout.classes) return {low(window, layout.rank_bits), layout.rank_bits};
  const uint32_t kind = low(window, 2), bits = kind < 3 ? kClassBits[kind] : layout.rank_bits;
  return {kClassStart[kind] + low(window >> 2, bits), 2 + bits};
}

void store(uint8_t* out, uint32_t value, size_t bytes) { std::memcpy(out, &value, bytes); }

uint32_t load(const uint8_t* in, size_t bytes) {
  uint32_t value = 0;
  std::memcpy(&value, in, bytes);
  return value;
}

}  // namespace

std::vector<uint8_t> encode_row_block(const EntriesView& rows, const RowLayout& layout) {
  const size_t fields = layout.field_bits.size();
  std::vector<uint8_t> bytes;
  std::vector<uint32_t> ends;
  BitWriter out(bytes);
  int64_t entry = 0;
  for (int64_t row = 0; row < rows.rows; ++row) {
    const int32_t* field = rows.fields + row * int64_t(fields);
    for (size_t c = 0; c < fields; ++c) put(out, uint32_t(field[c]), layout.field_bits[c]);
    for (int32_t left = field[0]; left > 0; --left, ++entry) {
      put_rank(out, uint32_t(rows.ranks[entry]), layout);
      put(out, uint32_t(rows.values[entry]), layout.value_bits);
    }
    out.align();
    ends.push_back(uint32_t(bytes.size()));
  }
  const size_t width = int64_t(bytes.size()) < kNarrow ? 2 : 4;
  std::vector<uint8_t> block(1 + width * ends.size());
  block[0] = uint8_t(width);
  for (size_t row = 0; row < ends.size(); ++row) store(&block[1 + width * row], ends[row], width);
  block.insert(block.end(), bytes.begin(), bytes.end());
  return block;
}

Span locate_row(const uint8_t* data, int64_t length, int64_t rows, int64_t row) {
  const int64_t width = length > 0 ? data[0] : 0;
  if (width != 2 && width != 4) bad("has no index");
  const int64_t head = 1 + width * rows;
  if (head > length || row < 0 || row >= rows) bad("is cut short");
  const int64_t begin = row ? load(data + 1 + width * (row - 1), size_t(width)) : 0;
  const int64_t end = load(data + 1 + width * row, size_t(width));
  if (begin > end || head + end > length) bad("has an index that points outside");
  return {head + begin, end - begin};
}

void check_index(const uint8_t* data, int64_t length, int64_t rows) {
  const int64_t width = length > 0 ? data[0] : 0;
  if (width != 2 && width != 4) bad("has no index");
  const int64_t head = 1 + width * rows;
  if (head > length) bad("is cut short");
  if ((length - head < kNarrow) != (width == 2)) bad("has an index of another width than its length asks for");
  int64_t before = 0;
  bool ascends = true;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t end = load(data + 1 + width * row, size_t(width));
    ascends &= end >= before;
    before = end;
  }
  if (!ascends || head + before != length) bad("has an index whose rows do not follow one another to its end");
}

void decode_row(const uint8_t* data, size_t length, size_t readable, const RowLayout& layout, int32_t max_entries,
                int32_t max_rank, int32_t total, DecodedEntries& out) {
  RowReader in(data, length, readable);
  const size_t base = out.fields.size();
  for (uint32_t bits : layout.field_bits) {
    out.fields.push_back(int32_t(low(in.peek(), bits)));
    in.skip(bits);
  }
  const int32_t count = out.fields[base];
  if (count > max_entries) bad("has a row with too many entries");
  const size_t at = out.ranks.size();
  out.ranks.resize(at + size_t(count));
  out.values.resize(at + size_t(count));
  int32_t *ranks = out.ranks.data() + at, *values = out.values.data() + at;
  bool good = true;
  uint32_t lowest = 0;
  int64_t sum = count;
  for (int32_t i = 0; i < count; ++i) {
    const uint64_t window = in.peek();  // holds rank and value: they take at most 2 + 24 + 18 bits
    const BitField rank = read_rank(window, layout);
    ranks[i] = int32_t(rank.number);
    values[i] = int32_t(low(window >> rank.bits, layout.value_bits));
    in.skip(rank.bits + layout.value_bits);
    good &= rank.number >= lowest && rank.number < uint32_t(max_rank);
    lowest = rank.number + 1;
    sum += values[i];
  }
  in.finish();
  if (!good) bad("has ranks that do not ascend, or lie outside the vocabulary");
  if (total && sum != total) bad("has a row whose values do not add up to the total");
}

}  // namespace kdfast::codec
