// Every op's schema, and the pybind11 module with what works on host memory.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "codec_bindings.h"
#include "cpu/row.h"
#include "crc32c.h"
#include "cuda/plan.h"
#include "gather.h"

#define KDFAST_TRUTH "Tensor coef, Tensor? label, Tensor? label_probs, float smoothing"
#define KDFAST_DIVERGENCE "int kind, float a, float b, float scale"
#define KDFAST_DENSE "Tensor teacher, " KDFAST_TRUTH ", " KDFAST_DIVERGENCE ", bool standardize, bool want_parts"
#define KDFAST_SPARSE                                                                            \
  "Tensor ids, Tensor weights, Tensor offsets, Tensor? tail, int vocab, Tensor? shape, Tensor? " \
  "shapes, " KDFAST_DIVERGENCE ", " KDFAST_TRUTH ", bool want_parts"
#define KDFAST_SELECT "Tensor logits, float temperature"
#define KDFAST_STREAM "int seed, int first_row"

STABLE_TORCH_LIBRARY(kdfast, m) {
  m.def("dense_rows(Tensor student, " KDFAST_DENSE ") -> (Tensor loss, Tensor parts)");
  m.def("dense_rows_grad(Tensor student, " KDFAST_DENSE ") -> (Tensor loss, Tensor grad, Tensor parts)");
  m.def("dense_rows_inplace(Tensor(a!) student, " KDFAST_DENSE ") -> (Tensor loss, Tensor parts)");
  m.def("sparse_rows(Tensor student, " KDFAST_SPARSE ") -> (Tensor loss, Tensor parts)");
  m.def("sparse_rows_grad(Tensor student, " KDFAST_SPARSE ") -> (Tensor loss, Tensor grad, Tensor parts)");
  m.def("sparse_rows_inplace(Tensor(a!) student, " KDFAST_SPARSE ") -> (Tensor loss, Tensor parts)");
  m.def("select_threshold(" KDFAST_SELECT ", float tau, " KDFAST_STREAM
        ", Tensor? order=None) -> (Tensor ids, Tensor probs, Tensor counts, Tensor lse)");
  m.def("select_sample(" KDFAST_SELECT ", int draws, " KDFAST_STREAM
        ") -> (Tensor ids, Tensor counts_of_id, Tensor counts, Tensor lse)");
  m.def("select_top(" KDFAST_SELECT ", int k) -> (Tensor ids, Tensor probs, Tensor rest, Tensor lse)");
  m.def("scale_(Tensor(a!) x, Tensor factor) -> ()");
}

namespace py = pybind11;

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
    // No sum of lengths that are in range overflows before memory runs out.
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

py::tuple divergences() {
  py::list names;
  for (const char* name : kdfast::kKindNames) names.append(name);
  return py::tuple(names);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "kdfast's native code. Importing it registers torch.ops.kdfast.";
  m.def("crc32c", &crc32c, py::arg("buffer"), py::arg("crc") = 0, "CRC-32C of a contiguous buffer, GIL released.");
  m.def("copy_ranges", &copy_ranges, py::arg("buffers"), py::arg("owners"), py::arg("ranges"),
        "Byte ranges of several uint8 buffers, one after another: ranges[i] = (begin, length) of buffers[owners[i]].");
  m.def("last_at_most", &last_at_most, py::arg("table"), py::arg("column"), py::arg("values"),
        "Per value the last row of an int64 table whose column, which never decreases, is at most it; -1 if none.");
  m.def("cpu_isa", [] { return kdfast::kernels().isa; }, "The instruction set of the CPU kernels in use.");
  m.def("cluster_size", &kdfast::cuda::cluster_size, py::arg("row_bytes"),
        "How many thread blocks share a row of so many bytes in the one-read CUDA kernels; 0: they do not take it.");
  m.def("divergences", &divergences, "Divergence names, at the numbers that the ops take.");
  kdfast::codec::bind(m);
}
