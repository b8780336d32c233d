// The host codec over numpy arrays, GIL released.
#include "bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "entry_block.h"
#include "row_block.h"
#include "top_rows.h"

namespace py = pybind11;

namespace kdfast::codec {

namespace {

using Ints = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Longs = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Frequencies = py::array_t<uint16_t, py::array::c_style | py::array::forcecast>;

void require_below(const int32_t* numbers, int64_t count, uint32_t limit, const char* what) {
  for (int64_t i = 0; i < count; ++i)
    if (uint32_t(numbers[i]) >= limit)
      throw std::invalid_argument(std::string(what) + " must lie in [0, " + std::to_string(limit) + "), got " +
                                  std::to_string(numbers[i]));
}

// Checks what the encoders rely on: shapes, ranges, ascending ranks, and fields and values that match the entries.
EntriesView view(const Ints& fields, const Ints& ranks, const Ints& values, uint32_t expected, uint32_t total) {
  if (fields.ndim() != 2 || fields.shape(1) != py::ssize_t(expected) || ranks.size() != values.size())
    throw std::invalid_argument("columns must be (rows, columns), ranks and values (entries,)");
  const EntriesView rows{fields.data(), ranks.data(), values.data(), fields.shape(0)};
  require_below(rows.fields, fields.size(), kMaxNumber, "columns");
  require_below(rows.ranks, ranks.size(), kMaxRank, "ranks");
  require_below(rows.values, values.size(), kMaxNumber, "values");
  int64_t entries = 0;
  for (int64_t row = 0; row < rows.rows; ++row) {
    const int64_t end = entries + rows.fields[row * expected];
    if (end > ranks.size()) throw std::invalid_argument("column 0 must add up to the number of entries");
    int64_t sum = 0;
    for (int64_t before = -1; entries < end; before = rows.ranks[entries++]) {
      if (rows.ranks[entries] <= before) throw std::invalid_argument("the ranks of a row must ascend");
      sum += rows.values[entries] + 1;
    }
    if (total && sum != total) throw std::invalid_argument("a row's values do not add up to the total");
  }
  if (entries != ranks.size()) throw std::invalid_argument("column 0 must add up to the number of entries");
  return rows;
}

py::bytes as_bytes(const std::vector<uint8_t>& data) {
  return py::bytes(reinterpret_cast<const char*>(data.data()), data.size());
}

// Moves the numbers into an array of int32, or of another type of 4 bytes.
py::array take(Numbers&& data, std::vector<py::ssize_t> shape, const py::dtype& type = py::dtype::of<int32_t>()) {
  auto* owner = new Numbers(std::move(data));
  return py::array(type, std::move(shape), owner->data(),
                   py::capsule(owner, [](void* p) { delete static_cast<Numbers*>(p); }));
}

struct Units {
  const uint8_t* data;
  int64_t size;
  const int64_t* table;
  py::ssize_t count;
};

Units check_units(const Bytes& data, const Longs& units) {
  if (units.ndim() != 2 || units.shape(1) != 3) throw std::invalid_argument("units must be (n, 3)");
  const Units out{data.data(), data.size(), units.data(), units.shape(0)};
  for (py::ssize_t i = 0; i < out.count; ++i) {
    const int64_t* unit = out.table + 3 * i;
    if (unit[0] < 0 || unit[1] < 0 || unit[2] < 0 || unit[2] > INT32_MAX || unit[0] > data.size() - unit[1])
      throw std::invalid_argument("a unit lies outside the data");
  }
  return out;
}

// What a codec knows about its rows besides their bytes.
struct Bounds {
  int32_t max_entries;
  std::vector<int32_t> field_limits;
  int32_t value_limit;
  Ints order;     // (orders, vocab): ids by rank; with several orders, field 1 is a row's order
  Floats levels;  // (value_limit,): what values stand for; empty: themselves
  int32_t total;  // what a row's values, each plus 1, add up to; 0: that varies
  // If not negative: the last entry of a row has the value 0, and a row without entries has this as its last field.
  int32_t remainder;

