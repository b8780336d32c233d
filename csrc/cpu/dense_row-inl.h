// A student row against a row of teacher logits: every divergence, CE and z-loss in one sweep.
// A sparse row whose tail has a prototype comes here too: its logits are the logarithms of its probabilities.

#if defined(KDFAST_CPU_DENSE_ROW_INL_H_) == defined(KDFAST_TARGET_TOGGLE)
#ifdef KDFAST_CPU_DENSE_ROW_INL_H_
#undef KDFAST_CPU_DENSE_ROW_INL_H_
#else
#define KDFAST_CPU_DENSE_ROW_INL_H_
#endif

#include <cmath>
#include <cstdint>

#include "../divergence.h"
#include "../rowmath.h"
#include "row_sweep-inl.h"
#include "tail_prototype-inl.h"

KDFAST_BEFORE_NAMESPACE();
namespace kdfast {
namespace KDFAST_TARGET {

template <typename T>
class DenseRow : RowSweep<T> {
  using Base = RowSweep<T>;
  using V = Vec<T>;
  using Base::s_, Base::t_, Base::task_, Base::tile_g_, Base::tile_t_;

 public:
  DenseRow(const Divergence& divergence, const RowTask& task, void* workspace)
      : Base(task, is_tempered(divergence, task), !divergence.standardize && divergence.kind != Kind::kDkd, workspace),
        divergence_(divergence),
        active_(task.kd != 0),
        tempered_(is_tempered(divergence, task)),
        prototype_(task, this->entry_tiles_) {
    t_.columns = task.shared;
    t_.set_tau(task.tau_t);
  }

  RowResult run() {
    if (is_bad() || (active_ && !prepare_prototype())) return this->fail();
    if (active_ && divergence_.standardize) {
      moments_s_ = moments(task_.student);
      moments_t_ = moments(task_.teacher);
    }
    sweep();
    this->finish_softmax();
    if (tempered_) t_.finish();
    const double ce = this->finish_truth();
    RowResult result = this->total(active_ ? divergence_.scale * value() : 0, ce);
    if (result.loss != result.loss) return this->fail();
    if (task_.want_parts) describe(result);
    if (task_.grad) gradient();
    return result;
  }

 private:
  struct Moments {
    double mean = 0, inverse_std = 1, count = 1;
  };

  static bool is_tempered(const Divergence& divergence, const RowTask& task) {
    return task.kd != 0 && divergence.kind != Kind::kLogitMse;
  }

  // Forward KL's gradient is q - p, and its value is a sum that the first sweep makes: the logits are read once.
  bool is_forward() const { return kdfast::is_forward(divergence_.kind) || divergence_.kind == Kind::kDkd; }

  bool is_bad() const {
    const bool good_tau = task_.tau_s > 0 && task_.tau_t > 0 && 1 / task_.tau_s > 0 && 1 / task_.tau_t > 0;
    const bool good_target = task_.label >= 0 && task_.label < task_.shared;
    return this->bad_label() || (active_ && (!good_tau || (divergence_.kind == Kind::kDkd && !good_target)));
  }

  int64_t shared_tiles() const { return tile_count(task_.shared); }

  // False where an entry's id or the prototype's index is out of range.
  bool prepare_prototype() {
    if (!prototype_.exists()) return true;
    if (prototype_.is_bad() || !this->entry_tiles_.sort(task_.entries, this->columns(), task_.shared)) return false;
    prototype_scale_ = prototype_.scale_of_row(tile_t_);
    return true;
  }

  Moments moments(const Source& row) {
    double sum = 0, square = 0, low = Real<double>::kInf, high = -low;
    Moments m;
    m.count = 0;
    each_finite(row, [&](double x) {
      sum += x;
      m.count += 1;
      low = x < low ? x : low;
      high = x > high ? x : high;
    });
    if (m.count == 0) return m;
    m.mean = sum / m.count;
    each_finite(row, [&](double x) { square += (x - m.mean) * (x - m.mean); });
    // A constant row has no scale: its z-scores are 0, and so is its gradient.
    m.inverse_std = low == high ? 0 : 1 / ::sqrt(square / m.count);
    return m;
  }

