#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bit_writer.h"
#include "entry_block.h"

namespace kdfast::codec {

namespace {

struct Event {
  uint16_t context;
  uint8_t symbol, lane;
};

// A row's state between one entry and the next.
struct Lane {
  uint32_t left;                  // what is left of the row: entries, or of the total
  uint32_t before = kFirstEntry;  // the octave of the last rank
  uint32_t symbol = 0, next = 0;  // the last rank's symbol, and the lowest low bits that may follow in it
};

// Visits every number of a group of rows in coding order: visit(lane, context, symbol, low, range), where low < range.
template <typename Visit>
void visit_group(const EntriesView& rows, const int64_t* starts, int64_t first, uint32_t lanes, uint32_t fields,
                 uint32_t total, Visit&& visit) {
  for (uint32_t c = total ? 1 : 0; c < fields; ++c)
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      const Split part = split(uint32_t(rows.fields[(first + lane) * fields + c]), kNumberMantissa);
      visit(lane, c, part.symbol, part.low, 1u << part.bits);
    }
  Lane state[kLanes];
  uint32_t longest = 0;
  for (uint32_t lane = 0; lane < lanes; ++lane) {
    const uint32_t entries = uint32_t(rows.fields[(first + lane) * fields]);
    state[lane].left = total ? total : entries;
    longest = std::max(longest, entries);
  }
  for (uint32_t t = 0; t < longest; ++t)
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      if (t >= uint32_t(rows.fields[(first + lane) * fields])) continue;
      Lane& row = state[lane];
      const uint32_t value = uint32_t(rows.values[starts[lane] + t]);
      const Split rank = split(uint32_t(rows.ranks[starts[lane] + t]), kRankMantissa);
      const uint32_t passed = rank.symbol == row.symbol ? row.next : 0;
      visit(lane, rank_context(fields, row.before, row.left), rank.symbol, rank.low - passed,
            (1u << rank.bits) - passed);
      row.before = octave(rank.symbol);
      row.symbol = rank.symbol;
      row.next = rank.low + 1;
      const Split part = split(value, kNumberMantissa);
      visit(lane, value_context(fields, row.before, row.left), part.symbol, part.low, 1u << part.bits);
      row.left -= total ? value + 1 : 1;
    }
}

template <typename Visit>
void visit_rows(const EntriesView& rows, uint32_t fields, uint32_t total, Visit&& visit) {
  int64_t entries = 0;
  for (int64_t first = 0; first < rows.rows; first += kLanes) {
    const uint32_t lanes = uint32_t(std::min<int64_t>(kLanes, rows.rows - first));
    int64_t starts[kLanes];
    for (uint32_t lane = 0; lane < lanes; ++lane) {
      starts[lane] = entries;
      entries += rows.fields[(first + lane) * fields];
    }
    visit_group(rows, starts, first, lanes, fields, total, visit);
  }
}

// The lanes' rANS states and words, in the order in which a decoder reads them.
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
  const uint32_t count = uint32_t(words.size());
  std::memcpy(out.data(), &count, 4);
  std::memcpy(out.data() + 4, state, 4 * lanes);
  if (!words.empty()) std::memcpy(out.data() + 4 + 4 * lanes, words.data(), 2 * words.size());
  return out;
}

}  // namespace

Model::Model(uint32_t fields, uint32_t total, const uint16_t* frequencies)
    : fields_(fields), total_(total), contexts_(contexts(fields)) {
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

void count_symbols(const EntriesView& rows, uint32_t fields, uint32_t total, uint32_t* counts) {
  visit_rows(rows, fields, total, [&](uint32_t, uint32_t context, uint32_t symbol, uint32_t, uint32_t) {
    ++counts[context * 256 + symbol];
  });
}

std::vector<uint8_t> encode_block(const EntriesView& rows, const Model& model) {
  std::vector<Event> events;
  std::vector<uint8_t> bits;
  BitWriter raw(bits);
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
  visit_rows(rows, model.fields(), model.total(), visit);
  std::vector<uint8_t> out = code_events(events, uint32_t(std::min<int64_t>(kLanes, rows.rows)), model);
  raw.align();
  out.insert(out.end(), bits.begin(), bits.end());
  return out;
}

}  // namespace kdfast::codec
