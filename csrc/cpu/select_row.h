// The unbiased samplers' row: which columns the points of a cumulative probability fall on, without sorting and with
// one full sweep. The sweep leaves the sum of exponentials of every chunk of columns; only chunks that a point falls
// in, or that weigh enough to hold an entry above tau, are looked at again. Included like vec.h.

// The grid of systematic sampling: points at (k + offset) * step.
struct GridPoints {
  double step, offset, value;  // `value` is what a column on the grid gets
  double next = offset * step;

  double limit() const { return step; }
  // Moves to the first point that is not below `mass`. Counting up to it would take forever on a grid that is finer
  // than the rounding of `mass`.
  double pass(double mass) {
    const double passed = ::ceil(mass / step - offset);
    next = (passed + offset) * step;
    if (next < mass) next = (passed + 1 + offset) * step;
    return value;
  }
  // What rounding has left behind the row's last column: a row without an entry above tau always has one on the grid.
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
class SelectRow {
  using V = Vec<T>;
  static constexpr int kGroup = 16;  // columns added up together when a chunk is scanned

 public:
  SelectRow(const SelectTask& task, void* workspace)
      : task_(task), row_((const From*)task.logits.data), columns_(task.logits.size) {
    chunks_ = (columns_ + kSelectChunk - 1) / kSelectChunk;
    mass_ = (double*)workspace;
    origin_of_ = mass_ + chunks_;
    share_ = origin_of_ + chunks_;
    // Within what a product with it can bear; temperatures beyond are as good as 0 and infinite.
    const double bits = kLog2E / task.temperature;
    bits_ = T(bits < 1e-35 ? 1e-35 : bits > 1e35 ? 1e35 : bits);
    lowest_ = T(-2 * Real<T>::kBias) / bits_;
  }

  Selection run() {
    if (!sum_chunks() || !scale_chunks()) return {0, __builtin_nan("")};
    if (task_.draws > 0) {
      DrawnPoints points = {task_.points, task_.draws, z_};
      walk(points);
    } else {
      GridPoints points = {task_.tau * z_, task_.points[0], task_.tau};
      if (task_.order)
        walk_ordered(points);
      else
        walk(points);
    }
    return {count_, top_ / task_.temperature + ::log(z_)};
  }

 private:
  // ---- the sweep --------------------------------------------------------------------------------------------------

  // Sums of exponentials above an origin, which is some logit not far below the largest one so far. False where a NaN
  // or +inf is. The first origin lies below every logit, so that a chunk of -inf has sum 0 like any other.
  bool sum_chunks() {
    for (int64_t k = 0; k < chunks_; ++k) {
      const From* x = chunk(k);
      T sum = sum_of(x);
      if (!is_sound(sum)) {
        origin_ = maximum<T>(x, kSelectChunk);
        sum = sum_of(x);
        if (!is_sound(sum)) return false;
      }
      mass_[k] = double(sum);
      origin_of_[k] = double(origin_);
    }
    top_ = double(origin_);
    return true;
  }

  // All sums above the last origin, which is the highest; false where no column is finite.
  bool scale_chunks() {
    double origin = top_, scale = 1;
    for (int64_t k = 0; k < chunks_; ++k) {
      if (origin_of_[k] != origin) {
        origin = origin_of_[k];
        scale = ::exp2((origin - top_) * double(bits_));
      }
      mass_[k] *= scale;
      z_ += mass_[k];
    }
    return z_ > 0;
  }

  // Chunk k; the last one padded with -inf.
  const From* chunk(int64_t k) {
    const int64_t begin = k * kSelectChunk;
    if (begin + kSelectChunk <= columns_) return row_ + begin;
    for (int i = 0; i < kSelectChunk; ++i)
      if (begin + i < columns_)
        padded_[i] = row_[begin + i];
      else
        from_real(-Real<double>::kInf, padded_ + i);
    return padded_;
  }

  T sum_of(const From* x) const {
    V sum(T(0));
    for (int i = 0; i < kSelectChunk; i += V::kLanes) sum = sum + power(load_vector<T>(x + i));
    return reduce_add(sum);
  }

  // 0 at -inf, NaN at NaN.
  KD_INLINE V power(V x) const {
    const V bits(bits_);
#if KDFAST_VEC_BYTES == 64
    if constexpr (sizeof(T) == 4) {
      // Short of the lowest exponent there is: -inf would make a NaN.
      const V d = max(V(lowest_), x - V(origin_)), round(Real<T>::kRound);
      const V n = (d * bits + round) - round;
      const V y = horner(Real<T>::kExp2Short, d * bits - n);
      return V((typename V::Value)_mm512_scalef_ps((__m512)y.v, (__m512)n.v));
    }
#endif
    return exp2((x - V(origin_)) * bits);
  }

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