  template <typename F>
  void each_finite(const Source& row, F visit) {
    for (int64_t k = 0; k < shared_tiles(); ++k) {
      const int count = Base::clamp_tile(task_.shared - k * kTile);
      load(row, k * kTile, count, tile_t_);
      for (int i = 0; i < count; ++i)
        if (tile_t_[i] != -Real<T>::kInf) visit(tile_t_[i]);
    }
    staged_t_ = -1;
  }

  // ---- tiles as the divergence sees them ------------------------------------------------------------------------

  bool changes_logits() const { return divergence_.standardize || divergence_.kind == Kind::kDkd; }

  const T* student_for_kd(int64_t k) {
    const T* raw = this->student_tile(k);
    const int count = Base::clamp_tile(task_.shared - k * kTile);
    if (!changes_logits() && count == this->tile_size(k)) return raw;
    for (int i = 0; i < count; ++i) tile_g_[i] = raw[i];
    return change(k, count, moments_s_, tile_g_);
  }

  const T* teacher_for_kd(int64_t k) {
    if (k == staged_t_) return tile_t_;
    const int count = Base::clamp_tile(task_.shared - k * kTile);
    if (prototype_.exists())
      prototype_.log_tile(k, prototype_scale_, tile_t_);
    else
      load(task_.teacher, k * kTile, count, tile_t_);
    staged_t_ = k;
    return change(k, count, moments_t_, tile_t_);
  }

  // Changes logits in place: to z-scores; to -inf at the label (dkd); and pads whole vectors with -inf.
  const T* change(int64_t k, int count, const Moments& m, T* x) {
    if (divergence_.standardize)
      for (int i = 0; i < count; ++i)
        if (x[i] != -Real<T>::kInf) x[i] = T((x[i] - m.mean) * m.inverse_std);
    if (divergence_.kind == Kind::kDkd && task_.label / kTile == k) x[task_.label % kTile] = -Real<T>::kInf;
    for (int i = count; i < Base::padded(count); ++i) x[i] = -Real<T>::kInf;
    return x;
  }

  // ---- forward ----------------------------------------------------------------------------------------------------

  void sweep() {
    for (int64_t k = 0; k < tile_count(this->columns()); ++k) {
      this->sweep_truth(k);
      if (tempered_ && k * kTile < task_.shared) {
        if (prototype_.exists() && !is_forward())
          sweep_with_prototype(k);
        else
          sweep_both(k);
      } else if (!tempered_ && this->unit_tau_ == UnitTau::kShared) {
        const int count = this->tile_size(k);
        this->with_student(k, [&](auto* x) { this->sweep_tile(k, s_, SweepMode(), count, x, x); });
      } else {
        zero_beyond(k, 0);
        if (!tempered_) Base::record(s_, k, 0, 0);
      }
    }
  }

  // The prototype holds probabilities, not logits: store them as exponentials with origin 0.
  void sweep_with_prototype(int64_t k) {
    SweepMode mode;
    mode.square = this->unit_tau_ == UnitTau::kSquared;
    const int count = Base::clamp_tile(task_.shared - k * kTile);
    if (count == this->tile_size(k)) {
      this->with_student(k, [&](auto* x) { this->sweep_tile(k, s_, mode, count, x, x); });
    } else {
      const T* x = student_for_kd(k);
      this->sweep_tile(k, s_, mode, count, x, x);
    }
    t_.sum[k] = prototype_.probability_tile(k, prototype_scale_, t_.e + k * kTile);
    t_.offset[k] = 0;
    zero_beyond(k, count);
  }

