// The dense row ops: student logits against teacher logits.
#include "rows.h"

namespace kdfast {
namespace {

struct DenseArguments {
  RowArguments rows;
  const Tensor& teacher;  // (outer, inner, V_t)
  Divergence divergence;
};

// Entropy and top-1 agreement are those of the plain tempered softmax, whatever the divergence makes of the logits.
RowResult describe(const Divergence& divergence, const RowTask& row, void* workspace,
                   RowResult (*dense)(const Divergence&, const RowTask&, void*)) {
  RowTask task = unweighted(row);
  RowResult result = dense(divergence, task, workspace);
  task.ce = task.z = 0;
  const RowResult plain = dense(Divergence(), task, workspace);
  result.entropy = plain.entropy;
  result.top1 = plain.top1;
  return result;
}

RowOutputs run(const DenseArguments& arguments, const Tensor* grad) {
  const auto dense = is_double(arguments.rows.student) ? kernels().dense_double : kernels().dense_float;
  const Rows teachers(arguments.teacher);
  const int64_t shared = std::min(arguments.rows.student.size(2), arguments.teacher.size(2));
  return for_each_row(arguments.rows, grad, [&](int64_t i, RowTask& task, void* workspace) {
    task.teacher = teachers[i];
    task.shared = shared;
    RowResult parts;
    if (task.want_parts) parts = describe(arguments.divergence, task, workspace, dense);
    task.want_parts = false;
    parts.loss = dense(arguments.divergence, task, workspace).loss;
    return parts;
  });
}

using Outputs = std::tuple<Tensor, Tensor>;
using OutputsWithGrad = std::tuple<Tensor, Tensor, Tensor>;

}  // namespace

#define KDFAST_DENSE_ARGUMENTS                                                                                 \
  Tensor student, Tensor teacher, Tensor coef, std::optional<Tensor> label, std::optional<Tensor> label_probs, \
      double smoothing, int64_t kind, double a, double b, double scale, bool standardize, bool want_parts
#define KDFAST_DENSE_PACK                                                  \
  DenseArguments {                                                         \
    {student, coef, label, label_probs, smoothing, want_parts}, teacher, { \
      static_cast<Kind>(kind), a, b, scale, standardize                    \
    }                                                                      \
  }

Outputs dense_rows(KDFAST_DENSE_ARGUMENTS) {
  const RowOutputs out = run(KDFAST_DENSE_PACK, nullptr);
  return {out.loss, out.parts};
}

OutputsWithGrad dense_rows_grad(KDFAST_DENSE_ARGUMENTS) {
  const Tensor grad = new_gradient(student);
  const RowOutputs out = run(KDFAST_DENSE_PACK, &grad);
  return {out.loss, grad, out.parts};
}

Outputs dense_rows_inplace(KDFAST_DENSE_ARGUMENTS) {
  const RowOutputs out = run(KDFAST_DENSE_PACK, &student);
  return {out.loss, out.parts};
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("dense_rows", TORCH_BOX(&dense_rows));
  m.impl("dense_rows_grad", TORCH_BOX(&dense_rows_grad));
  m.impl("dense_rows_inplace", TORCH_BOX(&dense_rows_inplace));
}

}  // namespace kdfast
