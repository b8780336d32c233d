// The one-read sparse kernel's threads, one after another: its arithmetic and its way of sharing out a row.
#include "../../../csrc/cuda/sparse_row.h"

#include "blocks.h"

namespace {

struct Task {
  RowTask row;
  EntryLists entries;
  int subtract_entropy;
};

template <UnitTau kUnitTau, typename T>
SparseSums sums_of(Blocks<T>& blocks, const EntriesView& entries, Scales scales, UnitTau mode) {
  const auto merge_sums = [&](const SparseSums& l, const SparseSums& r) { return merge(l, r, scales, mode); };
  SparseSums taken = blocks.reduce(
      SparseSums(),
      [&](const Slice<T>& s, int thread) {
        SparseSums sums;
        take_entries<kUnitTau>(sums, s, const_cast<Pack<T>*>(s.student), entries, thread, kTestThreads, scales);
        return sums;
      },
      merge_sums);
  return blocks.reduce(
      taken,
      [&](const Slice<T>& s, int thread) {
        SparseSums sums;
        sweep_outside<kUnitTau>(sums, s, thread, kTestThreads, scales);
        return sums;
      },
      merge_sums);
}

template <typename T>
void run_row(const Task& task, int64_t row) {
  const int columns = task.row.columns;
  const T* x = static_cast<const T*>(task.row.student) + row * columns;
  const GradientRow<T> to = gradient_row(task.row, x, row);
  const RowCoefficients coef = coefficients(task.row, row);
  Blocks<T> blocks(x, x, columns, task.row.cluster);
  task.row.loss[row] = 0;
  if (!coef.counts()) return blocks.fill(0, to);
  EntriesView entries = task.entries.row(row);
  if (coef.kd == 0) entries.count = 0;
  const Scales scales = scales_of(coef, Kind::kSoftCe);
  const UnitTau mode = unit_tau_of(coef);
  const Smoothing smoothing = blocks.smoothing();
  const SparseSums sums = mode == UnitTau::kSquared    ? sums_of<UnitTau::kSquared>(blocks, entries, scales, mode)
                          : mode == UnitTau::kSeparate ? sums_of<UnitTau::kSeparate>(blocks, entries, scales, mode)
                                                       : sums_of<UnitTau::kShared>(blocks, entries, scales, mode);
  const int label = coef.label_column(columns);
  const SparseOutcome out = outcome_of(coef, columns, sums, entries, scales, task.subtract_entropy, smoothing,
                                       label >= 0 ? to_float(x[label]) : 0);
  task.row.loss[row] = out.row.loss;
  if (out.row.gradient.failed) return blocks.fill(out.row.loss, to);
  blocks.each_thread(
      [&](const Slice<T>& slice, int thread) { write_outside(slice, thread, kTestThreads, out, label, mode, to); });
  blocks.each_thread([&](const Slice<T>& slice, int thread) {
    write_entries(slice, entries, thread, kTestThreads, out, label, mode, to);
  });
}

template <typename T>
void run(const Task& task) {
  for (int64_t row = 0; row < task.row.rows; ++row) run_row<T>(task, row);
}

}  // namespace

extern "C" void sparse_cluster(const Task* task, int dtype) {
  if (dtype == 0) run<float>(*task);
  if (dtype == 1) run<__half>(*task);
  if (dtype == 2) run<__nv_bfloat16>(*task);
}
