// The sparse kernel of one thread-block cluster: loads a row into shared memory, masks the entries' columns there,
// reduces the sums, writes the gradient.
#pragma once

#include "row_kernel.h"
#include "sparse_row.h"

namespace kdfast::cuda {

struct SparseTask {
  RowTask row;
  EntryLists entries;
  bool subtract_entropy;
};

#ifdef KDFAST_HAS_CLUSTERS

template <UnitTau kUnitTau, typename T>
__device__ SparseSums sums_of(const Slice<T>& slice, Pack<T>* student, const EntriesView& entries, Scales scales) {
  SparseSums sums;
  take_entries<kUnitTau>(sums, slice, student, entries, threadIdx.x, kThreads, scales);
  __syncthreads();
  sweep_outside<kUnitTau>(sums, slice, threadIdx.x, kThreads, scales);
  return sums;
}

template <typename T>
__device__ SparseSums sums_of(const Slice<T>& slice, Pack<T>* student, const EntriesView& entries, Scales scales,
                              UnitTau mode) {
  if (mode == UnitTau::kSquared) return sums_of<UnitTau::kSquared>(slice, student, entries, scales);
  if (mode == UnitTau::kSeparate) return sums_of<UnitTau::kSeparate>(slice, student, entries, scales);
  return sums_of<UnitTau::kShared>(slice, student, entries, scales);
}

template <typename T>
__device__ void sparse_row(const SparseTask& task) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Exchange<SparseSums> all_sums;
  __shared__ Exchange<Smoothing> all_smoothing;
  __shared__ Arrivals arrivals;
  cg::cluster_group cluster = cg::this_cluster();
  const int64_t row = blockIdx.x / cluster.num_blocks();
  const RowCoefficients coef = coefficients_of(task.row, row);
  auto* const student = reinterpret_cast<Pack<T>*>(memory);
  Loader<T> loader(task.row, row, student, &arrivals);
  const Slice<T>& slice = loader.slice;
  if (!coef.counts()) return finish_uncounted(task.row, row, slice);
  loader.start(nullptr);
  cluster.barrier_arrive();  // a block must have started before another one writes to its memory
  EntriesView entries = task.entries.row(row);
  if (coef.kd == 0) entries.count = 0;
  const int label = coef.label_column(slice.columns);
  const float label_logit = logit_of<T>(task.row, row, label);
  const Scales scales = scales_of(coef, Kind::kSoftCe);
  const UnitTau mode = unit_tau_of(coef);
  loader.wait();
  cluster.barrier_wait();
  const Smoothing smoothing = smoothing_of_row(slice, coef, all_smoothing);  // of all columns, entries too
  SparseSums sums = sums_of(slice, student, entries, scales, mode);
  const auto merge_sums = [&](const SparseSums& a, const SparseSums& b) { return merge(a, b, scales, mode); };
  sums = reduce_cluster(sums, all_sums, SparseSums(), merge_sums);
  const SparseOutcome out =
      outcome_of(coef, slice.columns, sums, entries, scales, task.subtract_entropy, smoothing, label_logit);
  if (!finish_loss<T>(task.row, row, slice, out.row)) return;
  const GradientRow<T> to = gradient_row<T>(task.row, row);
  write_outside(slice, threadIdx.x, kThreads, out, label, mode, to);
  __syncthreads();  // the entries' gradient overwrites what their columns got
  write_entries(slice, entries, threadIdx.x, kThreads, out, label, mode, to);
}

#endif

}  // namespace kdfast::cuda
