// The divergences, by the numbers that cross the op boundary. kdfast/divergences.py documents them.
//
// This list and rowmath.h are all that a divergence of the family Element touches in C++ and CUDA.
#pragma once

namespace kdfast {

// X(Enumerator, name, family). A divergence's place in the list is its number.
#define KDFAST_DIVERGENCES(X)                     \
  X(ForwardKl, forward_kl, Forward)               \
  X(SoftCe, soft_ce, Forward)                     \
  X(ReverseKl, reverse_kl, Element)               \
  X(SymmetricKl, symmetric_kl, Element)           \
  X(Jsd, jsd, Element)                            \
  X(SkewForwardKl, skew_forward_kl, Element)      \
  X(SkewReverseKl, skew_reverse_kl, Element)      \
  X(Tvd, tvd, Element)                            \
  X(AlphaBeta, alpha_beta, Element)               \
  X(Dkd, dkd, Special)                            \
  X(LogitMse, logit_mse, Special)                 \
  X(SquaredHellinger, squared_hellinger, Element) \
  X(PearsonChi2, pearson_chi2, Element)           \
  X(NeymanChi2, neyman_chi2, Element)

enum class Kind : int {
#define KDFAST_ENUMERATOR(Enumerator, name, family) k##Enumerator,
  KDFAST_DIVERGENCES(KDFAST_ENUMERATOR)
#undef KDFAST_ENUMERATOR
};

constexpr const char* kKindNames[] = {
#define KDFAST_NAME(Enumerator, name, family) #name,
    KDFAST_DIVERGENCES(KDFAST_NAME)
#undef KDFAST_NAME
};
constexpr int kKinds = sizeof(kKindNames) / sizeof(*kKindNames);

// How a divergence is computed.
enum class Family {
  kForward,  // value and gradient follow from the sums of the sweep that also makes both softmaxes
  kElement,  // rowmath::element of every column, once both softmaxes are known
  kSpecial,  // an algorithm of its own
};

constexpr Family family_of(Kind kind) {
  switch (kind) {
#define KDFAST_CASE(Enumerator, name, family) \
  case Kind::k##Enumerator:                   \
    return Family::k##family;
    KDFAST_DIVERGENCES(KDFAST_CASE)
#undef KDFAST_CASE
  }
  __builtin_unreachable();
}

constexpr bool is_forward(Kind kind) { return family_of(kind) == Family::kForward; }
constexpr bool is_element(Kind kind) { return family_of(kind) == Family::kElement; }

// A kind as a type, for templates to take as an argument. std::integral_constant, where the standard library is not
// wanted.
template <Kind kKind>
struct KindConstant {
  static constexpr Kind value = kKind;
};

// Calls visit(KindConstant<kind>), which returns the same type for every kind. In host code, in device code, and in the
// files of one ISA, whose target a lambda may lack: let it call a function and do no arithmetic of its own.
template <typename Visit>
constexpr auto with_kind(Kind kind, Visit visit) {
  switch (kind) {
#define KDFAST_CASE(Enumerator, name, family) \
  case Kind::k##Enumerator:                   \
    return visit(KindConstant<Kind::k##Enumerator>());
    KDFAST_DIVERGENCES(KDFAST_CASE)
#undef KDFAST_CASE
  }
  __builtin_unreachable();
}

struct Divergence {
  Kind kind = Kind::kForwardKl;
  double a = 0, b = 0;
  double scale = 1;  // 1 / (beta (1 - beta)) for a normalised jsd
  bool standardize = false;
};

}  // namespace kdfast
