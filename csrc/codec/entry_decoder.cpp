// Entry blocks to rows.
//
// A single dependency chain bounds the speed: which word a lane reads depends on how many words the lanes before it
// have read, and so on every symbol before. So nothing in that chain branches on the data, and tables are prefetched.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "entry_block.h"

namespace kdfast::codec {

namespace {

[[noreturn]] void corrupt(const char* what) { throw std::invalid_argument(std::string("an entry block ") + what); }

uint32_t load32(const uint8_t* in) {
  uint32_t x;
  std::memcpy(&x, in, 4);
  return x;
}

// The ranks that a symbol stands for: from first up to, not including, end. None for a symbol that no rank has.
struct RankSymbol {
  uint32_t first, end, octave;
};

struct RankSymbols {
  RankSymbol of[256] = {};

  constexpr RankSymbols() {
    for (uint32_t s = 0; s < 256; ++s) {
      of[s].octave = octave(s);
      const uint32_t bits = low_bits(s, kRankMantissa);
      if (s >= 2 * kRankClasses) continue;
      of[s].first = join(s, bits, 0, kRankMantissa);
      of[s].end = of[s].first + (1u << bits);
    }
  }
};

struct RestClasses {
  static constexpr uint32_t kLast = 259;  // this number and all above are in the last class
  uint8_t of[kLast + 1] = {};

  constexpr RestClasses() {
    for (uint32_t left = 1; left <= kLast; ++left) of[left] = uint8_t(rest_class(left));
  }
};

constexpr RankSymbols kRankSymbols;
constexpr RestClasses kRests;
static_assert(rest_class(RestClasses::kLast) == kRestClasses - 1, "the table ends where classes do");

// The rANS states of a block's lanes, and the words that they read. The words are padded: `overrun` is checked after a
// step of all lanes, which may have read beyond the end.
class Coders {
 public:
  Coders(const uint8_t* data, size_t length, uint32_t lanes) : lanes_(lanes) {
    const size_t head = 4 + 4 * size_t(lanes);
    if (length < head) corrupt("is cut short");
    const size_t words = load32(data);
    if (words > (length - head) / 2) corrupt("is cut short");
    std::memcpy(state_, data + 4, 4 * lanes);
    words_.resize(words + kPadding);
    std::memcpy(words_.data(), data + head, 2 * words);
    word_ = words_.data();
    end_ = word_ + words;
    bytes_ = head + 2 * words;
  }

  size_t bytes() const { return bytes_; }

  // A lane's next symbol. Must be followed by `refill`, in the order of lanes.
  uint32_t advance(uint32_t lane, const Model::Context& context) {
    const uint32_t x = state_[lane], slot = x & (kProbs - 1);
    const uint32_t symbol = context.symbol[slot], range = context.range[symbol];
    state_[lane] = (range >> 16) * (x >> kProbBits) + slot - (range & 0xffff);
    return symbol;
  }

  void refill(uint32_t lane) {
    const uint32_t x = state_[lane], low = x < kLowest;
    state_[lane] = x << (16 * low) | (*word_ & (0u - low));  // arithmetic, as compilers turn `low ? :` into a branch
    word_ += low;
  }

  uint32_t symbol(uint32_t lane, const Model::Context& context) {
    const uint32_t found = advance(lane, context);
    refill(lane);
    return found;
  }

  // Prefetches the table of the lane's next symbol, if that is likely to be in this context.
  void prefetch(uint32_t lane, const Model::Context& context) const {
    __builtin_prefetch(context.symbol + (state_[lane] & (kProbs - 1)));
  }

  bool overrun() const { return word_ > end_; }
  bool finished() const {
    return word_ == end_ && std::all_of(state_, state_ + lanes_, [](uint32_t x) { return x == kLowest; });
  }

 private:
  static constexpr size_t kPadding = 2 * kLanes;  // a step takes at most 2 words per lane

  uint32_t lanes_, state_[kLanes];
  std::vector<uint16_t> words_;
  const uint16_t *word_, *end_;
  size_t bytes_;
};

// A block's raw bits, padded for the same reason.
class RawBits {
 public:
  RawBits(const uint8_t* data, size_t length) : bytes_(length + kPadding), end_(8 * uint64_t(length)) {
    if (length) std::memcpy(bytes_.data(), data, length);
  }

  uint32_t take(uint32_t n) {
    const uint32_t value = peek() & ((1u << n) - 1);
    at_ += n;
    return value;
  }

