// Checksums and gathered reads over numpy arrays, GIL released.
#include "bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "crc32c.h"
#include "gather.h"

namespace py = pybind11;

namespace kdfast::io {

namespace {

uint32_t crc32c(const py::buffer& buffer, uint32_t crc) {
  const py::buffer_info info = buffer.request();
  if (!PyBuffer_IsContiguous(info.view(), 'C')) throw py::value_error("crc32c needs a contiguous buffer");
  py::gil_scoped_release release;
  return kdfast::crc32c(info.ptr, size_t(info.size * info.itemsize), crc);
}

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Integers = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

Bytes copy_ranges(const std::vector<Bytes>& buffers, const Integers& owners, const Integers& ranges) {
  if (owners.ndim() != 1 || ranges.ndim() != 2 || ranges.shape(0) != owners.size() || ranges.shape(1) != 2) {
    throw py::value_error("copy_ranges needs owners of (n,) and ranges of (n, 2)");
  }
  std::vector<kdfast::Mapped> sources;
  for (const Bytes& buffer : buffers) sources.push_back({buffer.data(), int64_t(buffer.size())});
  const int64_t count = owners.size();
  int64_t size = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = ranges.data()[2 * i + 1];
    // Checked before adding, so that `size` cannot overflow.
    if (length < 0 || length > INT64_MAX - size) throw py::value_error("a range has an impossible length");
    size += length;
  }
  Bytes out(size);
  int64_t copied = 0;
  {
    unsigned char* const target = out.mutable_data();
    py::gil_scoped_release release;
    copied =
        kdfast::copy_ranges(sources.data(), int64_t(sources.size()), owners.data(), ranges.data(), count, target, size);
  }
  if (copied < count) throw py::value_error("range " + std::to_string(copied) + " does not lie in its buffer");
  return out;
}

Integers last_at_most(const py::array_t<int64_t, py::array::c_style>& table, int64_t column, const Integers& values) {
  if (table.ndim() != 2 || column < 0 || column >= table.shape(1) || values.ndim() != 1) {
    throw py::value_error("last_at_most needs a table of (rows, columns), one of its columns, and values of (n,)");
  }
  Integers out(values.size());
  const auto* const first = static_cast<const unsigned char*>(table.request().ptr) + 8 * column;
  const int64_t rows = table.shape(0), stride = 8 * table.shape(1), count = values.size();
  int64_t* const target = out.mutable_data();
  py::gil_scoped_release release;
  kdfast::last_at_most(first, rows, stride, values.data(), count, target);
  return out;
}

}  // namespace

void bind(py::module_& m) {
  m.def("crc32c", &crc32c, py::arg("buffer"), py::arg("crc") = 0, "CRC-32C of a contiguous buffer, GIL released.");
  m.def("copy_ranges", &copy_ranges, py::arg("buffers"), py::arg("owners"), py::arg("ranges"),
        "Byte ranges of several uint8 buffers, one after another: ranges[i] = (begin, length) of buffers[owners[i]].");
  m.def("last_at_most", &last_at_most, py::arg("table"), py::arg("column"), py::arg("values"),
        "Per value the last row of an int64 table whose column, which never decreases, is at most it; -1 if none.");
}

}  // namespace kdfast::io
