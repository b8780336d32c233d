#include "entry_block.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace kdfast::codec {

namespace {

struct Event {
  uint16_t context;
  uint8_t symbol, lane;
};

// Low-order bits first.
class BitWriter {
 public:
  void put(uint32_t value, uint32_t bits) {
    pending_ |= uint64_t(value) << filled_;
    for (filled_ += bits; filled_ >= 8; filled_ -= 8, pending_ >>= 8) bytes_.push_back(uint8_t(pending_));
  }
  std::vector<uint8_t> finish() {
    if (filled_) bytes_.push_back(uint8_t(pending_));
    return std::move(bytes_);
  }

 private:
  std::vector<uint8_t> bytes_;
  uint64_t pending_ = 0;
  uint32_t filled_ = 0;
};

// Visits every number of a group of rows in coding order: visit(lane, context, number, mantissa) -> its symbol.
template <typename Visit>
void visit_group(const RowsView& rows, const int64_t* starts, int64_t first, uint32_t lanes, uint32_t columns,
                 Visit&& visit) {
  for (uint32_t c = 0; c < columns; ++c)
    for (uint32_t lane = 0; lane < lanes; ++lane)
      visit(lane, c, uint32_t(rows.columns[(first + lane) * columns + c]), kColumnMantissa);
  uint32_t before[kLanes], left[kLanes], longest = 0;
  for (uint32_t lane = 0; lane < lanes; ++lane) {
    before[lane] = kFirstEntry;
    left[lane] = uint32_t(rows.columns[(first + lane) * columns]);
    longest = std::max(longest, left[lane]);
  }
  for (uint32_t t = 0; t < longest; ++t)
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      if (left[lane] == 0) continue;
      const int64_t entry = starts[lane] + t;
      const uint32_t symbol =
          visit(lane, rank_context(columns, before[lane], left[lane]), uint32_t(rows.ranks[entry]), kRankMantissa);
      before[lane] = octave(symbol);
      visit(lane, value_context(columns, before[lane], left[lane]), uint32_t(rows.values[entry]), kColumnMantissa);
      --left[lane];
    }
}

template <typename Visit>
void visit_rows(const RowsView& rows, uint32_t columns, Visit&& visit) {
  int64_t entries = 0;
  for (int64_t first = 0; first < rows.rows; first += kLanes) {
    const uint32_t lanes = uint32_t(std::min<int64_t>(kLanes, rows.rows - first));
    int64_t starts[kLanes];
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      starts[lane] = entries;
      entries += rows.columns[(first + lane) * columns];
    }
    visit_group(rows, starts, first, lanes, columns, visit);
  }
}

void store32(uint8_t* out, uint32_t x) { std::memcpy(out, &x, 4); }
uint32_t load32(const uint8_t* in) {
  uint32_t x;
  std::memcpy(&x, in, 4);
  return x;
}

// The coders' states and their words, in the order in which a decoder wants them.
std::vector<uint8_t> code_events(const std::vector<Event>& events, uint32_t lanes, const Model& model) {
  uint32_t state[kLanes];
  std::fill(state, state + lanes, kLowest);
  std::vector<uint16_t> words;
  for (auto event = events.rbegin(); event != events.rend(); ++event) {
    const uint32_t range = model[event->context].range[event->symbol];
    const uint32_t frequency = range >> 16, start = range & 0xffff;
    uint32_t& x = state[event->lane];
    if (x >= uint64_t(frequency) << (32 - kProbBits)) {
      words.push_back(uint16_t(x));
      x >>= 16;
    }
    x = (x / frequency << kProbBits) + x % frequency + start;
  }
  std::reverse(words.begin(), words.end());
  std::vector<uint8_t> out(4 + 4 * lanes + 2 * words.size());
  store32(out.data(), uint32_t(words.size()));
  std::memcpy(out.data() + 4, state, 4 * lanes);
  std::memcpy(out.data() + 4 + 4 * lanes, words.data(), 2 * words.size());
  return out;
}

