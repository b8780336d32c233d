// The unbiased samplers on one row: finds the columns that given points of the cumulative probability fall in, without
// sorting and with one full sweep. Only chunks that a point falls in, or that are heavy enough to hold an entry above
// tau, are looked at again.

#if defined(KDFAST_CPU_SELECT_SELECT_ROW_INL_H_) == defined(KDFAST_TARGET_TOGGLE)
#ifdef KDFAST_CPU_SELECT_SELECT_ROW_INL_H_
#undef KDFAST_CPU_SELECT_SELECT_ROW_INL_H_
#else
#define KDFAST_CPU_SELECT_SELECT_ROW_INL_H_
#endif

#include <cmath>
#include <cstdint>

#include "chunked_row-inl.h"

KDFAST_BEFORE_NAMESPACE();
namespace kdfast {
namespace KDFAST_TARGET {

// The grid of systematic sampling: points at (k + offset) * step.
struct GridPoints {
  double step, offset, value;  // `value` is what a column on the grid gets
  double next = offset * step;

  double limit() const { return step; }
  // Moves to the first point that is not below `mass`. Computed, not counted up to: the grid may be finer than the
  // rounding of `mass`.
  double pass(double mass) {
    const double passed = ::ceil(mass / step - offset);
    next = (passed + offset) * step;
    if (next < mass) next = (passed + 1 + offset) * step;
    return value;
  }
  // What rounding has left over after the last column. A row without an entry above tau always has one on the grid.
  double remaining(int64_t entries) const { return entries == 0 ? value : 0; }
};

// Draws with replacement at ascending positions.
struct DrawnPoints {
  const double* position;
  int64_t left;
  double scale;
  double next = position[0] * scale;

  double limit() const { return Real<double>::kInf; }
  double pass(double mass) {
    const int64_t before = left;
    while (next < mass) {
      ++position;
      next = --left > 0 ? *position * scale : Real<double>::kInf;
    }
    return double(before - left);
  }
  double remaining(int64_t) const { return double(left); }
};

template <typename T, typename From>
class SelectRow : ChunkedRow<T, From> {
  using Base = ChunkedRow<T, From>;
  using Base::chunks_, Base::e_, Base::exponentiate, Base::groups_, Base::kGroup, Base::mass_;
  using Base::sum_, Base::task_, Base::sum_exp_;

 public:
  SelectRow(const SelectTask& task, void* workspace) : Base(task, workspace) {}

  Selection run() {
    if (!Base::sweep()) return {0, __builtin_nan("")};
    if (task_.draws > 0) {
      DrawnPoints points = {task_.points, task_.draws, sum_exp_};
      walk(points);
    } else {
      GridPoints points = {task_.tau * sum_exp_, task_.points[0], task_.tau};
      walk(points);
    }
    return {count_, Base::lse()};
  }

 private:
  // ---- the walk ---------------------------------------------------------------------------------------------------

  template <typename Points>
  void walk(Points& points) {
    double before = 0;
    for (int64_t k = 0; k < chunks_; ++k) {
      if (mass_[k] <= points.limit() && before + mass_[k] <= points.next)
        before += mass_[k];
      else
        before = scan(k, before, points);
    }
    const double remaining = points.remaining(count_);
    if (remaining > 0) add_to_last(remaining);
  }

  // Scans chunk k column by column. `before` is the mass of all columns before it that do not exceed the points' limit;
  // returns the same for the columns up to its end.
  template <typename Points>
  double scan(int64_t k, double before, Points& points) {
    exponentiate(k);
    // Columns share out the sweep's sum of this chunk, which also places the chunks after it.
    const double scale = mass_[k] / sum_, limit = points.limit();
    double at = before, above = 0;
    for (int g = 0; g < kSelectChunk / kGroup; ++g) {
      const double mass = groups_[g] * scale;
      if (mass <= limit && at + mass <= points.next) {
        at += mass;
        continue;
      }
      for (int i = g * kGroup; i < (g + 1) * kGroup; ++i) {
        const double m = double(e_[i]) * scale;
        if (m > limit) {
          above += m;
          emit(k * kSelectChunk + i, m / sum_exp_);
        } else {
          at += m;
          if (points.next < at && m > 0) emit(k * kSelectChunk + i, points.pass(at));
        }
      }
    }
    return before + (mass_[k] > above ? mass_[k] - above : 0);
  }

  void emit(int64_t column, double value) {
    if (count_ < task_.capacity) task_.entries[count_++] = {int32_t(column), value};
  }

  // Gives what rounding has left over to the last column whose probability is not 0.
  void add_to_last(double value) {
    int64_t k = chunks_ - 1;
    while (!(mass_[k] > 0)) --k;
    exponentiate(k);
    int i = kSelectChunk - 1;
    while (i > 0 && !(e_[i] > 0)) --i;
    const int32_t id = int32_t(k * kSelectChunk + i);
    if (count_ > 0 && task_.entries[count_ - 1].id == id)
      task_.entries[count_ - 1].value += value;
    else
      emit(id, value);
  }

  int64_t count_ = 0;
};

}  // namespace KDFAST_TARGET
}  // namespace kdfast
KDFAST_AFTER_NAMESPACE();

#endif  // per-target include guard
