// The op that keeps a row's likeliest columns, straight from its logits.
#include <algorithm>
#include <tuple>
#include <vector>

#include "select.h"

namespace kdfast {
namespace {

struct TopOutputs {
  int32_t* id;   // (rows, k)
  double* prob;  // (rows, k)
  double* rest;  // (rows,)
  float* lse;    // (rows,)
  int64_t k;

  void store(int64_t row, const Selection& selection, const Entry* entries) const {
    for (int64_t j = 0; j < k; ++j) {
      const bool there = j < selection.count;
      id[row * k + j] = there ? entries[j].id : 0;
      prob[row * k + j] = there ? entries[j].value : 0;
    }
    rest[row] = selection.rest;
    lse[row] = float(selection.lse);
  }
};

void run(const Tensor& logits, double temperature, const TopOutputs& out) {
  const StridedRows rows(logits);
  const int64_t count = logits.size(0) * logits.size(1), columns = logits.size(2);
  for_each_piece(count, columns, [&](int64_t begin, int64_t end) {
    std::vector<Entry> entries(out.k);
    SelectTask task;
    task.temperature = temperature;
    task.likeliest = true;
    task.entries = entries.data();
    task.capacity = out.k;
    void* workspace = thread_workspace(int64_t(sizeof(double)) * 2 * chunk_count(columns));
    for (int64_t i = begin; i < end; ++i) {
      task.logits = rows[i];
      out.store(i, kernels().select(task, workspace), entries.data());
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> select_top(Tensor logits, double temperature, int64_t k) {
  const int64_t rows = logits.size(0) * logits.size(1), columns = logits.size(2);
  check_selection(columns, temperature);
  STD_TORCH_CHECK(k >= 0 && k <= columns, "expected k in [0, vocabulary]");
  const Tensor ids = torch::stable::new_empty(logits, {rows, k}, ScalarType::Int);
  const Tensor probs = torch::stable::new_empty(logits, {rows, k}, ScalarType::Double);
  const Tensor rest = torch::stable::new_empty(logits, {rows}, ScalarType::Double);
  const Tensor lse = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  run(logits, temperature,
      {static_cast<int32_t*>(ids.data_ptr()), static_cast<double*>(probs.data_ptr()),
       static_cast<double*>(rest.data_ptr()), static_cast<float*>(lse.data_ptr()), k});
  return {ids, probs, rest, lse};
}

STABLE_TORCH_LIBRARY_IMPL(kdfast, CPU, m) { m.impl("select_top", TORCH_BOX(&select_top)); }

}  // namespace kdfast
