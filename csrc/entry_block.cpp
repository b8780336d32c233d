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

// What coding remembers of a row from one entry to the next.
struct Lane {
  uint32_t left;                  // entries to come, or of the total
  uint32_t before = kFirstEntry;  // the octave of the last rank
  uint32_t symbol = 0, next = 0;  // the last rank's symbol, and the lowest low bits that may follow in it
};

// Visits every number of some rows in coding order: visit(lane, context, symbol, low, range), where low < range.
template <typename Visit>
void visit_group(const RowsView& rows, const int64_t* starts, int64_t first, uint32_t lanes, uint32_t columns,
                 uint32_t total, Visit&& visit) {
  for (uint32_t c = total ? 1 : 0; c < columns; ++c)
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      const Split part = split(uint32_t(rows.columns[(first + lane) * columns + c]), kColumnMantissa);
      visit(lane, c, part.symbol, part.low, 1u << part.bits);
    }
  Lane state[kLanes];
  uint32_t longest = 0;
  for (uint32_t lane = 0; lane < lanes; ++lane) {
    const uint32_t entries = uint32_t(rows.columns[(first + lane) * columns]);
    state[lane].left = total ? total : entries;
    longest = std::max(longest, entries);
  }
  for (uint32_t t = 0; t < longest; ++t)
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      if (t >= uint32_t(rows.columns[(first + lane) * columns])) continue;
      Lane& row = state[lane];
      const uint32_t value = uint32_t(rows.values[starts[lane] + t]);
      const Split rank = split(uint32_t(rows.ranks[starts[lane] + t]), kRankMantissa);
      const uint32_t passed = rank.symbol == row.symbol ? row.next : 0;
      visit(lane, rank_context(columns, row.before, row.left), rank.symbol, rank.low - passed,
            (1u << rank.bits) - passed);
      row.before = octave(rank.symbol);
      row.symbol = rank.symbol;
      row.next = rank.low + 1;
      const Split part = split(value, kColumnMantissa);
      visit(lane, value_context(columns, row.before, row.left), part.symbol, part.low, 1u << part.bits);
      row.left -= total ? value + 1 : 1;
    }
}

