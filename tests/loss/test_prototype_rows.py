"""Labels whose tails are prototypes: the sparse row op against the oracle in float64, gradients first."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from kdfast import SoftLabels, jsd, kd_loss
from kdfast.divergences import Divergence
from kdfast.loss.reference import Targets
from kdfast.testing import loss_and_gradient, relative_error
from support.prototype_rows import DIVERGENCES, OTHERS, ROWS, coefficients, make_table, make_teacher
from support.sparse_rows import check, oracle, run, with_padding

# (V_s, V_t): two columns, below a vector, around a tile (1024), and either vocabulary wider.
SHAPES = [(2, 2), (5, 5), (1031, 1031), (1030, 1023), (1023, 1030), (2100, 2100)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("tau", [1.0, 2.0, 3.3])
def test_matches_oracle(dtype, divergence, tau):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for columns, vocab in SHAPES:
        teacher = make_teacher(columns, vocab, divergence)
        labels = Targets(torch.randint(0, columns, (ROWS,)), None, 0.1)
        check(oracle, (torch.randn(ROWS, columns) * 3).to(dtype), teacher, coefficients(wide, tau), labels)


@pytest.mark.parametrize("divergence", OTHERS, ids=str)
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_other_divergences_match_the_oracle(divergence, tau):
    for columns, vocab in SHAPES[2:]:
        teacher = make_teacher(columns, vocab, divergence, table=make_table(vocab, torch.float32))
        labels = Targets(torch.randint(0, min(columns, vocab), (ROWS,)))
        check(oracle, torch.randn(ROWS, columns) * 3, teacher, coefficients(torch.float32, tau), labels)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_a_large_vocabulary(divergence):
    teacher = make_teacher(50000, 50000, divergence, counts=[0, 9, 49999])
    check(
        oracle,
        torch.randn(3, 50000) * 3,
        teacher,
        coefficients(torch.float32, 2.0, 3),
        Targets(torch.randint(0, 50000, (3,))),
    )


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_columns_that_both_sides_mask(divergence, dtype):
    """Whole leading tiles, and more; an entry that weighs nothing may lie there too."""
    table = make_table(2300)
    student = (torch.randn(ROWS, 2300) * 3).to(dtype)
    dead = torch.arange(2300) < 1100
    dead[2000:2050] = True
    student[:, dead], table[:, dead] = -math.inf, 0.0
    teacher = make_teacher(2300, 2300, divergence, table=table, counts=[0, 3, 3, 3, 3, 3, 3])
    kept = (~dead).nonzero()[:, 0]
    ids = torch.cat([kept[torch.randperm(len(kept))[:3]] for _ in range(6)]).int()
    ids[4], teacher.weights[4] = 7, 0.0
    teacher = teacher._replace(ids=ids)
    labels = Targets(kept[torch.arange(ROWS) * 9], None, 0.1)
    check(oracle, student, teacher, coefficients(torch.float32, 2.0), labels)
    assert (run(student, teacher, coefficients(torch.float32, 1.0), labels)[1][:, dead] == 0.0).all()


@pytest.mark.parametrize(
    ("divergence", "infinite"),
    [("forward_kl", True), ("soft_ce", True), ("reverse_kl", False), ("symmetric_kl", True), ("jsd", False)],
)
@pytest.mark.parametrize("whole_tile", [False, True])
def test_mass_on_a_masked_student_column(divergence, infinite, whole_tile):
    student = torch.randn(3, 2100)
    masked = slice(0, 1024) if whole_tile else slice(200, 400)
    student[:, masked] = -math.inf
    teacher = make_teacher(2100, 2100, Divergence(divergence), counts=[0, 2, 9])
    labels = Targets(torch.full((3,), 2099))
    coef = coefficients(torch.float32, 2.0, 3)
    loss, grad, _ = run(student, teacher, coef, labels)
    assert ((loss == math.inf) == infinite).all()
    assert (grad[:, masked] == 0.0).all()
    exact_loss, exact_grad, _ = oracle(student.double(), teacher, coef.double(), labels)
    assert torch.equal(exact_loss.isinf(), loss.isinf())
    if not infinite:
        assert relative_error(grad, exact_grad) <= 1e-5
        assert relative_error(loss, exact_loss, floor=1.0) <= 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_student_mass_where_the_shape_has_none(divergence):
    """Infinite under the divergences whose expectation is the student's, and only there."""
    table = make_table(1200)
    table[:, 300:310] = 0.0
    teacher = make_teacher(1200, 1200, divergence, counts=[0, 2, 9], table=table)
    teacher = teacher._replace(ids=teacher.ids % 300)
    student, coef, labels = torch.randn(3, 1200), coefficients(torch.float32, 1.0, 3), Targets(torch.arange(3))
    exact_loss, exact_grad, _ = oracle(student.double(), teacher, coef.double(), labels)
    loss, grad, _ = run(student, teacher, coef, labels)
    infinite = divergence.name in ("reverse_kl", "symmetric_kl")
    assert torch.equal(loss.isinf(), exact_loss.isinf())
    assert loss.isinf().all() == infinite
    if not infinite:
        assert relative_error(grad, exact_grad) <= 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_rows_without_a_distribution_or_a_student_are_zero(divergence):
    student = torch.randn(4, 40)
    student[0] = -math.inf
    teacher = make_teacher(40, 40, divergence, counts=[2, 0, 0, 2], table=make_table(40, count=2))
    teacher.tail[1] = -math.inf  # nothing at all
    teacher.tail_prototypes.prototypes[1] = 0.0
    teacher.tail_prototypes.prototype_ids[:] = torch.tensor([0, 0, 1, 1])  # a prototype of no mass
    labels, coef = Targets(torch.zeros(4, dtype=torch.long)), torch.ones(5, 4)
    loss, grad, _ = run(student, teacher, coef, labels)
    coef[2, :3] = 0.0
    without, grad_without, _ = run(student, teacher, coef, labels)
    torch.testing.assert_close((loss, grad), (without, grad_without))
    if divergence.name in ("forward_kl", "soft_ce"):
        assert loss[3].isfinite()
        assert grad[3].isfinite().all()


