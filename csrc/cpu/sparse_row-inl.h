// A student row against K (id, weight) entries and a tail: the student's softmax over the whole row, and a gather.
//
// The entries' columns are masked before the exponentials are summed, so that the tail's log-sum-exp is accurate
// however small its mass is; their gradient is added from the row's statistics at the end. Where the tail has a
// prototype, the prototype's row is read along with the student's; forward KL and soft cross-entropy, which come here,
// need neither its logarithm nor an exponential of it.

#if defined(KDFAST_CPU_SPARSE_ROW_INL_H_) == defined(KDFAST_TARGET_TOGGLE)
#ifdef KDFAST_CPU_SPARSE_ROW_INL_H_
#undef KDFAST_CPU_SPARSE_ROW_INL_H_
#else
#define KDFAST_CPU_SPARSE_ROW_INL_H_
#endif

#include <cmath>
#include <cstdint>

#include "row_sweep-inl.h"
#include "tail_prototype-inl.h"

KDFAST_BEFORE_NAMESPACE();
namespace kdfast {
namespace KDFAST_TARGET {

template <typename T>
class SparseRow : RowSweep<T> {
  using Base = RowSweep<T>;
  using V = Vec<T>;
  using Base::s_, Base::t_, Base::unit_, Base::task_, Base::tile_t_;

 public:
  SparseRow(const RowTask& task, void* workspace)
      : Base(task, task.kd != 0, true, workspace),
        active_(task.kd != 0),
        entries_(task.entries),
        tiles_(this->entry_tiles_),
        prototype_(task, tiles_) {
    // No teacher's softmax: use its part of the workspace.
    tail_factor_ = t_.factor;
    prototype_mass_ = t_.sum;
  }

  RowResult run() {
    if (is_bad() || (active_ && !sort_entries())) return this->fail();
    for (int64_t k = 0; k < tile_count(this->columns()); ++k) sweep(k);
    this->finish_softmax();
    if (active_) include_entries();
    const double ce = this->finish_truth();
    RowResult result = this->total(active_ ? value() : 0, ce);
    if (result.loss != result.loss) return this->fail();
    if (task_.want_parts) describe(result);
    if (task_.grad) gradient();
    return result;
  }

 private:
  bool is_bad() const { return this->bad_label() || (active_ && !(task_.tau_s > 0 && 1 / task_.tau_s > 0)); }

  // False where an entry's id or the prototype's index is out of range.
  bool sort_entries() { return !prototype_.is_bad() && tiles_.sort(entries_, this->columns(), task_.shared); }

  double logit(int64_t entry) const { return load_one(task_.student, entries_.id[entry]); }

  // ---- forward ----------------------------------------------------------------------------------------------------

  void sweep(int64_t k) {
    this->sweep_truth(k);
    if (this->unit_tau_ == UnitTau::kUnused && !active_) return;
    const int count = this->tile_size(k), kept = Base::clamp_tile(s_.columns - k * kTile);
    SweepMode mode;
    mode.square = this->unit_tau_ == UnitTau::kSquared;
    if (kept == count && !(active_ && tiles_.any_in(k))) {
      this->with_student(k, [&](auto* x) { this->sweep_tile(k, s_, mode, count, x, x); });
    } else if (kept > 0) {
      // sweep_tile() would report the masked entries as masks of the student's.
      const bool masked = Base::holds_mask(this->student_tile(k), count);
      const T* x = without_entries(k, kept);
      this->sweep_tile(k, s_, mode, kept, x, x);
      this->masked_[k] = masked;
    }
    for (int i = kept; i < Base::padded(count); ++i) s_.e[k * kTile + i] = T(0);
    if (active_ && prototype_.exists() && kept > 0) sweep_prototype(k, kept);
  }