  void sweep_both(int64_t k) {
    SweepMode mode;
    mode.teacher = true;
    mode.square = this->unit_tau_ == UnitTau::kSquared;
    if (is_forward()) mode.cross = divergence_.kind == Kind::kSoftCe ? Cross::kCe : Cross::kKl;
    const int count = Base::clamp_tile(task_.shared - k * kTile);
    const bool direct = !changes_logits() && !prototype_.exists() && task_.student.dtype == task_.teacher.dtype &&
                        Base::is_readable(task_.student.dtype);
    if (!direct) {
      const T *x = student_for_kd(k), *y = teacher_for_kd(k);
      this->sweep_tile(k, s_, mode, count, x, y);
    } else {
      this->with_student(
          k, [&](auto* x) { this->sweep_tile(k, s_, mode, count, x, (decltype(x))task_.teacher.data + k * kTile); });
    }
    zero_beyond(k, count);
  }

  // Zeros for the columns that only the student has: the divergence leaves them out.
  void zero_beyond(int64_t k, int count) {
    for (int i = count; i < Base::padded(this->tile_size(k)); ++i) s_.e[k * kTile + i] = t_.e[k * kTile + i] = T(0);
  }

  double value() {
    if (divergence_.kind == Kind::kLogitMse) return logit_mse();
    if (s_.sum_exp != s_.sum_exp || t_.sum_exp != t_.sum_exp) return __builtin_nan("");
    if (divergence_.kind == Kind::kDkd) return dkd();
    dead_ = s_.sum_exp == 0 || t_.sum_exp == 0;
    if (dead_) return 0;
    return is_forward() ? forward_value() : elements();
  }

  // sum p (keep log p - log q), from each tile's cross sum; keep is 1 for KL and 0 for cross-entropy.
  double forward_value() const {
    const double keep = divergence_.kind == Kind::kSoftCe ? 0 : 1;
    double total = 0;
    for (int64_t k = 0; k < shared_tiles(); ++k) {
      if (t_.sum[k] == 0) continue;
      const double gap = keep * t_.log_factor(k) - s_.log_factor(k);
      // A factor that underflowed to 0 must still turn an infinite gap into an infinite value.
      const double factor = t_.factor[k] > Real<double>::kTiny ? t_.factor[k] : Real<double>::kTiny;
      total += factor * (this->cross_[k] * kLn2 + t_.sum[k] * gap);
    }
    return total;
  }

  double logit_mse() {
    const V lowest(-Real<T>::kInf), zero(T(0)), one(T(1));
    double total = 0, valid = 0;
    for (int64_t k = 0; k < shared_tiles(); ++k) {
      const int count = Base::padded(Base::clamp_tile(task_.shared - k * kTile));
      const T *x = student_for_kd(k), *y = teacher_for_kd(k);
      V squares = zero, counts = zero;
      for (int i = 0; i < count; i += V::kLanes) {
        const V s = V::load(x + i), t = V::load(y + i);
        const V gap = select(s == lowest, zero, select(t == lowest, zero, s - t));
        squares = squares + gap * gap;
        counts = counts + select(s == lowest, zero, select(t == lowest, zero, one));
        gap.store(t_.e + k * kTile + i);
      }
      for (int i = count; i < Base::padded(this->tile_size(k)); ++i) t_.e[k * kTile + i] = T(0);
      total += reduce_add(squares);
      valid += reduce_add(counts);
    }
    mse_slope_ = valid > 0 ? 2 / valid : 0;
    return valid > 0 ? total / valid : 0;
  }

  double dkd() {
    rest_is_dead_ = s_.sum_exp == 0 || t_.sum_exp == 0;
    const double target_s = target_logit(load_one(task_.student, task_.label), moments_s_) * s_.inverse_tau();
    const double target_t = target_logit(teacher_target(), moments_t_) * t_.inverse_tau();
    dead_ =
        (s_.sum_exp == 0 && target_s == -Real<double>::kInf) || (t_.sum_exp == 0 && target_t == -Real<double>::kInf);
    if (dead_) return 0;
    const double odds_s = s_.sum_exp == 0 ? Real<double>::kInf : target_s - s_.lse();
    const double odds_t = t_.sum_exp == 0 ? Real<double>::kInf : target_t - t_.lse();
    target_gap_ = sigmoid(odds_s) - sigmoid(odds_t);
    const double tckd = binary_kl_term(odds_t, odds_s) + binary_kl_term(-odds_t, -odds_s);
    // A term of weight 0 is left out: it may be infinite.
    return (divergence_.a == 0 ? 0 : divergence_.a * tckd) +
           (rest_is_dead_ || divergence_.b == 0 ? 0 : divergence_.b * forward_value());
  }

