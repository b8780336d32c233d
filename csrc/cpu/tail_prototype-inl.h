// A sparse row's tail spread over the columns outside its entries in proportion to a prototype: one row r of a table,
// not normalised.

#if defined(KDFAST_CPU_TAIL_PROTOTYPE_INL_H_) == defined(KDFAST_TARGET_TOGGLE)
#ifdef KDFAST_CPU_TAIL_PROTOTYPE_INL_H_
#undef KDFAST_CPU_TAIL_PROTOTYPE_INL_H_
#else
#define KDFAST_CPU_TAIL_PROTOTYPE_INL_H_
#endif

#include <cmath>
#include <cstdint>

#include "entry_tiles-inl.h"
#include "row.h"
#include "simd/load-inl.h"
#include "simd/vec-inl.h"
#include "softmax-inl.h"

KDFAST_BEFORE_NAMESPACE();
namespace kdfast {
namespace KDFAST_TARGET {

// Natural logarithm of a number >= 0: -inf at 0, and accurate for subnormal numbers too, unlike log().
template <typename T>
KD_INLINE Vec<T> log_or_lowest(Vec<T> x) {
  const Vec<T> tiny(Real<T>::kTiny), inf(Real<T>::kInf);
  const Mask<T> small = tiny > x;
  const Vec<T> y = log(select(small, x * Vec<T>(T(0x1p64)), x)) - select(small, Vec<T>(T(64 * kLn2)), Vec<T>(T(0)));
  return select(x == Vec<T>(T(0)), -inf, y);
}

// sum r log r over a tile.
template <typename T>
double tile_entropy(const T* r) {
  using V = Vec<T>;
  const V zero(T(0));
  V total = zero;
  for (int i = 0; i < kTile; i += V::kLanes) {
    const V p = V::load(r + i);
    total = total + select(p > zero, p * log_or_lowest(p), zero);
  }
  return reduce_add(total);
}

// sum r log r over a prototype's first `shared` columns.
template <typename T>
double prototype_entropy(const Source& prototype, int64_t shared) {
  T tile[kTile];
  double total = 0;
  for (int64_t begin = 0; begin < shared; begin += kTile) {
    const int count = int(shared - begin < kTile ? shared - begin : kTile);
    load(prototype, begin, count, tile);
    for (int i = count; i < kTile; ++i) tile[i] = T(0);
    total += tile_entropy(tile);
  }
  return total;
}

template <typename T>
class TailPrototype {
  using V = Vec<T>;

 public:
  TailPrototype(const RowTask& task, const EntryTiles& tiles)
      : entries_(task.entries), shared_(task.shared), tiles_(tiles) {}

  bool exists() const { return entries_.has_prototype; }
  // Whether the row's index is out of the table's range.
  bool is_bad() const { return exists() && !entries_.prototype.data; }
  double tail_mass() const { return ::exp(entries_.tail); }

  // r in tile k's columns; 0 at the entries and beyond the shared columns.
  void load_tile(int64_t k, T* to) const {
    const int64_t left = shared_ - k * kTile;
    const int count = int(left < 0 ? 0 : left > kTile ? kTile : left);
    load(entries_.prototype, k * kTile, count, to);
    for (int i = count; i < kTile; ++i) to[i] = T(0);
    for (const int32_t* entry = tiles_.begin(k); entry != tiles_.end(k); ++entry)
      to[entries_.id[*entry] - k * kTile] = T(0);
  }

  // The sum of r over the teacher's columns beyond the shared ones.
  double mass_beyond(T* buffer) const {
    double total = 0;
    for (int64_t begin = shared_; begin < entries_.prototype.size; begin += kTile) {
      const int64_t left = entries_.prototype.size - begin;
      const int count = int(left > kTile ? kTile : left);
      load(entries_.prototype, begin, count, buffer);
      for (int i = count; i < kTile; ++i) buffer[i] = T(0);
      total += sum_of(buffer);
    }
    return total;
  }

  // The factor that gives r the tail's mass; `mass` is the sum of r outside the entries. 0 where that is 0.
  double scale(double mass) const { return mass == 0 ? 0 : tail_mass() / mass; }

  // sum r log r outside the entries. Subtract the entries' share from the precomputed total, unless that cancels; then
  // sum directly.
  double entropy(double mass, T* buffer) const {
    double taken = 0, entropy_taken = 0;
    for (int64_t i = 0; i < entries_.count; ++i) {
      if (entries_.is_padding(i)) continue;
      const T r = T(load_one(entries_.prototype, entries_.id[i]));
      taken += r;
      if (r > 0) entropy_taken += double(r) * log_or_lowest(V(r)).v[0];
    }
    if (taken < mass) return entries_.prototype_entropy - entropy_taken;
    double total = 0;
    for (int64_t k = 0; k < tile_count(shared_); ++k) {
      load_tile(k, buffer);
      total += tile_entropy(buffer);
    }
    return total;
  }

  // scale() of the whole row, where a sweep needs it beforehand; NaN where r is not finite.
  double scale_of_row(T* buffer) const {
    double mass = mass_beyond(buffer);
    for (int64_t k = 0; k < tile_count(shared_); ++k) {
      load_tile(k, buffer);
      mass += sum_of(buffer);
    }
    return is_finite(mass) ? scale(mass) : __builtin_nan("");
  }

  // Writes the row's probabilities in tile k, entries included. Returns their sum.
  double probability_tile(int64_t k, double scale, T* to) const {
    load_tile(k, to);
    const V factor((T(scale)));
    for (int i = 0; i < kTile; i += V::kLanes) (V::load(to + i) * factor).store(to + i);
    for (const int32_t* entry = tiles_.begin(k); entry != tiles_.end(k); ++entry)
      to[entries_.id[*entry] - k * kTile] = T(entries_.weight[*entry]);
    return sum_of(to);
  }

  // Writes the logarithms of the row's probabilities in tile k.
  void log_tile(int64_t k, double scale, T* to) const {
    load_tile(k, to);
    const V offset(T(::log(scale)));
    for (int i = 0; i < kTile; i += V::kLanes) (log_or_lowest(V::load(to + i)) + offset).store(to + i);
    for (const int32_t* entry = tiles_.begin(k); entry != tiles_.end(k); ++entry)
      to[entries_.id[*entry] - k * kTile] = T(::log(double(entries_.weight[*entry])));
  }

 private:
  // Four sums per lane: shorter sums round less.
  static double sum_of(const T* x) {
    V sums[4] = {V(T(0)), V(T(0)), V(T(0)), V(T(0))};
    for (int i = 0; i < kTile; i += 4 * V::kLanes)
      for (int j = 0; j < 4; ++j) sums[j] = sums[j] + V::load(x + i + j * V::kLanes);
    return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }

  const Entries& entries_;
  const int64_t shared_;
  const EntryTiles& tiles_;
};

}  // namespace KDFAST_TARGET
}  // namespace kdfast
KDFAST_AFTER_NAMESPACE();

#endif  // per-target include guard
