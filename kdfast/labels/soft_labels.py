"""SoftLabels: what a teacher said about a number of rows, as ``kd_loss`` takes it."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kdfast.labels.head import OutputLayer

__all__ = ["SoftLabels"]

KINDS = ("topk", "weights", "prototype", "dense", "hidden")


@dataclass(frozen=True)
class SoftLabels:
    """A teacher's labels for ``rows`` rows. Build it with one of the five constructors.

    ========== ============================================= =======================================================
    kind       a row holds                                   serves
    ========== ============================================= =======================================================
    topk       K (id, log-probability) and the exact         forward_kl, soft_ce: the tail is one more class
               log-mass of the rest per temperature          (an exact coarse-graining, a lower bound)
    weights    K (id, weight), unnormalised, as unbiased     soft_ce (and forward_kl, whose gradient is the same)
               samplers give them, at one temperature
    prototype  K (id, probability), the log-mass of the      every divergence but logit_mse, not standardized:
               rest, and its prototype: a row of a table      a distribution over the whole vocabulary, at one
               that all rows share                           temperature
    dense      log-probabilities of the whole vocabulary     every divergence, every temperature
    hidden     the teacher's last hidden state; the labels   every divergence, every temperature
               share its output layer
    ========== ============================================= =======================================================

    Rows are ragged: row i owns entries ``offsets[i]:offsets[i + 1]``. Ids are unique within a row.
    ``present`` marks the rows that exist; an absent row is not counted and leaves the denominator.
    Index it by row: a slice, a bool mask, or integer rows.
    """

    kind: str
    vocab_size: int
    # (nnz,) log-probs at T = 1 (topk), weights, or probabilities (prototype); (rows, vocab) logits (dense); (rows, d)
    values: Tensor
    temperatures: tuple[float, ...] = (1.0,)
    ids: Tensor | None = None  # (nnz,) int32
    offsets: Tensor | None = None  # (rows + 1,) int64
    tails: Tensor | None = None  # topk, prototype: (len(temperatures), rows) log-mass outside the entries
    present: Tensor | None = None  # (rows,) bool; None: all
    width: int | None = None  # entries per row where every row has as many
    prototype_ids: Tensor | None = None  # prototype: (rows,) int64, each row's row of `prototypes`
    prototypes: Tensor | None = (
        None  # prototype: (S, vocab) bfloat16 or float32, shared by whatever is made of the labels
    )
    head: OutputLayer | None = None  # hidden: what makes logits of the values, shared in the same way

    # ---- constructors -------------------------------------------------------------------------------------------

    @classmethod
    def topk(
        cls,
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
            ids: (rows, K) or, with ``offsets``, (nnz,) integer token ids.
            log_probs: same shape: the teacher's log-probabilities at T = 1.
            tails: (len(temperatures), rows), or (rows,) for one temperature: the log of the probability that
                the entries leave out, at each temperature (-inf: nothing is left out).
            temperatures: the teacher temperatures whose tail is known; a loss at another one raises.
        """
        width = ids.shape[1] if offsets is None and ids.dim() == 2 else None
        ids, log_probs, offsets = _ragged(ids, log_probs, offsets)
        tails = tails.reshape(len(temperatures), -1) if tails.dim() < 2 else tails
        rows = offsets.numel() - 1
        if tails.shape != (len(temperatures), rows):
            raise ValueError(f"tails must be ({len(temperatures)} temperatures, {rows} rows), got {tuple(tails.shape)}")
        _check_temperatures(temperatures)
        return cls(
            "topk",
            int(vocab_size),
            log_probs,
            tuple(float(t) for t in temperatures),
            ids,
            offsets,
            tails.float(),
            _check_present(present, rows),
            width,
        )

    @classmethod
    def weights(
        cls,
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
            ids: (rows, K) or, with ``offsets``, (nnz,) integer token ids.
            weights: same shape, non-negative; a row need not sum to 1.
        """
        ids, weights, offsets = _ragged(ids, weights, offsets)
        _check_temperatures((temperature,))
        present = _check_present(present, offsets.numel() - 1)
        return cls("weights", int(vocab_size), weights, (float(temperature),), ids, offsets, None, present)

    @classmethod
    def prototype(
        cls,
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
            ids: (rows, K) or, with ``offsets``, (nnz,) integer token ids; K may be 0.
            probs: same shape: the teacher's probabilities at ``temperature``.
            tails: (rows,) log of the probability that the entries leave out (-inf: nothing is left out).
            prototype_ids: (rows,) integers in [0, S).
            prototypes: (S, vocab_size) contiguous bfloat16 or float32, non-negative; a row need not sum to 1.
        """
        width = ids.shape[1] if offsets is None and ids.dim() == 2 else None
        ids, probs, offsets = _ragged(ids, probs, offsets)
        rows = offsets.numel() - 1
        _check_temperatures((temperature,))
        _check_prototypes(tails, prototype_ids, prototypes, rows, int(vocab_size))
        if not ids.device == prototype_ids.device == prototypes.device:
            raise ValueError(
                f"ids are on {ids.device}, prototype_ids on {prototype_ids.device}, prototypes on {prototypes.device}"
            )
        return cls(
            "prototype",
            int(vocab_size),
            probs,
            (float(temperature),),
            ids,
            offsets,
            tails.float()[None],
            _check_present(present, rows),
            width,
            prototype_ids.long(),
            prototypes,
        )

    @classmethod
    def dense(cls, log_probs: Tensor, *, present: Tensor | None = None) -> SoftLabels:
        """Whole rows: (rows, vocab) logits or log-probabilities at T = 1 (a constant per row does not matter)."""
        if log_probs.dim() != 2 or not log_probs.is_floating_point():
            raise ValueError(
                f"dense labels must be floating-point (rows, vocab), got {log_probs.dtype} {tuple(log_probs.shape)}"
            )
        return cls(
            "dense",
            log_probs.shape[1],
            log_probs,
            present=_check_present(present, log_probs.shape[0]),
        )

    @classmethod
    def hidden(
        cls,
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
        size = head.vocab_size if head is not None else int(vocab_size or 0)
        return cls("hidden", size, hidden, present=_check_present(present, hidden.shape[0]), head=head)

    @classmethod
    def cat(cls, parts: Sequence[SoftLabels]) -> SoftLabels:
        """Concatenate along rows; kinds, vocabularies, temperatures and tables of prototypes must agree."""
        if not parts:
            raise ValueError("SoftLabels.cat needs at least one part")
        first = parts[0]
        for part in parts[1:]:
            if (part.kind, part.vocab_size, part.temperatures) != (first.kind, first.vocab_size, first.temperatures):
                raise ValueError(f"cannot concatenate {first!r} with {part!r}: kind, vocabulary or temperatures differ")
            if not same_table(part.prototypes, first.prototypes):
                raise ValueError(f"cannot concatenate {first!r} with {part!r}: their tables of prototypes differ")
            if part.head is not first.head:
                raise ValueError(f"cannot concatenate {first!r} with {part!r}: their heads are not the same object")
        present = None
        if any(part.present is not None for part in parts):
            present = torch.cat([part._present_mask() for part in parts])
        values = torch.cat([part.values for part in parts])
        if first.ids is None:
            return replace(first, values=values, present=present)
        counts = torch.cat([part._counts() for part in parts])
        tails = None if first.tails is None else torch.cat([part._tails() for part in parts], dim=1)
        ids = torch.cat([part._ids() for part in parts])
        width = first.width if all(part.width == first.width for part in parts) else None
        prototype_ids = None if first.prototype_ids is None else torch.cat([part._prototype_ids() for part in parts])
        return replace(
            first,
            values=values,
            ids=ids,
            offsets=_offsets(counts),
            tails=tails,
            present=present,
            width=width,
            prototype_ids=prototype_ids,
        )

    # ---- rows ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return self.values.shape[0] if self.ids is None else self._offsets().numel() - 1

    @property
    def device(self) -> torch.device:
        return self.values.device

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SoftLabels:
        """The same labels on another device."""
        moved = self._map(lambda x: x.to(device, non_blocking=non_blocking))
        return moved if self.prototypes is None else replace(moved, prototypes=table_on(self.prototypes, moved.device))

    def pin_memory(self) -> SoftLabels:
        """The same labels in page-locked memory; ``DataLoader(pin_memory=True)`` calls this.

        A table of prototypes stays where it is: a copy per batch would cost more than the batch.
        """
        return self._map(lambda x: x.pin_memory())

    def _map(self, move: Callable[[Tensor], Tensor]) -> SoftLabels:
        def optional(x: Tensor | None) -> Tensor | None:
            return None if x is None else move(x)

        return replace(
            self,
            values=move(self.values),
            ids=optional(self.ids),
            offsets=optional(self.offsets),
            tails=optional(self.tails),
            present=optional(self.present),
            prototype_ids=optional(self.prototype_ids),
        )

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> SoftLabels:
        index = row_index(rows, len(self), self.device)
        present = None if self.present is None else self.present[index]
        if self.ids is None:
            return replace(self, values=self.values[index], present=present)
        counts = self._counts()[index]
        offsets = _offsets(counts)
        # Entry e of the result sits `e - offsets[row]` past its row's old start.
        shift = torch.repeat_interleave(self._offsets()[:-1][index] - offsets[:-1], counts)
        entries = shift + torch.arange(shift.numel(), device=self.device)
        tails = None if self.tails is None else self.tails[:, index]
        ids = self._ids()[entries]
        prototype_ids = None if self.prototype_ids is None else self.prototype_ids[index]
        values = self.values[entries]
        return replace(
            self, values=values, ids=ids, offsets=offsets, tails=tails, present=present, prototype_ids=prototype_ids
        )

    # ---- what a loss takes ----------------------------------------------------------------------------------------

    def to_dense(self) -> SoftLabels:
        """Hidden labels as dense ones: (rows, vocab) float32 logits. Dense labels are returned as they are.

        Raises:
            ValueError: labels of another kind, or without their output layer, or on another device than it.
        """
        if self.kind == "dense":
            return self
        if self.kind != "hidden":
            raise ValueError(f"{self.kind} soft labels do not hold the logits of whole rows; dense and hidden ones do")
        return SoftLabels.dense(self.require_head().logits(self.values), present=self.present)

    def require_head(self) -> OutputLayer:
        """The output layer of hidden labels. Raises ``ValueError`` if they have not been given it."""
        if self.head is None:
            raise ValueError(
                "hidden soft labels need the teacher's output layer: kdfast.cache.open(path, head=...) gives it to them"
            )
        return self.head

    def find_temperature(self, temperature: float | Tensor) -> int | None:
        """Which of ``temperatures`` it is: the row of ``tails``. None for another one, or a tensor."""
        if isinstance(temperature, Tensor):
            return None
        # Compared one by one: torch.compile may hold either side as a symbol.
        return next((i for i, t in enumerate(self.temperatures) if t == temperature), None)

    def at(self, temperature: float | Tensor) -> tuple[Tensor, Tensor | None]:
        """(nnz,) weights and, for top-k and prototypes, (rows,) log tail mass at one of the labels' temperatures.

        The entries of such a row are normalised to what the tail leaves (top-k: after tempering), so that entries and
        tail are a distribution whatever the precision they were stored in.

        Raises:
            ValueError: a temperature that the labels do not carry, or a tensor of temperatures.
        """
        known = self.find_temperature(temperature)
        if known is None:
            got = "a tensor" if isinstance(temperature, Tensor) else temperature
            raise ValueError(f"{self.kind} soft labels hold teacher_temperature {self.temperatures}, got {got}")
        if self.kind == "weights":
            return self.values, None
        tail = self._tails()[known]
        # A tail that rounding took above all of the mass leaves nothing to the entries.
        mass = -torch.expm1(tail.clamp(max=0.0))
        if self.kind == "prototype":
            row = torch.repeat_interleave(self._counts(), output_size=self.values.numel())
            total = torch.zeros_like(mass).index_add(0, row, self.values)
            return self.values * torch.where(total == 0.0, 0.0, mass / total)[row], tail
        head = torch.log(mass)
        tempered = self.values / temperature
        if self.width is not None:
            tempered = tempered.view(len(self), self.width)
            log_probs = tempered + (head - _finite(torch.logsumexp(tempered, 1)))[:, None]
            return log_probs.exp().view(-1), tail
        row = torch.repeat_interleave(self._counts(), output_size=tempered.numel())
        top = _finite(head.new_full((len(self),), -torch.inf).scatter_reduce(0, row, tempered, "amax"))
        total = torch.zeros_like(head).index_add(0, row, (tempered - top[row]).exp())
        return (tempered - top[row] + (head - _finite(total.log()))[row]).exp(), tail

    def __repr__(self) -> str:
        entries = "" if self.ids is None else f", entries={self.values.numel()}"
        prototypes = "" if self.prototypes is None else f", prototypes={len(self.prototypes)}"
        return (
            f"SoftLabels({self.kind}, rows={len(self)}, vocab_size={self.vocab_size}{entries}{prototypes}, "
            f"temperatures={self.temperatures})"
        )

    # ---- the optional fields, once the kind says they are there --------------------------------------------------

    def _ids(self) -> Tensor:
        assert self.ids is not None
        return self.ids

    def _offsets(self) -> Tensor:
        assert self.offsets is not None
        return self.offsets

    def _tails(self) -> Tensor:
        assert self.tails is not None
        return self.tails

    def _prototype_ids(self) -> Tensor:
        assert self.prototype_ids is not None
        return self.prototype_ids

    def _counts(self) -> Tensor:
        offsets = self._offsets()
        return offsets[1:] - offsets[:-1]

    def _present_mask(self) -> Tensor:
        if self.present is None:
            return torch.ones(len(self), dtype=torch.bool, device=self.device)
        return self.present


def _ragged(ids: Tensor, values: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, K) or flat entries with offsets, as flat entries with offsets."""
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"ids must be integers, got {ids.dtype}")
    if not values.is_floating_point():
        raise TypeError(f"values must be floating point, got {values.dtype}")
    if ids.shape != values.shape:
        raise ValueError(f"ids and values must have one shape, got {tuple(ids.shape)} and {tuple(values.shape)}")
    if offsets is None:
        if ids.dim() != 2:
            raise ValueError(f"ids must be (rows, K) unless offsets are given, got {tuple(ids.shape)}")
        rows, k = ids.shape
        offsets = torch.arange(rows + 1, device=ids.device) * k
    elif offsets.dtype != torch.int64 or offsets.dim() != 1 or offsets.numel() < 1 or ids.dim() != 1:
        raise ValueError(
            f"ragged labels need flat ids and int64 offsets of (rows + 1,), got ids {tuple(ids.shape)} "
            f"and offsets {offsets.dtype} {tuple(offsets.shape)}"
        )
    return ids.reshape(-1).to(torch.int32).contiguous(), values.reshape(-1).float().contiguous(), offsets.contiguous()


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _finite(x: Tensor) -> Tensor:
    """0 in place of -inf: rows whose entries are all impossible, or that have none."""
    return x.masked_fill(x == -torch.inf, 0.0)


def row_index(rows: int | slice | Sequence[int] | Tensor, length: int, device: torch.device) -> Tensor:
    if isinstance(rows, int):
        if not -length <= rows < length:
            raise IndexError(f"row {rows} is out of range for {length} rows")
        rows = [rows % length]
    if isinstance(rows, slice):
        return torch.arange(length, device=device)[rows]
    index = torch.as_tensor(rows, device=device)
    if index.dtype == torch.bool:
        if index.shape != (length,):
            raise IndexError(f"a row mask must be ({length},), got {tuple(index.shape)}")
        return index.nonzero().squeeze(1)
    return index.long().reshape(-1)


def _check_temperatures(temperatures: Sequence[float]) -> None:
    if not temperatures or not all(0.0 < t < float("inf") for t in temperatures):
        raise ValueError(f"temperatures must be positive and finite, got {tuple(temperatures)}")


def _check_present(present: Tensor | None, rows: int) -> Tensor | None:
    if present is not None and (present.dtype != torch.bool or present.shape != (rows,)):
        raise ValueError(f"present must be a bool mask of ({rows},), got {present.dtype} {tuple(present.shape)}")
    return present


def _check_prototypes(tails: Tensor, prototype_ids: Tensor, prototypes: Tensor, rows: int, vocab_size: int) -> None:
    if tails.shape != (rows,):
        raise ValueError(f"tails must be ({rows},) log-masses, got {tuple(tails.shape)}")
    if prototype_ids.is_floating_point() or prototype_ids.dtype == torch.bool:
        raise TypeError(f"prototype_ids must be integers, got {prototype_ids.dtype}")
    if prototype_ids.shape != (rows,):
        raise ValueError(f"prototype_ids must be ({rows},), a row of prototypes each, got {tuple(prototype_ids.shape)}")
    if prototypes.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"prototypes must be float32 or bfloat16 probabilities, got {prototypes.dtype}")
    if prototypes.dim() != 2 or prototypes.shape[1] != vocab_size or not prototypes.is_contiguous():
        raise ValueError(
            f"prototypes must be a contiguous (S, {vocab_size}) table, got {tuple(prototypes.shape)} with strides "
            f"{prototypes.stride()}"
        )


def same_table(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))


# A table's copies on other devices, by device and version: batch after batch refers to one table.
_COPIES: MutableMapping[Tensor, dict[tuple[torch.device, int], Tensor]] = WeakTensorKeyDictionary()


def table_on(table: Tensor, device: torch.device) -> Tensor:
    if table.device == device:
        return table
    key = (device, 0 if table.is_inference() else table._version)
    if key not in _COPIES.get(table, {}):
        _COPIES[table] = {key: table.to(device)}
    return _COPIES[table][key]
