"""A vocabulary that processes share out gives the loss and gradients of the whole one."""

import dataclasses
import math
import os

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessRaisedException

import kdfast
from kdfast import Head, SoftLabels, kd_loss
from kdfast.divergences import DIVERGENCES
from kdfast.loss import label_values
from support import processes
from support.teachers import TEACHERS, make_teacher

ROWS, VOCAB, WIDTH = 6, 37, 8  # which no number of processes divides


def make(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = randn(ROWS, WIDTH), randn(VOCAB, WIDTH), randn(VOCAB)
    labels = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    labels[1] = -100
    return hidden, weight, bias, randn(ROWS, 5), randn(VOCAB, 5), labels


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves, torch.ones_like(loss) * 1.5)


def assert_close(name, ours, whole, tolerance=1e-9):
    assert torch.allclose(ours, whole, rtol=tolerance, atol=tolerance), (name, ours, whole)


def cases(world):
    if world > 2:  # every number that crosses costs the more, the more processes share a core
        yield from (("logits", "jsd", {}), ("topk", "forward_kl", {}), ("prototype", "reverse_kl", {}))
        return
    for kind in TEACHERS:
        for name in ("soft_ce", "forward_kl", "reverse_kl"):
            if not (kind == "weights" and name != "soft_ce") and not (kind == "topk" and name == "reverse_kl"):
                yield kind, name, {}
    for name in DIVERGENCES:
        yield "logits", name, {"reduction": "none", "label_smoothing": 0.2, "z_weight": 0.1}
    yield "logits", kdfast.jsd(0.3), {"temperature": 2.0}
    yield "logits", kdfast.Divergence("forward_kl", standardize=True), {"temperature": 2.0}


def share_out(rank, world):
    """Every case, with the logits and with the head shared out, and the teacher too or whole."""
    os.environ["KDFAST_WORKSPACE"] = str(2 * ROWS // 3 * -(-VOCAB // world) * 20 * 8)  # two chunks
    hidden, weight, bias, states, layer, labels = make()
    here = torch.arange(VOCAB).tensor_split(world)[rank]
    for kind, divergence, options in cases(world):
        options = {"divergence": divergence, "ce_weight": 0.5, **options}
        teacher = make_teacher(kind, states, layer)
        tolerance = 1e-6 if kind == "hidden" else 1e-9
        whole = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        logits = torch.nn.functional.linear(*whole)
        expected = kd_loss(logits, teacher, labels, **options)
        of_logits, *of_head = gradients(expected, [logits, *whole])
        teachers = [teacher]
        if kind == "logits":
            teachers.append(teacher[:, here])
        if kind == "head":
            teachers.append(dataclasses.replace(teacher, weight=teacher.weight[here]))
        for given in teachers:
            part = logits.detach()[:, here].clone().requires_grad_()
            loss = kd_loss(part, given, labels, group=dist.group.WORLD, **options)
            assert_close((kind, divergence), loss, expected, tolerance)
            assert_close((kind, divergence), gradients(loss, [part])[0], of_logits[:, here], tolerance)
            leaves = [x.clone().requires_grad_() for x in (hidden, weight[here], bias[here])]
            loss = kd_loss(Head(*leaves), given, labels, group=dist.group.WORLD, **options)
            assert_close((kind, divergence), loss, expected, tolerance)
            for ours, theirs in zip(
                gradients(loss, leaves), (of_head[0], of_head[1][here], of_head[2][here]), strict=True
            ):
                assert_close((kind, divergence), ours, theirs, tolerance)


def edges(rank, world):
    """Masks, rows that are masked throughout, bad labels, parts."""
    label_values.can_look = lambda x: False  # as on a device
    hidden, weight, _, states, layer, labels = make(3)
    here = torch.arange(VOCAB).tensor_split(world)[rank]
    student, teacher = hidden @ weight.T, states @ layer.T
    student[:, ::3] = teacher[:, ::3] = -math.inf
    student[2] = -math.inf
    labels[3], labels[4] = VOCAB, 4
    for kind in ("logits", "topk"):
        top, ids = teacher.log_softmax(-1).topk(4)
        tail = torch.log1p(-top.exp().sum(-1))[None]
        given = teacher if kind == "logits" else SoftLabels.topk(ids, top.float(), tail, vocab_size=VOCAB)
        leaves = [student.clone().requires_grad_(), student[:, here].clone().requires_grad_()]
        options = {"ce_weight": 0.5, "reduction": "none", "return_parts": True, "temperature": 1.0}
        whole, whole_parts = kd_loss(leaves[0], given, labels, **options)
        ours, parts = kd_loss(leaves[1], given, labels, group=dist.group.WORLD, **options)
        for a, b in zip((ours, *parts), (whole, *whole_parts), strict=True):
            # A bad label's row is NaN; what its parts are is nobody's.
            good = torch.arange(ROWS) != 3 if a is not ours else slice(None)
            assert torch.allclose(a[good], b[good], equal_nan=True), (kind, a, b)
        upstream = torch.arange(ROWS) != 3
        a, b = (torch.autograd.grad(x, y, upstream.double())[0] for x, y in ((ours, leaves[1]), (whole, leaves[0])))
        assert torch.allclose(a[upstream], b[upstream][:, here]), (kind, a, b[:, here])
    with pytest.raises(ValueError, match="columns"):
        kd_loss(leaves[1], teacher[:, :-1], group=dist.group.WORLD)
    with pytest.raises(TypeError, match="teacher must be a tensor of logits, got dict"):
        kd_loss(leaves[1], {}, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="all 37 columns"):
        kd_loss(leaves[1], dataclasses.replace(given, vocab_size=30), group=dist.group.WORLD)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradients_are_those_of_the_whole_vocabulary(world):
    processes.run(share_out, world)


@pytest.mark.parametrize("world", [3])
def test_masks_and_bad_labels(world):
    processes.run(edges, world)


def _die(rank, world):
    if rank == 1:
        raise RuntimeError("one process fails")
    dist.barrier()


def test_a_dead_process_fails_the_test():
    with pytest.raises(ProcessRaisedException):  # its own error, or another's that has lost it
        processes.run(_die, 2)
