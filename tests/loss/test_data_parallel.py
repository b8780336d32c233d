"""Averaged over processes, gradients are those of one process that has the whole batch."""

import copy
from functools import partial

import pytest
import torch
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
