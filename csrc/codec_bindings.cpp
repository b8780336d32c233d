// The host codec over numpy arrays, GIL released.
#include "codec_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "entry_block.h"
#include "row_block.h"

namespace py = pybind11;

namespace kdfast::codec {

namespace {

using Ints = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Longs = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Frequencies = py::array_t<uint16_t, py::array::c_style | py::array::forcecast>;

void require_below(const int32_t* numbers, int64_t count, uint32_t limit, const char* what) {
  for (int64_t i = 0; i < count; ++i)
    if (uint32_t(numbers[i]) >= limit)
      throw std::invalid_argument(std::string(what) + " must lie in [0, " + std::to_string(limit) + "), got " +
                                  std::to_string(numbers[i]));
}

// Checks what coding counts on: shapes, sizes, and entries that add up.
RowsView view(const Ints& columns, const Ints& ranks, const Ints& values, uint32_t expected) {
  if (columns.ndim() != 2 || columns.shape(1) != py::ssize_t(expected) || ranks.size() != values.size())
    throw std::invalid_argument("columns must be (rows, columns), ranks and values (entries,)");
  const RowsView rows{columns.data(), ranks.data(), values.data(), columns.shape(0)};
  require_below(rows.columns, columns.size(), kMaxNumber, "columns");
  require_below(rows.ranks, ranks.size(), kMaxRank, "ranks");
  require_below(rows.values, values.size(), kMaxNumber, "values");
  int64_t entries = 0;
  for (int64_t row = 0; row < rows.rows; ++row)
    for (int64_t left = rows.columns[row * expected]; left > 0 && entries < ranks.size(); --left, ++entries)
      if (left != rows.columns[row * expected] && rows.ranks[entries] <= rows.ranks[entries - 1])
        throw std::invalid_argument("the ranks of a row must ascend");
  int64_t total = 0;
  for (int64_t row = 0; row < rows.rows; ++row) total += rows.columns[row * expected];
  if (total != ranks.size()) throw std::invalid_argument("column 0 must add up to the number of entries");
  return rows;
}

py::bytes as_bytes(const std::vector<uint8_t>& data) {
  return py::bytes(reinterpret_cast<const char*>(data.data()), data.size());
}

Ints take(std::vector<int32_t>&& data, std::vector<py::ssize_t> shape) {
  auto* owner = new std::vector<int32_t>(std::move(data));
  return Ints(std::move(shape), owner->data(),
              py::capsule(owner, [](void* p) { delete static_cast<std::vector<int32_t>*>(p); }));
}

struct Units {
  const uint8_t* data;
  const int64_t* table;
  py::ssize_t count;
};

Units check_units(const Bytes& data, const Longs& units) {
  if (units.ndim() != 2 || units.shape(1) != 3) throw std::invalid_argument("units must be (n, 3)");
  const Units out{data.data(), units.data(), units.shape(0)};
  for (py::ssize_t i = 0; i < out.count; ++i) {
    const int64_t* unit = out.table + 3 * i;
    if (unit[0] < 0 || unit[1] < 0 || unit[2] < 0 || unit[2] > INT32_MAX || unit[0] > data.size() - unit[1])
      throw std::invalid_argument("a unit lies outside the data");
  }
  return out;
}

// Runs decode(bytes, length, rows, out) over units; (columns, ranks, values).
template <typename Decode>
py::tuple decode_units(const Bytes& data, const Longs& table, size_t columns, Decode&& decode) {
  const Units units = check_units(data, table);
  Rows out;
  {
    py::gil_scoped_release release;
    for (py::ssize_t i = 0; i < units.count; ++i) {
      const int64_t* unit = units.table + 3 * i;
      decode(units.data + unit[0], size_t(unit[1]), unit[2], out);
    }
  }
  const auto rows = py::ssize_t(out.columns.size() / columns), entries = py::ssize_t(out.ranks.size());
  return py::make_tuple(take(std::move(out.columns), {rows, py::ssize_t(columns)}),
                        take(std::move(out.ranks), {entries}), take(std::move(out.values), {entries}));
}

Model make_model(uint32_t columns, const Frequencies& frequencies) {
  if (columns < 1 || columns > kMaxColumns || frequencies.ndim() != 2 || frequencies.shape(1) != 256 ||
      frequencies.shape(0) != py::ssize_t(contexts(columns)))
    throw std::invalid_argument("frequencies must be (contexts, 256)");
  return Model(columns, frequencies.data());
}

py::array_t<uint32_t> count(const Ints& columns, const Ints& ranks, const Ints& values) {
  const auto width = uint32_t(columns.ndim() == 2 ? columns.shape(1) : 0);
  const RowsView rows = view(columns, ranks, values, width);
  py::array_t<uint32_t> counts({py::ssize_t(contexts(width)), py::ssize_t(256)});
  std::fill(counts.mutable_data(), counts.mutable_data() + counts.size(), 0u);
  count_symbols(rows, width, counts.mutable_data());
  return counts;
}

py::bytes encode_entries(const Model& model, const Ints& columns, const Ints& ranks, const Ints& values) {
  const RowsView rows = view(columns, ranks, values, model.columns());
  std::vector<uint8_t> block;
  {
    py::gil_scoped_release release;
    block = encode_block(rows, model);
  }
  return as_bytes(block);
}

py::tuple decode_entries(const Model& model, const Bytes& data, const Longs& units, int32_t max_entries,
                         int32_t max_rank) {
  return decode_units(data, units, model.columns(), [&](const uint8_t* at, size_t length, int64_t rows, Rows& out) {
    decode_block(at, length, rows, model, max_entries, max_rank, out);
  });
}

py::bytes encode_rows(const RowLayout& layout, const Ints& columns, const Ints& ranks, const Ints& values) {
  const RowsView rows = view(columns, ranks, values, uint32_t(layout.column_bits.size()));
  std::vector<uint8_t> block;
  {
    py::gil_scoped_release release;
    block = encode_row_block(rows, layout);
  }
  return as_bytes(block);
}

py::tuple decode_rows(const RowLayout& layout, const Bytes& data, const Longs& units, int32_t max_entries,
                      int32_t max_rank) {
  const size_t columns = layout.column_bits.size();
  return decode_units(data, units, columns, [&](const uint8_t* at, size_t length, int64_t rows, Rows& out) {
    if (rows != 1) throw std::invalid_argument("a unit of a row block is one row");
    decode_row(at, length, layout, max_entries, max_rank, out);
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

RowLayout make_layout(std::vector<uint32_t> column_bits, uint32_t value_bits, uint32_t rank_bits, bool classes) {
  if (column_bits.empty() || column_bits.size() > kMaxColumns || value_bits > 18 || rank_bits > 24)
    throw std::invalid_argument("a row layout has 1 to 8 columns, values of up to 18 bits, ranks of up to 24");
  for (uint32_t bits : column_bits)
    if (bits > 18) throw std::invalid_argument("a column has up to 18 bits");
  return {std::move(column_bits), value_bits, rank_bits, classes};
}

}  // namespace

void bind(py::module_& m) {
  py::class_<Model>(m, "EntryModel", "The frequencies that entry blocks are coded with.")
      .def(py::init(&make_model), py::arg("columns"), py::arg("frequencies"))
      .def("encode", &encode_entries)
      .def("decode", &decode_entries, py::arg("data"), py::arg("units"), py::arg("max_entries"), py::arg("max_rank"));
  py::class_<RowLayout>(m, "RowLayout", "The fields of a row block's rows.")
      .def(py::init(&make_layout), py::arg("column_bits"), py::arg("value_bits"), py::arg("rank_bits"),
           py::arg("classes"))
      .def("encode", &encode_rows)
      .def("decode", &decode_rows, py::arg("data"), py::arg("units"), py::arg("max_entries"), py::arg("max_rank"));
  m.def("count_symbols", &count, "How often each symbol occurs in each context.");
  m.def("locate_rows", &locate_rows, "Where rows of row blocks lie.");
}

}  // namespace kdfast::codec