[[noreturn]] void corrupt(const char* what) { throw std::invalid_argument(std::string("an entry block ") + what); }

// Reads one block. Words and bits are padded, so that a step of all lanes may overrun before `check` sees it.
class Decoder {
 public:
  Decoder(const uint8_t* data, size_t length, uint32_t lanes, const Model& model) : model_(model), lanes_(lanes) {
    if (length < 4 + 4 * size_t(lanes)) corrupt("is cut short");
    const size_t words = load32(data), head = 4 + 4 * size_t(lanes);
    if (words > (length - head) / 2) corrupt("is cut short");
    std::memcpy(state_, data + 4, 4 * lanes);
    words_.resize(words + kPadding);
    std::memcpy(words_.data(), data + head, 2 * words);
    const size_t bytes = length - head - 2 * words;
    bits_.resize(bytes + 4 * kPadding);
    if (bytes) std::memcpy(bits_.data(), data + head + 2 * words, bytes);
    word_ = words_.data();
    words_end_ = word_ + words;
    bits_end_ = 8 * uint64_t(bytes);
  }

  uint32_t number(uint32_t lane, uint32_t context, uint32_t mantissa, uint32_t& symbol) {
    const Model::Context& table = model_[context];
    uint32_t x = state_[lane];
    const uint32_t slot = x & (kProbs - 1);
    symbol = table.symbol[slot];
    const uint32_t range = table.range[symbol];
    x = (range >> 16) * (x >> kProbBits) + slot - (range & 0xffff);
    const bool low = x < kLowest;
    const uint32_t refilled = x << 16 | *word_;
    state_[lane] = low ? refilled : x;
    word_ += low;
    if (symbol == kEscape) symbol = bits(8);
    const uint32_t n = low_bits(symbol, mantissa);
    if (n > 23) corrupt("holds an impossible symbol");
    return join(symbol, n, bits(n), mantissa);
  }

  void check() const {
    if (word_ > words_end_ || bit_ > bits_end_) corrupt("is cut short");
  }

  void finish() const {
    check();
    for (uint32_t lane = 0; lane < lanes_; ++lane)
      if (state_[lane] != kLowest) corrupt("does not end where it should");
    if (word_ != words_end_ || bits_end_ - bit_ >= 8) corrupt("does not end where it should");
  }

 private:
  static constexpr size_t kPadding = 4 * kLanes;  // a step takes at most 2 words and 2 (23 + 8) bits per lane

  uint32_t bits(uint32_t n) {
    uint64_t window;
    std::memcpy(&window, bits_.data() + (bit_ >> 3), 8);
    const uint32_t value = uint32_t(window >> (bit_ & 7)) & uint32_t((uint64_t(1) << n) - 1);
    bit_ += n;
    return value;
  }

  const Model& model_;
  uint32_t lanes_, state_[kLanes];
  std::vector<uint16_t> words_;
  std::vector<uint8_t> bits_;
  const uint16_t *word_, *words_end_;
  uint64_t bit_ = 0, bits_end_;
};

void decode_entries(Decoder& in, uint32_t columns, const int32_t* row_columns, uint32_t lanes, int32_t max_rank,
                    Rows& out) {
  int32_t *rank[kLanes], *value[kLanes];
  uint32_t active[kLanes], left[kLanes], before[kLanes], n = 0;
  int64_t previous[kLanes];
  size_t entries = out.ranks.size(), total = entries;
  for (uint32_t lane = 0; lane < lanes; ++lane) total += size_t(row_columns[lane * columns]);
  out.ranks.resize(total);
  out.values.resize(total);
  for (uint32_t lane = 0; lane < lanes; ++lane) {
    rank[lane] = out.ranks.data() + entries;
    value[lane] = out.values.data() + entries;
    left[lane] = uint32_t(row_columns[lane * columns]);
    before[lane] = kFirstEntry;
    previous[lane] = -1;
    entries += left[lane];
    if (left[lane]) active[n++] = lane;
  }
  while (n) {
    uint32_t still = 0;
    bool ascending = true;
    for (uint32_t i = 0; i < n; ++i) {
      const uint32_t lane = active[i];
      uint32_t symbol, ignored;
      const uint32_t r = in.number(lane, rank_context(columns, before[lane], left[lane]), kRankMantissa, symbol);
      before[lane] = octave(symbol);
      *value[lane]++ =
          int32_t(in.number(lane, value_context(columns, before[lane], left[lane]), kColumnMantissa, ignored));
      ascending &= int64_t(r) > previous[lane] && r < uint32_t(max_rank);
      previous[lane] = r;
      *rank[lane]++ = int32_t(r);
      active[still] = lane;
      still += --left[lane] != 0;
    }
    in.check();
    if (!ascending) corrupt("holds ranks that do not ascend, or lie outside the vocabulary");
    n = still;
  }
}

}  // namespace

