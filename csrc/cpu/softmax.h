// One side's exponentials, tile by tile, straight from the logits: 2^(x log2(e) / tau - offset), with an integer offset
// per tile. The offset only has to come near the tile's maximum (float has room for 2^60 on either side), so a few
// logits decide it and nobody looks for the maximum first; a tile whose sums overflow all the same is done again.
// The factors that normalize() leaves turn a tile's exponentials into probabilities. Included like vec.h.

constexpr int kTile = 1024;
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

KD_INLINE int64_t tile_count(int64_t columns) { return (columns + kTile - 1) / kTile; }
KD_INLINE bool is_finite(double x) { return x - x == 0; }

template <typename T>
struct Exponentials {
  T* e = nullptr;            // (columns,)
  double* offset = nullptr;  // (tiles,) -inf where no column of the tile is finite
  double* sum = nullptr;     // (tiles,)
  double* factor = nullptr;  // (tiles,)
  int64_t columns = 0;
  T bits = T(kLog2E);                      // log2(e) / tau
  double top = -Real<double>::kInf, z = 0;  // over the row; z is 0 exactly where every column is -inf

  void set_tau(double tau) { bits = T(kLog2E / tau); }
  // 1 / tau, with the rounding that the exponentials saw.
  double scale() const { return double(bits) * kLn2; }

  // Sums of tiles to a sum of the row. A NaN or +inf anywhere makes z NaN.
  void finish() {
    const int64_t tiles = tile_count(columns);
    for (int64_t k = 0; k < tiles; ++k) top = offset[k] > top ? offset[k] : top;
    for (int64_t k = 0; k < tiles; ++k) z += sum[k] * relative(k);
    normalize();
  }
  // Adds a column that no tile holds; normalize() when all are in.
  void include(double x) {
    if (x == -Real<double>::kInf) return;
    const double u = x * bits, raised = u > top ? u : top;
    if (z != 0) z *= ::exp2(top - raised);
    z += ::exp2(u - raised);
    top = raised;
  }
  void normalize() {
    for (int64_t k = 0; k < tile_count(columns); ++k) factor[k] = z == 0 ? 0 : relative(k) / z;
  }
  // A tile without a finite column has sum 0, or NaN, and no offset to be relative to.
  double relative(int64_t k) const { return offset[k] == -Real<double>::kInf ? 1 : ::exp2(offset[k] - top); }

  // In nats.
  double lse() const { return top * kLn2 + ::log(z); }
  double log_probability(double x) const { return x * scale() - lse(); }
  // log of a tile's probability per unit of its exponential.
  double log_factor(int64_t k) const { return (offset[k] - top) * kLn2 - ::log(z); }
  T probability(int64_t column) const { return e[column] * T(factor[column / kTile]); }
};

// A tile of one side: log2(e) / tau and the offset.
template <typename T>
struct Base2 {
  T bits = 0, offset = 0;
  KD_INLINE Vec<T> operator()(Vec<T> x) const { return x * Vec<T>(bits) - Vec<T>(offset); }
};

template <typename T>
struct TileSums {
  T student = 0, teacher = 0, square = 0, cross = 0, logits_s = 0, logits_t = 0;

  TileSums operator+(const TileSums& other) const {
    return {student + other.student, teacher + other.teacher,   square + other.square,
            cross + other.cross,     logits_s + other.logits_s, logits_t + other.logits_t};
  }
};

// What one sweep over a tile computes beside the student's exponentials.
struct SweepMode {
  bool teacher = false;  // the teacher's exponentials
  bool square = false;   // sum of e_s^2: the student at temperature 1, when tau is 2
  bool cross = false;    // sum of e_t (keep v - u), in bits: the value of forward KL
  bool careful = false;  // cross with -inf on either side, as rowmath's weighted()
};

template <bool kTeacher, bool kSquare, bool kCross, bool kCareful, typename T, typename From>
TileSums<T> exponentiate(int count, const From* x, const From* y, Base2<T> s, Base2<T> t, T keep, T* e_s, T* e_t) {
  using V = Vec<T>;
  const V zero(T(0)), lowest(-Real<T>::kInf), tiny(Real<T>::kTiny), keep_v(keep);
  V sum_s = zero, sum_t = zero, square = zero, cross = zero, logits_s = zero, logits_t = zero;
  for (int i = 0; i < count; i += V::kLanes) {
    const V logit_s = load_vector<T>(x + i), u = s(logit_s), a = exp2(u);
    a.store(e_s + i);
    sum_s = sum_s + a;
    logits_s = logits_s + logit_s;
    if constexpr (kSquare) square = a * a + square;
    if constexpr (kTeacher) {
      const V logit_t = load_vector<T>(y + i), v = t(logit_t), b = exp2(v);
      b.store(e_t + i);
      sum_t = sum_t + b;
      logits_t = logits_t + logit_t;
      if constexpr (kCross && kCareful) cross = cross + select(v > lowest, max(b, tiny) * (keep_v * v - u), zero);
      if constexpr (kCross && !kCareful) cross = b * (keep_v * v - u) + cross;
    }
  }
  return {reduce_add(sum_s), reduce_add(sum_t),    reduce_add(square),
          reduce_add(cross), reduce_add(logits_s), reduce_add(logits_t)};
}

template <typename T, typename From>
TileSums<T> exponentiate(SweepMode mode, int count, const From* x, const From* y, Base2<T> s, Base2<T> t, T keep,
                         T* e_s, T* e_t) {
#define KD_SWEEP(...) exponentiate<__VA_ARGS__, T, From>(count, x, y, s, t, keep, e_s, e_t)
  if (!mode.teacher) return mode.square ? KD_SWEEP(false, true, false, false) : KD_SWEEP(false, false, false, false);
  if (!mode.cross) return mode.square ? KD_SWEEP(true, true, false, false) : KD_SWEEP(true, false, false, false);
  if (mode.careful) return mode.square ? KD_SWEEP(true, true, true, true) : KD_SWEEP(true, false, true, true);
  return mode.square ? KD_SWEEP(true, true, true, false) : KD_SWEEP(true, false, true, false);
#undef KD_SWEEP
}

// The largest of `count` logits, ignoring NaN; -inf where there is none.
template <typename T, typename From>
T maximum(const From* x, int count) {
  T top = -Real<T>::kInf;
  for (int i = 0; i < count; ++i) {
    const T value = T(to_real(x[i]));
    top = value > top ? value : top;
  }
  return top;
}

// The integer near the exponent of logit x; 0 where there is none to be near to.
template <typename T>
T offset_near(T x, T bits) {
  const double u = ::nearbyint(double(x) * double(bits));
  return is_finite(u) ? T(u) : T(0);
}
