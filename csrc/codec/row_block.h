// Row blocks: every row is coded by itself, in whole bytes and without a model, so that any row can be read alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "entry_block.h"

namespace kdfast::codec {

// How many bits each number of a row takes. The first header field is the number of entries.
struct RowLayout {
  std::vector<uint32_t> field_bits;
  uint32_t value_bits;
  uint32_t rank_bits;
  bool classes;  // a rank is a class of 2 bits, then 5, 9, 13 or rank_bits bits
};

// Where a row's bytes are.
struct Span {
  int64_t begin, length;
};

// An index of row ends, then the rows. Throws invalid_argument for a number that does not fit its bits.
std::vector<uint8_t> encode_row_block(const EntriesView& rows, const RowLayout& layout);

// Where a row's bytes lie in the block at `data`, counted from `data`. Throws invalid_argument for a broken index.
Span locate_row(const uint8_t* data, int64_t length, int64_t rows, int64_t row);

// Throws invalid_argument unless the index of the block at `data` is one that encode_row_block writes: its rows follow
// one another to the block's end.
void check_index(const uint8_t* data, int64_t length, int64_t rows);

// Appends a row to `out`. Safe for any bytes, as decode_block is. `readable` bytes at data, at least length, may be
// read. total: what the row's values, each plus 1, add up to; 0: that varies.
void decode_row(const uint8_t* data, size_t length, size_t readable, const RowLayout& layout, int32_t max_entries,
                int32_t max_rank, int32_t total, DecodedEntries& out);

}  // namespace kdfast::codec
