// A row's likeliest columns, and the probability of all others.

#if defined(KDFAST_CPU_SELECT_TOP_ROW_INL_H_) == defined(KDFAST_TARGET_TOGGLE)
#ifdef KDFAST_CPU_SELECT_TOP_ROW_INL_H_
#undef KDFAST_CPU_SELECT_TOP_ROW_INL_H_
#else
#define KDFAST_CPU_SELECT_TOP_ROW_INL_H_
#endif

#include <cmath>
#include <cstdint>

#include "chunked_row-inl.h"

KDFAST_BEFORE_NAMESPACE();
namespace kdfast {
namespace KDFAST_TARGET {

template <typename T, typename From>
class TopRow : ChunkedRow<T, From> {
  using Base = ChunkedRow<T, From>;
  using Base::chunks_, Base::e_, Base::exponentiate, Base::mass_, Base::sum_, Base::task_;

 public:
  TopRow(const SelectTask& task, void* workspace) : Base(task, workspace), kept_(task.entries) {}

  // The likeliest one first; of equal ones, the one with the smaller id. None has a probability of 0.
  Selection run() {
    if (!Base::sweep()) return {0, __builtin_nan("")};
    if (task_.capacity == 0) return {0, Base::lse(), 1};
    for (int64_t k = 0; k < chunks_; ++k)
      if (mass_[k] > lowest_) look(k);
    const double rest = others();
    sort();
    for (int64_t i = 0; i < count_; ++i) kept_[i].value = Base::mass_of(kept_[i].value) / Base::sum_exp_;
    return {count_, Base::lse(), rest};
  }

 private:
  // More than the exponentials' relative error: a column that they rule out is not among the likeliest.
  static constexpr double kSlack = 1 - 1e-3;

  void look(int64_t k) {
    exponentiate(k);
    const From* x = Base::chunk(k);
    const double scale = mass_[k] / sum_;
    for (int i = 0; i < kSelectChunk; ++i)
      if (double(e_[i]) * scale > lowest_) offer({int32_t(k * kSelectChunk + i), double(to_real(x[i]))});
  }

  static bool is_worse(const Entry& a, const Entry& b) { return a.value != b.value ? a.value < b.value : a.id > b.id; }

  // Keeps the entry if it is among the best `capacity` so far: a heap of logits with the worst one first.
  void offer(Entry entry) {
    if (count_ < task_.capacity) {
      int64_t at = count_++;
      for (; at > 0 && is_worse(entry, kept_[(at - 1) / 2]); at = (at - 1) / 2) kept_[at] = kept_[(at - 1) / 2];
      kept_[at] = entry;
    } else if (is_worse(kept_[0], entry)) {
      sink(entry, count_);
    } else {
      return;
    }
    if (count_ == task_.capacity) lowest_ = Base::mass_of(kept_[0].value) * kSlack;
  }

  // Replaces the heap's first entry and restores its order.
  void sink(Entry entry, int64_t size) {
    int64_t at = 0;
    for (int64_t below = 1; below < size; below = 2 * at + 1) {
      if (below + 1 < size && is_worse(kept_[below + 1], kept_[below])) ++below;
      if (!is_worse(kept_[below], entry)) break;
      kept_[at] = kept_[below];
      at = below;
    }
    kept_[at] = entry;
  }

  void sort() {
    for (int64_t size = count_ - 1; size > 0; --size) {
      const Entry last = kept_[size];
      kept_[size] = kept_[0];
      sink(last, size);
    }
  }

  // The probability of all columns that are not kept, as a sum of its own: 1 minus the kept ones' would cancel.
  double others() {
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t k = kept_[i].id / kSelectChunk;
      if (!__builtin_signbit(mass_[k])) mass_[k] = -mass_of_others(k);
    }
    double sum = 0;
    for (int64_t k = 0; k < chunks_; ++k) sum += ::fabs(mass_[k]);
    return sum / Base::sum_exp_;
  }

  double mass_of_others(int64_t k) {
    exponentiate(k);
    const From* x = Base::chunk(k);
    double sum = 0;
    for (int i = 0; i < kSelectChunk; ++i)
      if (is_worse({int32_t(k * kSelectChunk + i), double(to_real(x[i]))}, kept_[0])) sum += double(e_[i]);
    return sum * (mass_[k] / sum_);
  }

  Entry* kept_;
  int64_t count_ = 0;
  double lowest_ = 0;  // no column of less mass can still be kept
};

}  // namespace KDFAST_TARGET
}  // namespace kdfast
KDFAST_AFTER_NAMESPACE();

#endif  // per-target include guard
