"""Averaged over processes, gradients are those of one process that has the whole batch."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from kdfast import Head, SoftLabels, global_items, kd_loss
from support import processes

ROWS, LENGTH, VOCAB, WIDTH = 8, 5, 31, 12


class Student(nn.Module):
    """With its loss inside, where a sharded weight is whole."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids, teacher, labels, num_items=None):
        head = Head(self.body(self.embed(ids)).tanh(), self.head.weight)
        return kd_loss(head, teacher, labels, ce_weight=0.5, shift=True, num_items=num_items)


def make():
    torch.manual_seed(0)
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH))
    labels = ids.clone()
    labels[:3, 1:] = -100  # all of one process's, and more
    labels[5, 2:] = -100
    return Student(), ids, torch.randn(ROWS, LENGTH, VOCAB), labels


def soft(teacher):
    log_probs, ids = teacher.flatten(0, -2).log_softmax(-1).topk(4)
    tails = torch.log1p(-log_probs.exp().sum(-1))[None]
    return SoftLabels.topk(ids, log_probs, tails, vocab_size=VOCAB)


def whole_gradients(student, ids, teacher, labels):
    student(ids, soft(teacher), labels).backward()
    return {name: x.grad for name, x in student.named_parameters()}


def train(rank, world, wrap, micro_batches):
    student, ids, teacher, labels = make()
    expected = whole_gradients(copy.deepcopy(student), ids, teacher, labels)
    wrapped = wrap(student)
    mine = [x.chunk(world)[rank].chunk(micro_batches) for x in (ids, teacher, labels)]
    items = global_items(*mine[2], shift=True)
    for x, t, y in zip(*mine, strict=True):
        wrapped(x, soft(t), y, items).backward()
    for name, parameter in student.named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        assert torch.allclose(grad, expected[name], rtol=1e-4, atol=1e-6), (name, grad, expected[name])


def ddp(rank, world):
    train(rank, world, DistributedDataParallel, 1)
    train(rank, world, DistributedDataParallel, 2)


class Model(Student):
    """A model that returns logits, with a scale and a layer that no row may need."""

    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids):
        return 2.0 * self.head(self.body(self.embed(ids)).tanh())


def train_by_head_of(rank, world, wrap):
    _, ids, teacher, labels = make()
    torch.manual_seed(1)
    model = Model()
    model.spare.requires_grad_(False)
    whole = copy.deepcopy(model)
    kd_loss(whole(ids), teacher, labels, ce_weight=0.5, shift=True).backward()
    wrapped = wrap(model)
    mine = [x.chunk(world)[rank] for x in (ids, teacher, labels)]
    items = global_items(mine[2], shift=True)
    for _ in range(2):
        model.zero_grad()
        head = Head.of(wrapped, mine[0], layer="head")
        kd_loss(head, mine[1], mine[2], ce_weight=0.5, shift=True, num_items=items).backward()
        for name, parameter in whole.named_parameters():
            grad = model.get_parameter(name).grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            if parameter.grad is not None:
                assert torch.allclose(grad, parameter.grad, rtol=1e-4, atol=1e-6), (name, grad, parameter.grad)


def fsdp_by_layer(model):
    fully_shard(model.body)
    return fully_shard(model)


def head_of(rank, world):
    train_by_head_of(rank, world, DistributedDataParallel)
    train_by_head_of(rank, world, partial(DistributedDataParallel, find_unused_parameters=True))
    train_by_head_of(rank, world, partial(DistributedDataParallel, static_graph=True))
    train_by_head_of(rank, world, fully_shard)
    train_by_head_of(rank, world, fsdp_by_layer)
    unit = Model()
    fully_shard(unit.head)
    with pytest.raises(ValueError, match="FSDP unit of its own"):
        Head.of(fully_shard(unit), make()[1], layer="head")


def fsdp(rank, world):
    train(rank, world, fully_shard, 1)
    train(rank, world, fully_shard, 2)
    student = fully_shard(make()[0])
    with pytest.raises(TypeError, match="DTensor"):
        Head(torch.randn(2, WIDTH), student.head.weight)


@pytest.mark.parametrize("wrapped", [ddp, fsdp, head_of])
def test_gradients_are_those_of_the_whole_batch(wrapped):
    processes.run(wrapped, 2)


