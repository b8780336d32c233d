"""The native extension and the package mapping; everything else is in pyproject.toml."""

import os
import sysconfig
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, include_paths

# One binary for every torch from 2.10 on: only the stable ABI is used.
CXX = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020A000000000000"]
# What has thread-block clusters and the memory for them. Others run the Triton kernels.
NVCC = [
    *CXX,
    "-DUSE_CUDA",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fvisibility=hidden",
    "-gencode=arch=compute_90,code=sm_90",
    "-gencode=arch=compute_100,code=sm_100",
]


def builds_cuda():
    """Whether torch was built for CUDA and a compiler is there, a GPU or not. KDFAST_CUDA=0 or 1 decides otherwise."""
    wanted = os.environ.get("KDFAST_CUDA")
    return CUDA_HOME is not None and torch.version.cuda is not None if wanted is None else wanted == "1"


def strict(headers):
    """With KDFAST_WERROR=1 our own files compile without a warning, whatever the ``headers`` of others do."""
    if os.environ.get("KDFAST_WERROR") != "1":
        return []
    return ["-Wall", "-Wextra", "-Werror", *(f"-isystem{path}" for path in headers)]


def sanitizers():
    """With KDFAST_SANITIZE=1 undefined behaviour, or an access outside of what was allocated, ends the process."""
    if os.environ.get("KDFAST_SANITIZE") != "1":
        return []
    return ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-O1", "-g1"]


def extension():
    import pybind11

    cuda = builds_cuda()
    cxx = [
        *CXX,
        "-fvisibility=hidden",
        *strict([pybind11.get_include(), sysconfig.get_path("include"), *include_paths()]),
        *sanitizers(),
    ]
    patterns = ["*.cpp", *(["*.cu"] if cuda else [])]
    sources = sorted(str(path) for pattern in patterns for path in Path("csrc").rglob(pattern))
    return (CUDAExtension if cuda else CppExtension)(
        "kdfast._C",
        sources,
        include_dirs=[pybind11.get_include()],
        depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
        extra_compile_args={"cxx": cxx, "nvcc": NVCC},
        extra_link_args=sanitizers(),
    )


if __name__ == "__main__":
    setup(
        # The folder `kernels` ships inside the package: PyPI's `kernels` is another project.
        packages=[
            "kdfast",
            "kdfast.bench",
            "kdfast.cache",
            "kdfast.cache.capture",
            "kdfast.cache.codecs",
            "kdfast.cache.convert",
            "kdfast.cache.format",
            "kdfast.cache.read",
            "kdfast.cache.selection",
            "kdfast.cache.tools",
            "kdfast.cache.write",
            "kdfast.cli",
            "kdfast.demo",
            "kdfast.distill",
            "kdfast.experiments",
            "kdfast.kernels",
            "kdfast.labels",
            "kdfast.loss",
            "kdfast.meter",
            "kdfast.objectives",
            "kdfast.recipes",
        ],
        package_dir={"kdfast": "kdfast", "kdfast.kernels": "kernels"},
        ext_modules=[extension()],
        cmdclass={"build_ext": BuildExtension},
    )
