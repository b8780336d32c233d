// Entry blocks: rows of header fields and entries, to bytes and back, with a model's symbol frequencies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "codec.h"

namespace kdfast::codec {

// The symbol frequencies of every context, with the tables for coding and decoding.
class Model {
 public:
  // frequencies: (contexts(fields), 256); each context's sum to 2^12 and its escape has one. Throws invalid_argument.
  // total: the sum of a row's values, each plus 1; 0: it varies.
  Model(uint32_t fields, uint32_t total, const uint16_t* frequencies);

  struct Context {
    uint32_t range[256];     // of a symbol: first slot in the low 16 bits, number of slots in the high 16
    uint8_t symbol[kProbs];  // of a slot
  };
  uint32_t fields() const { return fields_; }
  uint32_t total() const { return total_; }
  const Context& operator[](uint32_t context) const { return contexts_[context]; }

 private:
  uint32_t fields_, total_;
  std::vector<Context> contexts_;
};

// An allocator that leaves the elements uninitialised by which a vector grows, as they are overwritten anyway.
template <typename T>
struct Unset : std::allocator<T> {
  template <typename U>
  struct rebind {
    using other = Unset<U>;
  };
  template <typename U>
  void construct(U* at) noexcept {
    ::new (static_cast<void*>(at)) U;
  }
  template <typename U, typename... Args>
  void construct(U* at, Args&&... args) {
    ::new (static_cast<void*>(at)) U(std::forward<Args>(args)...);
  }
};

using Numbers = std::vector<int32_t, Unset<int32_t>>;

// Rows in memory. fields: every row's header fields, of which the first is its number of entries. ranks and values:
// every row's entries, ranks ascending within a row.
struct DecodedEntries {
  Numbers fields;
  Numbers ranks;
  Numbers values;
};

// The same for encoding, in memory of others.
struct EntriesView {
  const int32_t* fields;
  const int32_t* ranks;
  const int32_t* values;
  int64_t rows;
};

// Adds to `counts`, (contexts(fields), 256), how often each symbol occurs in each context.
void count_symbols(const EntriesView& rows, uint32_t fields, uint32_t total, uint32_t* counts);

std::vector<uint8_t> encode_block(const EntriesView& rows, const Model& model);

// Appends a block's rows to `out`. Safe for any bytes: throws invalid_argument unless encode_block could have written
// them, with at most max_entries entries per row and ranks below max_rank.
void decode_block(const uint8_t* data, size_t length, int64_t rows, const Model& model, int32_t max_entries,
                  int32_t max_rank, DecodedEntries& out);

// Writes one field, which must be below 256, of each row of a block without entries to `out`, (rows,). Likewise safe.
void decode_field(const uint8_t* data, size_t length, int64_t rows, const Model& model, uint32_t field, uint8_t* out);

}  // namespace kdfast::codec
