// A row as a cluster's thread blocks hold it, and their threads one after another.
#include <cstring>
#include <vector>

#include "../../../csrc/cuda/gradient.h"
#include "../../../csrc/cuda/plan.h"

using namespace kdfast;
using namespace kdfast::cuda;

constexpr int kTestThreads = 8;

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
  return coefficients_of(task.coef, task.label, task.smoothing, row, task.rows);
}

// The padding is filled with what no column may show.
template <typename T>
struct Blocks {
  std::vector<Pack<T>> student, teacher;
  std::vector<Slice<T>> slices;

  Blocks(const T* x, const T* y, int columns, int cluster) {
    constexpr int kLanes = Pack<T>::kLanes;
    const int phase = int(phase_of(x) / sizeof(T)), each = packs_of_block(columns, sizeof(T), cluster);
    student.resize(cluster * each), teacher.resize(cluster * each);
    for (int i = 0; i < cluster * each * kLanes; ++i) {
      const bool inside = i >= phase && i < phase + columns;
      student[i / kLanes].lane[i % kLanes] = inside ? x[i - phase] : from_float<T>(1e30f);
      teacher[i / kLanes].lane[i % kLanes] = inside ? y[i - phase] : from_float<T>(1e30f);
    }
    for (int block = 0; block < cluster; ++block) {
      Slice<T> slice = slice_of(x, columns, each, block);
      slice.student = &student[block * each];
      slice.teacher = &teacher[block * each];
      slices.push_back(slice);
    }
  }

  template <typename Visit>
  void each_thread(Visit visit) const {
    for (const Slice<T>& slice : slices)
      for (int thread = 0; thread < kTestThreads; ++thread) visit(slice, thread);
  }

  template <typename Value, typename Part, typename Merge>
  Value reduce(Value total, Part part, Merge merge) const {
    each_thread([&](const Slice<T>& slice, int thread) { total = merge(total, part(slice, thread)); });
    return total;
  }

  Smoothing smoothing() const {
    return reduce(
        Smoothing(), [&](const Slice<T>& s, int thread) { return smoothing_of(s, thread, kTestThreads); },
        [](const Smoothing& l, const Smoothing& r) { return Smoothing{l.logits + r.logits, l.count + r.count}; });
  }

  void fill(float value, const GradientRow<T>& to) const {
    each_thread([&](const Slice<T>& slice, int thread) { fill_gradient(slice, thread, kTestThreads, value, to); });
  }
};

template <typename T>
GradientRow<T> gradient_row(const RowTask& task, const T* student, int64_t row) {
  T* const grad = static_cast<T*>(task.grad) + row * task.columns;
  return {grad, phase_of(grad) == phase_of(student)};
}
