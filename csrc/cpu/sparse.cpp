// The sparse row ops: student logits against K (id, weight) entries and a tail.
#include <vector>

#include "rows.h"

namespace kdfast {
namespace {

struct SparseArguments {
  RowArguments rows;
  const Tensor& ids;                    // (nnz,) int32
  const Tensor& weights;                // (nnz,) float32
  const Tensor& offsets;                // (rows + 1,) int64
  const std::optional<Tensor>& tail;    // (rows,) log-mass, in coef's dtype
  int64_t vocab;                        // the teacher's
  const std::optional<Tensor>& shape;   // (rows,) int64: what the tail looks like; none: one more class
  const std::optional<Tensor>& shapes;  // (S, vocab)
  Divergence divergence;                // without shapes: forward KL or soft cross-entropy

  bool is_forward() const { return kdfast::is_forward(divergence.kind); }
};

// The tails' shapes, where they have any.
class Shapes {
 public:
  explicit Shapes(const SparseArguments& arguments, int64_t rows) {
    STD_TORCH_CHECK(arguments.shape.has_value() == arguments.shapes.has_value(), "shape and shapes belong together");
    STD_TORCH_CHECK(arguments.shapes || arguments.is_forward(), "the divergence needs the shapes of the tails");
    if (!arguments.shapes) return;
    const Tensor& table = *arguments.shapes;
    STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == arguments.vocab && table.is_contiguous(),
                    "shapes must be a contiguous (S, vocab) table");
    STD_TORCH_CHECK(arguments.tail.has_value(), "shapes are those of tails");
    index_ = vector_data<int64_t>(*arguments.shape, ScalarType::Long, rows);
    table_ = static_cast<const char*>(table.data_ptr());
    count_ = table.size(0);
    columns_ = table.size(1);
    row_bytes_ = columns_ * int64_t(table.element_size());
    dtype_ = dtype_of(table);
    if (arguments.divergence.kind == Kind::kForwardKl)
      find_entropies(rows, std::min(columns_, arguments.rows.student.size(2)), is_double(arguments.rows.student));
  }

  bool exist() const { return index_ != nullptr; }
  Source of(int64_t row) const { return has(row) ? at(index_[row]) : Source(); }
  double entropy(int64_t row) const { return has(row) && !entropies_.empty() ? entropies_[size_t(index_[row])] : 0; }

 private:
  bool has(int64_t row) const { return exist() && index_[row] >= 0 && index_[row] < count_; }
  Source at(int64_t index) const { return {table_ + index * row_bytes_, dtype_, columns_}; }

  // Once for each shape that some row names: a row's own would cost it a logarithm per column.
  void find_entropies(int64_t rows, int64_t shared, bool wide) {
    const auto entropy = wide ? kernels().shape_entropy_double : kernels().shape_entropy_float;
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

// A row's loss by the kernel that its divergence needs, and its parts: entropy and top-1 agreement are those of the
// tempered softmax, which forward KL's has.
template <typename Forward, typename Other>
RowResult run_row(const SparseArguments& arguments, RowTask& task, void* workspace, Forward forward, Other other) {
  const bool is_forward = arguments.is_forward();
  const auto row = [&](const RowTask& at) {
    return is_forward ? forward(at, workspace) : other(arguments.divergence, at, workspace);
  };
  RowResult parts;
  if (task.want_parts) {
    RowTask plain = unweighted(task);
    parts = forward(plain, workspace);
    plain.want_parts = false;
    if (!is_forward) parts.kd = row(plain).kd;
  }
  task.want_parts = false;
  parts.loss = row(task).loss;
  return parts;
}

RowOutputs run(const SparseArguments& arguments, const Tensor* grad) {
  const bool wide = is_double(arguments.rows.student);
  const auto forward = wide ? kernels().sparse_double : kernels().sparse_float;
  const auto other = wide ? kernels().dense_double : kernels().dense_float;
  const Tensor& student = arguments.rows.student;
  const int64_t rows = student.size(0) * student.size(1), entries = arguments.ids.numel();
  const auto* ids = vector_data<int32_t>(arguments.ids, ScalarType::Int, entries);
  const auto* weights = vector_data<float>(arguments.weights, ScalarType::Float, entries);
  const auto* offsets = vector_data<int64_t>(arguments.offsets, ScalarType::Long, rows + 1);
  for (int64_t i = 0; i < rows; ++i)
    STD_TORCH_CHECK(0 <= offsets[i] && offsets[i] <= offsets[i + 1] && offsets[i + 1] <= entries,
                    "offsets must not decrease or leave the entries");
  const Shapes shapes(arguments, rows);
  const std::optional<Numbers> tails = arguments.tail ? std::optional<Numbers>(*arguments.tail) : std::nullopt;
  const int64_t shared = std::min(student.size(2), arguments.vocab);
  const bool subtract_entropy = arguments.divergence.kind == Kind::kForwardKl;
  return for_each_row(arguments.rows, grad, [&](int64_t i, RowTask& task, void* workspace) {
    const int64_t begin = offsets[i], end = offsets[i + 1];
    const double tail = tails ? (*tails)[i] : -std::numeric_limits<double>::infinity();
    task.entries = {ids + begin,      weights + begin, end - begin,  tail,
                    subtract_entropy, shapes.exist(),  shapes.of(i), shapes.entropy(i)};
    task.shared = shared;
    task.tau_t = 1;  // the labels hold at the teacher's temperature as they are
    return run_row(arguments, task, workspace, forward, other);
  });
}

using Outputs = std::tuple<Tensor, Tensor>;
using OutputsWithGrad = std::tuple<Tensor, Tensor, Tensor>;

}  // namespace

#define KDFAST_SPARSE_ARGUMENTS                                                                                  \
  Tensor student, Tensor ids, Tensor weights, Tensor offsets, std::optional<Tensor> tail, int64_t vocab,         \
      std::optional<Tensor> shape, std::optional<Tensor> shapes, int64_t kind, double a, double b, double scale, \
      Tensor coef, std::optional<Tensor> label, std::optional<Tensor> label_probs, double smoothing, bool want_parts
#define KDFAST_SPARSE_PACK                                                                                           \
  SparseArguments {                                                                                                  \
    {student, coef, label, label_probs, smoothing, want_parts}, ids, weights, offsets, tail, vocab, shape, shapes, { \
      static_cast<Kind>(kind), a, b, scale, false                                                                    \
    }                                                                                                                \
  }

Outputs sparse_rows(KDFAST_SPARSE_ARGUMENTS) {
  const RowOutputs out = run(KDFAST_SPARSE_PACK, nullptr);
  return {out.loss, out.parts};
}

OutputsWithGrad sparse_rows_grad(KDFAST_SPARSE_ARGUMENTS) {
  const Tensor grad = new_gradient(student);
  const RowOutputs out = run(KDFAST_SPARSE_PACK, &grad);
  return {out.loss, grad, out.parts};
}

Outputs sparse_rows_inplace(KDFAST_SPARSE_ARGUMENTS) {
  const RowOutputs out = run(KDFAST_SPARSE_PACK, &student);
  return {out.loss, out.parts};
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) {
  m.impl("sparse_rows", TORCH_BOX(&sparse_rows));
  m.impl("sparse_rows_grad", TORCH_BOX(&sparse_rows_grad));
  m.impl("sparse_rows_inplace", TORCH_BOX(&sparse_rows_inplace));
}

}  // namespace kdfast
