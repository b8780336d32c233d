// Entry blocks: rows of fields and entries as bytes and back, with the frequencies of a model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "codec.h"

namespace kdfast::codec {

// The frequencies of every context, with the tables that coding wants.
class Model {
 public:
  // frequencies: (contexts(fields), 256); each context's sum to 2^12 and its escape has one. Throws invalid_argument.
  // total: what a row's values, each plus 1, add up to; 0: that varies.
  Model(uint32_t fields, uint32_t total, const uint16_t* frequencies);

  struct Context {
    uint32_t range[256];     // first slot in the low half, number of slots in the high half
    uint8_t symbol[kProbs];  // that owns a slot
  };
  uint32_t fields() const { return fields_; }
  uint32_t total() const { return total_; }
  const Context& operator[](uint32_t context) const { return contexts_[context]; }

 private:
  uint32_t fields_, total_;
  std::vector<Context> contexts_;
};

// Leaves the numbers that a vector grows by as they are, for what is then written anyway.
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

// DecodedEntries in memory: fields row by row, column 0 being the number of entries; entries row by row, ranks
// ascending.
struct DecodedEntries {
  Numbers fields;
  Numbers ranks;
  Numbers values;
};

struct EntriesView {
  const int32_t* fields;
  const int32_t* ranks;
  const int32_t* values;
  int64_t rows;
};

// How often each symbol occurs in each context: adds to counts, (contexts(fields), 256).
void count_symbols(const EntriesView& rows, uint32_t fields, uint32_t total, uint32_t* counts);

std::vector<uint8_t> encode_block(const EntriesView& rows, const Model& model);

// Appends a block's rows. Any bytes may come: throws invalid_argument unless they are what encode_block writes, with at
// most max_entries entries per row and ranks below max_rank.
void decode_block(const uint8_t* data, size_t length, int64_t rows, const Model& model, int32_t max_entries,
                  int32_t max_rank, DecodedEntries& out);

}  // namespace kdfast::codec
