"""SoftLabels: what a teacher said about a number of rows, as ``kd_loss`` takes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from kdfast.divergences import Divergence
from kdfast.labels.floor import Floor
from kdfast.labels.head import OutputLayer
from kdfast.labels.inputs import (
    check_entries,
    check_not_negative,
    check_present,
    check_prototypes,
    check_size,
    check_temperatures,
    check_tensors,
    flat_entries,
)
from kdfast.labels.repeats import merged_repeats

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["KINDS", "SoftLabels", "Support", "row_index"]

# Each kind of labels is a class, which is noted here when it is defined.
KINDS: dict[str, type[SoftLabels]] = {}

# What fields were called before 0.2, in pickles and in writers' journals.
FORMER_NAMES = {"shape": "prototype_ids", "shapes": "prototypes"}

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Support:
    """What one kind of labels can be asked for.

    Args:
        divergences: by name, and how near the loss is to that of the teacher's whole rows: "exact" (up to the stored
            precision), "lower bound" (the tail as one class), "unbiased" (in expectation over the draws), or
            "approximate" (the tail has another row's shape).
        any_temperature: else only the temperatures that the labels hold.
        standardize: z-scores need the logits of the whole row.
        entropy: the teacher's entropy is known, so that a KL divergence has its value and not just its gradient.
    """

    divergences: Mapping[str, str]
    any_temperature: bool = False
    standardize: bool = False
    entropy: bool = True

    def serves(self, divergence: Divergence) -> bool:
        """Whether a loss of this divergence can be computed, at the temperatures that the labels hold."""
        return divergence.name in self.divergences and self.standardize >= divergence.standardize


def _takes_former_names(make: F) -> F:
    """``make``, which also understands its keywords' former names."""

    @wraps(make)
    def call(*args: Any, **options: Any) -> Any:
        return make(*args, **{FORMER_NAMES.get(name, name): value for name, value in options.items()})

    return call  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True, repr=False)