  // A number below range, which is at least 1, in truncated binary.
  uint32_t below(uint32_t range) {
    const uint32_t n = floor_log2(range), shorts = short_codes(range), window = peek();
    const uint32_t low = window & ((1u << n) - 1), one_more = low >= shorts;
    at_ += n + one_more;  // no branch: whether a code is short is hard to predict
    return low + ((0u - (one_more & window >> n)) & ((1u << n) - shorts));
  }

  // The number that a symbol stands for, with its low bits read.
  uint32_t number(uint32_t symbol) {
    if (symbol == kEscape) symbol = take(8);
    const uint32_t n = low_bits(symbol, kNumberMantissa);
    return n ? join(symbol, n, take(n), kNumberMantissa) : symbol;
  }

  bool overrun() const { return at_ > end_; }
  // Nothing is left but the zeros that fill the last byte up. The padding is zeros too.
  bool finished() const { return end_ - at_ < 8 && (peek() & 0xff) == 0; }

 private:
  static constexpr size_t kPadding = 8 * kLanes;  // a step takes at most 8 + 23 + 8 + 14 bits per lane

  uint32_t peek() const {
    uint64_t window;
    std::memcpy(&window, bytes_.data() + (at_ >> 3), 8);
    return uint32_t(window >> (at_ & 7));
  }

  std::vector<uint8_t> bytes_;
  uint64_t at_ = 0, end_;
};

// A group of up to kLanes rows. Their entries are interleaved in the block: collected here, then appended row by row.
class Group {
 public:
  Group(Coders& coders, RawBits& raw, const Model& model, uint32_t max_entries, uint32_t max_rank)
      : coders_(coders),
        raw_(raw),
        ranks_(&model[model.fields()]),
        values_(ranks_ + kRankContexts),
        fields_(model.fields()),
        total_(model.total()),
        max_entries_(max_entries),
        max_rank_(max_rank) {}

  void decode(int32_t* row_fields, uint32_t lanes, DecodedEntries& out) {
    uint32_t active[kLanes], n = 0;
    size_t used = 0;
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      rows_[lane] = {};
      expect(rows_[lane], kFirstEntry, total_ ? total_ : uint32_t(row_fields[lane * fields_]));
      if (rows_[lane].left) active[n++] = lane;
    }
    for (size_t t = 0; n; ++t) {
      if (t >= max_entries_) corrupt("holds a row with too many entries");
      if (entries_.size() < used + kLanes) entries_.resize(2 * (used + kLanes));
      advance_ranks(active, n);
      const uint32_t taken = n;
      n = step(entries_.data() + used, active, n);
      used += taken;
    }
    append(row_fields, lanes, out);
  }

 private:
  struct Row {
    const Model::Context* context;  // the next rank's context
    uint32_t rest, left;            // what is left of the row (entries, or of the total), and its class
    uint32_t lowest;                // the lowest rank that may follow
    uint32_t symbol;                // the next rank's symbol, from advance_ranks to step
    uint32_t count;
  };
  struct Entry {
    int32_t rank, value;
  };

  void expect(Row& row, uint32_t octave_before, uint32_t left) {
    row.left = left;
    row.rest = kRests.of[std::min(left, RestClasses::kLast)];
    row.context = ranks_ + octave_before * kRestClasses + row.rest;
  }

  // Reads the rank symbols of all lanes first: they depend on no word, so the latencies of their table lookups overlap.
  // Prefetches each value's table too, which is the right one unless the lane needs a word or the symbol is an escape.
  void advance_ranks(const uint32_t* active, uint32_t n) {
    for (uint32_t i = 0; i < n; ++i) {
      const uint32_t lane = active[i];
      Row& row = rows_[lane];
      row.symbol = coders_.advance(lane, *row.context);
      coders_.prefetch(lane, values_[kRankSymbols.of[row.symbol].octave * kRestClasses + row.rest]);
    }
  }

