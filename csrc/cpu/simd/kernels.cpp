// Chooses the ISA whose kernels run: once, when the first row needs them.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "../row.h"

namespace kdfast {
namespace {

bool runs_here(const Kernels& kernels) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (&kernels == &avx2::kKernels) return avx2;
  if (&kernels == &avx512::kKernels)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return &kernels == &baseline::kKernels;
}

const Kernels& choose() {
#if defined(__x86_64__)
  const Kernels* const all[] = {&avx512::kKernels, &avx2::kKernels, &baseline::kKernels};
#else
  const Kernels* const all[] = {&baseline::kKernels};
#endif
  const char* forced = std::getenv("KDFAST_CPU_ISA");
  for (const Kernels* kernels : all)
    if (runs_here(*kernels) && (!forced || !*forced || std::string(forced) == kernels->isa)) return *kernels;
  throw std::runtime_error("KDFAST_CPU_ISA=" + std::string(forced) +
                           " names no kernels that this processor runs; expected baseline, avx2 or avx512");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace kdfast
