// What dense and sparse rows share: the student's softmax, the ground-truth terms (cross-entropy and z-loss) and the
// sweep that writes the gradient.

#if defined(KDFAST_CPU_ROW_SWEEP_INL_H_) == defined(KDFAST_TARGET_TOGGLE)
#ifdef KDFAST_CPU_ROW_SWEEP_INL_H_
#undef KDFAST_CPU_ROW_SWEEP_INL_H_
#else
#define KDFAST_CPU_ROW_SWEEP_INL_H_
#endif

#include <cstdint>

#include "entry_tiles-inl.h"
#include "row.h"
#include "simd/load-inl.h"
#include "simd/vec-inl.h"
#include "softmax-inl.h"

KDFAST_BEFORE_NAMESPACE();
namespace kdfast {
namespace KDFAST_TARGET {

// Where the student's softmax at temperature 1 comes from.
enum class UnitTau {
  kUnused,    // neither CE nor z-loss
  kShared,    // tau = 1: the tempered exponentials
  kSquared,   // tau = 2: their squares
  kSeparate,  // exponentials computed for it
};

template <typename T>
class RowSweep {
 public:
  using V = Vec<T>;

  RowSweep(const RowTask& task, bool tempered, bool may_share, void* workspace) : task_(task) {
    carve(workspace);
    // Without a tempered softmax, s_ holds the exponentials at temperature 1.
    s_.columns = tempered ? task.shared : columns();
    s_.set_tau(tempered ? task.tau_s : 1);
    unit_.columns = columns();
    const bool truth = task.ce != 0 || task.z_weight != 0;
    const bool share = may_share && s_.columns == columns();
    unit_tau_ = !truth                                    ? UnitTau::kUnused
                : share && s_.scale_log2 == T(kLog2E)     ? UnitTau::kShared
                : share && s_.scale_log2 == T(kLog2E) / 2 ? UnitTau::kSquared
                                                          : UnitTau::kSeparate;
  }

  int64_t columns() const { return task_.student.size; }

 protected:
  int tile_size(int64_t k) const { return clamp_tile(columns() - k * kTile); }
  static int clamp_tile(int64_t left) { return int(left < 0 ? 0 : left > kTile ? kTile : left); }
  static int padded(int count) { return (count + V::kLanes - 1) / V::kLanes * V::kLanes; }

  // The student's tile k in the working type, padded with -inf to whole vectors.
  const T* student_tile(int64_t k) {
    if (k != staged_) load_padded(task_.student, k * kTile, tile_size(k), tile_s_);
    staged_ = k;
    return tile_s_;
  }

  // student_tile() for a caller that changes it; the next call loads the tile again.
  T* student_tile_to_change(int64_t k) {
    student_tile(k);
    staged_ = -1;
    return tile_s_;
  }

  // Whether one of `count` logits is not finite.
  static bool holds_mask(const T* x, int count) {
    V sum(T(0));
    int i = 0;
    for (; i + V::kLanes <= count; i += V::kLanes) sum = sum + V::load(x + i);
    T total = reduce_add(sum);
    for (; i < count; ++i) total += x[i];
    return !is_finite(total);
  }

  static void load_padded(const Source& row, int64_t begin, int count, T* to) {
    load(row, begin, count, to);
    for (int i = count; i < padded(count); ++i) to[i] = -Real<T>::kInf;
  }

  // ---- exponentials ---------------------------------------------------------------------------------------------

