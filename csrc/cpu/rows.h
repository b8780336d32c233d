// What the row ops share: reading their tensors, and running a row function over every row.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>

#include "../vector_data.h"
#include "memory.h"
#include "row.h"

// Makes a tensor over the caller's memory. From torch 2.11 on; null before.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* tensor, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace kdfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::Half:
      return Dtype::kHalf;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, float16 or bfloat16");
      return Dtype::kFloat;
  }
}

// A (outer, inner, columns) tensor, which it checks, as outer * inner rows of unit stride.
class StridedRows {
 public:
  explicit StridedRows(const Tensor& x)
      : data_(checked(x)),
        dtype_(dtype_of(x)),
        bytes_(int64_t(x.element_size())),
        inner_(x.size(1)),
        columns_(x.size(2)),
        stride_outer_(x.stride(0)),
        stride_inner_(x.stride(1)) {}
  // Rows that go with `count` others, of at least `columns` columns.
  StridedRows(const Tensor& x, int64_t count, int64_t columns) : StridedRows(x) {
    STD_TORCH_CHECK(x.size(0) * inner_ == count, "student, teacher and label_probs must have as many rows");
    STD_TORCH_CHECK(columns_ >= columns, "label_probs must have the student's columns");
  }
  Source operator[](int64_t row) const { return {at(row), dtype_, columns_}; }
  void* at(int64_t row) const { return data_ + (row / inner_ * stride_outer_ + row % inner_ * stride_inner_) * bytes_; }

 private:
  static char* checked(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 3 && (x.size(2) < 2 || x.stride(2) == 1), "expected (outer, inner, columns) rows");
    return static_cast<char*>(x.data_ptr());
  }

  char* data_;
  Dtype dtype_;
  int64_t bytes_, inner_, columns_, stride_outer_, stride_inner_;
};

// `count` numbers in the working type: float, or double for a float64 student.
class Numbers {
 public:
  Numbers(const Tensor& x, int64_t count) : data_(x.data_ptr()), is_double_(x.scalar_type() == ScalarType::Double) {
    STD_TORCH_CHECK(
        x.is_contiguous() && x.numel() == count && (is_double_ || x.scalar_type() == ScalarType::Float),
        "coef, tail and factor must be contiguous float32 or float64: 5 numbers a row, 1 a row, and 1 at all");
  }
  double operator[](int64_t i) const { return is_double_ ? ((double*)data_)[i] : ((float*)data_)[i]; }
  void set(int64_t i, double value) const {
    if (is_double_)
      ((double*)data_)[i] = value;
    else
      ((float*)data_)[i] = float(value);
  }

 private:
  void* data_;
  bool is_double_;
};

struct RowOutputs {
  Tensor loss;   // (rows,)
  Tensor parts;  // (4, rows): KD, CE, entropy, top-1 agreement; or (4, 0)
};

// How many rows a row op's student has.
inline int64_t count_rows(const Tensor& student) {
  STD_TORCH_CHECK(student.dim() == 3, "student must be (outer, inner, columns)");
  return student.size(0) * student.size(1);
}

inline bool is_double(const Tensor& student) { return student.scalar_type() == ScalarType::Double; }

// A gradient larger than this leaves the caches before it is read, and the page faults of fresh memory cost more than
// its arithmetic.
constexpr int64_t kLargeBytes = 8 << 20;

inline Tensor new_gradient(const Tensor& student) {
  const int64_t bytes = student.numel() * int64_t(student.element_size());
  if (bytes < kLargeBytes || !torch_from_blob) {
    const Tensor grad = torch::stable::new_empty(student, student.sizes(), student.scalar_type());
    advise_huge_pages(grad.data_ptr(), bytes);
    return grad;
  }
  const int64_t sizes[] = {student.size(0), student.size(1), student.size(2)};
  const int64_t strides[] = {sizes[1] * sizes[2], sizes[2], 1};
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(student.get(), &dtype));
  void* data = take_block(bytes);
  AtenTensorHandle grad;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      data, 3, sizes, strides, 0, dtype, aoti_torch_device_type_cpu(), -1, &grad, aoti_torch_layout_strided(), nullptr,
      0, [](void* freed, void*) { return_block(freed); }, nullptr));
  return Tensor(grad);
}

