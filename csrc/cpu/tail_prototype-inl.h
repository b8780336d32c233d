// The columns of a sparse row outside its entries, where the tail's mass has the shape of a row of a table.

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

// Natural logarithm of what is not negative: -inf at 0, right where log() is not, below the normal range.
template <typename T>
KD_INLINE Vec<T> log_or_lowest(Vec<T> x) {
  const Vec<T> tiny(Real<T>::kTiny), inf(Real<T>::kInf);
  const Mask<T> small = tiny > x;
  const Vec<T> y = log(select(small, x * Vec<T>(T(0x1p64)), x)) - select(small, Vec<T>(T(64 * kLn2)), Vec<T>(T(0)));
  return select(x == Vec<T>(T(0)), -inf, y);
}

// sum r log r of a tile.
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

// The same of a shape's first columns, as many as both sides have.
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
  // An index out of the table.
  bool is_bad() const { return exists() && !entries_.prototype.data; }
  double tail_mass() const { return ::exp(entries_.tail); }

  // The shape in tile k's columns; 0 at the entries and where only one side has columns.
  void load_tile(int64_t k, T* to) const {
    const int64_t left = shared_ - k * kTile;
    const int count = int(left < 0 ? 0 : left > kTile ? kTile : left);
    load(entries_.prototype, k * kTile, count, to);
    for (int i = count; i < kTile; ++i) to[i] = T(0);
    for (const int32_t* entry = tiles_.begin(k); entry != tiles_.end(k); ++entry)
      to[entries_.id[*entry] - k * kTile] = T(0);
  }

  // The sum of the shape in the teacher's own columns, beyond the shared ones.
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

  // What the shape is multiplied by, given its sum outside the entries; 0 where there is nothing to multiply.
  double scale(double mass) const { return mass == 0 ? 0 : tail_mass() / mass; }

  // sum r log r outside the entries. The whole shape's is known; less what the entries take of it, unless that is most
  // of it: their difference would be the sums' rounding.
  double entropy(double mass, T* buffer) const {
    double taken = 0, entropy_taken = 0;
    for (int64_t i = 0; i < entries_.count; ++i) {
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

  // What scale() is over the whole row, for a sweep that needs it beforehand.
  double scale_of_row(T* buffer) const {
    double mass = mass_beyond(buffer);
    for (int64_t k = 0; k < tile_count(shared_); ++k) {
      load_tile(k, buffer);
      mass += sum_of(buffer);
    }
    return is_finite(mass) ? scale(mass) : __builtin_nan("");
  }

  // The whole row's distribution in tile k, entries included, and its sum.
  double probability_tile(int64_t k, double scale, T* to) const {
    load_tile(k, to);
    const V factor((T(scale)));
    for (int i = 0; i < kTile; i += V::kLanes) (V::load(to + i) * factor).store(to + i);
    for (const int32_t* entry = tiles_.begin(k); entry != tiles_.end(k); ++entry)
      to[entries_.id[*entry] - k * kTile] = T(entries_.weight[*entry]);
    return sum_of(to);
  }

  // Its logarithm.
  void log_tile(int64_t k, double scale, T* to) const {
    load_tile(k, to);
    const V offset(T(::log(scale)));
    for (int i = 0; i < kTile; i += V::kLanes) (log_or_lowest(V::load(to + i)) + offset).store(to + i);
    for (const int32_t* entry = tiles_.begin(k); entry != tiles_.end(k); ++entry)
      to[entries_.id[*entry] - k * kTile] = T(::log(double(entries_.weight[*entry])));
  }

 private:
  // Four sums per lane, so that none is long.
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