template <typename Visit>
void visit_rows(const RowsView& rows, uint32_t columns, uint32_t total, Visit&& visit) {
  int64_t entries = 0;
  for (int64_t first = 0; first < rows.rows; first += kLanes) {
    const uint32_t lanes = uint32_t(std::min<int64_t>(kLanes, rows.rows - first));
    int64_t starts[kLanes];
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      starts[lane] = entries;
      entries += rows.columns[(first + lane) * columns];
    }
    visit_group(rows, starts, first, lanes, columns, total, visit);
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

  uint32_t symbol(uint32_t lane, uint32_t context) {
    const Model::Context& table = model_[context];
    uint32_t x = state_[lane];
    const uint32_t slot = x & (kProbs - 1);
    const uint32_t symbol = table.symbol[slot], range = table.range[symbol];
    x = (range >> 16) * (x >> kProbBits) + slot - (range & 0xffff);
    const bool low = x < kLowest;
    const uint32_t refilled = x << 16 | *word_;
    state_[lane] = low ? refilled : x;
    word_ += low;
    return symbol == kEscape ? bits(8) : symbol;
  }

  uint32_t bits(uint32_t n) {
    const uint32_t value = peek() & uint32_t((uint64_t(1) << n) - 1);
    bit_ += n;
    return value;
  }

  // A number below range, in truncated binary.
  uint32_t below(uint32_t range) {
    const uint32_t n = floor_log2(range), shorts = short_codes(range), window = peek();
    const uint32_t low = window & ((1u << n) - 1);
    const bool is_short = low < shorts;
    bit_ += n + !is_short;
    return is_short ? low : low + (window >> n & 1 ? (1u << n) - shorts : 0);
  }

  uint32_t number(uint32_t lane, uint32_t context) {
    const uint32_t s = symbol(lane, context), n = low_bits(s, kColumnMantissa);
    return n ? join(s, n, bits(n), kColumnMantissa) : s;
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

  uint32_t peek() const {
    uint64_t window;
    std::memcpy(&window, bits_.data() + (bit_ >> 3), 8);
    return uint32_t(window >> (bit_ & 7));
  }

  const Model& model_;
  uint32_t lanes_, state_[kLanes];
  std::vector<uint16_t> words_;
  std::vector<uint8_t> bits_;
  const uint16_t *word_, *words_end_;
  uint64_t bit_ = 0, bits_end_;
};

// The entries of a group of rows, whose numbers come row by row in turns: gathered here, then put row after row.
class Group {
 public:
  Group(uint32_t columns, uint32_t total, uint32_t max_entries, uint32_t max_rank)
      : columns_(columns), total_(total), max_entries_(max_entries), max_rank_(max_rank) {}

  void decode(Decoder& in, int32_t* row_columns, uint32_t lanes, Rows& out) {
    uint32_t active[kLanes], n = 0;
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      state_[lane] = Lane{};
      state_[lane].left = total_ ? total_ : uint32_t(row_columns[lane * columns_]);
      if (state_[lane].left) active[n++] = lane;
      counts_[lane] = 0;
    }
    for (uint32_t t = 0; n; ++t) {
      if (t >= max_entries_) corrupt("holds a row with too many entries");
      if (entries_.size() < (t + 1) * kLanes) entries_.resize(2 * (t + 1) * kLanes);
      n = step(in, t, active, n);
      in.check();
    }
    append(row_columns, lanes, out);
  }

 private:
  struct Entry {
    int32_t rank, value;
  };

  // One entry of each active row; those that have more stay active.
  uint32_t step(Decoder& in, uint32_t t, uint32_t* active, uint32_t n) {
    uint32_t still = 0;
    bool good = true;
    Entry* entries = entries_.data() + t * kLanes;
    for (uint32_t i = 0; i < n; ++i) {
      const uint32_t lane = active[i];
      Lane& row = state_[lane];
      const uint32_t rank = this->rank(in, lane, row, good);
      const uint32_t value = in.number(lane, value_context(columns_, row.before, row.left));
      entries[lane] = {int32_t(rank), int32_t(value)};
      const uint32_t taken = total_ ? value + 1 : 1;
      good = good && rank < max_rank_ && taken <= row.left;
      counts_[lane] = t + 1;
      row.left -= taken;
      active[still] = lane;
      still += row.left != 0;
      if (!good) corrupt("holds ranks that do not ascend or lie outside the vocabulary, or values beyond their total");
    }
    return still;
  }

  static uint32_t rank_low(Decoder& in, const Lane& row, uint32_t symbol, uint32_t n, bool& good) {
    if (symbol != row.symbol || row.next == 0) {
      good = symbol >= row.symbol;
      return in.bits(n);
    }
    good = row.next < 1u << n;
    return good ? row.next + in.below((1u << n) - row.next) : 0;
  }

  uint32_t rank(Decoder& in, uint32_t lane, Lane& row, bool& good) {
    const uint32_t symbol = in.symbol(lane, rank_context(columns_, row.before, row.left));
    const uint32_t n = low_bits(symbol, kRankMantissa);
    if (n > 22) corrupt("holds an impossible symbol");
    const uint32_t low = rank_low(in, row, symbol, n, good);
    row.symbol = symbol;
    row.next = low + 1;
    row.before = octave(symbol);
    return n ? join(symbol, n, low, kRankMantissa) : symbol;
  }

  void append(int32_t* row_columns, uint32_t lanes, Rows& out) {
    size_t at = out.ranks.size(), total = at;
    for (uint32_t lane = 0; lane < lanes; ++lane) total += counts_[lane];
    out.ranks.resize(total);
    out.values.resize(total);
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      row_columns[lane * columns_] = int32_t(counts_[lane]);
      const Entry* entry = entries_.data() + lane;
      for (uint32_t t = counts_[lane]; t > 0; --t, entry += kLanes, ++at) {
        out.ranks[at] = entry->rank;
        out.values[at] = entry->value;
      }
    }
  }

  uint32_t columns_, total_, max_entries_, max_rank_;
  Lane state_[kLanes];
  uint32_t counts_[kLanes];
  std::vector<Entry> entries_;
};

}  // namespace