  const T* without_entries(int64_t k, int kept) {
    T* x = this->student_tile_to_change(k);
    for (int i = kept; i < Base::padded(this->tile_size(k)); ++i) x[i] = -Real<T>::kInf;
    if (active_)
      for (const int32_t* entry = tiles_.begin(k); entry != tiles_.end(k); ++entry)
        x[entries_.id[*entry] - k * kTile] = -Real<T>::kInf;
    return x;
  }

  // Tile k's sums over the prototype: its mass, and its mass times the student's exponents.
  void sweep_prototype(int64_t k, int kept) {
    T* r = tile_t_;
    prototype_.load_tile(k, r);
    if (kept < kTile) return sum_prototype(k, Base::padded(kept), this->student_tile(k), r);
    this->with_student(k, [&](auto* x) { sum_prototype(k, kept, x, r); });
  }

  template <typename From>
  void sum_prototype(int64_t k, int count, const From* x, const T* r) {
    const Base2<T> student = origin_of(s_, k);
    const V zero(T(0));
    V mass = zero, cross = zero;
    for (int i = 0; i < count; i += V::kLanes) {
      const V p = V::load(r + i), u = student(load_vector<T>(x + i));
      mass = mass + p;
      // A mass of 0 on a masked column adds 0, not 0 * inf; a positive mass there makes the loss infinite.
      cross = cross + select(p > zero, p * u, zero);
    }
    prototype_mass_[k] = reduce_add(mass);
    this->cross_[k] = reduce_add(cross);
  }

  void include_entries() {
    tail_sum_exp_ = s_.sum_exp;
    tail_lse_ = s_.sum_exp == 0 ? -Real<double>::kInf : s_.lse();
    for (int64_t k = 0; k < tile_count(s_.columns); ++k) tail_factor_[k] = s_.factor[k];
    const bool squared = this->unit_tau_ == UnitTau::kSquared;
    for (int64_t i = 0; i < entries_.count; ++i) {
      if (entries_.is_padding(i)) continue;
      s_.include(logit(i));
      if (squared) unit_.include(logit(i));
    }
    s_.normalize();
    if (squared) unit_.normalize();
    lse_s_ = s_.lse();
  }

  double value() {
    dead_ = s_.sum_exp == 0;
    if (dead_) return 0;
    const double heads = heads_value();
    if (prototype_.exists()) return prototype_value(heads);
    if (entries_.tail == -Real<double>::kInf) return heads;
    if (tail_sum_exp_ == 0) return Real<double>::kInf;
    tail_mass_ = ::exp(entries_.tail);
    mass_ += tail_mass_;
    return heads + tail_mass_ * ((entries_.subtract_entropy ? entries_.tail : 0) - (tail_lse_ - lse_s_));
  }

  double heads_value() {
    double total = 0;
    for (int64_t i = 0; i < entries_.count; ++i) {
      if (entries_.is_padding(i)) continue;
      const double w = entries_.weight[i];
      mass_ += w;
      total += w * ((entries_.subtract_entropy ? ::log(w) : 0) - s_.log_probability(logit(i)));
    }
    return total;
  }

  // Entries and prototype, renormalised: part of the teacher's mass may lie on columns that the student lacks.
  double prototype_value(double heads) {
    double mass = 0, cross = 0;
    for (int64_t k = 0; k < tile_count(s_.columns); ++k) {
      if (prototype_mass_[k] == 0) continue;
      mass += prototype_mass_[k];
      cross += this->cross_[k] * kLn2 + prototype_mass_[k] * s_.log_factor(k);
    }
    const double whole = mass + prototype_.mass_beyond(tile_t_), scale = prototype_.scale(whole);
    if (!is_finite(whole) || s_.sum_exp != s_.sum_exp) return __builtin_nan("");
    const bool keep = entries_.subtract_entropy;
    if (scale != 0 && mass != 0) {
      mass_ += scale * mass;
      heads += scale * ((keep ? prototype_.entropy(mass, tile_t_) + ::log(scale) * mass : 0) - cross);
    }
    dead_ = mass_ == 0;
    if (dead_) return 0;
    const double total = heads / mass_ - (keep ? ::log(mass_) : 0);
    entry_scale_ = 1 / mass_;
    prototype_scale_ = scale / mass_;
    mass_ = 1;
    return total;
  }