  // Exponentials and sums of tile k: of `side` from `count` logits x, and with mode.teacher of t_ from logits y of the
  // same dtype.
  template <typename From>
  void sweep_tile(int64_t k, Exponentials<T>& side, SweepMode mode, int count, const From* x, const From* y) {
    const int probe = count < V::kLanes ? count : V::kLanes;
    T *e_s = side.e + k * kTile, *e_t = t_.e + k * kTile;
    Base2<T> s = base2<T>(side.scale_log2, x, probe), t;
    if (mode.teacher) t = base2<T>(t_.scale_log2, y, probe);
    TileSums<T> sums;
    // An origin that is no logit's may lie so far above the logits that all exponentials are 0.
    const bool is_placed = s.is_placed && t.is_placed;
    if (is_placed) sums = exponentiate(mode, count, x, y, s, t, e_s, e_t);
    if (!is_placed || !is_finite(sums.logits + sums.cross) ||
        !(sums.student + sums.teacher + sums.square < kLargestSum)) {
      // A logit of -inf, or an origin too far below the maximum: repeat with the true maxima and with masks.
      mode.careful = true;
      s = base2<T>(side.scale_log2, x, count);
      if (mode.teacher) t = base2<T>(t_.scale_log2, y, count);
      sums = exponentiate(mode, count, x, y, s, t, e_s, e_t);
      masked_[k] = true;
    }
    record(side, k, sums.student, s.offset());
    if (mode.square) record(unit_, k, sums.square, 2 * s.offset());
    if (mode.teacher) record(t_, k, sums.teacher, t.offset());
    cross_[k] = sums.cross;
  }

  // The factors that normalise larger sums would leave float's range.
  static constexpr T kLargestSum = T(0x1p40);

  static void record(Exponentials<T>& side, int64_t k, double sum, double offset) {
    side.sum[k] = sum;
    side.offset[k] = sum == 0 ? -Real<double>::kInf : offset;
  }

  // The ground-truth terms' sums over tile k. Reads the row's own logits, before entries or labels are masked out.
  void sweep_truth(int64_t k) {
    const int count = tile_size(k);
    if (unit_tau_ == UnitTau::kSeparate)
      with_student(k, [&](auto* x) { sweep_tile(k, unit_, SweepMode(), count, x, x); });
    if (task_.ce == 0) return;
    if (task_.smoothing != 0) sum_finite(student_tile(k), count);
    if (task_.label_probs.data) sum_label_probs(k, student_tile(k), count);
  }

  // Calls visit with a typed pointer to the student's tile: into the row itself where the working type reads its dtype,
  // else to a converted copy.
  template <typename F>
  void with_student(int64_t k, F visit) {
    if (!is_readable(task_.student.dtype)) return visit(student_tile(k));
    with_type(task_.student.data, task_.student.dtype, [&](auto* x) {
      if constexpr (kReadable<decltype(x)>) visit(x + k * kTile);
    });
  }
  // float reads float, half and bfloat16 vectors; double reads its own.
  template <typename From>
  static constexpr bool kReadable = sizeof(*From()) == sizeof(T) || (sizeof(T) == 4 && sizeof(*From()) == 2);
  static bool is_readable(Dtype dtype) { return (dtype == Dtype::kDouble) == (sizeof(T) == 8); }

  // The student's softmax at temperature 1.
  const Exponentials<T>& unit_softmax() const { return unit_tau_ == UnitTau::kShared ? s_ : unit_; }

  void finish_softmax() {
    s_.finish();
    if (unit_tau_ == UnitTau::kSquared || unit_tau_ == UnitTau::kSeparate) unit_.finish();
  }

  // ---- ground truth -----------------------------------------------------------------------------------------------

  void sum_finite(const T* x, int count) {
    double sum = 0;
    int finite = 0;
    for (int i = 0; i < count; ++i) {
      const bool is_masked = x[i] == -Real<T>::kInf;
      finite += !is_masked;
      sum += is_masked ? T(0) : x[i];
    }
    finite_sum_ += sum;
    finite_count_ += finite;
  }

  void sum_label_probs(int64_t k, const T* x, int count) {
    load(task_.label_probs, k * kTile, count, tile_y_);
    for (int i = 0; i < count; ++i) {
      if (tile_y_[i] == T(0)) continue;
      label_mass_ += tile_y_[i];
      label_dot_ += double(tile_y_[i]) * x[i];
    }
  }

