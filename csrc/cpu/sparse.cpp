// The sparse row ops: student logits against K (id, weight) entries and a tail.
#include "rows.h"

namespace kdfast {
namespace {

struct SparseArguments {
  RowArguments rows;
  const Tensor& ids;                  // (nnz,) int32
  const Tensor& weights;              // (nnz,) float32
  const Tensor& offsets;              // (rows + 1,) int64
  const std::optional<Tensor>& tail;  // (rows,) log-mass, in coef's dtype
  int64_t vocab;                      // the teacher's
  bool subtract_entropy;
};

RowOutputs run(const SparseArguments& arguments, const Tensor* grad) {
  const auto sparse = is_double(arguments.rows.student) ? kernels().sparse_double : kernels().sparse_float;
  const Tensor& student = arguments.rows.student;
  const int64_t rows = student.size(0) * student.size(1), entries = arguments.ids.numel();
  const auto* ids = vector_data<int32_t>(arguments.ids, ScalarType::Int, entries);
  const auto* weights = vector_data<float>(arguments.weights, ScalarType::Float, entries);
  const auto* offsets = vector_data<int64_t>(arguments.offsets, ScalarType::Long, rows + 1);
  for (int64_t i = 0; i < rows; ++i)
    STD_TORCH_CHECK(0 <= offsets[i] && offsets[i] <= offsets[i + 1] && offsets[i + 1] <= entries,
                    "offsets must not decrease or leave the entries");
  const std::optional<Numbers> tails = arguments.tail ? std::optional<Numbers>(*arguments.tail) : std::nullopt;
  const int64_t shared = std::min(student.size(2), arguments.vocab);
  return for_each_row(arguments.rows, grad, [&](int64_t i, RowTask& task, void* workspace) {
    const int64_t begin = offsets[i], end = offsets[i + 1];
    const double tail = tails ? (*tails)[i] : -std::numeric_limits<double>::infinity();
    task.entries = {ids + begin, weights + begin, end - begin, tail, arguments.subtract_entropy};
    task.shared = shared;
    RowResult parts;
    if (task.want_parts) parts = sparse(unweighted(task), workspace);
    task.want_parts = false;
    parts.loss = sparse(task, workspace).loss;
    return parts;
  });
}

using Outputs = std::tuple<Tensor, Tensor>;
using OutputsWithGrad = std::tuple<Tensor, Tensor, Tensor>;

}  // namespace

#define KDFAST_SPARSE_ARGUMENTS                                                                           \
  Tensor student, Tensor ids, Tensor weights, Tensor offsets, std::optional<Tensor> tail, int64_t vocab,  \
      bool subtract_entropy, Tensor coef, std::optional<Tensor> label, std::optional<Tensor> label_probs, \
      double smoothing, bool want_parts
#define KDFAST_SPARSE_PACK                                                                                           \
  SparseArguments {                                                                                                  \
    {student, coef, label, label_probs, smoothing, want_parts}, ids, weights, offsets, tail, vocab, subtract_entropy \
  }

Outputs sparse_rows(KDFAST_SPARSE_ARGUMENTS) {
  const RowOutputs out = run(KDFAST_SPARSE_PACK, nullptr);
  return {out.loss, out.parts};
}

OutputsWithGrad sparse_rows_grad(KDFAST_SPARSE_ARGUMENTS) {
  const Tensor grad = new_gradient(student);
  const RowOutputs out = run(KDFAST_SPARSE_PACK, &grad);
  return {out.loss, grad, out.parts};
}

Outputs sparse_rows_inplace(KDFAST_SPARSE_ARGUMENTS) {
  const RowOutputs out = run(KDFAST_SPARSE_PACK, &student);
  return {out.loss, out.parts};
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("sparse_rows", TORCH_BOX(&sparse_rows));
  m.impl("sparse_rows_grad", TORCH_BOX(&sparse_rows_grad));
  m.impl("sparse_rows_inplace", TORCH_BOX(&sparse_rows_inplace));
}

}  // namespace kdfast