def test_shapes_below_the_normal_range_and_far_apart():
    table = torch.full((3, 1100), 1e-39)
    table[:, 5] = 1.0
    table[1] *= 1e-3
    teacher = make_teacher(1100, 1100, Divergence("reverse_kl"), counts=[0, 0, 1], table=table)
    teacher.ids[0] = 7
    labels = Targets(torch.zeros(3, dtype=torch.long))
    check(oracle, torch.randn(3, 1100), teacher, coefficients(torch.float32, 1.0, 3), labels)


def test_logits_far_from_zero():
    """The sums over a prototype are taken relative to each tile's origin."""
    for divergence in DIVERGENCES:
        teacher = make_teacher(2100, 2100, divergence)
        student = torch.randn(ROWS, 2100).half().float() + 3e4
        check(oracle, student, teacher, coefficients(torch.float32, 2.0), Targets(torch.randint(0, 2100, (ROWS,))))


@pytest.mark.parametrize("divergence", [*DIVERGENCES[:3], jsd(0.5)], ids=str)
def test_padding_is_as_if_it_were_not_there(divergence):
    student, teacher = torch.randn(3, 1000), make_teacher(1000, 1020, divergence, counts=[2, 0, 9])
    label = torch.tensor([int(teacher.ids[0]), 5, 999])
    padded = with_padding(teacher, label, 1000)
    clean, same = (run(student, x, torch.ones(5, 3), Targets(label, None, 0.1)) for x in (teacher, padded))
    for a, b in zip(clean, same, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("divergence", [*DIVERGENCES[:3], jsd(0.5)], ids=str)
def test_bad_rows_are_nan_and_touch_nothing_else(divergence):
    for name, bad in [*(("ids", i) for i in (-1, 1000, 2**31 - 1)), *(("prototype_ids", i) for i in (-1, 3, 2**62))]:
        teacher = make_teacher(1000, 1020, divergence, counts=[2, 2, 2])
        if name == "ids":
            teacher.ids[2] = bad
        else:
            teacher.tail_prototypes.prototype_ids[1] = bad
        labels = Targets(torch.zeros(3, dtype=torch.long))
        loss, grad, _ = run(torch.randn(3, 1000), teacher, torch.ones(5, 3), labels)
        assert torch.equal(loss.isnan(), torch.tensor([False, True, False]))
        assert grad[1].isnan().all()
        assert grad[[0, 2]].isfinite().all()
        # Nobody asks for the divergence: nobody is harmed.
        coef = torch.ones(5, 3)
        coef[2] = 0.0
        assert run(torch.randn(3, 1000), teacher, coef, labels)[0].isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("where", ["student", "shape", "shape beyond", "tail", "weight", "infinite shape"])
def test_nan_propagates_to_its_row(divergence, where):
    table = make_table(1030, torch.float32)
    teacher = make_teacher(1000, 1030, divergence, counts=[2, 2, 2], table=table)
    teacher.tail_prototypes.prototype_ids[:] = torch.tensor([0, 1, 2])
    student = torch.randn(3, 1000)
    free = next(j for j in range(1000) if j not in teacher.ids)
    targets = {
        "student": (student, (1, free), math.nan),
        "shape": (table, (1, free), math.nan),
        "shape beyond": (table, (1, 1029), math.nan),
        "infinite shape": (table, (1, free), math.inf),
        "tail": (teacher.tail, 1, math.nan),
        "weight": (teacher.weights, 2, math.nan),
    }
    tensor, index, value = targets[where]
    tensor[index] = value
    loss, grad, _ = run(student, teacher, torch.ones(5, 3), Targets(torch.zeros(3, dtype=torch.long)))
    assert torch.equal(loss.isnan(), torch.tensor([False, True, False]))
    assert grad[1].isnan().all()
    assert grad[[0, 2]].isfinite().all()


# ---- kd_loss --------------------------------------------------------------------------------------------------------


def make_labels(rows, vocab, k, *, temperature=1.0, table=None, **options):
    table = make_table(vocab) if table is None else table
    ids = torch.stack([torch.randperm(vocab)[:k] for _ in range(rows)])
    probs, tails = torch.rand(rows, k) + 0.01, torch.rand(rows).clamp(0.05, 0.95).log()
    shape = torch.randint(0, len(table), (rows,))
    return SoftLabels.prototype(ids, probs, tails, shape, table, vocab_size=vocab, temperature=temperature, **options)


def expand(labels, temperature):
    """The distribution that a row stands for, column by column."""
    weights, tail = labels.at(temperature)
    p = torch.zeros(len(labels), labels.vocab_size, dtype=torch.float64)
    for i in range(len(labels)):
        entries = slice(int(labels.offsets[i]), int(labels.offsets[i + 1]))
        p[i] = labels.prototypes[labels.prototype_ids[i]].double()
        p[i, labels.ids[entries].long()] = 0.0
        if p[i].any():
            p[i] *= tail[i].double().exp() / p[i].sum()
        p[i, labels.ids[entries].long()] = weights[entries].double()
    return p


@pytest.mark.parametrize("divergence", [*DIVERGENCES, *OTHERS], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("backward", ["fused", "recompute", "inplace"])
def test_is_the_dense_loss_of_the_expanded_distribution(divergence, temperature, backward):
    labels = make_labels(5, 300, 4, temperature=temperature)
    student, target = torch.randn(5, 300), torch.tensor([0, 5, -100, 7, 299])
    options = {"divergence": divergence, "ce_weight": 0.3, "z_weight": 0.01, "label_smoothing": 0.1}
    p = expand(labels, temperature)
    assert torch.allclose(p.sum(1), torch.ones(5, dtype=torch.float64))
    for tau in (temperature, 1.5):
        sparse = loss_and_gradient(
            student, labels, target, temperature=tau, teacher_temperature=temperature, backward=backward, **options
        )
        dense = loss_and_gradient(
            student.double(), p.log(), target, temperature=tau, teacher_temperature=1.0, **options
        )
        assert sparse[0].item() == pytest.approx(dense[0].item(), rel=1e-5)
        assert relative_error(sparse[1], dense[1]) <= 1e-5


@pytest.mark.parametrize("divergence", [*DIVERGENCES, *OTHERS[:2], OTHERS[3]], ids=str)
def test_a_student_that_is_the_teacher_has_no_gradient(divergence):
    labels = make_labels(4, 1500, 6)
    loss, grad = loss_and_gradient(expand(labels, 1.0).log().float(), labels, divergence=divergence)
    assert grad.abs().max() < 1e-7
    assert divergence.name == "soft_ce" or abs(loss.item()) < 1e-6


@pytest.mark.parametrize("divergence", [*DIVERGENCES, *OTHERS], ids=str)
@pytest.mark.parametrize("k", [0, 3, 8])
def test_gradcheck(divergence, k):
    student = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    labels = make_labels(3, 8, k)
    options = {"divergence": divergence, "temperature": 2.0, "teacher_temperature": 1.0, "ce_weight": 0.5}
    assert torch.autograd.gradcheck(lambda s: kd_loss(s, labels, torch.tensor([1, 2, 3]), **options), student)


@pytest.mark.parametrize("suffix", ["", "_grad", "_inplace"])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_opcheck(suffix, divergence):
    student = torch.randn(2, 3, 9, requires_grad=suffix == "")
    teacher = make_teacher(9, 9, Divergence(divergence), counts=[0, 9, 1, 2, 3, 4])
    targets = Targets(torch.randint(0, 9, (6,)), None, 0.1)
    arguments = teacher.arguments(torch.rand(5, 6) + 0.1, targets, True)
    opcheck(getattr(torch.ops.kdfast, "sparse_rows" + suffix), (student, *arguments))


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_devices_without_a_kernel_run_the_reference(divergence):
    teacher = make_teacher(9, 9, Divergence(divergence), counts=[0, 9, 1, 2, 3, 4])
    targets = Targets(torch.randint(0, 9, (6,)), None, 0.1)
    arguments = (torch.randn(2, 3, 9), *teacher.arguments(torch.rand(5, 6) + 0.1, targets, True))
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    native = torch.ops.kdfast.sparse_rows_grad
    for ours, slow in zip(native(*arguments), native.default.redispatch(keys, *arguments), strict=True):
        assert torch.allclose(ours, slow, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("ragged", [False, True])
def test_compiles_without_breaks(ragged):
    torch._dynamo.reset()
    labels = make_labels(6, 50, 5)
    if ragged:
        labels = SoftLabels.cat([labels[:3], make_labels(3, 50, 2, table=labels.prototypes)])
    student = torch.randn(6, 50)
    for divergence in ("forward_kl", "reverse_kl"):
        step = torch.compile(
            lambda s, t, d=divergence: kd_loss(s, t, divergence=d), fullgraph=True, backend="aot_eager"
        )
        results = []
        for call in (step, lambda s, t, d=divergence: kd_loss(s, t, divergence=d)):
            leaf = student.clone().requires_grad_()
            loss = call(leaf, labels)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(results[0], results[1])


@st.composite
def problems(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    rows, columns = draw(st.integers(1, 4)), draw(st.one_of(st.integers(3, 40), st.sampled_from([1023, 1025, 2100])))
    vocab = max(3, columns + draw(st.sampled_from([0, 0, -5, 7])))
    shared = min(columns, vocab)
    student = torch.randn(rows, columns) * draw(st.sampled_from([0.1, 1.0, 5.0]))
    table = make_table(vocab, draw(st.sampled_from([torch.float32, torch.bfloat16])))
    dead = torch.rand(shared) < draw(st.sampled_from([0.0, 0.3, 0.97]))
    dead[:3] = False
    student[:, :shared][:, dead], table[:, :shared][:, dead] = -math.inf, 0.0
    kept = (~dead).nonzero()[:, 0]
    counts = torch.randint(0, min(len(kept), 12) + 1, (rows,))
    ids = torch.cat([kept[torch.randperm(len(kept))[: int(count)]] for count in counts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    tails = torch.where(counts == 0, 0.0, torch.rand(rows).clamp(0.01, 0.99).log())
    shape = torch.randint(0, len(table), (rows,))
    labels = SoftLabels.prototype(
        ids, torch.rand(len(ids)) + 0.01, tails, shape, table, vocab_size=vocab, offsets=offsets
    )
    options = {
        "divergence": draw(st.sampled_from([*DIVERGENCES, *OTHERS])),
        "temperature": draw(st.sampled_from([0.5, 1.0, 2.0, 3.3])),
        "kd_weight": draw(st.sampled_from([0.0, 0.7])),
        "ce_weight": draw(st.sampled_from([0.0, 0.7])),
        "reduction": draw(st.sampled_from(["mean", "none"])),
        "vocab": "shared",
    }
    return student, labels, torch.randint(0, 3, (rows,)), options


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problems(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_any_problem(problem, dtype):
    """Against the dense loss of the expanded distribution, in float64."""
    student, labels, target, options = problem
    student = student.to(dtype)
    loss, grad = loss_and_gradient(student, labels, target, teacher_temperature=1.0, **options)
    dense = loss_and_gradient(student.double(), expand(labels, 1.0).log(), target, teacher_temperature=1.0, **options)
    assume(float(dense[1].abs().max()) < torch.finfo(dtype).max)  # else no gradient of this dtype could be right
    floor = 0.1 / len(student)
    assert relative_error(grad, dense[1], floor) <= 5e-6 + torch.finfo(dtype).eps
    assert relative_error(loss.reshape(-1), dense[0].reshape(-1), floor=1.0) <= 1e-5
    assert (grad[student == -math.inf] == 0.0).all()


def test_no_rows_and_no_shapes():
    nothing = make_labels(3, 20, 2)[:0]
    leaf = torch.randn(0, 20, requires_grad=True)
    kd_loss(leaf, nothing, divergence="jsd").backward()
    assert leaf.grad.shape == (0, 20)
    # An index into an empty table is out of range like any other.
    ids, probs, zeros = torch.zeros(2, 0).int(), torch.zeros(2, 0), torch.zeros(2)
    labels = SoftLabels.prototype(ids, probs, zeros, zeros.long(), make_table(20), vocab_size=20)
    labels = replace(labels, prototypes=labels.prototypes[:0])
    assert kd_loss(torch.randn(2, 20), labels, reduction="none").isnan().all()


# ---- SoftLabels -----------------------------------------------------------------------------------------------------


def test_rows_share_the_table():
    labels = make_labels(6, 20, 3)
    both = SoftLabels.cat([labels[:2], labels[torch.tensor([5, 2])]])
    assert both.prototypes is labels.prototypes
    assert torch.equal(both.prototype_ids, labels.prototype_ids[[0, 1, 5, 2]])
    assert torch.equal(both.at(1.0)[0].view(4, 3), labels.at(1.0)[0].view(6, 3)[[0, 1, 5, 2]])
    assert labels.to("cpu").prototypes is labels.prototypes
    assert labels.to("meta").prototypes is labels[:1].to("meta").prototypes
    assert repr(labels) == "SoftLabels(prototype, rows=6, vocab_size=20, entries=18, prototypes=3, temperatures=(1.0,))"


def test_a_table_that_changed_is_moved_again():
    labels = make_labels(6, 20, 3)
    first = labels.to("meta").prototypes
    labels.prototypes.mul_(2)
    assert labels.to("meta").prototypes is not first


def test_equal_tables_concatenate_and_others_do_not():
    a, b = make_labels(2, 20, 3), make_labels(2, 20, 3)
    copy = make_labels(2, 20, 3, table=a.prototypes.clone())
    assert len(SoftLabels.cat([a, copy])) == 4
    with pytest.raises(ValueError, match="their tables of prototypes differ"):
        SoftLabels.cat([a, b])


def test_entries_and_tail_are_a_distribution():
    labels = make_labels(5, 30, 4, temperature=2.0)
    weights, tail = labels.at(2.0)
    assert torch.allclose(weights.view(5, 4).sum(1) + tail.exp(), torch.ones(5))
    assert torch.allclose(weights[0] / weights[1], labels.values[0] / labels.values[1])
    ids = torch.tensor([[0, 1], [2, 3]])
    padded = SoftLabels.prototype(
        ids, torch.zeros(2, 2), torch.tensor([-0.5, 0.0]), torch.zeros(2).int(), labels.prototypes, vocab_size=30
    )
    assert (padded.at(1.0)[0] == 0.0).all()
    # Entries of probability 0 are none: their columns have the prototype's.
    prototype = labels.prototypes[:1].float().log().expand(2, -1)
    student = torch.randn(2, 30)
    for divergence in ("forward_kl", "reverse_kl"):
        torch.testing.assert_close(
            kd_loss(student, padded, divergence=divergence), kd_loss(student, prototype, divergence=divergence)
        )


IDS, PROBS, TAILS = torch.tensor([[0, 3], [1, 2]]), torch.full((2, 2), 0.1), torch.full((2,), -0.2)
TABLE = torch.full((3, 7), 0.125)


def prototype(ids=IDS, probs=PROBS, tails=TAILS, prototype_ids=IDS[1], prototypes=TABLE, **options):
    return SoftLabels.prototype(ids, probs, tails, prototype_ids, prototypes, **{"vocab_size": 7, **options})


ERRORS = {
    "tails": (lambda: prototype(tails=TAILS[None]), ValueError, r"tails must be \(2,\) log-masses, got \(1, 2\)"),
    "shape type": (
        lambda: prototype(prototype_ids=TAILS),
        TypeError,
        "prototype_ids must be integers, got torch.float32",
    ),
    "shape rows": (
        lambda: prototype(prototype_ids=IDS),
        ValueError,
        r"must be \(2,\), a row of prototypes each, got \(2, 2\)",
    ),
    "table type": (lambda: prototype(prototypes=TABLE.half()), TypeError, "float32 or bfloat16 .*got torch.float16"),
    "shape range": (lambda: prototype(prototype_ids=IDS[0]), ValueError, r"prototypes in \[0, 3\), got 0 to 3"),
    "table width": (lambda: prototype(prototypes=TABLE[:, :6]), ValueError, r"\(S, 7\) table, got \(3, 6\)"),
    "table strides": (lambda: prototype(prototypes=TABLE.t().contiguous().t()), ValueError, r"with strides \(1, 3\)"),
    "devices": (lambda: prototype(prototypes=TABLE.to("meta")), ValueError, "ids are on cpu, .* prototypes on meta"),
    "temperature": (lambda: prototype(temperature=-1.0), ValueError, "temperatures must be positive"),
    "not held": (
        lambda: kd_loss(torch.randn(2, 7), prototype(), temperature=2.0),
        ValueError,
        r"prototype soft labels hold teacher_temperature \(1.0,\), got 2.0",
    ),
    "logit mse": (
        lambda: kd_loss(torch.randn(2, 7), prototype(), divergence="logit_mse"),
        ValueError,
        "prototype soft labels serve forward_kl, .*reverse_kl, .*jsd, .* and neyman_chi2, got divergence logit_mse",
    ),
    "standardized": (
        lambda: kd_loss(torch.randn(2, 7), prototype(), divergence=Divergence("jsd", standardize=True)),
        ValueError,
        "got divergence jsd, standardized",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_named_error(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        # A device tensor's values are not looked at when labels are made of them.
        (replace(prototype(), prototype_ids=torch.tensor([0, 3])), r"prototypes in \[0, 3\), got 0 to 3"),
        (prototype(prototypes=-TABLE), "prototypes must be finite and not negative, got -0.125 to -0.125"),
        (prototype(prototypes=TABLE / 0), "prototypes must be finite and not negative, got inf to inf"),
        (replace(prototype(), ids=(IDS + 6).int().flatten()), r"tokens in \[0, 7\), got 6 to 9"),
    ],
    ids=str,
)
def test_values_are_checked_on_request(labels, message, monkeypatch):
    kd_loss(torch.randn(2, 7), labels)
    monkeypatch.setenv("KDFAST_CHECK", "1")
    with pytest.raises(ValueError, match=message):
        kd_loss(torch.randn(2, 7), labels)


def test_checks_let_rows_without_entries_pass(monkeypatch):
    monkeypatch.setenv("KDFAST_CHECK", "1")
    assert kd_loss(torch.randn(3, 7), make_labels(3, 7, 0)).isfinite()