Model::Model(uint32_t columns, uint32_t total, const uint16_t* frequencies)
    : columns_(columns), total_(total), contexts_(contexts(columns)) {
  for (Context& context : contexts_) {
    uint32_t start = 0;
    for (uint32_t s = 0; s < 256; ++s, ++frequencies) {
      const uint32_t frequency = *frequencies;
      if (start + frequency > kProbs) throw std::invalid_argument("a context's frequencies exceed 4096");
      context.range[s] = frequency << 16 | start;
      std::memset(context.symbol + start, int(s), frequency);
      start += frequency;
    }
    if (start != kProbs || context.range[kEscape] >> 16 == 0)
      throw std::invalid_argument("a context's frequencies do not sum to 4096 with one for the escape");
  }
}

void count_symbols(const RowsView& rows, uint32_t columns, uint32_t total, uint32_t* counts) {
  visit_rows(rows, columns, total, [&](uint32_t, uint32_t context, uint32_t symbol, uint32_t, uint32_t) {
    ++counts[context * 256 + symbol];
  });
}

std::vector<uint8_t> encode_block(const RowsView& rows, const Model& model) {
  std::vector<Event> events;
  BitWriter raw;
  const auto visit = [&](uint32_t lane, uint32_t context, uint32_t symbol, uint32_t low, uint32_t range) {
    const bool known = symbol < kEscape && model[context].range[symbol] >> 16;
    events.push_back({uint16_t(context), uint8_t(known ? symbol : kEscape), uint8_t(lane)});
    if (!known) raw.put(symbol, 8);
    const uint32_t n = floor_log2(range), shorts = short_codes(range);
    if (low < shorts) return raw.put(low, n);
    // Codes of one bit more: the low n bits of `shorts` ... 2^n - 1, then the bit that tells the two halves apart.
    const uint32_t first_half = (1u << n) - shorts, over = low - shorts;
    raw.put(over < first_half ? shorts + over : shorts + over - first_half, n);
    raw.put(over >= first_half, 1);
  };
  visit_rows(rows, model.columns(), model.total(), visit);
  std::vector<uint8_t> out = code_events(events, uint32_t(std::min<int64_t>(kLanes, rows.rows)), model);
  const std::vector<uint8_t> bits = raw.finish();
  out.insert(out.end(), bits.begin(), bits.end());
  return out;
}

void decode_block(const uint8_t* data, size_t length, int64_t rows, const Model& model, int32_t max_entries,
                  int32_t max_rank, Rows& out) {
  const uint32_t columns = model.columns();
  Decoder in(data, length, uint32_t(std::min<int64_t>(kLanes, rows)), model);
  Group group(columns, model.total(), uint32_t(max_entries), uint32_t(max_rank));
  for (int64_t first = 0; first < rows; first += kLanes) {
    const uint32_t lanes = uint32_t(std::min<int64_t>(kLanes, rows - first));
    const size_t base = out.columns.size();
    out.columns.resize(base + lanes * columns);
    for (uint32_t c = model.total() ? 1 : 0; c < columns; ++c) {
      for (uint32_t lane = 0; lane < lanes; ++lane)
        out.columns[base + lane * columns + c] = int32_t(in.number(lane, c));
      in.check();
    }
    group.decode(in, out.columns.data() + base, lanes, out);
  }
  in.finish();
}

}  // namespace kdfast::codec
