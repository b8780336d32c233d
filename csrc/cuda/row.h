// A row's coefficients, and a thread block's part of its columns. Host and device.
#pragma once

#include "pack.h"

namespace kdfast::cuda {

// What a row asks for; kdfast/reference.py says what it means.
struct RowCoefficients {
  float tau_s = 1, tau_t = 1;
  float kd = 0, ce = 0, z = 0;  // 0 takes the term out
  float smoothing = 0;
  int64_t label = -1;
  bool has_label = false;

  // The label's column, or one that no row has.
  KD_BOTH int label_column(int columns) const { return label >= 0 && label < columns ? int(label) : -1; }
  KD_BOTH bool counts() const { return kd != 0 || ce != 0 || z != 0; }
  KD_BOTH bool wants_ce() const { return ce != 0 && (has_label || smoothing == 1); }
  KD_BOTH bool wants_lse() const { return wants_ce() || z != 0; }
};

// How the student's exponentials at temperature 1, which cross-entropy and z-loss want, come from the tempered ones.
enum class AtOne { kNone, kShared, kSquared, kSeparate };

KD_BOTH AtOne at_one(const RowCoefficients& row) {
  if (row.kd == 0 || row.tau_s == 1) return AtOne::kShared;
  if (!row.wants_lse()) return AtOne::kNone;
  return row.tau_s == 2 ? AtOne::kSquared : AtOne::kSeparate;
}

// A thread block's part of the rows, in packs that are aligned as the student's row is in memory: columns before 0 and
// from `columns` on are padding in the packs that hold them.
template <typename T>
struct Slice {
  const Pack<T>*student, *teacher;
  int packs;
  int first;  // the column of the first pack's first lane; negative in padding
  int columns;

  KD_BOTH int column(int pack) const { return first + pack * Pack<T>::kLanes; }
  KD_BOTH bool has(int column) const { return column >= 0 && column < columns; }
  KD_BOTH bool is_whole(int pack) const { return has(column(pack)) && has(column(pack) + Pack<T>::kLanes - 1); }
};

KD_BOTH bool is_bad(const RowCoefficients& row, int columns) {
  const bool bad_tau = !(row.tau_s > 0 && row.tau_s < kInf && row.tau_t > 0 && row.tau_t < kInf);
  const bool bad_label = row.has_label && row.smoothing < 1 && (row.label < 0 || row.label >= columns);
  return (row.kd != 0 && bad_tau) || (row.ce != 0 && bad_label);
}

}  // namespace kdfast::cuda
