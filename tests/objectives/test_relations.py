"""Relations between samples: by loops, their invariances, and samples that coincide."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from kdfast.objectives import pkt, rkd_angle, rkd_distance, similarity_preserving

LOSSES = {f.__name__: f for f in (rkd_distance, rkd_angle, similarity_preserving, pkt)}


def distances(x):
    """RKD-D's by loops, as the other three below."""
    pairs = torch.stack([(x[i] - x[j]).norm() for i, j in itertools.combinations(range(len(x)), 2)])
    return pairs / pairs.mean()


def angles(x):
    return torch.stack(
        [F.cosine_similarity(x[i] - x[j], x[k] - x[j], dim=0) for i, j, k in itertools.permutations(range(len(x)), 3)]
    )


def similarities(x):
    return torch.stack([F.normalize(torch.stack([x[i] @ x[j] for j in range(len(x))]), dim=0) for i in range(len(x))])


def neighbours(x):
    rows = []
    for j in range(len(x)):
        k = torch.stack([(1 + F.cosine_similarity(x[i], x[j], dim=0)) / 2 for i in range(len(x)) if i != j])
        rows.append(k / k.sum())
    return torch.stack(rows)


BY_LOOPS = {
    "rkd_distance": lambda s, t: F.smooth_l1_loss(distances(s), distances(t)),
    "rkd_angle": lambda s, t: F.smooth_l1_loss(angles(s), angles(t)),
    "similarity_preserving": lambda s, t: (similarities(s) - similarities(t)).square().mean(),
    "pkt": lambda s, t: (neighbours(t) * (neighbours(t) / neighbours(s)).log()).sum(1).mean(),
}


def batch(rows=5, narrow=3, wide=6):
    return torch.randn(rows, narrow).double().requires_grad_(), torch.randn(rows, wide).double()


@pytest.mark.parametrize("name", LOSSES)
def test_by_loops(name):
    student, teacher = batch()
    ours, theirs = LOSSES[name](student, teacher), BY_LOOPS[name](student, teacher)
    assert torch.allclose(ours, theirs)
    grads = [torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)]
    assert torch.allclose(*grads)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient(name):
    student, teacher = batch()
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher), student)


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives(name):
    """A sample's difference from itself is zeros, whose length has none: that must not make all of them NaN."""
    student, teacher = batch()
    with torch.no_grad():
        student[1] = 0.0
    options = {"backward": "eager"} if name == "pkt" else {}
    (grad,) = torch.autograd.grad(LOSSES[name](student, teacher, **options), student, create_graph=True)
    if name == "rkd_distance":  # PyTorch has none of pdist
        with pytest.raises(NotImplementedError, match="pdist"):
            grad.sum().backward()
        return
    assert torch.autograd.grad(grad.sum(), student)[0].isfinite().all()
    student = batch()[0]
    assert torch.autograd.gradgradcheck(lambda s: LOSSES[name](s, teacher, **options), student)


@pytest.mark.parametrize("name", LOSSES)
def test_maps_are_flattened(name):
    student, teacher = torch.randn(5, 2, 3).double(), torch.randn(5, 2, 2, 2).double()
    assert torch.equal(LOSSES[name](student, teacher), LOSSES[name](student.flatten(1), teacher.flatten(1)))


@pytest.mark.parametrize("name", LOSSES)
def test_sees_the_geometry_alone(name):
    """Turned and scaled features relate as before; RKD's may also be moved, the others' have an origin."""
    _, teacher = batch()
    turn = torch.linalg.qr(torch.randn(6, 6).double())[0]
    moved = 3.0 * teacher @ turn + (torch.randn(6).double() if name.startswith("rkd") else 0.0)
    assert LOSSES[name](moved, teacher).item() == pytest.approx(0.0, abs=1e-12)
    assert LOSSES[name](teacher.flip(0), teacher) > 1e-4


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_coinciding_samples_have_finite_gradients(name, dtype):
    """Of a distance of 0 the square root's gradient is infinite, and a zero vector has no direction."""
    student, teacher = (x.detach().to(dtype) for x in batch(6))
    student[1], student[3] = student[0], 0.0
    teacher[2] = teacher[4]
    leaf = student.requires_grad_()
    loss = LOSSES[name](leaf, teacher)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss.isfinite()
    assert 0.0 < grad.abs().max() < 100.0


@pytest.mark.parametrize("name", LOSSES)
def test_all_samples_in_one_place(name):
    for place in (0.0, 1.5):
        leaf = torch.full((4, 3), place).requires_grad_()
        loss = LOSSES[name](leaf, torch.randn(4, 6))
        (grad,) = torch.autograd.grad(loss, leaf)
        assert loss.isfinite()
        assert grad.abs().max() < 100.0


@pytest.mark.parametrize("name", LOSSES)
def test_too_few_samples_to_relate(name):
    for rows in (0, 1, 2):
        student, teacher = batch(rows)
        loss = LOSSES[name](student, teacher)
        (grad,) = torch.autograd.grad(loss, student)
        assert loss.isfinite()
        assert grad.isfinite().all()
        if rows < 2 or name != "similarity_preserving":  # which relates a sample to itself, too
            assert loss.item() == pytest.approx(0.0, abs=1e-12)


def test_opposite_neighbours_are_dear_but_finite():
    student, teacher = torch.tensor([[1.0], [-1.0], [-1.0]]).requires_grad_(), torch.tensor([[1.0], [1.0], [-1.0]])
    loss = pkt(student, teacher)
    assert 1.0 < loss < -math.log(torch.finfo(torch.float32).eps)
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_and_autocast_are_computed_in_float32(name, dtype):
    student, teacher = (100 * x.detach().float() for x in batch(5, 40, 60))
    exact = LOSSES[name](student.double(), teacher.double())
    with torch.autocast("cpu", dtype=dtype):
        assert torch.allclose(LOSSES[name](student, teacher).double(), exact, rtol=1e-3)
    narrow = LOSSES[name](student.to(dtype), teacher.to(dtype))
    rounded = LOSSES[name](student.to(dtype).double(), teacher.to(dtype).double())
    assert torch.allclose(narrow.double(), rounded, rtol=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_errors(name):
    loss, x = LOSSES[name], torch.randn(4, 3)
    with pytest.raises(TypeError, match="student must be a floating-point tensor of features, got list"):
        loss([1.0], x)
    with pytest.raises(TypeError, match=r"teacher must be .* got torch.int64"):
        loss(x, x.long())
    with pytest.raises(ValueError, match=r"at least 2 dimensions, the first of samples, got \(4,\)"):
        loss(x[:, 0], x)
    with pytest.raises(ValueError, match="student has 4 samples, teacher 3"):
        loss(x, x[:3])
    with pytest.raises(ValueError, match="teacher requires grad"):
        loss(x, x.clone().requires_grad_())
    with pytest.raises(ValueError, match="student is on cpu, teacher on meta"):
        loss(x, x.to("meta"))
