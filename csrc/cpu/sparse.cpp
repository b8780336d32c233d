// The sparse row ops: student logits against K (id, weight) entries and a tail.
#include <vector>

#include "../row_arguments.h"
#include "rows.h"

namespace kdfast {
namespace {

// The prototypes of the rows' tails, if the op has any, and their entropies.
class Prototypes {
 public:
  Prototypes(const SparseArguments& arguments, const Divergence& divergence, int64_t rows) {
    STD_TORCH_CHECK(arguments.prototype_ids.has_value() == arguments.prototypes.has_value(),
                    "prototype_ids and prototypes belong together");
    STD_TORCH_CHECK(arguments.prototypes || is_forward(divergence.kind),
                    "the divergence needs the prototypes of the tails");
    if (!arguments.prototypes) return;
    const Tensor& table = *arguments.prototypes;
    STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == arguments.vocab && table.is_contiguous(),
                    "prototypes must be a contiguous (prototypes, vocab) table");
    STD_TORCH_CHECK(arguments.tail.has_value(), "prototypes are those of tails");
    index_ = vector_data<int64_t>(*arguments.prototype_ids, ScalarType::Long, rows);
    table_ = static_cast<const char*>(table.data_ptr());
    count_ = table.size(0);
    columns_ = table.size(1);
    row_bytes_ = columns_ * int64_t(table.element_size());
    dtype_ = dtype_of(table);
    if (divergence.kind == Kind::kForwardKl)
      find_entropies(rows, std::min(columns_, arguments.student.size(2)), is_double(arguments.student));
  }

  bool exist() const { return index_ != nullptr; }
  Source of(int64_t row) const { return has(row) ? at(index_[row]) : Source(); }
  double entropy(int64_t row) const { return has(row) && !entropies_.empty() ? entropies_[size_t(index_[row])] : 0; }

 private:
  bool has(int64_t row) const { return exist() && index_[row] >= 0 && index_[row] < count_; }
  Source at(int64_t index) const { return {table_ + index * row_bytes_, dtype_, columns_}; }

  // Once for each prototype that some row names, not once a row: it takes a logarithm per column.
  void find_entropies(int64_t rows, int64_t shared, bool wide) {
    const auto entropy = wide ? kernels().prototype_entropy_double : kernels().prototype_entropy_float;
    entropies_.resize(size_t(count_));
    std::vector<bool> is_named(static_cast<size_t>(count_));
    std::vector<int64_t> named;
    for (int64_t i = 0; i < rows; ++i) {
      if (!has(i) || is_named[size_t(index_[i])]) continue;
      is_named[size_t(index_[i])] = true;
      named.push_back(index_[i]);
    }
    torch::stable::parallel_for(0, int64_t(named.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        entropies_[size_t(named[size_t(i)])] = entropy(at(named[size_t(i)]), shared);
    });
  }

  const int64_t* index_ = nullptr;
  const char* table_ = nullptr;
  int64_t count_ = 0, columns_ = 0, row_bytes_ = 0;
  Dtype dtype_ = Dtype::kFloat;
  std::vector<double> entropies_;
};

// A row's loss, by the kernel that its divergence needs, and its parts. Entropy and top-1 agreement are properties of
// the tempered softmax, not of the divergence: the kernel of forward KL reports them.
template <typename Forward, typename Other>
RowResult run_row(const Divergence& divergence, RowTask& task, void* workspace, Forward forward, Other other) {
  const bool forward_kind = is_forward(divergence.kind);
  const auto row = [&](const RowTask& at) {
    return forward_kind ? forward(at, workspace) : other(divergence, at, workspace);
  };
  RowResult parts;
  if (task.want_parts) {
    RowTask plain = unweighted(task);
    parts = forward(plain, workspace);
    plain.want_parts = false;
    if (!forward_kind) parts.kd = row(plain).kd;
  }
  task.want_parts = false;
  parts.loss = row(task).loss;
  return parts;
}

RowOutputs run(const SparseArguments& arguments, const Tensor* grad) {
  const Divergence divergence = divergence_of(arguments);
  const bool wide = is_double(arguments.student);
  const auto forward = wide ? kernels().sparse_double : kernels().sparse_float;
  const auto other = wide ? kernels().dense_double : kernels().dense_float;
  const Tensor& student = arguments.student;
  const int64_t rows = count_rows(student), entries = arguments.ids.numel();
  const auto* ids = vector_data<int32_t>(arguments.ids, ScalarType::Int, entries);
  const auto* weights = vector_data<float>(arguments.weights, ScalarType::Float, entries);
  const auto* offsets = vector_data<int64_t>(arguments.offsets, ScalarType::Long, rows + 1);
  for (int64_t i = 0; i < rows; ++i)
    STD_TORCH_CHECK(0 <= offsets[i] && offsets[i] <= offsets[i + 1] && offsets[i + 1] <= entries,
                    "offsets must not decrease or leave the entries");
  STD_TORCH_CHECK(arguments.vocab >= 0, "vocab must not be negative");
  const Prototypes prototypes(arguments, divergence, rows);
  std::optional<Numbers> tails;
  if (arguments.tail) tails.emplace(*arguments.tail, rows);
  const int64_t shared = std::min(student.size(2), arguments.vocab);
  const bool subtract_entropy = divergence.kind == Kind::kForwardKl;
  return for_each_row(arguments, grad, [&](int64_t i, RowTask& task, void* workspace) {
    const int64_t begin = offsets[i], end = offsets[i + 1];
    const double tail = tails ? (*tails)[i] : -std::numeric_limits<double>::infinity();
    task.entries = {ids + begin,      weights + begin,    end - begin,      tail,
                    subtract_entropy, prototypes.exist(), prototypes.of(i), prototypes.entropy(i)};
    task.shared = shared;
    task.tau_t = 1;  // the entries are probabilities at the teacher's temperature already
    return run_row(divergence, task, workspace, forward, other);
  });
}

using Outputs = std::tuple<Tensor, Tensor>;
using OutputsWithGrad = std::tuple<Tensor, Tensor, Tensor>;

Outputs sparse_rows(const SparseArguments& arguments) {
  const RowOutputs out = run(arguments, nullptr);
  return {out.loss, out.parts};
}

OutputsWithGrad sparse_rows_grad(const SparseArguments& arguments) {
  const Tensor grad = new_gradient(arguments.student);
  const RowOutputs out = run(arguments, &grad);
  return {out.loss, grad, out.parts};
}

Outputs sparse_rows_inplace(const SparseArguments& arguments) {
  const RowOutputs out = run(arguments, &arguments.student);
  return {out.loss, out.parts};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("sparse_rows", TORCH_BOX(&Op<sparse_rows>::call));
  m.impl("sparse_rows_grad", TORCH_BOX(&Op<sparse_rows_grad>::call));
  m.impl("sparse_rows_inplace", TORCH_BOX(&Op<sparse_rows_inplace>::call));
}

}  // namespace kdfast