class SoftLabels(ABC):
    """A teacher's labels for a number of rows. Build them with one of the five constructors.

    A constructor raises ``TypeError`` or ``ValueError``, naming what was passed, for dtypes and shapes that do not fit.

    ========== ============================================= =======================================================
    kind       a row holds                                   serves
    ========== ============================================= =======================================================
    topk       K (id, log-probability) and the exact         forward_kl, soft_ce: the tail is one more class
               log-mass of the rest per temperature          (an exact coarse-graining, a lower bound)
    weights    K (id, weight), unnormalised, as unbiased     soft_ce, whose gradient is forward_kl's; not its value
               samplers give them, at one temperature
    prototype  K (id, probability), the log-mass of the      every divergence but logit_mse, not standardized:
               rest, and its prototype: a row of a table      a distribution over the whole vocabulary, at one
               that all rows share                           temperature
    dense      log-probabilities of the whole vocabulary     every divergence, every temperature
    hidden     the teacher's last hidden state; the labels   every divergence, every temperature
               share its output layer
    ========== ============================================= =======================================================

    Each kind is a class of ``kdfast.labels``: ``TopK``, ``Weights``, ``Prototype``, ``Dense`` and ``Hidden``. The first
    three are ``Ragged``: row i owns entries ``offsets[i]:offsets[i + 1]``. A row names an id once. An entry of
    log-probability -inf, or of weight or probability 0, is padding: as if it were not there, whatever its id.
    ``present`` marks the rows that exist; an absent row is not counted and leaves the denominator. ``floor`` says how
    far the labels of a cache lie from the rows that they stand for; it is None where nobody has measured that.
    Index it by row: a slice, a bool mask, or integer rows.
    """

    kind: ClassVar[str]
    support: ClassVar[Support]
    # Fields that are no row's but shared by whatever is made of the labels: they stay where and what they are.
    shared: ClassVar[tuple[str, ...]] = ()

    vocab_size: int
    values: Tensor  # what is stored of the rows; each kind says what that is
    temperatures: tuple[float, ...] = (1.0,)
    present: Tensor | None = None  # (rows,) bool; None: all
    floor: Floor | None = None  # how far they lie from the teacher's rows, where a cache has measured it

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in vars(cls):
            KINDS[cls.kind] = cls

    # ---- constructors -------------------------------------------------------------------------------------------

    @staticmethod
    def topk(
        ids: Tensor,
        log_probs: Tensor,
        tails: Tensor,
        *,
        vocab_size: int,
        temperatures: Sequence[float] = (1.0,),
        offsets: Tensor | None = None,
        present: Tensor | None = None,
    ) -> SoftLabels:
        """Top-k labels with exact tails.

        Args:
            ids: (rows, K) or, with ``offsets``, (nnz,) integer token ids, each once in a row.
            log_probs: same shape: the teacher's log-probabilities at T = 1; -inf for padding.
            tails: (len(temperatures), rows), or (rows,) for one temperature: the log of the probability that
                the entries leave out, at each temperature (-inf: nothing is left out).
            temperatures: the teacher temperatures whose tail is known; a loss at another one raises.
            offsets: (rows + 1,) int64 of ragged rows: from 0, never back, to nnz.

        Raises:
            ValueError: of tensors on a CPU also an id out of range or twice in a row, and offsets that go back. On a
                GPU these are looked for where KDFAST_CHECK=1.
        """
        size = check_size(vocab_size)
        check_tensors(ids=ids, tails=tails)
        check_temperatures(temperatures)
        width = ids.shape[1] if offsets is None and ids.dim() == 2 else None
        ids, log_probs, offsets = flat_entries(ids, log_probs, offsets)
        padding = log_probs == -torch.inf
        tails = tails.reshape(len(temperatures), -1) if tails.dim() < 2 else tails
        rows = offsets.numel() - 1
        if tails.shape != (len(temperatures), rows):
            raise ValueError(f"tails must be ({len(temperatures)} temperatures, {rows} rows), got {tuple(tails.shape)}")
        present = check_present(present, rows)
        check_entries(ids, offsets, padding, present, size, once="add up their probabilities")
        return _of_kind(
            "topk",
            vocab_size=size,
            values=log_probs,
            temperatures=tuple(float(t) for t in temperatures),
            present=present,
            ids=ids.masked_fill(padding, 0),
            offsets=offsets,
            width=width,
            tails=tails.float(),
        )

    @staticmethod
    def weights(
        ids: Tensor,
        weights: Tensor,
        *,
        vocab_size: int,
        temperature: float = 1.0,
        offsets: Tensor | None = None,
        present: Tensor | None = None,
    ) -> SoftLabels:
        """Unnormalised weights, what an unbiased sampler at ``temperature`` gives: E[w_j] = p_j.

        Args:
            ids: (rows, K) or, with ``offsets``, (nnz,) integer token ids. What a row names several times, as draws with
                replacement do, has the sum of its weights.
            weights: same shape, non-negative; a row need not sum to 1. 0 for padding.
            offsets: (rows + 1,) int64 of ragged rows: from 0, never back, to nnz.

        Raises:
            ValueError: of tensors on a CPU also an id out of range, and offsets that go back.
        """
        size = check_size(vocab_size)
        ids, weights, offsets = flat_entries(ids, weights, offsets)
        padding = weights == 0.0
        check_temperatures((temperature,))
        check_not_negative("weights", weights)
        present = check_present(present, offsets.numel() - 1)
        check_entries(ids, offsets, padding, present, size, once=None)
        ids = ids.masked_fill(padding, 0)
        return _of_kind(
            "weights",
            vocab_size=size,
            values=merged_repeats(ids, weights, offsets),
            temperatures=(float(temperature),),
            present=present,
            ids=ids,
            offsets=offsets,
        )

    @staticmethod
    @_takes_former_names
    def prototype(
        ids: Tensor,
        probs: Tensor,
        tails: Tensor,
        prototype_ids: Tensor,
        prototypes: Tensor,
        *,
        vocab_size: int,
        temperature: float = 1.0,
        offsets: Tensor | None = None,
        present: Tensor | None = None,
    ) -> SoftLabels:
        """A few entries exactly, and the rest of the mass spread like one of a table's prototypes.

        Row i is p_j = probs_j on its entries and c_i * prototypes[prototype_ids[i], j] on every other column, where c_i
        makes the other columns' mass what ``tails`` says. Where the prototype has no mass outside the entries, they
        take all of it. A column that a prototype has at 0 makes reverse KL infinite, unless the student masks it.

        Args:
            ids: (rows, K) or, with ``offsets``, (nnz,) integer token ids, each once in a row; K may be 0.
            probs: same shape: the teacher's probabilities at ``temperature``; 0 for padding.
            tails: (rows,) log of the probability that the entries leave out (-inf: nothing is left out).
            prototype_ids: (rows,) integers in [0, S).
            prototypes: (S, vocab_size) contiguous bfloat16 or float32, non-negative; a row need not sum to 1.
            offsets: (rows + 1,) int64 of ragged rows: from 0, never back, to nnz.

        Raises:
            ValueError: of tensors on a CPU also an id out of range or twice in a row, a prototype out of range, and
                offsets that go back. On a GPU these are looked for where KDFAST_CHECK=1.
        """
        size = check_size(vocab_size)
        check_tensors(ids=ids)
        width = ids.shape[1] if offsets is None and ids.dim() == 2 else None
        ids, probs, offsets = flat_entries(ids, probs, offsets)
        rows = offsets.numel() - 1
        check_temperatures((temperature,))
        check_prototypes(tails, prototype_ids, prototypes, rows, size)
        if not ids.device == prototype_ids.device == prototypes.device:
            raise ValueError(
                f"ids are on {ids.device}, prototype_ids on {prototype_ids.device}, prototypes on {prototypes.device}"
            )
        check_not_negative("probs", probs)
        padding, present = probs == 0.0, check_present(present, rows)
        check_entries(ids, offsets, padding, present, size, once="add up their probabilities")
        return _of_kind(
            "prototype",
            vocab_size=size,
            values=probs,
            temperatures=(float(temperature),),
            present=present,
            ids=ids.masked_fill(padding, 0),
            offsets=offsets,
            width=width,
            tails=tails.float()[None],
            prototype_ids=prototype_ids.long(),
            prototypes=prototypes,
        )

    @staticmethod
    def dense(log_probs: Tensor, *, present: Tensor | None = None) -> SoftLabels:
        """Whole rows: (rows, vocab) logits or log-probabilities at T = 1 (a constant per row does not matter)."""
        check_tensors(log_probs=log_probs)
        if log_probs.dim() != 2 or not log_probs.is_floating_point():
            raise ValueError(
                f"dense labels must be floating-point (rows, vocab), got {log_probs.dtype} {tuple(log_probs.shape)}"
            )
        present = check_present(present, log_probs.shape[0])
        return _of_kind("dense", vocab_size=log_probs.shape[1], values=log_probs, present=present)

    @staticmethod
    def hidden(
        hidden: Tensor,
        head: OutputLayer | None = None,
        *,
        vocab_size: int | None = None,
        present: Tensor | None = None,
    ) -> SoftLabels:
        """The teacher's last hidden states. A loss takes them once they have the teacher's output layer.

        Args:
            hidden: (rows, d), any float dtype.
            head: the layer, on the device that the labels will be on when a loss takes them. ``to`` leaves it there.
            vocab_size: needed without ``head``.
        """
        check_tensors(hidden=hidden)
        if head is not None and not isinstance(head, OutputLayer):
            raise TypeError(f"head must be an OutputLayer or None, got {type(head).__name__}: OutputLayer(layer)")
        if hidden.dim() != 2 or not hidden.is_floating_point():
            raise ValueError(
                f"hidden states must be floating-point (rows, d), got {hidden.dtype} {tuple(hidden.shape)}"
            )
        if head is None and vocab_size is None:
            raise ValueError("hidden soft labels need head or vocab_size")
        if head is not None and (hidden.shape[1] != head.width or vocab_size not in (None, head.vocab_size)):
            raise ValueError(
                f"hidden soft labels of width {hidden.shape[1]} and vocab_size {vocab_size} do not fit a head of width "
                f"{head.width} and vocab_size {head.vocab_size}"
            )
        size = head.vocab_size if head is not None else check_size(vocab_size)
        present = check_present(present, hidden.shape[0])
        return _of_kind("hidden", vocab_size=size, values=hidden, present=present, head=head)

    @staticmethod
    def cat(parts: Sequence[SoftLabels]) -> SoftLabels:
        """Concatenate along rows; kinds, vocabularies, temperatures and tables of prototypes must agree."""
        if not parts:
            raise ValueError("SoftLabels.cat needs at least one part")
        first = parts[0]
        for part in parts:
            if not isinstance(part, SoftLabels):
                raise TypeError(f"SoftLabels.cat takes SoftLabels, got {type(part).__name__}")
            if (part.kind, part.vocab_size, part.temperatures) != (first.kind, first.vocab_size, first.temperatures):
                raise ValueError(f"cannot concatenate {first!r} with {part!r}: kind, vocabulary or temperatures differ")
        return replace(first, **first._joined(parts))

    # ---- rows ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows, present or not."""

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def present_mask(self) -> Tensor:
        """(rows,) bool: ``present``, or all rows."""
        if self.present is None:
            return torch.ones(len(self), dtype=torch.bool, device=self.device)
        return self.present

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Return the labels on another device."""
        return self.map_tensors(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return the labels in page-locked memory; ``DataLoader(pin_memory=True)`` calls this.

        A table of prototypes stays where it is: a copy per batch would cost more than the batch.
        """
        return self.map_tensors(lambda x: x.pin_memory())

    def map_tensors(self, move: Callable[[Tensor], Tensor]) -> Self:
        """Return labels with ``move(x)`` for every tensor of the rows. What rows share, a table or a head, stays."""
        own = {name: x for name, x in self._fields().items() if isinstance(x, Tensor) and name not in self.shared}
        moved: dict[str, Any] = {name: move(x) for name, x in own.items()}
        return replace(self, **moved)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Self:
        return replace(self, **self._taken(row_index(rows, len(self), self.device)))

    def _taken(self, index: Tensor) -> dict[str, Any]:
        """The fields of rows ``index`` that differ from these labels'."""
        return {"values": self.values[index], "present": None if self.present is None else self.present[index]}

    def _joined(self, parts: Sequence[Any]) -> dict[str, Any]:
        """The fields of the concatenated ``parts``, which are all of this class, that differ from these labels'."""
        present = None
        if any(part.present is not None for part in parts):
            present = torch.cat([part.present_mask for part in parts])
        floor = self.floor if all(part.floor == self.floor for part in parts) else None
        return {"values": torch.cat([part.values for part in parts]), "present": present, "floor": floor}

    # ---- what a loss asks ---------------------------------------------------------------------------------------

    @abstractmethod
    def to_dense(self) -> SoftLabels:
        """Labels of whole rows as dense ones: (rows, vocab) logits, float32 where they are made of hidden states.

        Raises:
            ValueError: labels of a few entries a row; hidden ones without their output layer, or on another device
                than it.
        """

    @abstractmethod
    def argmax(self) -> Tensor:
        """(rows,) int64: the likeliest class of each row; -1 for a row that names none.

        Raises:
            ValueError: labels of kind weights: the likeliest of a sampler's draws need not be the likeliest class.
        """

    def without_padding(self) -> Self:
        """The labels without entries that are padding, for whoever stores them. The host waits for their device."""
        return self

    def shard(self, columns: slice) -> Self:
        """The part of the labels that a process with ``columns`` of the vocabulary needs. Entries keep their ids."""
        return self

    def find_temperature(self, temperature: float | Tensor) -> int | None:
        """The place of a temperature in ``temperatures``, which is its row of ``tails``.

        None for a temperature that the labels do not hold, or a tensor of several.
        """
        if isinstance(temperature, Tensor):
            return None
        # Compared one by one: torch.compile may hold either side as a symbol.
        return next((i for i, t in enumerate(self.temperatures) if t == temperature), None)

    # ---- fields -------------------------------------------------------------------------------------------------

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to_fields(self) -> dict[str, Any]:
        """The kind and all fields by their names, as ``from_fields`` takes them."""
        return {"kind": self.kind, **self._fields()}

    @staticmethod
    def from_fields(values: Mapping[str, Any]) -> SoftLabels:
        """Labels from what ``to_fields`` gave, here or before 0.2, when one class had the fields of all kinds."""
        kind = values["kind"]
        return _of_kind(kind, **_fields_of(KINDS[kind], values))

    def __new__(cls, *args: Any, **options: Any) -> Self:
        # The class itself: for unpickling what was pickled before 0.2, whose kind __setstate__ will know.
        return super().__new__(KINDS["dense"] if cls is SoftLabels else cls)  # type: ignore[return-value]

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "kind" in state:  # from before 0.2
            object.__setattr__(self, "__class__", KINDS[state["kind"]])
        self.__dict__.update(_fields_of(type(self), state))

    def __getattr__(self, name: str) -> None:
        """A field that labels of another kind have is None, as it was when one class had the fields of all kinds."""
        if not any(name in kind.__dataclass_fields__ for kind in KINDS.values()):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        about = [self.kind, f"rows={len(self)}", f"vocab_size={self.vocab_size}", *self._about()]
        return f"SoftLabels({', '.join(about)}, temperatures={self.temperatures})"

    def _about(self) -> list[str]:
        """What ``repr`` says of this kind beside its rows, vocabulary and temperatures."""
        return []


