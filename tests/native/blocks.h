// A row as a cluster's thread blocks hold it, and their threads one after another.
#include <cstring>
#include <vector>

#include "../../csrc/cuda/gradient.h"

using namespace kdfast;
using namespace kdfast::cuda;

constexpr int kThreads = 8;

// What both ops take, as the tests lay it out.
struct RowTask {
  const void* student;
  void* grad;
  int64_t rows;
  int columns;
  const float* coef;
  const int64_t* label;
  float smoothing;
  int cluster;
  float* loss;
};

inline RowCoefficients coefficients(const RowTask& task, int64_t row) {
  const float* coef = task.coef + row;
  RowCoefficients c = {coef[0], coef[task.rows], coef[2 * task.rows], coef[3 * task.rows], coef[4 * task.rows]};
  c.smoothing = task.smoothing;
  c.has_label = task.label != nullptr;
  if (c.has_label) c.label = task.label[row];
  return c;
}

// The padding is filled with what no column may show.
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

  template <typename Visit>
  void each_thread(Visit visit) const {
    for (const Slice<T>& slice : slices)
      for (int thread = 0; thread < kThreads; ++thread) visit(slice, thread);
  }

  template <typename Value, typename Part, typename Merge>
  Value reduce(Value total, Part part, Merge merge) const {
    each_thread([&](const Slice<T>& slice, int thread) { total = merge(total, part(slice, thread)); });
    return total;
  }

  Smoothing smoothing() const {
    return reduce(
        Smoothing(), [&](const Slice<T>& s, int thread) { return smoothing_of(s, thread, kThreads); },
        [](const Smoothing& l, const Smoothing& r) { return Smoothing{l.logits + r.logits, l.count + r.count}; });
  }

  void fill(float value, const GradientRow<T>& to) const {
    each_thread([&](const Slice<T>& slice, int thread) { fill_gradient(slice, thread, kThreads, value, to); });
  }
};

template <typename T>
GradientRow<T> gradient_row(const RowTask& task, const T* student, int64_t row) {
  T* const grad = static_cast<T*>(task.grad) + row * task.columns;
  return {grad, reinterpret_cast<uintptr_t>(grad) % 16 == reinterpret_cast<uintptr_t>(student) % 16};
}