  // Cross-entropy with smoothing, and the log-sum-exp, once the softmax at temperature 1 is complete.
  double finish_truth() {
    if (unit_tau_ == UnitTau::kUnused) return 0;
    lse_ = unit_softmax().lse();
    alive_ = unit_softmax().sum_exp != 0;
    if (!alive_ || task_.ce == 0) return 0;
    // 1 / tau for tau = 1, with the exponentials' rounding.
    const double unit = unit_softmax().inverse_tau();
    double hard = 0;
    if (task_.label_probs.data) {
      hard = label_mass_ * lse_ - label_dot_ * unit;
    } else {
      hard = -unit_softmax().log_probability(load_one(task_.student, task_.label));
      label_mass_ = 1;
    }
    if (task_.smoothing == 0) return hard;
    // With smoothing 1 the hard term is left out: a masked label would make it 0 * inf.
    return (task_.smoothing == 1 ? 0 : (1 - task_.smoothing) * hard) +
           task_.smoothing * (lse_ - finite_sum_ * unit / finite_count_);
  }

  double z_loss() const { return unit_tau_ != UnitTau::kUnused && alive_ ? task_.z_weight * lse_ * lse_ : 0; }

  bool bad_label() const {
    return task_.ce != 0 && !task_.label_probs.data && !(task_.label >= 0 && task_.label < columns());
  }

  // What the softmax at temperature 1, q, weighs in the gradient of the ground-truth terms:
  // d(loss) / d(logit) = truth_slope * q - smoothing_share - label.
  double truth_slope() const {
    if (unit_tau_ == UnitTau::kUnused || !alive_) return 0;
    const double mass = (1 - task_.smoothing) * label_mass_ + task_.smoothing;
    return (task_.ce != 0 ? task_.ce * mass : 0) + 2 * task_.z_weight * lse_;
  }

  double smoothing_share() const {
    return task_.ce != 0 && task_.smoothing != 0 && alive_ ? task_.ce * task_.smoothing / finite_count_ : 0;
  }

  // ---- gradient ---------------------------------------------------------------------------------------------------

  // A tile's gradient is student * e_s + h * h_tile + truth_slope * (softmax at temperature 1) - smoothing_share.
  struct Slopes {
    double student = 0, h = 0;
    const T* h_tile = nullptr;
  };

  // Writes tile k's gradient to memory, label and masks included.
  void write_gradient(int64_t k, const Slopes& slopes) {
    if (!is_readable(task_.student.dtype) || needs_staging(k)) {
      combine(k, slopes, 0, padded(tile_size(k)), tile_g_);
      return finish_staged(k);
    }
    with_type(task_.grad, task_.student.dtype, [&](auto* out) {
      if constexpr (kReadable<decltype(out)>) write_vectors(k, slopes, writable(out) + k * kTile);
    });
    if (has_label_in(k)) write_label(k, slopes);
    if (masked_[k]) zero_masked(k);
  }

  // Whole vectors go straight to the gradient's memory; the columns before and after them through a buffer.
  template <typename To>
  void write_vectors(int64_t k, const Slopes& slopes, To* out) {
    const int count = tile_size(k), lead = task_.stream ? columns_to_line(out, count) : 0;
    const int end = lead + (count - lead) / V::kLanes * V::kLanes;
    if (lead > 0) {
      combine(k, slopes, 0, padded(lead), tile_g_);
      convert_out(tile_g_, lead, out);
    }
    combine(k, slopes, lead, end, out + lead, task_.stream);
    if (end < count) {
      combine(k, slopes, end, end + V::kLanes, tile_g_);
      convert_out(tile_g_, count - end, out + end);
    }
  }

  // Columns before the next cache line.
  template <typename To>
  static int columns_to_line(const To* out, int count) {
    const int columns = int((64 - reinterpret_cast<uintptr_t>(out) % 64) % 64 / sizeof(To));
    return columns < count ? columns : count;
  }