def _of_kind(kind: str, **values: Any) -> SoftLabels:
    return KINDS[kind](**values)


def _fields_of(kind: type[SoftLabels], values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``values``, by their former names too, that labels of this kind have."""
    named = {FORMER_NAMES.get(name, name): value for name, value in values.items()}
    return {field.name: named[field.name] for field in fields(kind) if field.name in named}


def row_index(rows: int | slice | Sequence[int] | Tensor, length: int, device: torch.device) -> Tensor:
    """(n,) the row numbers that an index of ``length`` rows stands for, as a tensor's first dimension takes it.

    Raises:
        IndexError: a row out of range, or a mask of another length.
    """
    if isinstance(rows, int):
        if not -length <= rows < length:
            raise IndexError(f"row {rows} is out of range for {length} rows")
        rows = [rows % length]
    if isinstance(rows, slice):
        return torch.arange(length, device=device)[rows]
    if not isinstance(rows, Tensor) and not hasattr(rows, "__len__"):
        raise TypeError(f"rows are an int, a slice, a mask or row numbers, got {type(rows).__name__}")
    index = torch.as_tensor(rows, device=device)
    if index.is_floating_point() and index.numel():
        raise TypeError(f"row numbers must be integers, got {index.dtype}")
    if index.dtype == torch.bool:
        if index.shape != (length,):
            raise IndexError(f"a row mask must be ({length},), got {tuple(index.shape)}")
        return index.nonzero().squeeze(1)
    return index.long().reshape(-1)
