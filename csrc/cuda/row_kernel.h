// What the one-read kernels share: a row's coefficients, its loading into shared memory, and its ends (nothing to do,
// or a NaN).
#pragma once

#include "cluster.h"
#include "gradient.h"
#include "strided_rows.h"

namespace kdfast::cuda {

// What every one-read op takes besides its teacher.
struct RowTask {
  StridedRows student, grad;  // grad.data == nullptr: not wanted
  int64_t rows;
  int columns;
  const float* coef;     // (5, rows)
  const int64_t* label;  // (rows,); nullptr: none
  float smoothing;
  float* loss;  // (rows,)
  int packs;    // of each block but the last
};

#ifdef KDFAST_HAS_CLUSTERS

__device__ inline RowCoefficients coefficients_of(const RowTask& task, int64_t row) {
  return coefficients_of(task.coef, task.label, task.smoothing, row, task.rows);
}

// A column's logit, read before an in-place gradient may overwrite it; 0 for column -1.
template <typename T>
__device__ float logit_of(const RowTask& task, int64_t row, int column) {
  return column >= 0 ? to_float(task.student.row<T>(row)[column]) : 0.0f;
}

template <typename T>
__device__ GradientRow<T> gradient_row(const RowTask& task, int64_t row) {
  T* const grad = task.grad.row<T>(row);
  return {grad, phase_of(grad) == phase_of(task.student.row<T>(row))};
}

template <typename T>
__device__ Smoothing smoothing_of_row(const Slice<T>& slice, const RowCoefficients& row,
                                      Exchange<Smoothing>& exchange) {
  if (row.ce == 0 || row.smoothing == 0) return {};
  const auto add = [](const Smoothing& a, const Smoothing& b) {
    return Smoothing{a.logits + b.logits, a.count + b.count};
  };
  return reduce_cluster(smoothing_of(slice, threadIdx.x, kThreads), exchange, Smoothing(), add);
}

__device__ inline bool is_first_thread() { return cg::this_cluster().block_rank() == 0 && threadIdx.x == 0; }

template <typename T>
__device__ void finish_uncounted(const RowTask& task, int64_t row, const Slice<T>& slice) {
  if (is_first_thread()) task.loss[row] = 0;
  if (task.grad.data) fill_gradient(slice, threadIdx.x, kThreads, 0.0f, gradient_row<T>(task, row));
}

// Writes the loss, and a failed row's NaN gradient. Returns whether a gradient remains to be written.
template <typename T>
__device__ bool finish_loss(const RowTask& task, int64_t row, const Slice<T>& slice, const RowOutcome& out) {
  if (is_first_thread()) task.loss[row] = out.loss;
  if (task.grad.data && out.gradient.failed)
    fill_gradient(slice, threadIdx.x, kThreads, out.loss, gradient_row<T>(task, row));
  return task.grad.data && !out.gradient.failed;
}

// Loads a block's part of a row into shared memory.
template <typename T>
class Loader {
 public:
  __device__ Loader(const RowTask& task, int64_t row, Pack<T>* memory, Arrivals* arrivals)
      : student_(task.student.row<T>(row)),
        student_packs_(memory),
        teacher_packs_(memory + task.packs),
        arrivals_(arrivals) {
    if (threadIdx.x == 0) arrivals->init(1);
    __syncthreads();
    slice = slice_of(student_, task.columns, task.packs, int(cg::this_cluster().block_rank()));
    slice.student = student_packs_;
    slice.teacher = teacher_packs_;
    first_ = slice.packs && !slice.is_whole(0) ? 1 : 0;
    last_ = slice.packs > first_ && !slice.is_whole(slice.packs - 1) ? slice.packs - 1 : slice.packs;
  }

  // Starts the copies. Without a teacher's row its memory stays as it is.
  __device__ void start(const T* teacher) {
    load(student_packs_, student_);
    if (teacher) load(teacher_packs_, teacher);
    if (threadIdx.x == 0) arrivals_->expect(bytes_);
  }

  // Must be called by all threads of the block before they read.
  __device__ void wait() const {
    arrivals_->wait();
    __syncthreads();
  }

  Slice<T> slice;

 private:
  // The copy engine takes whole packs, if the row is aligned as the student's row is; threads copy the other columns.
  __device__ void load(Pack<T>* memory, const T* row) {
    const T* whole = row + slice.column(first_);
    const bool bulk = last_ > first_ && phase_of(whole) == 0;
    if (bulk && threadIdx.x == 0) {
      const uint32_t bytes = uint32_t(last_ - first_) * sizeof(Pack<T>);
      copy_bulk(memory + first_, whole, bytes, *arrivals_);
      bytes_ += bytes;
    }
    for (int pack = threadIdx.x; pack < slice.packs; pack += kThreads) {
      if (bulk && pack >= first_ && pack < last_) continue;
      for (int i = 0; i < Pack<T>::kLanes; ++i) {
        const int column = slice.column(pack) + i;
        if (slice.has(column)) memory[pack].lane[i] = row[column];
      }
    }
  }

  const T* student_;
  Pack<T>*student_packs_, *teacher_packs_;
  Arrivals* arrivals_;
  int first_, last_;  // the packs without padding
  uint32_t bytes_ = 0;
};

#endif

}  // namespace kdfast::cuda
