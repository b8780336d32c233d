// Which target the -inl.h files are compiled for: Google Highway's convention, for the few ISAs that kdfast has.
//
// A file with code of a target defines, before any include,
//   KDFAST_TARGET          the namespace that the code goes to
//   KDFAST_VEC_BYTES       the width of its vectors
//   KDFAST_TARGET_OPTIONS  what the compiler's target attribute takes; undefined: the build's own options.
// An -inl.h file includes what it needs and puts its code between KDFAST_BEFORE_NAMESPACE and KDFAST_AFTER_NAMESPACE.
// Those switch the target on and off, so that no template of the standard library is compiled for an ISA that the
// machine may lack. Its include guard is per target: a file that compiles several of them one after another defines or
// undefines KDFAST_TARGET_TOGGLE between two. This file has no guard, as it sets macros by the target at hand.

#ifndef KDFAST_TARGET  // an editor or a tool looks at one header alone
#define KDFAST_TARGET baseline
#define KDFAST_VEC_BYTES 16
#endif

#undef KDFAST_BEFORE_NAMESPACE
#undef KDFAST_AFTER_NAMESPACE
#undef KDFAST_PRAGMA_OF
#undef KDFAST_PRAGMA

#define KDFAST_PRAGMA_OF(tokens) _Pragma(#tokens)
#define KDFAST_PRAGMA(tokens) KDFAST_PRAGMA_OF(tokens)

// Inlined at whatever cost; on both sides of CUDA.
#undef KD_INLINE
#ifdef __CUDACC__
#define KD_INLINE __host__ __device__ __forceinline__
#else
#define KD_INLINE inline __attribute__((always_inline))
#endif

// The assertions make a semicolon end both.
#if !defined(KDFAST_TARGET_OPTIONS)
#define KDFAST_BEFORE_NAMESPACE() static_assert(true)
#define KDFAST_AFTER_NAMESPACE() static_assert(true)
#elif defined(__clang__)
#define KDFAST_BEFORE_NAMESPACE()                                                                          \
  KDFAST_PRAGMA(clang attribute push(__attribute__((target(KDFAST_TARGET_OPTIONS))), apply_to = function)) \
  static_assert(true)
#define KDFAST_AFTER_NAMESPACE() KDFAST_PRAGMA(clang attribute pop) static_assert(true)
#else
#define KDFAST_BEFORE_NAMESPACE() \
  KDFAST_PRAGMA(GCC push_options) KDFAST_PRAGMA(GCC target KDFAST_TARGET_OPTIONS) static_assert(true)
#define KDFAST_AFTER_NAMESPACE() KDFAST_PRAGMA(GCC pop_options) static_assert(true)
#endif
