"""Triton kernels, one file per op; shipped as ``kdfast.kernels`` and imported only when a GPU op needs one."""
