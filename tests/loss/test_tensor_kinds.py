"""Tensors whose numbers do not lie in memory as strides say: refused by name, before a kernel runs. Meta ones work."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from kdfast import Head, kd_loss


def nested(x):
    return torch.nested.nested_tensor([x, x[:2]])


def jagged(x):
    return torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged)


KINDS = {
    "nested": (nested, "is a nested tensor.*padded"),
    "jagged": (jagged, "is a nested tensor.*padded"),
    "coo": (torch.Tensor.to_sparse, r"sparse_coo tensor.*to_dense\(\)"),
    "csr": (torch.Tensor.to_sparse_csr, r"sparse_csr tensor.*to_dense\(\)"),
    "fp8": (lambda x: x.to(torch.float8_e4m3fn), r"float32.*float8_e4m3fn.*\.float\(\)"),
}


@pytest.mark.filterwarnings("ignore:.*(prototype|beta).*:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_plain_tensor_is_refused(kind):
    make, match = KINDS[kind]
    z, weight = torch.randn(3, 7), torch.randn(7, 7)
    odd = make(z)
    calls = [
        ("student", lambda: kd_loss(odd, z)),
        ("teacher", lambda: kd_loss(z, odd)),
        ("labels", lambda: kd_loss(z, z, odd, ce_weight=0.5)),
        ("row_weight", lambda: kd_loss(z, z, row_weight=make(z))),
        ("temperature", lambda: kd_loss(z, z, temperature=odd)),
        ("hidden", lambda: kd_loss(Head(odd, weight), z)),
        ("hidden", lambda: kd_loss(z, Head(odd, weight))),
        ("weight", lambda: kd_loss(Head(z, make(weight)), z)),
    ]
    for name, call in calls:
        with pytest.raises((TypeError, ValueError), match=f"{name} .*{match}" if kind != "fp8" else match):
            call()


def test_distributed_tensors_are_refused(tmp_path):
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        z = torch.randn(3, 7)
        odd = distribute_tensor(z, init_device_mesh("cpu", (1,)), [Shard(1)])
        for name, call in [
            ("student", lambda: kd_loss(odd, z)),
            ("student", lambda: kd_loss(odd, odd)),
            ("teacher", lambda: kd_loss(z, odd)),
            ("labels", lambda: kd_loss(z, z, odd, ce_weight=0.5)),
        ]:
            with pytest.raises(TypeError, match=rf"{name} is a DTensor.*full_tensor\(\).*group="):
                call()
        with pytest.raises(TypeError, match="hidden is a DTensor"):
            Head(odd, z)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("backward", ["fused", "recompute", "eager"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_on_the_meta_device_shapes_come_out(reduction, backward):
    def meta(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    labels, hidden, weight = meta(3, dtype=torch.int64), meta(3, 4).requires_grad_(), meta(7, 4).requires_grad_()
    for student in (meta(3, 7).requires_grad_(), Head(hidden, weight)):
        for teacher in (meta(3, 7), Head(meta(3, 5), meta(7, 5))):
            loss = kd_loss(student, teacher, labels, ce_weight=0.5, reduction=reduction, backward=backward)
            assert (loss.device.type, loss.dtype) == ("meta", torch.float32)
            assert loss.shape == (() if reduction == "mean" else (3,))
            leaves = [hidden, weight] if isinstance(student, Head) else [student]
            for leaf, gradient in zip(leaves, torch.autograd.grad(loss.sum(), leaves), strict=True):
                assert gradient.shape == leaf.shape
    with pytest.raises(ValueError, match="student is on meta, teacher on cpu"):
        kd_loss(meta(3, 7), torch.randn(3, 7))