  // Class probabilities need a second pass over the tile. An in-place gradient overwrites the logits that masks are
  // read from.
  bool needs_staging(int64_t k) const {
    return (task_.ce != 0 && task_.label_probs.data) || (masked_[k] && task_.grad == task_.student.data);
  }

  // Columns [begin, end) of tile k, whole vectors.
  template <typename To>
  void combine(int64_t k, const Slopes& slopes, int begin, int end, To* out, bool stream = false) {
    if (unit_tau_ == UnitTau::kSquared) return combine<UnitTau::kSquared>(k, slopes, begin, end, out, stream);
    if (unit_tau_ == UnitTau::kSeparate) return combine<UnitTau::kSeparate>(k, slopes, begin, end, out, stream);
    combine<UnitTau::kUnused>(k, slopes, begin, end, out, stream);
  }

  template <UnitTau kUnitTau, typename To>
  void combine(int64_t k, const Slopes& slopes, int begin, int end, To* out, bool stream) {
    if (stream)
      combine<kUnitTau, true>(k, slopes, begin, end, out);
    else
      combine<kUnitTau, false>(k, slopes, begin, end, out);
  }

  template <UnitTau kUnitTau, bool kStream, typename To>
  void combine(int64_t k, const Slopes& slopes, int begin, int end, To* out) {
    const double truth = truth_slope();
    const double student = slopes.student + (unit_tau_ == UnitTau::kShared ? truth * s_.factor[k] : 0);
    const double unit = kUnitTau == UnitTau::kUnused ? 0 : truth * unit_.factor[k];
    const V a((T(student))), b((T(slopes.h))), c((T(unit))), d((T(-smoothing_share())));
    const T *e = s_.e + k * kTile, *e_unit = unit_.e + k * kTile, *h = slopes.h_tile;
    for (int i = begin; i < end; i += V::kLanes) {
      const V e_s = V::load(e + i);
      V y = e_s * a + d;
      if (h) y = V::load(h + i) * b + y;
      if (kUnitTau == UnitTau::kSquared) y = e_s * e_s * c + y;
      if (kUnitTau == UnitTau::kSeparate) y = V::load(e_unit + i) * c + y;
      if constexpr (kStream)
        stream_vector(y, out + (i - begin));
      else
        store_vector(y, out + (i - begin));
    }
  }

  void write_label(int64_t k, const Slopes& slopes) {
    const int at = int(task_.label - k * kTile), begin = at / V::kLanes * V::kLanes;
    combine(k, slopes, begin, begin + V::kLanes, tile_g_);
    store_one(tile_g_[at - begin] - label_slope(), task_.grad, task_.student.dtype, task_.label);
  }

  double label_slope() const { return task_.ce * (1 - task_.smoothing); }
  bool has_label_in(int64_t k) const {
    return task_.ce != 0 && alive_ && !task_.label_probs.data && task_.label / kTile == k;
  }

  void finish_staged(int64_t k) {
    const int64_t begin = k * kTile;
    const int count = tile_size(k);
    if (has_label_in(k)) tile_g_[task_.label - begin] -= T(label_slope());
    if (task_.ce != 0 && alive_ && task_.label_probs.data) {
      load(task_.label_probs, begin, count, tile_y_);
      for (int i = 0; i < count; ++i) tile_g_[i] -= T(label_slope()) * tile_y_[i];
    }
    const T* x = student_tile(k);
    for (int i = 0; i < count; ++i) tile_g_[i] = x[i] == -Real<T>::kInf ? T(0) : tile_g_[i];
    store(tile_g_, count, task_.grad, task_.student.dtype, begin);
  }

  void zero_masked(int64_t k) {
    const T* x = student_tile(k);
    for (int i = 0; i < tile_size(k); ++i)
      if (x[i] == -Real<T>::kInf) store_one(0, task_.grad, task_.student.dtype, k * kTile + i);
  }

