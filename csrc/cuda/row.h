// A row's coefficients, and a thread block's part of its columns. Host and device.
#pragma once

#include "pack.h"

namespace kdfast::cuda {

// A row's coefficients; kdfast/loss/reference.py says what they mean.
struct RowCoefficients {
  float tau_s = 1, tau_t = 1;
  float kd = 0, ce = 0, z_weight = 0;  // 0 leaves the term out
  float smoothing = 0;
  int64_t label = -1;
  bool has_label = false;

  // The label's column; -1 where there is none.
  KD_INLINE int label_column(int columns) const { return label >= 0 && label < columns ? int(label) : -1; }
  KD_INLINE bool counts() const { return kd != 0 || ce != 0 || z_weight != 0; }
  KD_INLINE bool wants_ce() const { return ce != 0 && (has_label || smoothing == 1); }
  KD_INLINE bool wants_lse() const { return wants_ce() || z_weight != 0; }
};

// The coefficients of one of `rows` rows. `coef` is (5, rows); `label` is null where there are no labels.
KD_INLINE RowCoefficients coefficients_of(const float* coef, const int64_t* label, float smoothing, int64_t row,
                                          int64_t rows) {
  coef += row;
  RowCoefficients c = {coef[0], coef[rows], coef[2 * rows], coef[3 * rows], coef[4 * rows], smoothing};
  c.has_label = label != nullptr;
  if (c.has_label) c.label = label[row];
  return c;
}

// Where the student's softmax at temperature 1, which cross-entropy and z-loss need, comes from: nowhere (not needed),
// the tempered exponentials (tau = 1), their squares (tau = 2), or exponentials computed for it.
enum class UnitTau { kNone, kShared, kSquared, kSeparate };

KD_INLINE UnitTau unit_tau_of(const RowCoefficients& row) {
  if (row.kd == 0 || row.tau_s == 1) return UnitTau::kShared;
  if (!row.wants_lse()) return UnitTau::kNone;
  return row.tau_s == 2 ? UnitTau::kSquared : UnitTau::kSeparate;
}

// A thread block's part of the rows, in packs that are aligned as the student's row is in memory. The first and the
// last pack of a row may hold padding: columns before 0, and from `columns` on.
template <typename T>
struct Slice {
  const Pack<T>*student, *teacher;
  int packs;
  int first;  // the column of the first pack's first lane; negative in padding
  int columns;

  KD_INLINE int column(int pack) const { return first + pack * Pack<T>::kLanes; }
  KD_INLINE bool has(int column) const { return column >= 0 && column < columns; }
  KD_INLINE bool is_whole(int pack) const { return has(column(pack)) && has(column(pack) + Pack<T>::kLanes - 1); }
};

// An address's offset within its pack, in bytes.
KD_INLINE uintptr_t phase_of(const void* address) { return reinterpret_cast<uintptr_t>(address) % sizeof(uint4); }

// The part of the cluster's block number `block`: `packs` packs, or what is left of the row. Nothing is loaded yet.
template <typename T>
KD_INLINE Slice<T> slice_of(const T* student, int columns, int packs, int block) {
  constexpr int kLanes = Pack<T>::kLanes;
  const int phase = int(phase_of(student) / sizeof(T));
  const int all = (columns + phase + kLanes - 1) / kLanes, before = block * packs, left = all - before;
  return {nullptr, nullptr, left < 0 ? 0 : left < packs ? left : packs, before * kLanes - phase, columns};
}

KD_INLINE bool is_bad(const RowCoefficients& row, int columns) {
  const bool bad_tau = !(row.tau_s > 0 && row.tau_s < kInf && row.tau_t > 0 && row.tau_t < kInf);
  const bool bad_label = row.has_label && row.smoothing < 1 && (row.label < 0 || row.label >= columns);
  return (row.kd != 0 && bad_tau) || (row.ce != 0 && bad_label);
}

}  // namespace kdfast::cuda
