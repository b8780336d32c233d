"""kd_loss and KDLoss: validate, lay out rows, dispatch, reduce."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdfast._names import no_option
from kdfast.divergences import Divergence
from kdfast.labels import Head, Ragged, SoftLabels
from kdfast.labels.packed import Packed, unpacked
from kdfast.labels.support import check_supported
from kdfast.loss import checks, ops
from kdfast.loss.chunks import ChunkedRows, flat_head, teacher_chunks
from kdfast.loss.derivatives import transformed
from kdfast.loss.first_look import look_once
from kdfast.loss.head_loss import logits_of_head, loss_by_chunks
from kdfast.loss.label_values import check_label_values
from kdfast.loss.option_names import OPTION_TERMS
from kdfast.loss.reference import Targets
from kdfast.loss.row_layout import Number, RowLayout
from kdfast.loss.vocab_parallel import part_of
from kdfast.loss.vocabulary import Shard

__all__ = ["KDLoss", "LossParts", "kd_loss"]


class LossParts(NamedTuple):
    """Detached by-products of a loss: per row for ``reduction="none"``, else the mean over rows.

    The mean is unweighted, and over the rows that weigh something: those that count, unless ``row_weight`` or the
    weights of all terms are 0 there. Per row the parts of the others are 0. For a weighted mean take them per row.
    """

    kd: Tensor  # the divergence, nats, unweighted and without tau^2
    ce: Tensor  # cross-entropy with label smoothing, nats, unweighted
    entropy: Tensor  # of the student at its temperature, nats
    top1: Tensor  # 1 where student and teacher agree on the most likely column, else 0

    @property
    def floor(self) -> float | None:
        """How far the teacher's labels lie from its rows, in nats: KL(teacher || label), the mean over their cache.

        A ``kd`` that is not well above it is of a student that is about as near to its teacher as its labels are: it
        learns their error. None for logits, for labels that nobody has measured or that have no floor, being drawn,
        and at another teacher temperature than that of the measurement.
        """
        return None


class _FlooredParts(LossParts):
    """The parts of a loss of labels whose floor is known."""

    known: float

    @property
    def floor(self) -> float:
        return self.known


def kd_loss(
    student: Tensor | Head,
    teacher: Tensor | Head | SoftLabels | Packed,
    labels: Tensor | None = None,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: Number = 1.0,
    teacher_temperature: Number | None = None,
    scale_by_t2: bool = True,
    kd_weight: Number = 1.0,
    ce_weight: Number = 0.0,
    z_weight: float = 0.0,
    label_smoothing: float = 0.0,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    backward: str = "fused",
    shift: bool = False,
    return_parts: bool = False,
    group: dist.ProcessGroup | None = None,
    vocab: str = "same",
    **unknown: NoReturn,  # for an error that says what was meant
) -> Any:
    """Temperature softmax, divergence, cross-entropy and z-loss of every row in one sweep over the logits.

    For the defaults, with temperature T and row counts as usual in PyTorch::

        T**2 * F.kl_div(F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1),
                        log_target=True, reduction="batchmean")  # + ce_weight * F.cross_entropy(student, labels)

    Args:
        student: (..., V_s) logits: float32, bfloat16, float16 or float64. ``-inf`` masks a column. A ``Head`` holds
            what they are made of: then they exist for a chunk of rows at a time, as many as KDFAST_WORKSPACE allows
            ("512MiB" without), and the gradient reaches the hidden states, the weight and the bias.
        teacher: (..., V_t) logits, a ``Head``, or ``SoftLabels`` or ``PackedLabels`` with one row per student row. It
            is a constant: a ``Head``'s weight may be a parameter that requires grad, and gets no gradient from here.
            Where V_s and V_t differ (``vocab``) the divergence is over the shared columns, both sides renormalised
            there; CE and z-loss see all of V_s.
        labels: (...,) integer class indices, or (..., V_s) class probabilities, whose rows sum to 1, or to 0 where
            there is no label. Needed by CE and ``dkd``; without these they only say which rows are ignored. Classes are
            the last dimension: (N, C, H, W) logits are ``movedim(1, -1)`` here.
        divergence: a name of ``kdfast.divergences``, or a ``Divergence`` where it has parameters.
        temperature: the student's, and the teacher's unless ``teacher_temperature`` is given. A number, or a tensor
            of one per row, (...,) or (..., 1); a dimension may be 1 for one number that all its rows share.
        scale_by_t2: multiply the divergence by temperature^2 (Hinton et al. 2015); never for ``logit_mse``.
        kd_weight, ce_weight: numbers that are not negative, or tensors of one per row as ``temperature``.
        z_weight: of log-sum-exp(student)^2 at temperature 1 (PaLM, Chowdhery et al. 2022).
        label_smoothing: in [0, 1], averaged over the student's finite columns.
        row_weight: (...,) floating-point numbers scale a row's loss but not the denominator. Bool or integer ones are
            a mask, such as an ``attention_mask``, which does both: rows count where it is not 0.
        ignore_index: rows with this label do not count at all, KD included.
        reduction: "mean" over counted rows, "sum", or "none".
        num_items: replaces the denominator of "mean" (gradient accumulation, data parallelism). Whatever divides or
            averages the loss or its gradients afterwards must be in it: ``global_items`` says who does, and counts.
        backward: "fused" computes the gradient in the forward pass; "recompute" keeps only the logits, allows several
            backward passes, and is taken by itself for ``reduction="none"``, float16 and float64; "inplace"
            overwrites the student's logits with their gradient. Those give a gradient that has no derivative of its
            own, and says so. "eager" is plain PyTorch, slow and with logits even of a ``Head``: it has second
            derivatives, forward mode and per-sample gradients, and is taken by itself inside the transforms of
            ``torch.func`` and under forward mode.
        shift: position i's logits against label i + 1, for (..., length, V) logits and (..., length) labels, without
            copying; the last position does not count. The teacher is not shifted: it predicts what the student does. A
            mask of (..., length) is the labels', taken as ``row_weight[..., 1:]``: nothing learns to predict padding.
            With padding on the left the position before the first token counts, as in Hugging Face's losses;
            ``mask[..., :-1] * mask[..., 1:]`` leaves it out. Numbers of (..., length) are the logits': temperatures,
            weights and a ``row_weight`` that is no mask. Of (..., length - 1) both leave a position out already.
        return_parts: also return ``LossParts``, with the floor of a cache's labels where it is known.
        group: the processes that share out the vocabulary, each with some columns of the student's logits or rows of
            its head's weight, in the order of ranks. All call with the same rows and labels, whose classes are numbered
            over the whole. A teacher is shared out alike, or whole. A few numbers per row cross between them.
        vocab: "same": V_s and V_t may differ by padding (151936 and 152064): by 64 or 1 % where both are 1000 or more.
            "shared": by anything, where the first columns of both are the same classes.

    Returns:
        The loss, float32 (float64 for float64 logits): a scalar, or (...,) for ``reduction="none"`` ((..., length - 1)
        with ``shift``). With ``return_parts`` a pair of it and the parts.

    Raises:
        TypeError, ValueError: bad arguments, naming what was passed and what was wanted, before any kernel runs.
        Of values inside CPU tensors, labels are looked at in every call, and whether logits or the logarithms of soft
        labels are probabilities in the first one from each line of code. KDFAST_CHECK=1 looks at more, and at other
        devices' too, which waits for them; without it a bad label or temperature there makes its own row NaN.
        NotImplementedError: from a backward pass, for the derivative of a gradient, which "eager" alone has.
    """
    if unknown:
        _check_known(unknown)
    student = checks.check_student(student)
    teacher = unpacked(teacher)
    checks.check_options(ignore_index, scale_by_t2=scale_by_t2, shift=shift, return_parts=return_parts)
    shard, columns = None, student.shape[-1]
    if group is not None:
        checks.check_group(group)
        shard = Shard(group, columns)
        teacher, columns = part_of(teacher, shard), shard.columns
    div = Divergence.of(divergence)
    rows = RowLayout(student, shift)
    checks.check_teacher(student, teacher, rows.count)
    checks.check_backward(backward, reduction, num_items, student)
    if backward == "eager" or transformed():
        backward = checks.check_eager(backward, student, shard is not None)
    checks.check_smoothing(label_smoothing)
    tau_t = temperature if teacher_temperature is None else teacher_temperature
    checks.check_numbers(temperature, tau_t, kd_weight, ce_weight, z_weight, row_weight)
    needed_by = _needs_labels(div, ce_weight)
    checks.check_labels(labels, student, needed_by)
    _check_divergence(div, teacher, tau_t, columns, vocab, shard is not None, needed_by)
    checks.check_effects(label_smoothing, kd_weight, ce_weight, z_weight, return_parts)
    look_once(student, teacher)

    index = None if labels is None or labels.is_floating_point() else rows.labels(labels)
    counted = rows.counted(index, ignore_index, row_weight, teacher)
    if checks.values_are_checked():
        checks.check_values(student, teacher, [temperature, tau_t], columns)
        checks.check_weight_values(kd_weight=kd_weight, ce_weight=ce_weight, z_weight=z_weight)
    weight = rows.weights(counted, row_weight, reduction, num_items)
    scaled = scale_by_t2 and div.name != "logit_mse"
    coef = rows.coefficients(weight, scaled, temperature, tau_t, kd_weight, ce_weight, z_weight)
    probs = rows.probabilities(labels) if labels is not None and labels.is_floating_point() else None
    if labels is not None:
        check_label_values(index, probs, weight, columns, ignore_index, used=needed_by is not None)
    targets = Targets(index, probs, float(label_smoothing))
    by_chunks = isinstance(student, Head) or isinstance(teacher, Head) or shard is not None
    if by_chunks and backward != "eager":
        loss, parts = _run_by_chunks(
            student, teacher, rows, div, tau_t, coef, targets, return_parts, backward, reduction, shard
        )
    else:
        source = _op_teacher(_with_logits(teacher), rows, div, tau_t)
        logits = logits_of_head(student) if isinstance(student, Head) else student
        loss, parts = _run(rows.lay_out(logits), source, coef, targets, return_parts, backward, reduction)
    if reduction == "none":
        loss = rows.unflatten(loss)
    if not return_parts:
        return loss
    return loss, _loss_parts(parts.detach(), coef, rows, reduction, teacher, tau_t)


class KDLoss(nn.Module):
    """``kd_loss`` with its options bound: ``KDLoss(temperature=2.0, ce_weight=0.5)(student, teacher, labels)``.

    Options given to a call take precedence. Raises ``TypeError`` for an option that ``kd_loss`` lacks, saying what it
    may be called here.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        _check_known(options)
        self.options = options

    def forward(
        self,
        student: Tensor | Head,
        teacher: Tensor | Head | SoftLabels | Packed,
        labels: Tensor | None = None,
        **options: Any,
    ) -> Any:
        if options:
            _check_known(options)
        return kd_loss(student, teacher, labels, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _check_known(options: Mapping[str, Any]) -> None:
    known = set(kd_loss.__kwdefaults__ or ())
    if not known.issuperset(options):
        raise no_option("kd_loss", set(options) - known, known, OPTION_TERMS)


def _needs_labels(div: Divergence, ce_weight: Number) -> str | None:
    if isinstance(ce_weight, Tensor) or ce_weight != 0.0:
        return "ce_weight"
    return "divergence dkd" if div.name == "dkd" else None


def _check_divergence(
    div: Divergence,
    teacher: Tensor | Head | SoftLabels,
    tau_t: Number,
    ours: int,
    vocab: str,
    shared_out: bool,
    needed_by: str | None,
) -> None:
    if isinstance(teacher, SoftLabels):
        check_supported(teacher, div, tau_t)
    theirs = teacher.vocab_size if isinstance(teacher, SoftLabels) else teacher.shape[-1]
    theirs = ours if shared_out else theirs  # a part of the columns; part_of has seen to the whole
    checks.check_vocabularies(ours, theirs, vocab)
    if div.name == "dkd" and min(ours, theirs) < 3:
        raise ValueError(
            f"divergence dkd needs at least 3 classes (the non-target part is empty of 2), got {min(ours, theirs)}"
        )
    if ours == 1 and (div.name != "logit_mse" or div.standardize or needed_by is not None):
        raise ValueError(
            "student has one logit per row, whose softmax is always 1. For a sigmoid's logit z give both sides two "
            "classes: torch.stack((torch.zeros_like(z), z), -1), and labels of 0 and 1"
        )


def _op_teacher(teacher: Tensor | SoftLabels, rows: RowLayout, div: Divergence, tau_t: Number) -> ops.Teacher:
    if isinstance(teacher, Tensor):
        return ops.DenseTeacher(rows.lay_out(teacher), div)
    if isinstance(teacher, Ragged):
        return ops.SparseTeacher.of_labels(teacher, div, tau_t, rows.dtype)
    return ops.DenseTeacher(rows.lay_out(teacher.to_dense().values.view(*rows.shape, teacher.vocab_size)), div)


def _with_logits(teacher: Tensor | Head | SoftLabels) -> Tensor | SoftLabels:
    """A teacher whose logits exist. Its output layer is not trained."""
    if not isinstance(teacher, Head):
        return teacher
    layer = {name: getattr(teacher, name) for name in ("weight", "bias")}
    frozen = {name: x.detach() for name, x in layer.items() if x is not None and x.requires_grad}
    return logits_of_head(replace(teacher, **frozen))


def _run(
    logits: Tensor,
    teacher: ops.Teacher,
    coef: Tensor,
    targets: Targets,
    want_parts: bool,
    backward: str,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    trains = logits.requires_grad and torch.is_grad_enabled()
    if trains and backward == "inplace":
        return ops.row_loss_inplace(logits, teacher, coef, targets, want_parts)
    if trains and backward == "fused" and reduction != "none" and logits.dtype in (torch.float32, torch.bfloat16):
        return ops.row_loss_fused(logits, teacher, coef, targets, want_parts)
    rows = ops.row_loss_eager if backward == "eager" else ops.row_loss
    loss, parts = rows(logits, teacher, coef, targets, want_parts)
    return (loss if reduction == "none" else loss.sum()), parts


def _run_by_chunks(
    student: Tensor | Head,
    teacher: Tensor | Head | SoftLabels,
    layout: RowLayout,
    div: Divergence,
    tau_t: Number,
    coef: Tensor,
    targets: Targets,
    want_parts: bool,
    backward: str,
    reduction: str,
    shard: Shard | None,
) -> tuple[Tensor, Tensor]:
    """The loss and its parts where logits exist for some rows at a time, or for some columns on each process."""
    count, kept = layout.count, _kept(student, coef)
    if targets.probs is not None:
        targets = targets._replace(probs=targets.probs.reshape(count, student.shape[-1]))
    if kept is not None:
        coef, targets = coef[:, kept], targets.of_rows(kept)
    rows = ChunkedRows(
        teacher=teacher_chunks(teacher, count, div, tau_t, layout.dtype, kept),
        coef=coef,
        targets=targets,
        want_parts=want_parts,
        shard=shard,
    )
    flat: Tensor | Head
    if isinstance(student, Head):
        flat = flat_head(student, kept)
    else:
        flat = layout.lay_out(student).reshape(count, student.shape[-1])
    loss, parts = loss_by_chunks(flat, rows, backward, reduction)
    if kept is None:
        return loss, parts
    if reduction == "none":
        loss = loss.new_zeros(count).index_copy(0, kept, loss)
    if want_parts:
        parts = parts.new_zeros(4, count).index_copy(1, kept, parts)
    return loss, parts


def _kept(student: Tensor | Head, coef: Tensor) -> Tensor | None:
    """The rows that count, where finding them costs less than multiplying the others out. Elsewhere the host waits."""
    if not isinstance(student, Head) or coef.device.type != "cpu":
        return None
    counts = (coef[2:] != 0.0).any(0)
    return None if bool(counts.all()) else counts.nonzero()[:, 0]


def _loss_parts(
    parts: Tensor, coef: Tensor, rows: RowLayout, reduction: str, teacher: Tensor | Head | SoftLabels, tau_t: Number
) -> LossParts:
    """Those of each row, or their means over the rows that weigh something; with the floor of labels that have one."""
    if reduction == "none":
        values = [rows.unflatten(part) for part in parts]
    else:
        values = list(parts.sum(1) / (coef[2:] != 0.0).any(0).sum().clamp(min=1))
    floor = teacher.floor if isinstance(teacher, SoftLabels) else None
    if floor is None or isinstance(tau_t, Tensor) or tau_t != floor.temperature:
        return LossParts(*values)
    floored = _FlooredParts(*values)
    floored.known = floor.kl
    return floored