  // The teacher's logit at the label, which change() overwrites in the tiles.
  double teacher_target() {
    if (!prototype_.exists()) return load_one(task_.teacher, task_.label);
    staged_t_ = -1;
    prototype_.log_tile(task_.label / kTile, prototype_scale_, tile_t_);
    return tile_t_[task_.label % kTile];
  }

  double target_logit(double x, const Moments& m) const {
    return x == -Real<double>::kInf ? x : (x - m.mean * divergence_.standardize) * m.inverse_std;
  }

  static double sigmoid(double x) { return 1 / (1 + ::exp(-x)); }
  static double log_sigmoid(double x) { return x < 0 ? x - ::log1p(::exp(x)) : -::log1p(::exp(-x)); }
  static double binary_kl_term(double odds_p, double odds_q) {
    const double log_p = log_sigmoid(odds_p);
    return log_p == -Real<double>::kInf ? 0 : ::exp(log_p) * (log_p - log_sigmoid(odds_q));
  }

  // ---- divergences that need probabilities before their statistics ----------------------------------------------

  // Out of line: it holds the loop of every such divergence, and within run() would crowd out what is inlined there.
  __attribute__((noinline)) double elements() {
    return with_kind(divergence_.kind, [this](auto kind) {
      if constexpr (is_element(kind.value))
        return elements_of<kind.value>();
      else
        return 0.0;
    });
  }

  // The divergence's value. Overwrites the teacher's exponentials with h.
  template <Kind kKind>
  double elements_of() {
    const rowmath::Parameters<V> parameters = {divergence_.a, divergence_.b, V(T(-::log(divergence_.a))),
                                               V(T(-::log1p(-divergence_.a)))};
    const rowmath::Limits<V> limits = {V(-Real<T>::kMax), V(Real<T>::kInf)};
    double total = 0;
    for (int64_t k = 0; k < shared_tiles(); ++k) {
      const int count = Base::padded(Base::clamp_tile(task_.shared - k * kTile));
      const T *x = student_for_kd(k), *y = teacher_for_kd(k);
      T *e_s = s_.e + k * kTile, *e_t = t_.e + k * kTile;
      const Base2<T> s = origin_of(s_, k), t = origin_of(t_, k);
      const V factor_s(T(s_.factor[k])), factor_t(T(t_.factor[k])), ln2((T(kLn2)));
      const V base_s(T(s_.log_factor(k))), base_t(T(t_.log_factor(k))), gap(T(t_.log_factor(k) - s_.log_factor(k)));
      V values(T(0)), slopes(T(0));
      for (int i = 0; i < count; i += V::kLanes) {
        const V u = s(V::load(x + i)), v = t(V::load(y + i));
        const rowmath::Column<V> column = {rounded(V::load(e_t + i) * factor_t), rounded(V::load(e_s + i) * factor_s),
                                           (v - u) * ln2 + gap, v * ln2 + base_t, u * ln2 + base_s};
        const rowmath::Element<V> element = rowmath::element<kKind>(column, parameters, limits);
        values = values + element.value;
        slopes = slopes + element.h;
        element.h.store(e_t + i);
      }
      total += reduce_add(values);
      slope_sum_ += reduce_add(slopes);
    }
    return total;
  }

  // ---- gradient ---------------------------------------------------------------------------------------------------

  using Slopes = typename Base::Slopes;