  int32_t vocab() const { return int32_t(order.shape(1)); }
};

Bounds make_bounds(int32_t max_entries, std::vector<int32_t> field_limits, int32_t value_limit, Ints order,
                   std::optional<Floats> levels, int32_t total, int32_t remainder) {
  if (order.ndim() != 2 || field_limits.empty() || (order.shape(0) > 1 && field_limits.size() < 2))
    throw std::invalid_argument("order must be (orders, vocab), and a column tells which where there are several");
  if (levels && (levels->ndim() != 1 || levels->size() != value_limit))
    throw std::invalid_argument("levels must be (value_limit,)");
  if (total < 0) throw std::invalid_argument("total must not be negative");
  return {max_entries, std::move(field_limits), value_limit, std::move(order), levels.value_or(Floats(0)), total,
          remainder};
}

void check_limits(const DecodedEntries& rows, const Bounds& bounds) {
  const size_t fields = bounds.field_limits.size();
  for (size_t base = 0; base < rows.fields.size(); base += fields)
    for (size_t c = 0; c < fields; ++c)
      if (rows.fields[base + c] >= bounds.field_limits[c]) throw std::invalid_argument("a column exceeds its limit");
  int32_t largest = 0;
  for (const int32_t value : rows.values) largest = std::max(largest, value);
  if (largest >= bounds.value_limit) throw std::invalid_argument("an entry's value exceeds its limit");
}

void ranks_to_ids(DecodedEntries& rows, const Bounds& bounds) {
  const size_t fields = bounds.field_limits.size();
  const int64_t vocab = bounds.order.shape(1), orders = bounds.order.shape(0);
  size_t entry = 0;
  for (size_t base = 0; base < rows.fields.size(); base += fields) {
    const int64_t which = orders > 1 ? rows.fields[base + 1] : 0;
    if (which >= orders) throw std::invalid_argument("a row names an order that does not exist");
    const int32_t* ids = bounds.order.data() + which * vocab;
    for (const size_t end = entry + size_t(rows.fields[base]); entry < end; ++entry)
      rows.ranks[entry] = ids[rows.ranks[entry]];
    if (bounds.remainder < 0) continue;
    if (rows.fields[base] ? rows.values[entry - 1] != 0 : rows.fields[base + fields - 1] != bounds.remainder)
      throw std::invalid_argument("a row's numbers do not go together");
  }
}

// Replaces values by the bits of their levels, in place.
void values_to_levels(DecodedEntries& rows, const Floats& levels) {
  static_assert(sizeof(float) == sizeof(int32_t));
  const float* const table = levels.data();
  for (int32_t& value : rows.values) std::memcpy(&value, table + value, sizeof value);
}

// An upper estimate of the number of entries: few take less than a byte. Reserved memory that is never written is free.
size_t likely_entries(const Units& units) {
  int64_t bytes = 0;
  for (py::ssize_t i = 0; i < units.count; ++i) bytes += units.table[3 * i + 1];
  return size_t(std::min(bytes, units.size));
}

// Runs decode(bytes, length, readable, rows, out) over units. Returns (fields, ids, values or levels).
template <typename Decode>
py::tuple decode_units(const Bytes& data, const Longs& table, const Bounds& bounds, Decode&& decode) {
  const Units units = check_units(data, table);
  const size_t fields = bounds.field_limits.size();
  DecodedEntries out;
  {
    py::gil_scoped_release release;
    const size_t likely = likely_entries(units);
    out.ranks.reserve(likely);
    out.values.reserve(likely);
    for (py::ssize_t i = 0; i < units.count; ++i) {
      const int64_t* unit = units.table + 3 * i;
      decode(units.data + unit[0], size_t(unit[1]), size_t(units.size - unit[0]), unit[2], out);
    }
    check_limits(out, bounds);
    ranks_to_ids(out, bounds);
    if (bounds.levels.size()) values_to_levels(out, bounds.levels);
  }
  const auto rows = py::ssize_t(out.fields.size() / fields), entries = py::ssize_t(out.ranks.size());
  return py::make_tuple(
      take(std::move(out.fields), {rows, py::ssize_t(fields)}), take(std::move(out.ranks), {entries}),
      take(std::move(out.values), {entries}, bounds.levels.size() ? py::dtype::of<float>() : py::dtype::of<int32_t>()));
}

Model make_model(uint32_t fields, uint32_t total, const Frequencies& frequencies) {
  if (fields < 1 || fields > kMaxFields || frequencies.ndim() != 2 || frequencies.shape(1) != 256 ||
      frequencies.shape(0) != py::ssize_t(contexts(fields)))
    throw std::invalid_argument("frequencies must be (contexts, 256)");
  return Model(fields, total, frequencies.data());
}

py::array_t<uint32_t> count(const Ints& fields, const Ints& ranks, const Ints& values, uint32_t total) {
  const auto width = uint32_t(fields.ndim() == 2 ? fields.shape(1) : 0);
  const EntriesView rows = view(fields, ranks, values, width, total);
  py::array_t<uint32_t> counts({py::ssize_t(contexts(width)), py::ssize_t(256)});
  std::fill(counts.mutable_data(), counts.mutable_data() + counts.size(), 0u);
  count_symbols(rows, width, total, counts.mutable_data());
  return counts;
}

py::bytes encode_entries(const Model& model, const Ints& fields, const Ints& ranks, const Ints& values) {
  const EntriesView rows = view(fields, ranks, values, model.fields(), model.total());
  std::vector<uint8_t> block;
  {
    py::gil_scoped_release release;
    block = encode_block(rows, model);
  }
  return as_bytes(block);
}

py::tuple decode_entries(const Model& model, const Bytes& data, const Longs& units, const Bounds& bounds) {
  if (bounds.field_limits.size() != model.fields() || (bounds.total && uint32_t(bounds.total) != model.total()))
    throw std::invalid_argument("bounds and model differ in columns or total");
  return decode_units(data, units, bounds,
                      [&](const uint8_t* at, size_t length, size_t, int64_t rows, DecodedEntries& out) {
                        decode_block(at, length, rows, model, bounds.max_entries, bounds.vocab(), out);
                      });
}

py::array_t<uint8_t> decode_field_of(const Model& model, const Bytes& data, int64_t rows, uint32_t field) {
  if (rows < 0 || field >= model.fields() || model.total())
    throw std::invalid_argument("a field of rows without entries is wanted, one that the model has");
  py::array_t<uint8_t> out(rows);
  uint8_t* const target = out.mutable_data();
  py::gil_scoped_release release;
  decode_field(data.data(), size_t(data.size()), rows, model, field, target);
  return out;
}

py::bytes encode_rows(const RowLayout& layout, const Ints& fields, const Ints& ranks, const Ints& values) {
  const EntriesView rows = view(fields, ranks, values, uint32_t(layout.field_bits.size()), 0);
  std::vector<uint8_t> block;
  {
    py::gil_scoped_release release;
    block = encode_row_block(rows, layout);
  }
  return as_bytes(block);
}

py::tuple decode_rows(const RowLayout& layout, const Bytes& data, const Longs& units, const Bounds& bounds) {
  if (bounds.field_limits.size() != layout.field_bits.size())
    throw std::invalid_argument("bounds and layout differ in columns");
  return decode_units(data, units, bounds,
                      [&](const uint8_t* at, size_t length, size_t readable, int64_t rows, DecodedEntries& out) {
                        if (rows != 1) throw std::invalid_argument("a unit of a row block is one row");
                        decode_row(at, length, readable, layout, bounds.max_entries, bounds.vocab(), bounds.total, out);
                      });
}

Longs locate_rows(const Bytes& payload, const Longs& blocks, const Longs& rows) {
  const Units units = check_units(payload, blocks);
  if (rows.ndim() != 1 || rows.size() != units.count) throw std::invalid_argument("rows must be (blocks,)");
  Longs out({units.count, py::ssize_t(2)});
  int64_t* span = out.mutable_data();
  for (py::ssize_t i = 0; i < units.count; ++i, span += 2) {
    const int64_t* unit = units.table + 3 * i;
    const Span found = locate_row(units.data + unit[0], unit[1], unit[2], rows.data()[i]);
    span[0] = unit[0] + found.begin;
    span[1] = found.length;
  }
  return out;
}

std::pair<int64_t, bool> check_codes_of(const py::array_t<uint8_t>& codes, uint8_t last,
                                        const py::array_t<bool>& spread) {
  if (codes.ndim() != 2 || spread.ndim() != 1 || codes.shape(0) != spread.shape(0))
    throw std::invalid_argument("codes must be (rows, columns), and spread (rows,)");
  // A dimension of one number may have any stride.
  const auto apart = [](const py::array& array, int dim) { return array.shape(dim) > 1 && array.strides(dim) != 1; };
  if (codes.size() && (apart(codes, 1) || apart(spread, 0)))
    throw std::invalid_argument("the codes of a row, and spread, must lie side by side");
  py::gil_scoped_release release;
  const CheckedCodes found =
      check_codes(codes.data(), codes.strides(0), codes.shape(0), codes.shape(1), last, spread.data());
  return {found.first_bad, found.has_masked};
}

void check_indexes(const Bytes& payload, const Longs& blocks) {
  const Units units = check_units(payload, blocks);
  py::gil_scoped_release release;
  for (py::ssize_t i = 0; i < units.count; ++i) {
    const int64_t* unit = units.table + 3 * i;
    check_index(units.data + unit[0], unit[1], unit[2]);
  }
}

int64_t first_bad_top_of(const Ints& ids, const Floats& values, int32_t vocab) {
  if (ids.ndim() != 2 || values.ndim() != 2 || ids.shape(0) != values.shape(0) || ids.shape(1) != values.shape(1))
    throw std::invalid_argument("ids and values must both be (rows, k)");
  if (ids.shape(1) < 1 || vocab < 1) throw std::invalid_argument("k and vocab must be positive");
  py::gil_scoped_release release;
  return first_bad_top(ids.data(), values.data(), ids.shape(0), ids.shape(1), vocab);
}

RowLayout make_layout(std::vector<uint32_t> field_bits, uint32_t value_bits, uint32_t rank_bits, bool classes) {
  if (field_bits.empty() || field_bits.size() > kMaxFields || value_bits > 18 || rank_bits > 24)
    throw std::invalid_argument("a row layout has 1 to 8 columns, values of up to 18 bits, ranks of up to 24");
  for (uint32_t bits : field_bits)
    if (bits > 18) throw std::invalid_argument("a column has up to 18 bits");
  return {std::move(field_bits), value_bits, rank_bits, classes};
}

}  // namespace

void bind(py::module_& m) {
  py::class_<Model>(m, "EntryModel", "The frequencies that entry blocks are coded with.")
      .def(py::init(&make_model), py::arg("columns"), py::arg("total"), py::arg("frequencies"))
      .def("encode", &encode_entries)
      .def("decode", &decode_entries, py::arg("data"), py::arg("units"), py::arg("bounds"))
      .def("decode_field", &decode_field_of, py::arg("data"), py::arg("rows"), py::arg("column"),
           "One column, below 256, of a block of rows without entries, as (rows,) uint8.");
  py::class_<RowLayout>(m, "RowLayout", "The fields of a row block's rows.")
      .def(py::init(&make_layout), py::arg("column_bits"), py::arg("value_bits"), py::arg("rank_bits"),
           py::arg("classes"))
      .def("encode", &encode_rows)
      .def("decode", &decode_rows, py::arg("data"), py::arg("units"), py::arg("bounds"));
  py::class_<Bounds>(m, "RowBounds", "What decoded rows must lie within, and the orders of their ids.")
      .def(py::init(&make_bounds), py::arg("max_entries"), py::arg("column_limits"), py::arg("value_limit"),
           py::arg("order"), py::arg("levels") = py::none(), py::arg("total") = 0, py::arg("remainder") = -1);
  m.def("count_symbols", &count, "How often each symbol occurs in each context.");
  m.def("locate_rows", &locate_rows, "Where rows of row blocks lie.");
  m.def("check_codes", &check_codes_of, py::arg("codes"), py::arg("last"), py::arg("spread"),
        "The first row of codes without a code 0, or that is spread out and lacks the code `last`, or -1; and whether "
        "a row up to there has a code above `last`.");
  m.def("first_bad_top", &first_bad_top_of, py::arg("ids"), py::arg("values"), py::arg("vocab"),
        "The first of some rows of top-k entries that is none, or -1.");
  m.def("check_indexes", &check_indexes, py::arg("payload"), py::arg("blocks"),
        "Raises ValueError unless the indexes of whole row blocks are such as an encoder writes.");
}

}  // namespace kdfast::codec