  // The same along the task's order, column by column: a chunk's columns lie anywhere in it. Entries come out unsorted.
  void walk_ordered(GridPoints& points) {
    for (int64_t k = 0; k < chunks_; ++k) spread(k, points.limit());
    double at = 0;
    for (int64_t j = 0; j < columns_; j += kGroup) {
      const int32_t* id = task_.order + j;
      const int count = int(columns_ - j < kGroup ? columns_ - j : kGroup);
      // Four sums, that additions need not wait for each other.
      double masses[4] = {0, 0, 0, 0};
      for (int i = 0; i < count; ++i) masses[i % 4] += share_[id[i]];
      const double mass = (masses[0] + masses[1]) + (masses[2] + masses[3]);
      if (at + mass <= points.next) {
        at += mass;
        continue;
      }
      for (int i = 0; i < count; ++i) {
        at += share_[id[i]];
        if (points.next < at && share_[id[i]] > 0) emit(id[i], points.pass(at));
      }
    }
    const double remaining = points.remaining(count_);
    if (remaining > 0) add_to_last(remaining);
  }

  // Chunk k's masses by column; those above the limit become entries, and 0 for the walk.
  void spread(int64_t k, double limit) {
    exponentiate(k);
    const double scale = sum_ > 0 ? mass_[k] / sum_ : 0;
    double* share = share_ + k * kSelectChunk;
    for (int i = 0; i < kSelectChunk; ++i) share[i] = double(e_[i]) * scale;
    if (mass_[k] <= limit) return;
    for (int i = 0; i < kSelectChunk; ++i) {
      if (share[i] <= limit) continue;
      emit(k * kSelectChunk + i, share[i] / z_);
      share[i] = 0;
    }
  }

  // Chunk k column by column; returns the mass behind it. `before` counts what is not above the points' limit.
  template <typename Points>
  double scan(int64_t k, double before, Points& points) {
    exponentiate(k);
    // The sweep's sum is what places the chunks behind this one: the columns share it as their exponentials say.
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
          emit(k * kSelectChunk + i, m / z_);
        } else {
          at += m;
          if (points.next < at && m > 0) emit(k * kSelectChunk + i, points.pass(at));
        }
      }
    }
    return before + (mass_[k] > above ? mass_[k] - above : 0);
  }

  // The chunk's exponentials, their sums by group and in all, in double: no column's share may drown in another's.
  void exponentiate(int64_t k) {
    origin_ = T(origin_of_[k]);
    const From* x = chunk(k);
    for (int i = 0; i < kSelectChunk; i += V::kLanes) power(load_vector<T>(x + i)).store(e_ + i);
    sum_ = 0;
    for (int g = 0; g < kSelectChunk / kGroup; ++g) {
      Vec<double> sum(0.0);
      for (int i = 0; i < kGroup; i += Vec<double>::kLanes) sum = sum + widened(e_ + g * kGroup + i);
      groups_[g] = reduce_add(sum);
      sum_ += groups_[g];
    }
  }

  static KD_INLINE Vec<double> widened(const double* from) { return Vec<double>::load(from); }
  static KD_INLINE Vec<double> widened(const float* from) {
    typedef float Floats __attribute__((vector_size(KDFAST_VEC_BYTES / 2)));
    Floats floats;
    __builtin_memcpy(&floats, from, sizeof floats);
    return __builtin_convertvector(floats, Vec<double>::Value);
  }

  void emit(int64_t column, double value) {
    if (count_ < task_.capacity) task_.entries[count_++] = {int32_t(column), value};
  }

  // Gives the last column with a probability what rounding has carried beyond it.
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

  // Logits far above the origin lose digits in their difference from it; farther still, their powers may come out as
  // an infinity of either sign or as NaN.
  static bool is_sound(T sum) { return sum >= T(0) && sum < T(0x1p16); }

  const SelectTask& task_;
  const From* row_;
  const int64_t columns_;
  int64_t chunks_, count_ = 0;
  double *mass_, *origin_of_;  // (chunks,) each
  double* share_;              // (chunks, kSelectChunk), only with an order
  double top_ = 0, z_ = 0, sum_ = 0;
  T bits_, lowest_, origin_ = -Real<T>::kMax;
  double groups_[kSelectChunk / kGroup];
  T e_[kSelectChunk];
  From padded_[kSelectChunk];
};
