// The one-read kernel's threads, one after another: its arithmetic and its way of sharing out a row, without a GPU.
#include "../../csrc/cuda/dense_row.h"

#include <cstring>
#include <vector>

using namespace kdfast;
using namespace kdfast::cuda;

namespace {

constexpr int kThreads = 8;

struct Task {
  const void *student, *teacher;
  void* grad;
  int64_t rows;
  int columns;
  const float* coef;
  const int64_t* label;
  float smoothing;
  int kind;
  double a, b, scale;
  int cluster;
  float* loss;
};

RowCoefficients coefficients(const Task& task, int64_t row) {
  const float* coef = task.coef + row;
  RowCoefficients c = {coef[0], coef[task.rows], coef[2 * task.rows], coef[3 * task.rows], coef[4 * task.rows]};
  c.smoothing = task.smoothing;
  c.has_label = task.label != nullptr;
  if (c.has_label) c.label = task.label[row];
  return c;
}

// A row as the cluster's blocks hold it, the padding filled with what no column may show.
template <typename T>
struct Blocks {
  std::vector<Pack<T>> student, teacher;
  std::vector<Slice<T>> slices;

  Blocks(const T* x, const T* y, int columns, int cluster) {
    constexpr int kLanes = Pack<T>::kLanes;
    const int phase = int(reinterpret_cast<uintptr_t>(x) % sizeof(Pack<T>) / sizeof(T));
    const int packs = (columns + phase + kLanes - 1) / kLanes, each = (packs + cluster - 1) / cluster;
    student.resize(packs), teacher.resize(packs);
    for (int i = 0; i < packs * kLanes; ++i) {
      const bool inside = i >= phase && i < phase + columns;
      student[i / kLanes].lane[i % kLanes] = inside ? x[i - phase] : from_float<T>(1e30f);
      teacher[i / kLanes].lane[i % kLanes] = inside ? y[i - phase] : from_float<T>(1e30f);
    }
    for (int before = 0; before < packs; before += each)
      slices.push_back(
          {&student[before], &teacher[before], std::min(each, packs - before), before * kLanes - phase, columns});
  }

  template <typename Value, typename Part, typename Merge>
  Value reduce(Value total, Part part, Merge merge) const {
    for (const Slice<T>& slice : slices)
      for (int thread = 0; thread < kThreads; ++thread) total = merge(total, part(slice, thread));
    return total;
  }
};

template <Kind kKind, typename T>
void run_row(const Task& task, int64_t row) {
  const T *x = static_cast<const T*>(task.student) + row * task.columns,
          *y = static_cast<const T*>(task.teacher) + row * task.columns;
  T* const grad = static_cast<T*>(task.grad) + row * task.columns;
  const GradientRow<T> to = {grad, reinterpret_cast<uintptr_t>(grad) % 16 == reinterpret_cast<uintptr_t>(x) % 16};
  const Divergence divergence = {kKind, task.a, task.b, task.scale, false};
  const RowCoefficients coef = coefficients(task, row);
  const Blocks<T> blocks(x, y, task.columns, task.cluster);
  const auto each_thread = [&](auto visit) {
    for (const Slice<T>& slice : blocks.slices)
      for (int thread = 0; thread < kThreads; ++thread) visit(slice, thread);
  };
  const auto fill = [&](float value) {
    each_thread([&](const Slice<T>& slice, int thread) { fill_gradient(slice, thread, kThreads, value, to); });
  };
  task.loss[row] = 0;
  if (!coef.counts()) return fill(0);
  const bool teacher = coef.kd != 0;
  const Scales scales = scales_of(coef, kKind);
  const AtOne mode = at_one(coef);
  const Sums sums = blocks.reduce(
      Sums(),
      [&](const Slice<T>& s, int thread) {
        return sweep<is_forward(kKind)>(s, thread, kThreads, scales, teacher, mode);
      },
      [&](const Sums& l, const Sums& r) { return merge(l, r, scales, mode); });
  const Normaliser normaliser = normaliser_of(sums, scales, mode);
  Values values = {0, 0};
  if constexpr (!is_forward(kKind)) {
    const auto part = [&](const Slice<T>& s, int thread) {
      return values_of<kKind>(s, thread, kThreads, normaliser, divergence);
    };
    const auto add = [](const Values& l, const Values& r) { return Values{l.value + r.value, l.h + r.h}; };
    if (teacher) values = blocks.reduce(values, part, add);
  }
  const Smoothing smoothing = blocks.reduce(
      Smoothing(), [&](const Slice<T>& s, int thread) { return smoothing_of(s, thread, kThreads); },
      [](const Smoothing& l, const Smoothing& r) { return Smoothing{l.logits + r.logits, l.count + r.count}; });
  const int label = coef.label_column(task.columns);
  const float label_logit = label >= 0 ? to_float(x[label]) : 0;
  const RowOutcome out = outcome_of(coef, divergence, task.columns, sums, normaliser, values, smoothing, label_logit);
  task.loss[row] = out.loss;
  if (out.gradient.failed) return fill(out.loss);
  each_thread([&](const Slice<T>& slice, int thread) {
    write_gradient<kKind>(slice, thread, kThreads, out.gradient, normaliser, divergence, teacher, label, mode, to);
  });
}

template <typename T>
void run(const Task& task) {
  static constexpr void (*kRow[])(const Task&, int64_t) = {
      run_row<Kind::kForwardKl, T>,     run_row<Kind::kSoftCe, T>, run_row<Kind::kReverseKl, T>,
      run_row<Kind::kSymmetricKl, T>,   run_row<Kind::kJsd, T>,    run_row<Kind::kSkewForwardKl, T>,
      run_row<Kind::kSkewReverseKl, T>, run_row<Kind::kTvd, T>,    run_row<Kind::kAlphaBeta, T>};
  for (int64_t row = 0; row < task.rows; ++row) kRow[task.kind](task, row);
}

}  // namespace

extern "C" void dense_cluster(const Task* task, int dtype) {
  if (dtype == 0) run<float>(*task);
  if (dtype == 1) run<__half>(*task);
  if (dtype == 2) run<__nv_bfloat16>(*task);
}
