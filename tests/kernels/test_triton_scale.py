import pytest
import torch

pytest.importorskip("triton")

from kdfast.kernels.scale import scale_
from support.triton_device import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [0, 1, 4095, 10_001])
def test_scales_in_place(dtype, count):
    x = torch.randn(count, device=DEVICE).to(dtype)
    expected = (x.float() * 0.25).to(dtype)  # exact: the interpreter truncates where a GPU rounds
    scale_(x, torch.tensor(0.25, device=DEVICE))
    assert torch.equal(x, expected)


def test_a_factor_of_one_leaves_even_nan_payloads():
    x = torch.tensor([0x7FC12345], dtype=torch.int32, device=DEVICE).view(torch.float32)
    scale_(x, torch.ones((), device=DEVICE))
    assert x.view(torch.int32).item() == 0x7FC12345
