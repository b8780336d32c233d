// A thread-block cluster's way through a row: its logits into shared memory, sums, and the gradient out.
#pragma once

#include "cluster.h"
#include "dense_row.h"
#include "rows_view.h"

namespace kdfast::cuda {

struct DenseTask {
  RowsView student, teacher, grad;  // grad.data == nullptr: not wanted
  int64_t rows;
  int columns;
  const float* coef;     // (5, rows)
  const int64_t* label;  // (rows,); nullptr: none
  float smoothing;
  Divergence divergence;
  float* loss;  // (rows,)
  int packs;    // of each block but the last
};

#ifdef KDFAST_HAS_CLUSTERS

__device__ RowCoefficients coefficients(const DenseTask& task, int64_t row) {
  const float* coef = task.coef + row;
  RowCoefficients c = {coef[0], coef[task.rows], coef[2 * task.rows], coef[3 * task.rows], coef[4 * task.rows]};
  c.smoothing = task.smoothing;
  c.has_label = task.label != nullptr;
  if (c.has_label) c.label = task.label[row];
  return c;
}

// A row's part in shared memory, on its way there.
template <typename T>
class Loader {
 public:
  __device__ Loader(const DenseTask& task, int64_t row, Pack<T>* memory, Arrivals* arrivals)
      : memory_(memory), arrivals_(arrivals) {
    const int block = int(cg::this_cluster().block_rank());
    const T* student = task.student.row<T>(row);
    const int phase = int(reinterpret_cast<uintptr_t>(student) % sizeof(Pack<T>) / sizeof(T));
    const int packs = (task.columns + phase + kLanes - 1) / kLanes, before = block * task.packs;
    slice.student = memory;
    slice.teacher = memory + task.packs;
    slice.packs = ::max(0, ::min(packs - before, task.packs));
    slice.first = before * kLanes - phase;
    slice.columns = task.columns;
    first_ = slice.packs && !slice.is_whole(0) ? 1 : 0;
    last_ = slice.packs > first_ && !slice.is_whole(slice.packs - 1) ? slice.packs - 1 : slice.packs;
  }

  __device__ void start(const DenseTask& task, int64_t row, bool teacher) {
    load(memory_, task.student.row<T>(row));
    if (teacher) load(memory_ + task.packs, task.teacher.row<T>(row));
    if (threadIdx.x == 0) arrivals_->expect(bytes_);
  }

  // All of the block's threads call it, before they read.
  __device__ void wait() const {
    arrivals_->wait();
    __syncthreads();
  }

  Slice<T> slice;

 private:
  static constexpr int kLanes = Pack<T>::kLanes;

  // Whole packs by the copy engine where the row is aligned as the student's; everything else column by column.
  __device__ void load(Pack<T>* memory, const T* row) {
    const T* whole = row + slice.column(first_);
    const bool bulk = last_ > first_ && reinterpret_cast<uintptr_t>(whole) % sizeof(Pack<T>) == 0;
    if (bulk && threadIdx.x == 0) {
      const uint32_t bytes = uint32_t(last_ - first_) * sizeof(Pack<T>);
      copy_bulk(memory + first_, whole, bytes, *arrivals_);
      bytes_ += bytes;
    }
    for (int pack = threadIdx.x; pack < slice.packs; pack += kThreads) {
      if (bulk && pack >= first_ && pack < last_) continue;
      for (int i = 0; i < kLanes; ++i) {
        const int column = slice.column(pack) + i;
        if (slice.has(column)) memory[pack].lane[i] = row[column];
      }
    }
  }

  Pack<T>* memory_;
  Arrivals* arrivals_;
  int first_, last_;  // the packs without padding
  uint32_t bytes_ = 0;
};

// The logit of the row's label: read before any block of the cluster may write over it.
template <typename T>
__device__ float label_logit(const DenseTask& task, const RowCoefficients& coef, int64_t row) {
  const int column = coef.label_column(task.columns);
  return column >= 0 ? to_float(task.student.row<T>(row)[column]) : 0.0f;
}

struct Add {
  __device__ Values operator()(const Values& a, const Values& b) const { return {a.value + b.value, a.h + b.h}; }
  __device__ Smoothing operator()(const Smoothing& a, const Smoothing& b) const {
    return {a.logits + b.logits, a.count + b.count};
  }
};

template <typename T>
__device__ GradientRow<T> gradient_row(const DenseTask& task, int64_t row) {
  T* const grad = task.grad.row<T>(row);
  const auto phase = [](const T* x) { return reinterpret_cast<uintptr_t>(x) % sizeof(Pack<T>); };
  return {grad, phase(grad) == phase(task.student.row<T>(row))};
}

template <Kind kKind, typename T>
__device__ void dense_row(const DenseTask& task) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Exchange<Sums> all_sums;
  __shared__ Exchange<Values> all_values;
  __shared__ Exchange<Smoothing> all_smoothing;
  __shared__ Arrivals arrivals;
  cg::cluster_group cluster = cg::this_cluster();
  const int64_t row = blockIdx.x / cluster.num_blocks();
  const RowCoefficients coef = coefficients(task, row);
  const bool teacher = coef.kd != 0, writes = task.grad.data != nullptr;
  if (threadIdx.x == 0) arrivals.init(1);
  __syncthreads();
  Loader<T> loader(task, row, reinterpret_cast<Pack<T>*>(memory), &arrivals);
  const Slice<T>& slice = loader.slice;
  if (!coef.counts()) {
    if (writes) fill_gradient(slice, threadIdx.x, kThreads, 0.0f, gradient_row<T>(task, row));
    if (cluster.block_rank() == 0 && threadIdx.x == 0) task.loss[row] = 0;
    return;
  }
  loader.start(task, row, teacher);
  cluster.barrier_arrive();  // before a block's memory is written to, it must have started
  const float label = label_logit<T>(task, coef, row);
  const Scales scales = scales_of(coef, kKind);
  const AtOne mode = at_one(coef);
  loader.wait();
  Sums sums = sweep<is_forward(kKind)>(slice, threadIdx.x, kThreads, scales, teacher, mode);
  cluster.barrier_wait();
  const auto merge_sums = [&](const Sums& a, const Sums& b) { return merge(a, b, scales, mode); };
  sums = reduce_cluster(sums, all_sums, Sums(), merge_sums);
  const Normaliser normaliser = normaliser_of(sums, scales, mode);
  Values values = {0, 0};
  if constexpr (!is_forward(kKind)) {
    if (teacher) values = values_of<kKind>(slice, threadIdx.x, kThreads, normaliser, task.divergence);
    values = reduce_cluster(values, all_values, Values{0, 0}, Add());
  }
  Smoothing smoothing;
  if (task.smoothing != 0)
    smoothing = reduce_cluster(smoothing_of(slice, threadIdx.x, kThreads), all_smoothing, Smoothing(), Add());
  const RowOutcome out = outcome_of(coef, task.divergence, task.columns, sums, normaliser, values, smoothing, label);
  if (cluster.block_rank() == 0 && threadIdx.x == 0) task.loss[row] = out.loss;
  if (!writes) return;
  const GradientRow<T> to = gradient_row<T>(task, row);
  if (out.gradient.failed)
    fill_gradient(slice, threadIdx.x, kThreads, out.loss, to);
  else
    write_gradient<kKind>(slice, threadIdx.x, kThreads, out.gradient, normaliser, task.divergence, teacher,
                          coef.label_column(task.columns), mode, to);
}

#endif

}  // namespace kdfast::cuda
