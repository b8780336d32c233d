"""Ensembles: what is averaged, and over which labels that is exact."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import kdfast
from kdfast import Distiller, SoftLabels, kd_loss
from kdfast.distill import Step
from kdfast.recipes import LogitEnsemble, ProbabilityEnsemble, hardest, label_trust, soft_targets
from support.recipes import CLASSES, blobs, gradient, make_step, mlp

SOFT = {"kd_weight": 1.0, "ce_weight": 0.0}


def sparse(logits, temperature=2.0):
    """Every column as an entry of unnormalised weights."""
    ids = torch.arange(logits.shape[1]).expand(logits.shape)
    probs = (logits / temperature).softmax(-1)
    return SoftLabels.weights(ids, probs, vocab_size=logits.shape[1], temperature=temperature)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_probabilities_are_averaged_at_the_temperature(divergence):
    step = make_step(teachers=3)
    weights = (0.5, 0.3, 0.2)
    mean = sum(w * (z / 2.0).softmax(-1) for w, z in zip(weights, step.teacher, strict=True))
    ours = ProbabilityEnsemble(weights, divergence=divergence, temperature=2.0, **SOFT)(step)
    expected = kd_loss(step.logits, mean.log(), divergence=divergence, temperature=2.0, teacher_temperature=1.0)
    assert torch.allclose(ours, expected, rtol=1e-12)
    assert torch.allclose(gradient(ours, step.student)[0], gradient(expected, step.student)[0], rtol=1e-10)


def test_a_temperature_per_row_is_the_rows():
    step = make_step(teachers=2)
    tau = torch.linspace(1.0, 4.0, 6, dtype=torch.float64)
    ours = ProbabilityEnsemble(temperature=lambda step: tau, **SOFT)(step)
    mean = sum((z / tau[:, None]).softmax(-1) for z in step.teacher) / 2
    rows = tau**2 * F.kl_div((step.student / tau[:, None]).log_softmax(-1), mean, reduction="none").sum(-1)
    assert torch.allclose(ours, rows.mean(), rtol=1e-12)


def test_mixed_losses_have_the_gradient_of_averaged_probabilities():
    dense = make_step(teachers=2)
    labels = replace(dense, teacher=tuple(sparse(z) for z in dense.teacher))
    options = {"weights": (0.8, 0.2), "temperature": 2.0, "kd_weight": 0.7, "ce_weight": 0.3, "divergence": "soft_ce"}
    ours, expected = ProbabilityEnsemble(**options)(labels), ProbabilityEnsemble(**options)(dense)
    assert torch.allclose(gradient(ours, dense.student)[0], gradient(expected, dense.student)[0], atol=1e-7)


def test_a_sharper_divergence_over_entries_is_refused():
    step = make_step(teachers=2)
    step = replace(step, teacher=tuple(sparse(z) for z in step.teacher))
    with pytest.raises(ValueError, match=r"forward_kl and soft_ce, got reverse_kl"):
        ProbabilityEnsemble(divergence="reverse_kl", **SOFT)(step)


def test_logits_are_averaged_and_a_teacher_without_weight_masks_nothing():
    step = make_step(teachers=2)
    step.teacher[1][0, 0] = -torch.inf
    alone = LogitEnsemble((1.0, 0.0), **SOFT)(step)
    assert torch.allclose(alone, soft_targets(temperature=2.0)(replace(step, teacher=step.teacher[0])), rtol=1e-12)
    mean = 0.25 * step.teacher[0] + 0.75 * step.teacher[1]
    both = LogitEnsemble((0.25, 0.75), divergence="logit_mse", **SOFT)(step)
    assert torch.allclose(both, kd_loss(step.logits, mean, divergence="logit_mse"), rtol=1e-12)


def test_the_two_averages_differ():
    step = make_step(teachers=2)
    assert not torch.isclose(LogitEnsemble(**SOFT)(step), ProbabilityEnsemble(**SOFT)(step))


@pytest.mark.parametrize("ensemble", [ProbabilityEnsemble, LogitEnsemble])
@pytest.mark.parametrize("cached", [False, True])
def test_a_row_may_have_weights_of_its_own(ensemble, cached):
    step = make_step(teachers=2)
    chosen = torch.tensor([0, 1, 1, 0, 1, 0])
    ours = ensemble(lambda step: F.one_hot(chosen, 2).double(), **SOFT)
    row_by_row = torch.where(chosen[:, None] == 0, *step.teacher)
    outputs = tuple(SoftLabels.dense(z) for z in step.teacher) if cached else step.teacher
    expected = soft_targets(temperature=2.0)(replace(step, teacher=row_by_row))
    assert torch.allclose(ours(replace(step, teacher=outputs)), expected, rtol=1e-12)


@pytest.mark.parametrize("make", [SoftLabels.dense, sparse])
def test_a_row_that_one_teacher_lacks_does_not_count(make):
    step = make_step(teachers=2)
    absent = torch.tensor([True, True, False, True, True, True])
    outputs = (replace(make(step.teacher[0]), present=absent), make(step.teacher[1]))
    whole = ProbabilityEnsemble(divergence="soft_ce", **SOFT)
    kept = replace(step, student=step.student[absent], teacher=tuple(z[absent] for z in step.teacher), labels=None)
    ours, expected = whole(replace(step, teacher=outputs)), whole(kept)
    assert torch.allclose(gradient(ours, step.student)[0], gradient(expected, step.student)[0], atol=1e-7)


def test_a_mask_of_rows_leaves_the_denominator_of_sparse_labels_too():
    step = make_step(teachers=2)
    labels = replace(step, teacher=tuple(sparse(z) for z in step.teacher))
    options = {"divergence": "soft_ce", "row_weight": hardest(0.5), **SOFT}
    ours, expected = ProbabilityEnsemble(**options)(labels), ProbabilityEnsemble(**options)(step)
    assert torch.allclose(gradient(ours, step.student)[0], gradient(expected, step.student)[0], atol=1e-7)


def test_live_teachers_and_caches_are_one_ensemble(tmp_path):
    inputs, labels = blobs(8)
    teachers, student = [mlp() for _ in range(3)], mlp()
    outputs = []
    for number, (teacher, codec) in enumerate(
        zip(teachers, ({"codec": "dense"}, {"codec": "topk", "k": 2}), strict=False)
    ):
        with kdfast.cache.Writer(tmp_path / str(number), vocab_size=3, teacher="toy", **codec) as writer:
            for key, row in enumerate(teacher(inputs).detach()):
                writer.add(key, row[None])
        outputs.append(kdfast.cache.open(tmp_path / str(number)))
    batch = {"x": inputs, "labels": labels, "key": range(8)}
    options = {"inputs": lambda batch: batch["x"]}
    ours = Distiller(student, (*outputs, teachers[2]), objective=ProbabilityEnsemble(temperature=1.0), **options).step(
        batch
    )
    alone = [Distiller(student, x, temperature=1.0, **options).step(batch) for x in (*outputs, teachers[2])]
    assert torch.allclose(ours, torch.stack(alone).mean(), rtol=1e-5)
    assert len({round(x.item(), 3) for x in alone}) == 3


def test_trust_falls_with_a_teachers_cross_entropy():
    step = make_step(teachers=3)
    step.labels[2] = -100
    weights = label_trust(step)
    counted = step.labels != -100
    losses = torch.stack([F.cross_entropy(z, step.labels, reduction="none") for z in step.teacher], -1)
    assert torch.allclose(weights.sum(-1), torch.ones(6).to(weights))
    assert torch.allclose(weights[counted], (1 - losses.softmax(-1)[counted]) / 2, rtol=1e-6)
    assert torch.allclose(weights[2], torch.full((3,), 1 / 3).to(weights))
    assert bool((weights.argmax(-1) == losses.argmin(-1))[counted].all())


@pytest.mark.parametrize("ensemble", [ProbabilityEnsemble, LogitEnsemble])
def test_trust_is_judged_by_the_labels_that_the_loss_has(ensemble):
    ids = torch.tensor([[0, 1, 2, 0, -1]])
    following = torch.tensor([[1, 2, 0, 0, 0]])
    right, repeats = (5.0 * F.one_hot(x.clamp(min=0), 3).double() for x in (following, ids))
    step = Step(torch.randn(1, 5, 3, dtype=torch.float64), (right, repeats), ids)
    weights = label_trust(step, shift=True, ignore_index=-1)
    assert bool((weights[0, :3, 0] > 0.9).all())
    assert weights[0, 3:].tolist() == [[0.5, 0.5]] * 2
    options = {"shift": True, "ignore_index": -1}
    assert torch.equal(ensemble(label_trust, **options)(step), ensemble(lambda step: weights, **options)(step))


@pytest.mark.parametrize("ensemble", [ProbabilityEnsemble, LogitEnsemble])
def test_misuse(ensemble, monkeypatch):
    step = make_step(teachers=2)
    with pytest.raises(ValueError, match="two teachers or more, got 1"):
        ensemble()(make_step())
    with pytest.raises(ValueError, match=r"must sum to 1, got \[0\.5, 0\.6\]"):
        ensemble((0.5, 0.6))
    with pytest.raises(ValueError, match="must not be negative"):
        ensemble((1.5, -0.5))
    with pytest.raises(ValueError, match="2 teachers need as many weights, got 3"):
        ensemble((0.5, 0.25, 0.25))(step)
    with pytest.raises(ValueError, match=r"must be \(6, 2\), got \(6,\)"):
        ensemble(lambda step: torch.ones(6))(step)
    with pytest.raises(ValueError, match="must agree in shape"):
        ensemble()(replace(step, teacher=(step.teacher[0], step.teacher[1][:, : CLASSES - 1])))
    monkeypatch.setenv("KDFAST_CHECK", "1")
    with pytest.raises(ValueError, match="sum to 1 in every row"):
        ensemble(lambda step: torch.ones(6, 2))(step)


def test_logit_mse_of_probabilities_is_refused():
    with pytest.raises(ValueError, match="use LogitEnsemble"):
        ProbabilityEnsemble(divergence="logit_mse")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_a_mask_is_of_the_labels_whatever_the_teachers_hold(dtype, shift):
    """One that integers make, or that leaves the first label out, too."""
    student, labels = torch.randn(2, 4, 6), torch.randint(0, 6, (2, 4))
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).to(dtype)
    logits = [torch.randn(2, 4, 6) for _ in range(2)]
    ids = torch.arange(6).expand(8, 6)
    nothing = torch.full((8,), -torch.inf)
    soft = [SoftLabels.topk(ids, x.flatten(0, 1).log_softmax(-1), nothing, vocab_size=6) for x in logits]
    options = {"temperature": 1.0, "kd_weight": 1.0, "ce_weight": 0.5, "shift": shift}
    rows = mask.bool()[:, 1:] if shift else mask.bool()
    s, y = (student[:, :-1], labels[:, 1:]) if shift else (student, labels)
    p = sum(x.softmax(-1) for x in logits) / 2
    q = s.log_softmax(-1)[rows]
    ce = 0.5 * torch.nn.functional.cross_entropy(s[rows], y[rows])
    entropy = [-(x.softmax(-1) * x.log_softmax(-1)).sum(-1) for x in logits]
    p, entropy = (x[:, :-1][rows] if shift else x[rows] for x in (p, sum(entropy) / 2))
    expected = -(p * q).sum(-1).mean() + ce
    for given in (mask, *([mask[:, 1:]] if shift else [])):
        dense = ProbabilityEnsemble(**options, divergence="soft_ce", row_weight=given)
        assert torch.allclose(dense(Step(student, tuple(logits), labels)), expected, atol=1e-6)
        sparse = ProbabilityEnsemble(**options, row_weight=given)(Step(student, tuple(soft), labels))
        assert torch.allclose(sparse + entropy.mean(), expected, atol=1e-6)