Model::Model(uint32_t columns, const uint16_t* frequencies) : columns_(columns), contexts_(contexts(columns)) {
  for (Context& context : contexts_) {
    uint32_t start = 0;
    for (uint32_t s = 0; s < 256; ++s, ++frequencies) {
      const uint32_t frequency = *frequencies;
      if (start + frequency > kProbs) break;
      context.range[s] = frequency << 16 | start;
      std::memset(context.symbol + start, int(s), frequency);
      start += frequency;
    }
    if (start != kProbs || context.range[kEscape] >> 16 == 0)
      throw std::invalid_argument("a context's frequencies do not sum to 4096 with one for the escape");
  }
}

void count_symbols(const RowsView& rows, uint32_t columns, uint32_t* counts) {
  visit_rows(rows, columns, [&](uint32_t, uint32_t context, uint32_t number, uint32_t mantissa) {
    const uint32_t symbol = split(number, mantissa).symbol;
    ++counts[context * 256 + symbol];
    return symbol;
  });
}

std::vector<uint8_t> encode_block(const RowsView& rows, const Model& model) {
  std::vector<Event> events;
  BitWriter raw;
  visit_rows(rows, model.columns(), [&](uint32_t lane, uint32_t context, uint32_t number, uint32_t mantissa) {
    const Split part = split(number, mantissa);
    const bool known = part.symbol < kEscape && model[context].range[part.symbol] >> 16;
    events.push_back({uint16_t(context), uint8_t(known ? part.symbol : kEscape), uint8_t(lane)});
    if (!known) raw.put(part.symbol, 8);
    raw.put(part.low, part.bits);
    return part.symbol;
  });
  std::vector<uint8_t> out = code_events(events, uint32_t(std::min<int64_t>(kLanes, rows.rows)), model);
  const std::vector<uint8_t> bits = raw.finish();
  out.insert(out.end(), bits.begin(), bits.end());
  return out;
}

void decode_block(const uint8_t* data, size_t length, int64_t rows, const Model& model, int32_t max_entries,
                  int32_t max_rank, Rows& out) {
  const uint32_t columns = model.columns();
  Decoder in(data, length, uint32_t(std::min<int64_t>(kLanes, rows)), model);
  for (int64_t first = 0; first < rows; first += kLanes) {
    const uint32_t lanes = uint32_t(std::min<int64_t>(kLanes, rows - first));
    const size_t base = out.columns.size();
    out.columns.resize(base + lanes * columns);
    for (uint32_t c = 0; c < columns; ++c) {
      uint32_t symbol;
      for (uint32_t lane = 0; lane < lanes; ++lane)
        out.columns[base + lane * columns + c] = int32_t(in.number(lane, c, kColumnMantissa, symbol));
      in.check();
    }
    for (uint32_t lane = 0; lane < lanes; ++lane)
      if (out.columns[base + lane * columns] > max_entries) corrupt("holds a row with too many entries");
    decode_entries(in, columns, out.columns.data() + base, lanes, max_rank, out);
  }
  in.finish();
}

}  // namespace kdfast::codec
