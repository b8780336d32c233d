// The unbiased samplers' ops, straight from a teacher's logits.
#include <cmath>
#include <mutex>
#include <tuple>
#include <vector>

#include "select.h"

namespace kdfast {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;

// splitmix64's output function.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// Uniform numbers in (0, 1) that depend on the seed, the row and their index alone.
class Uniforms {
 public:
  Uniforms(int64_t seed, int64_t row) : stream_(mix(mix(uint64_t(seed) + kGolden) + kGolden * (uint64_t(row) + 1))) {}
  double operator[](int64_t i) const {
    return (double(mix(stream_ + kGolden * (uint64_t(i) + 1)) >> 12) + 0.5) * 0x1p-52;
  }

 private:
  uint64_t stream_;
};

// `count` sorted uniform numbers, made of exponential spacings instead of by sorting.
void sorted_uniforms(const Uniforms& uniforms, int64_t count, double* to) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) to[i] = sum -= std::log(uniforms[i]);
  sum -= std::log(uniforms[count]);
  for (int64_t i = 0; i < count; ++i) to[i] /= sum;
}

// `count` numbers at equal distances in (0, 1), all moved by one offset.
void spaced(double offset, int64_t count, double* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = (double(i) + offset) / double(count);
}

struct SelectArguments {
  const Tensor& logits;  // (outer, inner, V)
  double temperature;
  int64_t seed, first_row;
  double tau = 0;
  int64_t draws = 0;
  bool systematic = false;
};

// The entries of consecutive rows, one after another.
struct Piece {
  int64_t begin = 0;
  std::vector<Entry> entries;
};

struct SelectOutputs {
  Tensor counts, lse;  // (rows,)
  std::vector<Piece> pieces;
  int64_t entries = 0;
};

int64_t most_entries(const SelectArguments& arguments) {
  const int64_t columns = arguments.logits.size(2);
  if (arguments.draws > 0) return std::min(columns, arguments.draws);
  const double grid = std::ceil(1 / arguments.tau) + 2;
  return grid < double(columns) ? int64_t(grid) : columns;
}

class PieceRunner {
 public:
  PieceRunner(const SelectArguments& arguments) : arguments_(arguments), points_(arguments.draws + 1) {
    const int64_t columns = arguments.logits.size(2);
    entries_.resize(most_entries(arguments));
    task_.temperature = arguments.temperature;
    task_.tau = arguments.tau;
    task_.draws = arguments.draws;
    task_.points = points_.data();
    task_.entries = entries_.data();
    task_.capacity = int64_t(entries_.size());
    workspace_ = thread_workspace(int64_t(sizeof(double)) * 2 * chunk_count(columns));
  }

  Selection operator()(const Source& row, int64_t i) {
    const Uniforms uniforms(arguments_.seed, arguments_.first_row + i);
    if (arguments_.systematic)
      spaced(uniforms[0], arguments_.draws, points_.data());
    else if (arguments_.draws > 0)
      sorted_uniforms(uniforms, arguments_.draws, points_.data());
    else
      points_[0] = uniforms[0];
    task_.logits = row;
    return kernels().select(task_, workspace_);
  }

  const Entry* entries() const { return entries_.data(); }

 private:
  const SelectArguments& arguments_;
  std::vector<double> points_;
  std::vector<Entry> entries_;
  SelectTask task_;
  void* workspace_;
};

SelectOutputs run(const SelectArguments& arguments) {
  const Tensor& logits = arguments.logits;
  const StridedRows rows(logits);
  const int64_t count = logits.size(0) * logits.size(1), columns = logits.size(2);
  check_selection(columns, arguments.temperature);
  SelectOutputs out = {torch::stable::new_empty(logits, {count}, ScalarType::Int),
                       torch::stable::new_empty(logits, {count}, ScalarType::Float),
                       {}};
  auto* counts = static_cast<int32_t*>(out.counts.data_ptr());
  auto* lse = static_cast<float*>(out.lse.data_ptr());
  std::mutex mutex;
  for_each_piece(count, columns, [&](int64_t begin, int64_t end) {
    PieceRunner select(arguments);
    Piece piece{begin, {}};
    for (int64_t i = begin; i < end; ++i) {
      const Selection selection = select(rows[i], i);
      counts[i] = int32_t(selection.count);
      lse[i] = float(selection.lse);
      piece.entries.insert(piece.entries.end(), select.entries(), select.entries() + selection.count);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    out.entries += int64_t(piece.entries.size());
    out.pieces.push_back(std::move(piece));
  });
  std::sort(out.pieces.begin(), out.pieces.end(), [](const Piece& a, const Piece& b) { return a.begin < b.begin; });
  return out;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename T>
Outputs pack(const SelectOutputs& out, ScalarType dtype) {
  const Tensor ids = torch::stable::new_empty(out.counts, {out.entries}, ScalarType::Int);
  const Tensor values = torch::stable::new_empty(out.counts, {out.entries}, dtype);
  auto* id = static_cast<int32_t*>(ids.data_ptr());
  auto* value = static_cast<T*>(values.data_ptr());
  for (const Piece& piece : out.pieces)
    for (const Entry& entry : piece.entries) {
      *id++ = entry.id;
      *value++ = T(entry.value);
    }
  return {ids, values, out.counts, out.lse};
}

}  // namespace

Outputs select_threshold(Tensor logits, double temperature, double tau, int64_t seed, int64_t first_row) {
  STD_TORCH_CHECK(tau > 0 && tau <= 1, "expected tau in (0, 1]");
  SelectArguments arguments = {logits, temperature, seed, first_row};
  arguments.tau = tau;
  return pack<float>(run(arguments), ScalarType::Float);
}

Outputs select_sample(Tensor logits, double temperature, int64_t draws, bool systematic, int64_t seed,
                      int64_t first_row) {
  STD_TORCH_CHECK(draws >= 1 && draws <= INT32_MAX, "expected 1 draw or more");
  SelectArguments arguments = {logits, temperature, seed, first_row};
  arguments.draws = draws;
  arguments.systematic = systematic;
  return pack<int32_t>(run(arguments), ScalarType::Int);
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("select_threshold", TORCH_BOX(&select_threshold));
  m.impl("select_sample", TORCH_BOX(&select_sample));
}

}  // namespace kdfast