  // ---- gradient ---------------------------------------------------------------------------------------------------

  void gradient() {
    const bool kd = active_ && !dead_;
    const double slope = task_.kd * s_.inverse_tau();
    for (int64_t k = 0; k < tile_count(this->columns()); ++k) {
      typename Base::Slopes slopes;
      const bool shared = kd && k < tile_count(s_.columns);
      if (shared)
        slopes.student = slope * (mass_ * s_.factor[k] - (tail_sum_exp_ != 0 ? tail_mass_ * tail_factor_[k] : 0));
      if (shared && tiles_.any_in(k)) {
        slopes.h_tile = entry_tile(k, slope);
        slopes.h = 1;
      } else if (shared && prototype_.exists()) {
        prototype_.load_tile(k, tile_t_);
        slopes.h_tile = tile_t_;
        slopes.h = -slope * prototype_scale_;
      }
      this->write_gradient(k, slopes);
    }
  }

  // The part of a tile's gradient that its exponentials do not hold: the entries', which were masked, and the
  // prototype's.
  const T* entry_tile(int64_t k, double slope) {
    T* g = tile_t_;
    if (prototype_.exists()) prototype_.load_tile(k, g);
    const T weight = T(-slope * prototype_scale_);
    for (int i = 0; i < kTile; ++i) g[i] = prototype_.exists() ? g[i] * weight : T(0);
    // Where the softmax at temperature 1 is made of the same exponentials, it lacks the entries too.
    const bool truth = this->unit_tau_ == UnitTau::kShared || this->unit_tau_ == UnitTau::kSquared;
    for (const int32_t* i = tiles_.begin(k); i != tiles_.end(k); ++i) {
      const int32_t entry = *i;
      const double x = logit(entry);
      double value = slope * (mass_ * ::exp(s_.log_probability(x)) - entry_scale_ * entries_.weight[entry]);
      if (truth) value += this->truth_slope() * ::exp(this->unit_softmax().log_probability(x));
      g[entries_.id[entry] - k * kTile] += T(value);
    }
    return g;
  }

  void describe(RowResult& result) {
    if (!active_ || s_.sum_exp == 0) return;
    result.entropy = this->entropy();
    double best = -1;
    int64_t id = -1;
    for (int64_t i = 0; i < entries_.count; ++i) {
      if (entries_.is_padding(i)) continue;
      const double log_q = s_.log_probability(logit(i)), q = ::exp(log_q);
      if (q > 0) result.entropy -= q * log_q;
      if (entry_scale_ * entries_.weight[i] > best) {
        best = entry_scale_ * entries_.weight[i];
        id = entries_.id[i];
      }
    }
    for (int64_t k = 0; prototype_.exists() && k < tile_count(s_.columns); ++k) {
      prototype_.load_tile(k, tile_t_);
      for (int i = 0; i < Base::clamp_tile(s_.columns - k * kTile); ++i)
        if (prototype_scale_ * tile_t_[i] > best) {
          best = prototype_scale_ * tile_t_[i];
          id = k * kTile + i;
        }
    }
    result.top1 = this->argmax(task_.student) == id;
  }

  const bool active_;
  const Entries& entries_;
  EntryTiles& tiles_;
  const TailPrototype<T> prototype_;
  double *tail_factor_, *prototype_mass_;
  double prototype_scale_ = 0, entry_scale_ = 1;
  bool dead_ = false;
  double tail_sum_exp_ = 0, tail_lse_ = 0, lse_s_ = 0, mass_ = 0, tail_mass_ = 0;
};

}  // namespace KDFAST_TARGET
}  // namespace kdfast
KDFAST_AFTER_NAMESPACE();

#endif  // per-target include guard