// Streaming pays from this row size on: shorter rows lose more to their unaligned ends than the fetches cost.
constexpr int64_t kStreamRowBytes = 3 << 10;

// A row whose coefficients are all 0: loss 0 and gradient exactly 0, even if its logits are infinite or NaN.
inline void clear_row(const RowTask& task, int64_t element_size) {
  if (task.grad) std::memset(task.grad, 0, size_t(task.student.size * element_size));
}

// The row with KD and CE both weighted 1 and no gradient: the parts report both, even where the loss leaves one out.
inline RowTask unweighted(RowTask task) {
  task.grad = nullptr;
  task.kd = 1;
  task.ce = task.label_probs.data || (task.label >= 0 && task.label < task.student.size) ? 1 : 0;
  return task;
}

// Calls run(begin, end) on pieces of the rows, on torch's threads. Each thread takes the next piece when it is done
// with one; a piece is just large enough to pay for that, so that no thread waits long for another at the end.
template <typename F>
void for_each_piece(int64_t rows, int64_t columns, F run) {
  constexpr int64_t kGrain = 1 << 15;
  const int64_t grain = columns < kGrain ? kGrain / (columns ? columns : 1) : 1;
  const int64_t pieces = (rows + grain - 1) / grain;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min<int64_t>(pieces, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t piece = next++; piece < pieces; piece = next++)
      run(piece * grain, std::min(rows, (piece + 1) * grain));
  });
}

// Calls row(i, task, workspace) -> RowResult for every row that counts, across torch's threads. `arguments` are those
// of a row op.
template <typename Arguments, typename F>
RowOutputs for_each_row(const Arguments& arguments, const Tensor* grad, F row) {
  const Tensor& student = arguments.student;
  const StridedRows students(student);
  const int64_t count = count_rows(student), columns = student.size(2);
  const int64_t element_size = int64_t(student.element_size());
  const Tensor& coef = arguments.coef;
  STD_TORCH_CHECK(coef.dim() == 2 && coef.size(0) == 5 && coef.size(1) == count, "coef must be (5, rows)");
  std::optional<StridedRows> probs, grads;
  if (arguments.label_probs) probs.emplace(*arguments.label_probs, count, columns);
  if (grad) grads.emplace(*grad);
  const Numbers numbers(coef, 5 * count);
  const int64_t* labels = arguments.label ? vector_data<int64_t>(*arguments.label, ScalarType::Long, count) : nullptr;
  RowOutputs out = {torch::stable::new_empty(coef, {count}, coef.scalar_type()),
                    torch::stable::new_empty(coef, {4, arguments.want_parts ? count : 0}, coef.scalar_type())};
  const Numbers loss(out.loss, count), parts(out.parts, out.parts.numel());
  for_each_piece(count, columns, [&](int64_t begin, int64_t end) {
    void* workspace = thread_workspace(kernels().workspace_bytes(columns));
    RowTask task;
    task.smoothing = arguments.smoothing;
    task.stream = grad && grad->data_ptr() != student.data_ptr() && columns * element_size >= kStreamRowBytes &&
                  grad->numel() * element_size >= kLargeBytes;
    for (int64_t i = begin; i < end; ++i) {
      task.student = students[i];
      if (probs) task.label_probs = (*probs)[i];
      if (labels) task.label = labels[i];
      if (grads) task.grad = grads->at(i);
      task.tau_s = numbers[i];
      task.tau_t = numbers[count + i];
      task.kd = numbers[2 * count + i];
      task.ce = numbers[3 * count + i];
      task.z_weight = numbers[4 * count + i];
      task.want_parts = arguments.want_parts;
      const bool counts = task.kd != 0 || task.ce != 0 || task.z_weight != 0;
      const RowResult result = counts ? row(i, task, workspace) : RowResult();
      if (!counts) clear_row(task, element_size);
      loss.set(i, result.loss);
      if (!arguments.want_parts) continue;
      const double values[] = {result.kd, result.ce, result.entropy, result.top1};
      for (int p = 0; p < 4; ++p) parts.set(p * count + i, values[p]);
    }
    if (task.stream) kernels().fence();
  });
  return out;
}

}  // namespace kdfast
