// What the row ops take, written once: an op's schema, the struct that its kernels get and the order in which they are
// unpacked into it are all made of one list.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

#include "divergence.h"

// X(Type, name). kdfast/loss/reference.py says what a row's coefficients and a divergence's numbers mean.
#define KDFAST_LABEL_ARGUMENTS(X)                                                \
  X(Tensor, coef)                /* (5, rows): tau_s, tau_t, kd, ce, z_weight */ \
  X(OptionalTensor, label)       /* (rows,) int64 */                             \
  X(OptionalTensor, label_probs) /* (outer, inner, V_s) */                       \
  X(Float, smoothing)
#define KDFAST_DIVERGENCE_ARGUMENTS(X) X(Int, kind) X(Float, a) X(Float, b) X(Float, scale)

#define KDFAST_DENSE_ROWS(X)                   \
  X(Tensor, teacher) /* (outer, inner, V_t) */ \
  KDFAST_LABEL_ARGUMENTS(X)                    \
  KDFAST_DIVERGENCE_ARGUMENTS(X)               \
  X(Bool, standardize)                         \
  X(Bool, want_parts)

#define KDFAST_SPARSE_ROWS(X)                                                       \
  X(Tensor, ids)                   /* (nnz,) int32 */                               \
  X(Tensor, weights)               /* (nnz,) float32 */                             \
  X(Tensor, offsets)               /* (rows + 1,) int64 */                          \
  X(OptionalTensor, tail)          /* (rows,) log-mass, in coef's dtype */          \
  X(Int, vocab)                    /* the teacher's */                              \
  X(OptionalTensor, prototype_ids) /* (rows,) int64; none: the tail is one class */ \
  X(OptionalTensor, prototypes)    /* (prototypes, vocab) */                        \
  KDFAST_DIVERGENCE_ARGUMENTS(X)   /* without prototypes: of the family Forward */  \
  KDFAST_LABEL_ARGUMENTS(X)                                                         \
  X(Bool, want_parts)

// The one-read CUDA kernels'. Without `grad` they compute the loss alone.
#define KDFAST_DENSE_ROWS_CLUSTER(X) \
  X(Tensor, teacher)                 \
  X(Tensor, coef)                    \
  X(OptionalTensor, label)           \
  X(Float, smoothing)                \
  KDFAST_DIVERGENCE_ARGUMENTS(X)     \
  X(OptionalOutput, grad)            \
  X(Int, cluster)

#define KDFAST_SPARSE_ROWS_CLUSTER(X) \
  X(Tensor, ids)                      \
  X(Tensor, weights)                  \
  X(Tensor, offsets)                  \
  X(OptionalTensor, tail)             \
  X(Tensor, coef)                     \
  X(OptionalTensor, label)            \
  X(Float, smoothing)                 \
  X(Bool, subtract_entropy)           \
  X(OptionalOutput, grad)             \
  X(Int, cluster)

// A list as the part of a schema that follows the student.
#define KDFAST_SCHEMA(list) list(KDFAST_SCHEMA_ARGUMENT)
#define KDFAST_SCHEMA_ARGUMENT(Type, name) ", " KDFAST_SCHEMA_##Type " " #name
#define KDFAST_SCHEMA_Tensor "Tensor"
#define KDFAST_SCHEMA_OptionalTensor "Tensor?"
#define KDFAST_SCHEMA_OptionalOutput "Tensor(a!)?"
#define KDFAST_SCHEMA_Int "int"
#define KDFAST_SCHEMA_Float "float"
#define KDFAST_SCHEMA_Bool "bool"

namespace kdfast {

namespace schema {
using Tensor = torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalOutput = std::optional<Tensor>;
using Int = int64_t;
using Float = double;
using Bool = bool;
}  // namespace schema

#define KDFAST_FIELD(Type, name) schema::Type name;
#define KDFAST_TYPE(Type, name) , schema::Type
#define KDFAST_ARGUMENTS(Name, list)                            \
  struct Name {                                                 \
    schema::Tensor student; /* (outer, inner, V_s) */           \
    list(KDFAST_FIELD);                                         \
    using Types = std::tuple<schema::Tensor list(KDFAST_TYPE)>; \
  }
KDFAST_ARGUMENTS(DenseArguments, KDFAST_DENSE_ROWS);
KDFAST_ARGUMENTS(SparseArguments, KDFAST_SPARSE_ROWS);
KDFAST_ARGUMENTS(DenseClusterArguments, KDFAST_DENSE_ROWS_CLUSTER);
KDFAST_ARGUMENTS(SparseClusterArguments, KDFAST_SPARSE_ROWS_CLUSTER);
#undef KDFAST_ARGUMENTS
#undef KDFAST_TYPE
#undef KDFAST_FIELD

// A function of such a struct as a function of its fields, which TORCH_BOX takes: TORCH_BOX(&Op<dense_rows>::call).
template <typename Result, typename Arguments>
Arguments arguments_of(Result (*)(const Arguments&));
template <auto kFunction, typename Types = typename decltype(arguments_of(kFunction))::Types>
struct Op;
template <auto kFunction, typename... Types>
struct Op<kFunction, std::tuple<Types...>> {
  static auto call(Types... fields) { return kFunction({std::move(fields)...}); }
};

template <typename Arguments>
Divergence divergence_of(const Arguments& arguments, bool standardize = false) {
  STD_TORCH_CHECK(0 <= arguments.kind && arguments.kind < kKinds, "kind must be the number of a divergence");
  return {static_cast<Kind>(arguments.kind), arguments.a, arguments.b, arguments.scale, standardize};
}

}  // namespace kdfast
