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

  // The likeliest one first; of equal ones, the one with the smaller id. None is masked. They are chosen by their
  // logits, so that columns whose exponentials underflow have an order too.
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
  // More than the exponentials' relative error: a chunk that they rule out has none of the likeliest columns.
  static constexpr double kSlack = 1 - 1e-3;
  // Of the row's mass: chunks of less have columns that underflow, and rule out nothing.
  static constexpr double kSound = 1e-30;

  void look(int64_t k) {
    const From* x = Base::chunk(k);
    if (!(double(maximum<T>(x, kSelectChunk)) > least_)) return;
    for (int i = 0; i < kSelectChunk; ++i) {
      const double logit = double(to_real(x[i]));
      if (logit > least_) offer({int32_t(k * kSelectChunk + i), logit});
    }
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
    if (count_ < task_.capacity) return;
    least_ = kept_[0].value;
    const double mass = Base::mass_of(least_);
    lowest_ = mass > kSound ? mass * kSlack : -1;
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
    return sum > 0 ? sum * (mass_[k] / sum_) : 0;
  }

  Entry* kept_;
  int64_t count_ = 0;
  double least_ = -Real<double>::kInf;  // no column of a smaller logit, or of this one, can still be kept
  double lowest_ = -1;                  // nor one in a chunk of less mass; -1: any chunk may have one
};

}  // namespace KDFAST_TARGET
}  // namespace kdfast
KDFAST_AFTER_NAMESPACE();

#endif  // per-target include guard