  // The divergence's gradient in tile k: student * e_s + h * (e_t, or what elements() left there).
  Slopes slopes(int64_t k) const {
    if (!active_ || dead_ || k >= shared_tiles()) return {};
    const T* h = t_.e + k * kTile;
    if (divergence_.kind == Kind::kLogitMse) return {0, task_.kd * mse_slope_, h};
    const double kd = task_.kd * divergence_.scale * s_.inverse_tau();
    if (divergence_.kind == Kind::kDkd) {
      const double rest = rest_is_dead_ ? 0 : kd * divergence_.b;
      return {(rest - kd * divergence_.a * target_gap_) * s_.factor[k], -rest * t_.factor[k], h};
    }
    if (is_forward()) return {kd * s_.factor[k], -kd * t_.factor[k], h};
    return {-kd * slope_sum_ * s_.factor[k], kd, h};
  }

  // dkd changes one column and standardised logits add a backward step, which slopes cannot express: there the
  // divergence's whole gradient is written over the teacher's exponentials first.
  void gradient() {
    const bool kd = active_ && !dead_;
    const bool settled = kd && (divergence_.standardize || divergence_.kind == Kind::kDkd);
    if (settled) settle();
    if (settled && divergence_.standardize) unstandardize();
    for (int64_t k = 0; k < tile_count(this->columns()); ++k)
      this->write_gradient(k, settled && k < shared_tiles() ? Slopes{0, 1, t_.e + k * kTile} : slopes(k));
  }

  void settle() {
    for (int64_t k = 0; k < shared_tiles(); ++k) {
      const Slopes by = slopes(k);
      const V a((T(by.student))), b((T(by.h)));
      T *e_s = s_.e + k * kTile, *g = t_.e + k * kTile;
      for (int i = 0; i < Base::padded(Base::clamp_tile(task_.shared - k * kTile)); i += V::kLanes)
        (V::load(e_s + i) * a + V::load(g + i) * b).store(g + i);
    }
    if (divergence_.kind == Kind::kDkd)
      t_.e[task_.label] += T(task_.kd * s_.inverse_tau() * divergence_.a * target_gap_);
  }

  // Backward through zscore = (x - mean) / std, in place: dx = (g - mean(g) - zscore mean(g zscore)) / std.
  void unstandardize() {
    double sum = 0, dot = 0;
    for (int64_t k = 0; k < shared_tiles(); ++k)
      each_zscore(k, t_.e + k * kTile, [&](double zscore, T& value) {
        sum += value;
        dot += zscore * value;
      });
    const Moments& m = moments_s_;
    for (int64_t k = 0; k < shared_tiles(); ++k)
      each_zscore(k, t_.e + k * kTile, [&](double zscore, T& value) {
        value = T((value - sum / m.count - zscore * dot / m.count) * m.inverse_std);
      });
  }

  template <typename F>
  void each_zscore(int64_t k, T* g, F visit) {
    const T* x = this->student_tile(k);
    const Moments& m = moments_s_;
    for (int i = 0; i < Base::clamp_tile(task_.shared - k * kTile); ++i) {
      if (x[i] == -Real<T>::kInf)
        g[i] = T(0);
      else
        visit((x[i] - m.mean) * m.inverse_std, g[i]);
    }
  }

  // ---- parts ------------------------------------------------------------------------------------------------------

  void describe(RowResult& result) {
    if (tempered_ && s_.sum_exp != 0) result.entropy = this->entropy();
    result.top1 = this->argmax(task_.student) == this->argmax(task_.teacher);
  }

  const Divergence& divergence_;
  const bool active_, tempered_;
  const TailPrototype<T> prototype_;
  double prototype_scale_ = 0;
  Moments moments_s_, moments_t_;
  int64_t staged_t_ = -1;
  bool dead_ = false, rest_is_dead_ = false;
  double slope_sum_ = 0, mse_slope_ = 0, target_gap_ = 0;
};

}  // namespace KDFAST_TARGET
}  // namespace kdfast
KDFAST_AFTER_NAMESPACE();

#endif  // per-target include guard
