// The dense kernel of one thread-block cluster: loads a row into shared memory, reduces its sums, writes the gradient.
#pragma once

#include "dense_row.h"
#include "row_kernel.h"

namespace kdfast::cuda {

struct DenseTask {
  RowTask row;
  StridedRows teacher;
  Divergence divergence;
};

#ifdef KDFAST_HAS_CLUSTERS

template <Kind kKind, typename T>
__device__ void dense_row(const DenseTask& task) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Exchange<Sums> all_sums;
  __shared__ Exchange<Values> all_values;
  __shared__ Exchange<Smoothing> all_smoothing;
  __shared__ Arrivals arrivals;
  cg::cluster_group cluster = cg::this_cluster();
  const int64_t row = blockIdx.x / cluster.num_blocks();
  const RowCoefficients coef = coefficients_of(task.row, row);
  Loader<T> loader(task.row, row, reinterpret_cast<Pack<T>*>(memory), &arrivals);
  const Slice<T>& slice = loader.slice;
  if (!coef.counts()) return finish_uncounted(task.row, row, slice);
  const bool teacher = coef.kd != 0;
  loader.start(teacher ? task.teacher.row<T>(row) : nullptr);
  cluster.barrier_arrive();  // a block must have started before another one writes to its memory
  const int label = coef.label_column(slice.columns);
  const float label_logit = logit_of<T>(task.row, row, label);
  const Scales scales = scales_of(coef, kKind);
  const UnitTau mode = unit_tau_of(coef);
  loader.wait();
  Sums sums = sweep<is_forward(kKind)>(slice, threadIdx.x, kThreads, scales, teacher, mode);
  cluster.barrier_wait();
  const auto merge_sums = [&](const Sums& a, const Sums& b) { return merge(a, b, scales, mode); };
  sums = reduce_cluster(sums, all_sums, Sums(), merge_sums);
  const SoftmaxStats stats = softmax_stats(sums, scales, mode);
  Values values = {0, 0};
  if constexpr (!is_forward(kKind)) {
    if (teacher) values = values_of<kKind>(slice, threadIdx.x, kThreads, stats, task.divergence);
    const auto add = [](const Values& a, const Values& b) { return Values{a.value + b.value, a.h + b.h}; };
    values = reduce_cluster(values, all_values, Values{0, 0}, add);
  }
  const Smoothing smoothing = smoothing_of_row(slice, coef, all_smoothing);
  const RowOutcome out =
      outcome_of<kKind>(coef, task.divergence, slice.columns, sums, stats, values, smoothing, label_logit);
  if (!finish_loss<T>(task.row, row, slice, out)) return;
  write_gradient<kKind>(slice, threadIdx.x, kThreads, out.gradient, stats, task.divergence, teacher, label, mode,
                        gradient_row<T>(task.row, row));
}

#endif

}  // namespace kdfast::cuda
