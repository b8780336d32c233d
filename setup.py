"""The native extension and the package mapping; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# One binary for every torch from 2.10 on: only the stable ABI is used.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020A000000000000"


def extension():
    import pybind11

    sources = sorted(str(path) for folder in ("csrc", "csrc/cpu") for path in Path(folder).glob("*.cpp"))
    return CppExtension(
        "kdfast._C",
        sources,
        include_dirs=[pybind11.get_include()],
        depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
        extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", STABLE_ABI],
    )


setup(
    # The folder `kernels` ships inside the package: PyPI's `kernels` is another project.
    packages=[
        "kdfast",
        "kdfast.bench",
        "kdfast.cache",
        "kdfast.cache.codecs",
        "kdfast.cache.convert",
        "kdfast.cli",
        "kdfast.demo",
        "kdfast.kernels",
    ],
    package_dir={"kdfast": "kdfast", "kdfast.kernels": "kernels"},
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
)
