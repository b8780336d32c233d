"""One test per error: named, from Python, before any kernel runs, saying what was passed and what was wanted."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import kdfast
from kdfast import Divergence, KDLoss, SoftLabels, kd_loss
from kdfast.loss import label_values

S, T, Y = torch.randn(4, 7), torch.randn(4, 7), torch.tensor([0, 1, 2, 6])
IDS, LOG_PROBS, TAILS = torch.tensor([[0, 3]] * 4), torch.full((4, 2), -1.0), torch.full((4,), -1.0)
GOES_BACK = torch.tensor([0, 100, 8])
TOPK = SoftLabels.topk(IDS, LOG_PROBS, TAILS, vocab_size=7)
WEIGHTS = SoftLabels.weights(IDS, torch.rand(4, 2), vocab_size=7)
GRAD = torch.tensor(1.0, requires_grad=True)

CASES = {
    "student is no tensor": (lambda: kd_loss([1.0], T), TypeError, "student must be a tensor of logits, got list"),
    "student is a model's output": (
        lambda: kd_loss(SimpleNamespace(logits=S), T),
        TypeError,
        "student must be a tensor of logits, got SimpleNamespace: pass student.logits",
    ),
    "teacher is an array": (lambda: kd_loss(S, T.numpy()), TypeError, r"got ndarray: pass torch.from_numpy\(teacher\)"),
    "labels are the next tokens": (
        lambda: kd_loss(S[None], T[None], torch.zeros(1, 3).long(), shift=True),
        ValueError,
        r"labels must be \(1, 4\).*got \(1, 3\); the next tokens go with student\[..., :-1, :\].*without shift",
    ),
    "student holds integers": (lambda: kd_loss(S.long(), T), TypeError, "student must be float32.*got torch.int64"),
    "student is complex": (lambda: kd_loss(S.cfloat(), T), TypeError, "student must be float32.*complex"),
    "student is a scalar": (lambda: kd_loss(torch.tensor(1.0), T), ValueError, "student must be .*got a scalar"),
    "no vocabulary": (lambda: kd_loss(S[:, :0], T), ValueError, "vocabulary of at least 1, got shape"),
    "teacher is no tensor": (lambda: kd_loss(S, None), TypeError, "teacher must be a tensor of logits, got NoneType"),
    "teacher holds integers": (lambda: kd_loss(S, T.int()), TypeError, "teacher must be float32.*got torch.int32"),
    "teacher requires grad": (lambda: kd_loss(S, T.clone().requires_grad_()), ValueError, "teacher requires grad"),
    "shapes differ": (lambda: kd_loss(S, T[:3]), ValueError, r"same leading dimensions, got \(4, 7\) and \(3, 7\)"),
    "soft label rows differ": (lambda: kd_loss(S[:3], TOPK), ValueError, "teacher has 4 rows.* has 3"),
    "devices differ": (lambda: kd_loss(S, T.to("meta")), ValueError, "student is on cpu, teacher on meta"),
    "label devices differ": (lambda: kd_loss(S, T, Y.to("meta"), ce_weight=1.0), ValueError, "labels on meta"),
    "ce without labels": (lambda: kd_loss(S, T, ce_weight=1.0), ValueError, "labels are required by ce_weight"),
    "ce rows without labels": (
        lambda: kd_loss(S, T, ce_weight=torch.zeros(4)),
        ValueError,
        "labels are required by ce_weight",
    ),
    "dkd without labels": (lambda: kd_loss(S, T, divergence="dkd"), ValueError, "required by divergence dkd"),
    "dkd with probabilities": (lambda: kd_loss(S, T, S, divergence="dkd"), ValueError, "dkd needs class indices"),
    "dkd of two classes": (
        lambda: kd_loss(S[:, :2], T[:, :2], Y, divergence="dkd"),
        ValueError,
        "dkd needs at least 3 classes.*got 2",
    ),
    "labels are no tensor": (lambda: kd_loss(S, T, [1]), TypeError, "labels must be a tensor.*got list"),
    "labels are bool": (lambda: kd_loss(S, T, Y > 1), TypeError, "labels must be int64.*got torch.bool"),
    "label shape": (lambda: kd_loss(S, T, Y[:2]), ValueError, r"labels must be \(4,\).*got \(2,\)"),
    "probability shape": (lambda: kd_loss(S, T, S[:, :3]), ValueError, r"student's shape \(4, 7\), got \(4, 3\)"),
    "labels require grad": (lambda: kd_loss(S, T, S.clone().requires_grad_()), ValueError, "labels require grad"),
    "divergence unknown": (lambda: kd_loss(S, T, divergence="kl"), ValueError, "'kl' is unknown; expected one of"),
    "divergence type": (lambda: kd_loss(S, T, divergence=3), TypeError, "name or a kdfast.Divergence, got int"),
    "jsd at its end": (lambda: kdfast.jsd(0.0), ValueError, r"beta must be in \(0, 1\), got 0.0.*normalize=True"),
    "jsd outside": (lambda: kdfast.jsd(1.5, normalize=True), ValueError, r"beta must be in \[0, 1\], got 1.5"),
    "skew outside": (lambda: kdfast.skew_forward_kl(1.0), ValueError, r"lam must be in \[0, 1\), got 1.0"),
    "alpha-beta infinite": (lambda: kdfast.alpha_beta(float("inf"), 0.0), ValueError, "must be finite, got inf"),
    "normalize elsewhere": (lambda: Divergence("tvd", normalize=True), ValueError, "jsd only, got tvd"),
    "temperature zero": (lambda: kd_loss(S, T, temperature=0.0), ValueError, "temperature must be positive.*got 0.0"),
    "temperature nan": (lambda: kd_loss(S, T, temperature=float("nan")), ValueError, "temperature must be .*got nan"),
    "temperature type": (lambda: kd_loss(S, T, temperature="2"), TypeError, "temperature must be a number.*got str"),
    "temperature shape": (
        lambda: kd_loss(S, T, temperature=torch.ones(3)),
        ValueError,
        r"temperature must be .*\(4,\), got \(3,\)",
    ),
    "temperature requires grad": (lambda: kd_loss(S, T, temperature=GRAD), ValueError, "temperature requires grad"),
    "teacher temperature": (
        lambda: kd_loss(S, T, teacher_temperature=-1.0),
        ValueError,
        "teacher_temperature must be positive.*got -1.0",
    ),
    "kd_weight infinite": (lambda: kd_loss(S, T, kd_weight=float("inf")), ValueError, "kd_weight must be finite"),
    "ce_weight type": (lambda: kd_loss(S, T, Y, ce_weight="1"), TypeError, "ce_weight must be a number.*got str"),
    "weight requires grad": (lambda: kd_loss(S, T, kd_weight=GRAD), ValueError, "kd_weight requires grad"),
    "row_weight type": (lambda: kd_loss(S, T, row_weight=[1.0]), TypeError, "row_weight must be a tensor.*got list"),
    "row_weight shape": (lambda: kd_loss(S, T, row_weight=torch.ones(3)), ValueError, r"row_weight .*got \(3,\)"),
    "smoothing outside": (lambda: kd_loss(S, T, label_smoothing=1.5), ValueError, r"in \[0, 1\], got 1.5"),
    "smoothing type": (lambda: kd_loss(S, T, label_smoothing=S), TypeError, "label_smoothing must be a number"),
    "reduction": (lambda: kd_loss(S, T, reduction="batchmean"), ValueError, "reduction must be .*got 'batchmean'"),
    "backward": (lambda: kd_loss(S, T, backward="fast"), ValueError, "backward must be .*got 'fast'"),
    "num_items with sum": (lambda: kd_loss(S, T, reduction="sum", num_items=3), ValueError, "num_items replaces"),
    "num_items zero": (lambda: kd_loss(S, T, num_items=0), ValueError, "num_items must be positive.*got 0"),
    "inplace without reduction": (
        lambda: kd_loss(S, T, backward="inplace", reduction="none"),
        ValueError,
        "inplace.* needs a scalar reduction",
    ),
    "inplace on a leaf": (
        lambda: kd_loss(S.clone().requires_grad_(), T, backward="inplace"),
        ValueError,
        "would overwrite a leaf",
    ),
    "inplace on a view of a leaf": (
        lambda: kd_loss(S.clone().requires_grad_()[None], T[None], backward="inplace"),
        ValueError,
        "would overwrite a leaf",
    ),
    "inplace in float16": (lambda: kd_loss(S.half(), T, backward="inplace"), ValueError, "rounds float16 gradients"),
    "inplace on strides": (
        lambda: kd_loss(torch.randn(7, 4).t(), T, backward="inplace"),
        ValueError,
        r"needs contiguous logits, got strides \(1, 4\)",
    ),
    "shift of one row": (lambda: kd_loss(S[0], T[0], shift=True), ValueError, "shift needs .*length, vocabulary"),
    "unknown option": (lambda: KDLoss(alpha=0.5), TypeError, "no option alpha"),
    "topk under reverse kl": (
        lambda: kd_loss(S, TOPK, divergence="reverse_kl"),
        ValueError,
        "topk soft labels serve forward_kl and soft_ce, got divergence reverse_kl",
    ),
    "topk standardized": (
        lambda: kd_loss(S, TOPK, divergence=Divergence("forward_kl", standardize=True)),
        ValueError,
        "got divergence forward_kl, standardized",
    ),
    "weights under kl": (lambda: kd_loss(S, WEIGHTS), ValueError, "weights soft labels serve soft_ce.*not its value"),
    "temperature not cached": (
        lambda: kd_loss(S, TOPK, temperature=2.0),
        ValueError,
        r"hold teacher_temperature \(1.0,\), got 2.0",
    ),
    "cached temperature per row": (
        lambda: kd_loss(S, TOPK, temperature=torch.ones(4)),
        ValueError,
        "hold teacher_temperature .*got a tensor",
    ),
    "soft label ids": (
        lambda: SoftLabels.topk(IDS.float(), LOG_PROBS, TAILS, vocab_size=7),
        TypeError,
        "ids must be integers, got torch.float32",
    ),
    "soft label values": (
        lambda: SoftLabels.weights(IDS, IDS, vocab_size=7),
        TypeError,
        "values must be floating point, got torch.int64",
    ),
    "soft label shapes": (
        lambda: SoftLabels.weights(IDS, LOG_PROBS[:2], vocab_size=7),
        ValueError,
        r"one shape, got \(4, 2\) and \(2, 2\)",
    ),
    "soft label offsets": (
        lambda: SoftLabels.weights(IDS[0], LOG_PROBS[0], vocab_size=7),
        ValueError,
        "unless offsets are given",
    ),
    "soft label offsets that go back": (
        lambda: SoftLabels.topk(IDS.flatten(), LOG_PROBS.flatten(), TAILS[:2], vocab_size=7, offsets=GOES_BACK),
        ValueError,
        r"never go back and end at the number of entries, 8, got \[0, 100, 8\]; torch.nn.functional.pad",
    ),
    "soft label offsets of fewer entries": (
        lambda: SoftLabels.weights(IDS.flatten(), LOG_PROBS.flatten().exp(), vocab_size=7, offsets=GOES_BACK[:1]),
        ValueError,
        r"end at the number of entries, 8, got \[0\]",
    ),
    "soft label range": (
        lambda: SoftLabels.topk(IDS + 4, LOG_PROBS, TAILS, vocab_size=7),
        ValueError,
        r"tokens in \[0, 7\), got 4 to 7, first in row",
    ),
    "soft label twice": (
        lambda: SoftLabels.topk(IDS * 0 + 3, LOG_PROBS, TAILS, vocab_size=7),
        ValueError,
        "once per row, got 3 twice in row 0; add up their probabilities",
    ),
    "soft label weights": (
        lambda: SoftLabels.weights(IDS, LOG_PROBS, vocab_size=7),
        ValueError,
        "weights must not be negative, got -1.0; of log-probabilities take the exponential",
    ),
    "soft label tails": (
        lambda: SoftLabels.topk(IDS, LOG_PROBS, TAILS[:2], vocab_size=7),
        ValueError,
        r"tails must be .*4 rows\), got \(1, 2\)",
    ),
    "soft label temperature": (
        lambda: SoftLabels.weights(IDS, LOG_PROBS, vocab_size=7, temperature=0.0),
        ValueError,
        "temperatures must be positive",
    ),
    "soft label mask": (
        lambda: SoftLabels.dense(T, present=torch.ones(3, dtype=torch.bool)),
        ValueError,
        "present must be a bool tensor",
    ),
    "dense soft labels": (lambda: SoftLabels.dense(T[0]), ValueError, r"\(rows, vocab\), got"),
    "soft labels of two kinds": (lambda: SoftLabels.cat([TOPK, WEIGHTS]), ValueError, "cannot concatenate"),
    "soft labels of nothing": (lambda: SoftLabels.cat([]), ValueError, "at least one part"),
    "soft label row": (lambda: TOPK[4], IndexError, "row 4 is out of range for 4 rows"),
    "soft label row mask": (lambda: TOPK[torch.ones(3) > 0], IndexError, r"row mask must be \(4,\), got \(3,\)"),
}


@pytest.mark.parametrize("case", CASES)
def test_named_error(case):
    call, error, message = CASES[case]
    with pytest.raises(error, match=message):
        call()


CHECKED = {
    "temperature": (lambda: kd_loss(S, T, temperature=torch.tensor([1.0, 0.0, 1.0, 1.0])), "temperatures must be"),
    "weight": (
        lambda: kd_loss(S, T, kd_weight=torch.tensor([1.0, -0.5, 1.0, 1.0])),
        r"kd_weight must be finite and not negative, got -0.5 to 1.0",
    ),
    "token": (lambda: kd_loss(S[:, :3], TOPK, vocab="shared"), r"tokens in \[0, 3\), got 0 to 3"),
    "token twice": (lambda: kd_loss(S, replace(TOPK, ids=TOPK.ids * 0)), "once per row, got 0 twice in row 0"),
}


@pytest.mark.parametrize("case", CHECKED)
def test_values_are_checked_on_request(case, monkeypatch):
    call, message = CHECKED[case]
    call()  # without KDFAST_CHECK nobody looks at values
    monkeypatch.setenv("KDFAST_CHECK", "1")
    with pytest.raises(ValueError, match=message):
        call()


def test_checks_let_good_values_pass(monkeypatch):
    monkeypatch.setenv("KDFAST_CHECK", "1")
    assert kd_loss(S, T, torch.tensor([0, -100, 2, 6]), ce_weight=1.0, temperature=torch.ones(4)).isfinite()
    assert kd_loss(S, TOPK).isfinite()


@pytest.mark.parametrize("label", [-1, 7, 2**40])
def test_a_bad_label_that_nobody_may_look_at_makes_its_own_row_nan(label, monkeypatch):
    monkeypatch.setattr(label_values, "can_look", lambda x: False)  # as on a device
    labels = torch.tensor([0, label, 2, 3])
    leaf = S.clone().requires_grad_()
    for divergence in ("forward_kl", "dkd"):
        loss = kd_loss(leaf, T, labels, ce_weight=1.0, divergence=divergence, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        assert torch.equal(loss.isnan(), torch.tensor([False, True, False, False]))
        assert torch.equal(grad.isnan().all(1), torch.tensor([False, True, False, False]))
        assert grad[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("teacher", [T, TOPK], ids=["dense", "sparse"])
def test_a_bad_temperature_makes_its_own_row_nan(tau, teacher):
    temperature = torch.tensor([1.0, tau, 1.0, 1.0])
    loss = kd_loss(S, teacher, temperature=temperature, teacher_temperature=1.0, reduction="none")
    assert torch.equal(loss.isnan(), torch.tensor([False, True, False, False]))


def test_an_unknown_isa_is_refused_at_import():
    command = [sys.executable, "-c", "import kdfast"]
    result = subprocess.run(command, env={"KDFAST_CPU_ISA": "mmx"}, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert (
        "ValueError: KDFAST_CPU_ISA=mmx names no kernels that this processor runs; expected baseline" in result.stderr
    )
