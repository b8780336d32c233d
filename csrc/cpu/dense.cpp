// The dense row ops: student logits against teacher logits.
#include "../row_arguments.h"
#include "rows.h"

namespace kdfast {
namespace {

// A row's parts. Entropy and top-1 agreement are those of the tempered softmax of the logits as given, even where the
// divergence standardises them or masks the label.
RowResult describe(const Divergence& divergence, const RowTask& row, void* workspace,
                   RowResult (*dense)(const Divergence&, const RowTask&, void*)) {
  RowTask task = unweighted(row);
  RowResult result = dense(divergence, task, workspace);
  task.ce = task.z_weight = 0;
  const RowResult plain = dense(Divergence(), task, workspace);
  result.entropy = plain.entropy;
  result.top1 = plain.top1;
  return result;
}

RowOutputs run(const DenseArguments& arguments, const Tensor* grad) {
  const Divergence divergence = divergence_of(arguments, arguments.standardize);
  const auto dense = is_double(arguments.student) ? kernels().dense_double : kernels().dense_float;
  const StridedRows teachers(arguments.teacher, count_rows(arguments.student), 0);
  const int64_t shared = std::min(arguments.student.size(2), arguments.teacher.size(2));
  return for_each_row(arguments, grad, [&](int64_t i, RowTask& task, void* workspace) {
    task.teacher = teachers[i];
    task.shared = shared;
    RowResult parts;
    if (task.want_parts) parts = describe(divergence, task, workspace, dense);
    task.want_parts = false;
    parts.loss = dense(divergence, task, workspace).loss;
    return parts;
  });
}

using Outputs = std::tuple<Tensor, Tensor>;
using OutputsWithGrad = std::tuple<Tensor, Tensor, Tensor>;

Outputs dense_rows(const DenseArguments& arguments) {
  const RowOutputs out = run(arguments, nullptr);
  return {out.loss, out.parts};
}

OutputsWithGrad dense_rows_grad(const DenseArguments& arguments) {
  const Tensor grad = new_gradient(arguments.student);
  const RowOutputs out = run(arguments, &grad);
  return {out.loss, grad, out.parts};
}

Outputs dense_rows_inplace(const DenseArguments& arguments) {
  const RowOutputs out = run(arguments, &arguments.student);
  return {out.loss, out.parts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("dense_rows", TORCH_BOX(&Op<dense_rows>::call));
  m.impl("dense_rows_grad", TORCH_BOX(&Op<dense_rows_grad>::call));
  m.impl("dense_rows_inplace", TORCH_BOX(&Op<dense_rows_inplace>::call));
}

}  // namespace kdfast