  // ---- the row's result -----------------------------------------------------------------------------------------

  // The loss and the whole gradient are NaN (quiet in every dtype).
  RowResult fail() {
    const double nan = __builtin_nan("");
    for (int i = 0; i < kTile; ++i) tile_g_[i] = T(nan);
    for (int64_t k = 0; task_.grad && k < tile_count(columns()); ++k)
      store(tile_g_, tile_size(k), task_.grad, task_.student.dtype, k * kTile);
    return {nan, nan, nan, nan, nan};
  }

  // A term with coefficient 0 contributes 0 even if its value is infinite.
  RowResult total(double kd, double ce) const {
    RowResult result;
    result.kd = kd;
    result.ce = ce;
    result.loss = (task_.kd != 0 ? task_.kd * kd : 0) + (task_.ce != 0 ? task_.ce * ce : 0) + z_loss();
    return result;
  }

  // -sum q log q over the tiles: the student's entropy at its temperature.
  double entropy() {
    double total = 0;
    for (int64_t k = 0; k < tile_count(s_.columns); ++k) {
      const T* x = student_tile(k);
      const int count = clamp_tile(s_.columns - k * kTile);
      for (int i = 0; i < count; ++i) {
        const T q = s_.probability(k * kTile + i);
        if (q > T(0)) total -= double(q) * s_.log_probability(x[i]);
      }
    }
    return total;
  }

  // The largest of a row's shared columns; the first of equal ones.
  int64_t argmax(const Source& row) {
    int64_t best = 0;
    T largest = -Real<T>::kInf;
    for (int64_t k = 0; k < tile_count(task_.shared); ++k) {
      const int count = clamp_tile(task_.shared - k * kTile);
      load(row, k * kTile, count, tile_g_);
      for (int i = 0; i < count; ++i)
        if (tile_g_[i] > largest) {
          largest = tile_g_[i];
          best = k * kTile + i;
        }
    }
    return best;
  }

  const RowTask& task_;
  Exponentials<T> s_, t_, unit_;
  EntryTiles entry_tiles_;
  UnitTau unit_tau_ = UnitTau::kUnused;
  double* cross_ = nullptr;  // (tiles,) see Cross
  bool* masked_ = nullptr;   // (tiles,) the student's tile may hold a -inf
  T *tile_s_ = nullptr, *tile_t_ = nullptr, *tile_g_ = nullptr, *tile_y_ = nullptr;
  int64_t staged_ = -1;  // the tile that tile_s_ holds, unchanged
  double finite_sum_ = 0, finite_count_ = 0, label_mass_ = 0, label_dot_ = 0, lse_ = 0;
  bool alive_ = false;  // the student has a finite column

 private:
  void carve(void* workspace) {
    const int64_t tiles = tile_count(columns());
    T* row = (T*)workspace;
    Exponentials<T>* const sides[] = {&s_, &t_, &unit_};
    for (Exponentials<T>* side : sides) {
      side->e = row;
      row += tiles * kTile;
    }
    T** const buffers[] = {&tile_s_, &tile_t_, &tile_g_, &tile_y_};
    for (T** buffer : buffers) {
      *buffer = row;
      row += kTile;
    }
    double* stats = (double*)row;
    for (Exponentials<T>* side : sides) {
      side->offset = stats;
      side->sum = stats + tiles;
      side->factor = stats + 2 * tiles;
      stats += 3 * tiles;
    }
    cross_ = stats;
    entry_tiles_.place(stats + tiles, tiles);
    masked_ = (bool*)(stats + tiles) + EntryTiles::bytes(tiles);
    for (int64_t k = 0; k < tiles; ++k) masked_[k] = false;
  }
};

}  // namespace KDFAST_TARGET
}  // namespace kdfast
KDFAST_AFTER_NAMESPACE();

#endif  // per-target include guard
