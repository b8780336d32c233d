// The interface between the op files and the kernels of each ISA: plain structs that describe one row's work.
#pragma once

#include <cstdint>

#include "../divergence.h"

namespace kdfast {

enum class Dtype { kFloat, kDouble, kHalf, kBFloat16 };

// A row of values in memory, unit stride.
struct Source {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  int64_t size = 0;
};

constexpr int64_t kNoLabel = INT64_MIN;

// The K (id, weight) entries of a sparse teacher row and the log-mass of everything else. An entry of weight 0 is
// padding: whatever its id, it is as if it were not there.
struct Entries {
  const int32_t* id = nullptr;
  const float* weight = nullptr;
  int64_t count = 0;
  double tail = 0;                // log-mass; -inf: none
  bool subtract_entropy = false;  // forward KL rather than soft cross-entropy
  bool has_prototype = false;     // the tail is spread like `prototype`; false: it is one class
  Source prototype;               // over the teacher's columns; data == nullptr: an index out of range
  double prototype_entropy = 0;   // sum r log r over the shared columns; forward KL alone reads it

  bool is_padding(int64_t i) const { return weight[i] == 0; }
};

struct RowTask {
  Source student;
  Source teacher;      // dense rows
  Entries entries;     // sparse rows
  Source label_probs;  // data == nullptr: none
  int64_t label = kNoLabel;
  int64_t shared = 0;    // columns both sides have: min(V_s, V_t)
  void* grad = nullptr;  // student's dtype; may be the student's own memory; nullptr: not wanted
  double tau_s = 1, tau_t = 1;
  double kd = 0, ce = 0, z_weight = 0;  // coefficients; 0 leaves the term out
  double smoothing = 0;
  bool stream = false;      // write the gradient past the caches
  bool want_parts = false;  // entropy and top-1 agreement too
};

struct RowResult {
  double loss = 0, kd = 0, ce = 0, entropy = 0, top1 = 0;
};

struct Entry {
  int32_t id;
  double value;  // a probability, or a number of draws
};

// Which columns of a row of logits to keep. The unbiased samplers place points in [0, 1) along the row's cumulative
// probability and keep the columns that they fall in.
struct SelectTask {
  Source logits;
  double temperature = 1;
  double tau = 0;                  // threshold: entries above it are kept, the others on a grid of this spacing
  const double* points = nullptr;  // threshold: the grid's offset; sample: `draws` positions, ascending
  int64_t draws = 0;               // sample: how many points; 0: threshold
  bool likeliest = false;          // the `capacity` likeliest columns instead
  Entry* entries = nullptr;        // room for `capacity` of them
  int64_t capacity = 0;
};

struct Selection {
  int64_t count = 0;
  double lse = 0;   // of logits / temperature; NaN where the row holds a NaN or +inf, or nothing but -inf
  double rest = 0;  // likeliest: the probability of all other columns
};

// Columns per chunk. A chunk's exponentials are summed together, and looked at again only where a point falls in it.
constexpr int kSelectChunk = 128;

// One ISA's kernels. `workspace` holds workspace_bytes(student columns) bytes, aligned, used by one thread at a time.
struct Kernels {
  const char* isa;
  RowResult (*dense_float)(const Divergence&, const RowTask&, void* workspace);
  RowResult (*dense_double)(const Divergence&, const RowTask&, void* workspace);
  RowResult (*sparse_float)(const RowTask&, void* workspace);
  RowResult (*sparse_double)(const RowTask&, void* workspace);
  // Its workspace holds two doubles for each chunk.
  Selection (*select)(const SelectTask&, void* workspace);
  double (*prototype_entropy_float)(const Source& prototype, int64_t shared);
  double (*prototype_entropy_double)(const Source& prototype, int64_t shared);
  void (*scale)(void* data, Dtype dtype, int64_t size, double factor);
  int64_t (*workspace_bytes)(int64_t columns);
  void (*fence)();  // after a thread's streaming writes
};

// The best kernels this processor runs, or the ones KDFAST_CPU_ISA names (baseline, avx2, avx512).
const Kernels& kernels();

// Each target's, in its namespace.
namespace baseline {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

}  // namespace kdfast
