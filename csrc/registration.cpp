// Every op's schema, and the pybind11 module with what works on host memory.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "cpu/row.h"
#include "crc32c.h"

#define KDFAST_TRUTH "Tensor coef, Tensor? label, Tensor? label_probs, float smoothing"
#define KDFAST_DIVERGENCE "int kind, float a, float b, float scale"
#define KDFAST_DENSE "Tensor teacher, " KDFAST_TRUTH ", " KDFAST_DIVERGENCE ", bool standardize, bool want_parts"
#define KDFAST_SPARSE                                                                            \
  "Tensor ids, Tensor weights, Tensor offsets, Tensor? tail, int vocab, Tensor? shape, Tensor? " \
  "shapes, " KDFAST_DIVERGENCE ", " KDFAST_TRUTH ", bool want_parts"

STABLE_TORCH_LIBRARY(kdfast, m) {
  m.def("dense_rows(Tensor student, " KDFAST_DENSE ") -> (Tensor loss, Tensor parts)");
  m.def("dense_rows_grad(Tensor student, " KDFAST_DENSE ") -> (Tensor loss, Tensor grad, Tensor parts)");
  m.def("dense_rows_inplace(Tensor(a!) student, " KDFAST_DENSE ") -> (Tensor loss, Tensor parts)");
  m.def("sparse_rows(Tensor student, " KDFAST_SPARSE ") -> (Tensor loss, Tensor parts)");
  m.def("sparse_rows_grad(Tensor student, " KDFAST_SPARSE ") -> (Tensor loss, Tensor grad, Tensor parts)");
  m.def("sparse_rows_inplace(Tensor(a!) student, " KDFAST_SPARSE ") -> (Tensor loss, Tensor parts)");
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

py::tuple divergences() {
  py::list names;
  for (const char* name : kdfast::kKindNames) names.append(name);
  return py::tuple(names);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "kdfast's native code. Importing it registers torch.ops.kdfast.";
  m.def("crc32c", &crc32c, py::arg("buffer"), py::arg("crc") = 0, "CRC-32C of a contiguous buffer, GIL released.");
  m.def("cpu_isa", [] { return kdfast::kernels().isa; }, "The instruction set of the CPU kernels in use.");
  m.def("divergences", &divergences, "Divergence names, at the numbers that the ops take.");
}
