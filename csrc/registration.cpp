// Every op's schema, and the pybind11 module.
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "codec/bindings.h"
#include "cpu/row.h"
#include "cuda/plan.h"
#include "divergence.h"
#include "io/bindings.h"
#include "row_arguments.h"

#define KDFAST_DENSE KDFAST_SCHEMA(KDFAST_DENSE_ROWS)
#define KDFAST_SPARSE KDFAST_SCHEMA(KDFAST_SPARSE_ROWS)
#define KDFAST_SELECT "Tensor logits, float temperature"
#define KDFAST_STREAM "int seed, int first_row"

STABLE_TORCH_LIBRARY(kdfast, m) {
  m.def("dense_rows(Tensor student" KDFAST_DENSE ") -> (Tensor loss, Tensor parts)");
  m.def("dense_rows_grad(Tensor student" KDFAST_DENSE ") -> (Tensor loss, Tensor grad, Tensor parts)");
  m.def("dense_rows_inplace(Tensor(a!) student" KDFAST_DENSE ") -> (Tensor loss, Tensor parts)");
  m.def("sparse_rows(Tensor student" KDFAST_SPARSE ") -> (Tensor loss, Tensor parts)");
  m.def("sparse_rows_grad(Tensor student" KDFAST_SPARSE ") -> (Tensor loss, Tensor grad, Tensor parts)");
  m.def("sparse_rows_inplace(Tensor(a!) student" KDFAST_SPARSE ") -> (Tensor loss, Tensor parts)");
  m.def("select_threshold(" KDFAST_SELECT ", float tau, " KDFAST_STREAM
        ") -> (Tensor ids, Tensor probs, Tensor counts, Tensor lse)");
  m.def("select_sample(" KDFAST_SELECT ", int draws, bool systematic, " KDFAST_STREAM
        ") -> (Tensor ids, Tensor counts_of_id, Tensor counts, Tensor lse)");
  m.def("select_top(" KDFAST_SELECT ", int k) -> (Tensor ids, Tensor probs, Tensor rest, Tensor lse)");
  m.def("scale_(Tensor(a!) x, Tensor factor) -> ()");
}

namespace py = pybind11;

namespace {

py::tuple divergences() {
  py::list names;
  for (const char* name : kdfast::kKindNames) names.append(name);
  return py::tuple(names);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "kdfast's native code. Importing it registers torch.ops.kdfast.";
  m.def("cpu_isa", [] { return kdfast::kernels().isa; }, "The instruction set of the CPU kernels in use.");
  m.def("cluster_size", &kdfast::cuda::cluster_size, py::arg("row_bytes"),
        "How many thread blocks share a row of so many bytes in the one-read CUDA kernels; 0: they do not take it.");
  m.def("divergences", &divergences, "Divergence names, at the numbers that the ops take.");
  kdfast::io::bind(m);
  kdfast::codec::bind(m);
}