  // Decodes one entry of each active row, whose rank symbol is known, one after another. Returns how many rows have
  // more; they stay active.
  uint32_t step(Entry* entries, uint32_t* active, uint32_t n) {
    uint32_t still = 0;
    bool good = true;
    for (uint32_t i = 0; i < n; ++i) {
      const uint32_t lane = active[i];
      Row& row = rows_[lane];
      coders_.refill(lane);
      const RankSymbol part = kRankSymbols.of[row.symbol == kEscape ? raw_.take(8) : row.symbol];
      const uint32_t symbol = coders_.symbol(lane, values_[part.octave * kRestClasses + row.rest]);
      const uint32_t lowest = std::max(part.first, row.lowest);
      const bool ascends = lowest < part.end;
      const uint32_t rank = lowest + raw_.below(ascends ? part.end - lowest : 1), value = raw_.number(symbol);
      const uint32_t taken = total_ ? value + 1 : 1;
      good &= ascends && rank < max_rank_ && taken <= row.left;
      entries[i] = {int32_t(rank), int32_t(value)};
      ++row.count;
      row.lowest = rank + 1;
      expect(row, part.octave, row.left - taken);
      coders_.prefetch(lane, *row.context);
      active[still] = lane;
      still += row.left != 0;
    }
    if (!good) corrupt("holds ranks that do not ascend or lie outside the vocabulary, or values beyond their total");
    if (coders_.overrun() || raw_.overrun()) corrupt("is cut short");
    return still;
  }

  void append(int32_t* row_fields, uint32_t lanes, DecodedEntries& out) {
    size_t at[kLanes], total = out.ranks.size();
    uint32_t active[kLanes], n = 0;
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      row_fields[lane * fields_] = int32_t(rows_[lane].count);
      at[lane] = total;
      total += rows_[lane].count;
      if (rows_[lane].count) active[n++] = lane;
    }
    out.ranks.resize(total);
    out.values.resize(total);
    const Entry* entry = entries_.data();
    for (uint32_t t = 1; n; ++t) {  // as they were decoded: the first of every row, then the second of every row, ...
      uint32_t still = 0;
      for (uint32_t i = 0; i < n; ++i, ++entry) {
        const uint32_t lane = active[i];
        out.ranks[at[lane]] = entry->rank;
        out.values[at[lane]++] = entry->value;
        active[still] = lane;
        still += rows_[lane].count > t;
      }
      n = still;
    }
  }

  Coders& coders_;
  RawBits& raw_;
  const Model::Context *ranks_, *values_;
  uint32_t fields_, total_, max_entries_, max_rank_;
  Row rows_[kLanes];
  std::vector<Entry> entries_;
};

// Decodes a block group by group, and calls visit(first row, rows) after each. What is decoded is appended to `out`.
template <typename Visit>
void decode_groups(const uint8_t* data, size_t length, int64_t rows, const Model& model, int32_t max_entries,
                   int32_t max_rank, DecodedEntries& out, Visit&& visit) {
  const uint32_t fields = model.fields();
  Coders coders(data, length, uint32_t(std::min<int64_t>(kLanes, rows)));
  RawBits raw(data + coders.bytes(), length - coders.bytes());
  Group group(coders, raw, model, uint32_t(max_entries), uint32_t(max_rank));
  for (int64_t first = 0; first < rows; first += kLanes) {
    const uint32_t lanes = uint32_t(std::min<int64_t>(kLanes, rows - first));
    const size_t base = out.fields.size();
    out.fields.resize(base + lanes * fields);
    for (uint32_t c = model.total() ? 1 : 0; c < fields; ++c) {
      for (uint32_t lane = 0; lane < lanes; ++lane)
        out.fields[base + lane * fields + c] = int32_t(raw.number(coders.symbol(lane, model[c])));
      if (coders.overrun() || raw.overrun()) corrupt("is cut short");
    }
    group.decode(out.fields.data() + base, lanes, out);
    visit(first, lanes);
  }
  if (!coders.finished() || !raw.finished()) corrupt("does not end where it should");
}

}  // namespace

void decode_block(const uint8_t* data, size_t length, int64_t rows, const Model& model, int32_t max_entries,
                  int32_t max_rank, DecodedEntries& out) {
  decode_groups(data, length, rows, model, max_entries, max_rank, out, [](int64_t, uint32_t) {});
}

void decode_field(const uint8_t* data, size_t length, int64_t rows, const Model& model, uint32_t field, uint8_t* out) {
  DecodedEntries group;
  decode_groups(data, length, rows, model, 0, 1, group, [&](int64_t first, uint32_t lanes) {
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      const int32_t number = group.fields[lane * model.fields() + field];
      if (number > UINT8_MAX) corrupt("holds a number beyond a byte");
      out[first + lane] = uint8_t(number);
    }
    group.fields.clear();
  });
}

}  // namespace kdfast::codec
