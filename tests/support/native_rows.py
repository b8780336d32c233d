"""The one-read CUDA kernels' arithmetic as a library that runs on the CPU, one thread after another."""

import ctypes
import shutil
import subprocess

import torch

from support import ROOT

NVCC = shutil.which("nvcc")
# Blocks that share a row: as threads of the CPU, and where there is a GPU with clusters on that.
CLUSTERS = [3]
ON_GPU = [1, 4, 16] if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0) else []
WHERE = [*(("cpu", size) for size in CLUSTERS), *(("cuda", size) for size in ON_GPU)]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class RowTask(ctypes.Structure):
    _fields_ = [
        ("student", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int),
        ("coef", ctypes.c_void_p),
        ("label", ctypes.c_void_p),
        ("smoothing", ctypes.c_float),
        ("cluster", ctypes.c_int),
        ("loss", ctypes.c_void_p),
    ]

    @classmethod
    def of(cls, student, grad, coef, labels, cluster, loss):
        label = None if labels.label is None else labels.label.data_ptr()
        shape = student.shape
        return cls(
            student.data_ptr(),
            grad.data_ptr(),
            *shape,
            coef.data_ptr(),
            label,
            labels.smoothing,
            cluster,
            loss.data_ptr(),
        )


def load(name, folder):
    """tests/kernels/native/<name>.cpp, compiled with the headers of nvcc's CUDA."""
    source, binary = ROOT / "tests" / "kernels" / "native" / f"{name}.cpp", folder / f"{name}.so"
    inline = "-D__forceinline__=inline"  # a GPU compiler's word
    command = [NVCC, "-std=c++17", "-O1", "-shared", "-Xcompiler=-fPIC", inline, source, "-o", binary]
    subprocess.run(command, check=True)
    return getattr(ctypes.CDLL(str(binary)), name)
