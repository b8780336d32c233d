// The one-read dense kernel's threads, one after another: its arithmetic and its way of sharing out a row.
#include "../../../csrc/cuda/dense_row.h"

#include "blocks.h"

namespace {

struct Task {
  RowTask row;
  const void* teacher;
  int kind;
  double a, b, scale;
};

template <Kind kKind, typename T>
void run_row(const Task& task, int64_t row) {
  const int columns = task.row.columns;
  const T *x = static_cast<const T*>(task.row.student) + row * columns,
          *y = static_cast<const T*>(task.teacher) + row * columns;
  const GradientRow<T> to = gradient_row(task.row, x, row);
  const Divergence divergence = {kKind, task.a, task.b, task.scale, false};
  const RowCoefficients coef = coefficients(task.row, row);
  const Blocks<T> blocks(x, y, columns, task.row.cluster);
  task.row.loss[row] = 0;
  if (!coef.counts()) return blocks.fill(0, to);
  const bool teacher = coef.kd != 0;
  const Scales scales = scales_of(coef, kKind);
  const UnitTau mode = unit_tau_of(coef);
  const auto part = [&](const Slice<T>& s, int thread) {
    return sweep<is_forward(kKind)>(s, thread, kTestThreads, scales, teacher, mode);
  };
  const auto merge_sums = [&](const Sums& l, const Sums& r) { return merge(l, r, scales, mode); };
  const Sums sums = blocks.reduce(Sums(), part, merge_sums);
  const SoftmaxStats stats = softmax_stats(sums, scales, mode);
  Values values = {0, 0};
  if constexpr (!is_forward(kKind)) {
    const auto values_part = [&](const Slice<T>& s, int thread) {
      return values_of<kKind>(s, thread, kTestThreads, stats, divergence);
    };
    const auto add = [](const Values& l, const Values& r) { return Values{l.value + r.value, l.h + r.h}; };
    if (teacher) values = blocks.reduce(values, values_part, add);
  }
  const int label = coef.label_column(columns);
  const RowOutcome out = outcome_of<kKind>(coef, divergence, columns, sums, stats, values, blocks.smoothing(),
                                           label >= 0 ? to_float(x[label]) : 0);
  task.row.loss[row] = out.loss;
  if (out.gradient.failed) return blocks.fill(out.loss, to);
  blocks.each_thread([&](const Slice<T>& slice, int thread) {
    write_gradient<kKind>(slice, thread, kTestThreads, out.gradient, stats, divergence, teacher, label, mode, to);
  });
}

template <typename T>
void run(const Task& task) {
  for (int64_t row = 0; row < task.row.rows; ++row)
    with_kind(static_cast<Kind>(task.kind), [&](auto kind) {
      if constexpr (family_of(kind.value) != Family::kSpecial) run_row<kind.value, T>(task, row);
    });
}

}  // namespace

extern "C" void dense_cluster(const Task* task, int dtype) {
  if (dtype == 0) run<float>(*task);
  if (dtype == 1) run<__half>(*task);
  if (dtype == 2) run<__nv_bfloat16>(*task);
}
