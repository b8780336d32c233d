// Row blocks: every row by itself, in whole bytes, without a model: any row can be read alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "entry_block.h"

namespace kdfast::codec {

// How many bits each field of a row takes. The number of entries is the first column.
struct RowLayout {
  std::vector<uint32_t> field_bits;
  uint32_t value_bits;
  uint32_t rank_bits;
  bool classes;  // ranks as a class of 2 bits and 5, 9, 13 or rank_bits raw ones
};

// Where a row's bytes are.
struct Span {
  int64_t begin, length;
};

// An index of row ends, then the rows. Throws invalid_argument for a number that its field cannot hold.
std::vector<uint8_t> encode_row_block(const EntriesView& rows, const RowLayout& layout);

// The bytes of one row of the block at data, from the start of data. Throws invalid_argument for a broken index.
Span locate_row(const uint8_t* data, int64_t length, int64_t rows, int64_t row);

// Appends a row. Any bytes may come, as for decode_block. `readable` bytes at data, at least length, may be looked at.
void decode_row(const uint8_t* data, size_t length, size_t readable, const RowLayout& layout, int32_t max_entries,
                int32_t max_rank, DecodedEntries& out);

}  // namespace kdfast::codec