def test_one_process_counts_its_own():
    labels = torch.tensor([[1, 2, -100], [-100, 4, 5]])
    assert global_items(labels) == 4
    assert global_items(labels, shift=True) == 3
    assert global_items(labels, labels, ignore_index=4) == 10
    mask = torch.tensor([[True, False, True], [True, True, False]])
    assert global_items(labels, mask=mask) == 2
    student, teacher = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    options = {"ce_weight": 1.0, "shift": True, "row_weight": mask}
    items = global_items(labels, mask=mask, shift=True)
    losses = [kd_loss(student, teacher, labels, num_items=n, **options) for n in (None, items)]
    assert torch.allclose(*losses)


def test_what_cannot_be_counted_is_refused():
    labels = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="at least one"):
        global_items()
    with pytest.raises(ValueError, match="mask"):
        global_items(labels, labels, mask=labels > 0)
    with pytest.raises(ValueError, match="mask"):
        global_items(labels, mask=labels)
    with pytest.raises(TypeError, match=r"labels must be tensors of class indices.*got int"):
        global_items(3)
    with pytest.raises(TypeError, match=r"class indices.*got torch.float32 \(2, 3\)"):
        global_items(torch.rand(2, 3))
    with pytest.raises(ValueError, match="accumulation_steps must be at least 1, got 0"):
        global_items(labels, accumulation_steps=0)
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup, got int"):
        global_items(labels, group=2)
    with pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup, got int"):
        kd_loss(torch.randn(2, 7), torch.randn(2, 7), group=2)


def test_narrow_labels_are_counted_as_wide_ones():
    # As uint8, -100 would be 156.
    labels = torch.tensor([1, 156, 255], dtype=torch.uint8)
    assert global_items(labels) == 3
    assert global_items(labels, ignore_index=255) == 2


# What a trainer does with a loss of one process's micro-batch before its gradients are averaged over processes.
TRAINERS = {
    "a loop under DDP": lambda loss, steps: loss,
    "accelerator.backward": lambda loss, steps: loss / steps,  # accelerate.Accelerator.backward
    "Lightning": lambda loss, steps: loss / steps,  # its closure divides by accumulate_grad_batches
}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(("world", "steps"), [(1, 1), (1, 4), (2, 1), (2, 4)])
def test_who_divides(trainer, world, steps, monkeypatch):
    """Whatever divides, the step's gradient is that of the mean over the whole batch."""
    student, teacher, labels = _step(world * steps)
    whole = _gradient(student, lambda s: kd_loss(s, teacher, labels, shift=True, ce_weight=0.5))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: world)
    monkeypatch.setattr(dist, "all_reduce", lambda count, group: count.fill_((labels[:, 1:] != -100).sum() / divided))
    divided = 1 if trainer == "a loop under DDP" else steps
    mine = labels.chunk(world)[0].chunk(steps)
    items = global_items(*mine, shift=True, accumulation_steps=divided)

    def loss(s):
        parts = zip(*(x.chunk(world * steps) for x in (s, teacher, labels)), strict=True)
        losses = [kd_loss(*part, shift=True, ce_weight=0.5, num_items=items) for part in parts]
        return sum(TRAINERS[trainer](x, steps) for x in losses) / world  # DDP averages gradients

    assert torch.allclose(_gradient(student, loss), whole, atol=1e-7)


@pytest.mark.parametrize("own", ["compute_loss", "compute_loss_func"])
@pytest.mark.parametrize(("world", "steps"), [(1, 1), (1, 4), (2, 4)])
def test_who_divides_in_a_trainer(own, world, steps):
    """transformers' Trainer counts ``labels[..., 1:]`` of all processes and does not divide by steps; DDP averages.

    Its own ``compute_loss`` multiplies what a ``compute_loss_func`` returns by the number of processes.
    """
    student, teacher, labels = _step(world * steps)
    whole = _gradient(student, lambda s: kd_loss(s, teacher, labels, shift=True, ce_weight=0.5))
    num_items_in_batch = (labels[..., 1:] != -100).sum()
    items = num_items_in_batch / world if own == "compute_loss" else num_items_in_batch
    times = 1 if own == "compute_loss" else world

    def loss(s):
        parts = zip(*(x.chunk(world * steps) for x in (s, teacher, labels)), strict=True)
        return sum(times * kd_loss(*part, shift=True, ce_weight=0.5, num_items=items) for part in parts) / world

    assert torch.allclose(_gradient(student, loss), whole, atol=1e-7)


def _step(micro_batches):
    torch.manual_seed(0)
    rows = 2 * micro_batches
    labels = torch.randint(0, VOCAB, (rows, LENGTH))
    labels[: rows // 2, 2:] = -100  # unevenly spread
    return torch.randn(rows, LENGTH, VOCAB), torch.randn(rows, LENGTH, VOCAB), labels


def _gradient(student, loss):
    leaf = student.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]
