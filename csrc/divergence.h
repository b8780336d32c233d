// The divergences, by the numbers that cross the op boundary. kdfast/divergences.py documents them.
#pragma once

namespace kdfast {

enum class Kind : int {
  kForwardKl,
  kSoftCe,
  kReverseKl,
  kSymmetricKl,
  kJsd,
  kSkewForwardKl,
  kSkewReverseKl,
  kTvd,
  kAlphaBeta,
  kDkd,
  kLogitMse,
};

constexpr const char* kKindNames[] = {
    "forward_kl",      "soft_ce", "reverse_kl", "symmetric_kl", "jsd",       "skew_forward_kl",
    "skew_reverse_kl", "tvd",     "alpha_beta", "dkd",          "logit_mse",
};

struct Divergence {
  Kind kind = Kind::kForwardKl;
  double a = 0, b = 0;
  double scale = 1;  // 1 / (beta (1 - beta)) for a normalised jsd
  bool standardize = false;
};

}  // namespace kdfast
