"""The default keys of a batch's records: whatever the model is given of a record tells it from others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["InputsKey", "record_keys"]

NON_MODEL_FIELDS = ("key", "labels")  # of a batch that is a mapping: all others are the model's keywords
# Fields that say what a model takes for granted, where they hold these values.
ZERO_BY_DEFAULT = ("token_type_ids",)
COUNTED_BY_DEFAULT = ("position_ids", "cache_position")
DECODER_INPUTS = {"decoder_input_ids", "decoder_inputs_embeds"}
PER_TOKEN_DIMS = 3  # a tensor of more is an image, whatever its first sizes are


class InputsKey(bytes):
    """A record's key where more than its ids is the model's: a digest, which says in messages what it is of."""

    ids: Any = None  # of the record
    parts = ""  # the names of all that it is of

    @classmethod
    def of(cls, ids: Any, rows: Mapping[str, Any]) -> InputsKey:
        digest = blake2b(digest_size=16, person=b"kdfast:inputs")
        for name, row in [("input_ids", ids), *sorted(rows.items())]:
            digest.update(_canonical(name, row))
        key = cls(digest.digest())
        key.ids, key.parts = ids, ", ".join(sorted(rows))
        return key

    def __repr__(self) -> str:
        if self.ids is None:
            return super().__repr__()
        return f"the record of ids {[int(i) for i in self.ids[:4]]} ({len(self.ids)} in all), {self.parts}"


def record_keys(batch: Mapping[str, Any], arguments: Any = None, *, decodes_labels: bool = False) -> list[Any]:
    """The default key of each record of a batch with ``input_ids``, as ``capture`` stores and ``Distiller`` looks up.

    Of text alone it is the record's row of ``input_ids`` without padding. Where the model is given more that tells
    records apart, such as ``pixel_values``, ``decoder_input_ids`` or segment ids, it is a digest of the ids and of all
    that. ``labels`` are no part of it where they are classes, or the ids or those that follow, of which no model makes
    other inputs. Padding is no part of a key: where the ``attention_mask`` is 0, and in a decoder's fields where the
    ``decoder_attention_mask`` is 0, or else after the last of the ``labels`` that is not negative. A mask with zeros
    between ones moves tokens apart, and is part of it, unless ``position_ids`` say where they are.

    Args:
        batch: a mapping.
        arguments: what the model is called with for it, a mapping, a tuple or one argument: by default every field but
            ``key`` and ``labels``.
        decodes_labels: the model makes its decoder's inputs of the ``labels``, as an encoder-decoder does that is given
            none: the labels are then covered.

    Raises:
        ValueError: an argument of which nothing tells what belongs to which record, naming it.
    """
    if arguments is None:
        arguments = {name: value for name, value in batch.items() if name not in NON_MODEL_FIELDS}
    ids, real = batch["input_ids"], _mask(batch, "attention_mask", batch["input_ids"])
    keys = [row if real is None else row[real[i]] for i, row in enumerate(ids)]
    more = dict(_more(arguments, batch))
    decodes_labels = decodes_labels and batch.get("labels") is not None and not more.keys() & DECODER_INPUTS
    if decodes_labels:
        more["labels"] = batch["labels"]
    holes = None if real is None or _positions(arguments) else _holes(real)
    if not more and holes is None:
        return keys
    masks = {"": real, "decoder_": _decoder_mask(arguments, batch)}
    rows = {name: list(_rows(name, value, masks, len(keys))) for name, value in more.items()}
    if "labels" in more:
        rows["labels"] = [_labels(row, None if decodes_labels else ids[i]) for i, row in enumerate(rows["labels"])]
    if holes is not None:
        rows["attention_mask"] = holes
    return [_key(key, {name: row[i] for name, row in rows.items() if row[i] is not None}) for i, key in enumerate(keys)]


def _key(ids: Any, rows: Mapping[str, Any]) -> Any:
    return InputsKey.of(ids, rows) if rows else ids


def _more(arguments: Any, batch: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each argument by name that may tell records with the same ids apart."""
    if isinstance(arguments, Mapping):
        named: list[tuple[str, Any]] = list(arguments.items())
    else:
        named = [(f"input {i}", x) for i, x in enumerate(arguments if isinstance(arguments, tuple) else (arguments,))]
    for name, value in named:
        # Flags such as use_cache choose what is returned.
        if value is None or isinstance(value, bool) or _same(value, batch["input_ids"]):
            continue
        if name == "decoder_attention_mask" or _same(value, batch.get("attention_mask")):
            if _is_padding_mask(value):
                continue
        elif name == "attention_mask" and _is_padding_mask(value):
            continue
        yield name, value


def _rows(name: str, value: Any, masks: Mapping[str, Any], count: int) -> Iterator[Any]:
    """What ``value`` has of each record; None where it is what a model takes for granted."""
    if isinstance(value, (int, float, str, bytes)) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0):
        yield from [value] * count
        return
    shared = isinstance(value, (Tensor, np.ndarray)) and value.shape[0] == 1 != count
    if name in COUNTED_BY_DEFAULT and isinstance(value, Tensor) and (shared or value.dim() == 1):
        value, shared = value.reshape(1, -1).expand(count, -1), False
    if not isinstance(value, (Tensor, np.ndarray, list, tuple)) or not (shared or len(value) == count):
        size = f" with {len(value)} entries" if hasattr(value, "__len__") else ""
        raise ValueError(
            f"the model is given {name}, a {type(value).__name__}{size}, for {count} records, so that nothing tells "
            "what is whose: give key=(lambda batch: ...), which gives one key per record"
        )
    mask = None if name == "labels" else masks["decoder_" if name.startswith("decoder_") else ""]
    for i in range(count):
        row = value[0 if shared else i]
        if mask is not None and isinstance(value, Tensor) and value.dim() <= PER_TOKEN_DIMS:
            row = row[mask[i]] if value.shape[:2] == mask.shape else row
        yield None if _granted(name, row) else row


def _granted(name: str, row: Any) -> bool:
    if name not in (*ZERO_BY_DEFAULT, *COUNTED_BY_DEFAULT) or not isinstance(row, (Tensor, np.ndarray, list, tuple)):
        return False
    values = torch.as_tensor(row).cpu()
    if name in ZERO_BY_DEFAULT:
        return not bool(values.any())
    return values.dim() == 1 and torch.equal(values, torch.arange(len(values), dtype=values.dtype))


def _labels(labels: Any, ids: Any) -> Any:
    """A record's labels without those that pad them; None if the model makes no other input of them than ``ids``.

    A class, and labels that are the ids or those that follow, are what a loss is computed of. ``ids`` are None where a
    decoder's inputs are made of the labels: it sees those that are the encoder's ids, too.
    """
    row = torch.as_tensor(labels).cpu()
    if row.dim() == 0 or row.is_floating_point():
        return None if row.dim() == 0 else labels
    kept = row >= 0
    if ids is not None:
        own = torch.as_tensor(ids).cpu()
        if row.shape == own.shape and any(torch.equal(row[kept], x[kept]) for x in (own, own.roll(-1))):
            return None
    last = kept.nonzero().flatten()
    return labels[: int(last[-1]) + 1 if len(last) else 0]


def _mask(fields: Mapping[str, Any], name: str, ids: Any) -> Tensor | None:
    """The field ``name`` as bool, if it is a mask of the tokens ``ids``."""
    if fields.get(name) is None:
        return None
    mask = torch.as_tensor(fields[name])
    return mask.bool() if mask.shape == getattr(ids, "shape", mask.shape) else None


def _decoder_mask(arguments: Any, batch: Mapping[str, Any]) -> Tensor | None:
    """Which of a decoder's tokens are no padding: by its mask, else by the labels; None if neither tells.

    Labels before the last one may be negative where a decoder is prompted, which is no padding.
    """
    fields = {**batch, **arguments} if isinstance(arguments, Mapping) else batch
    ids = fields.get("decoder_input_ids")
    if ids is None:
        return None
    mask, labels = _mask(fields, "decoder_attention_mask", ids), fields.get("labels")
    if mask is None and labels is not None and tuple(labels.shape) == tuple(ids.shape):
        return (torch.as_tensor(labels) >= 0).flip(1).cummax(1).values.flip(1)
    return mask


def _positions(arguments: Any) -> bool:
    return isinstance(arguments, Mapping) and arguments.get("position_ids") is not None


def _holes(real: Tensor) -> list[Tensor | None] | None:
    """Per record its mask without the padding at its ends, if there are zeros within; None if that is so of none."""
    starts = real[:, 1:] & ~real[:, :-1]
    torn = (starts.sum(1) + real[:, 0] > 1).tolist() if real.dim() == 2 and real.shape[1] else []
    if not any(torn):
        return None
    ends = [mask.nonzero().flatten() for mask in real]
    return [m[at[0] : int(at[-1]) + 1] if hole else None for m, at, hole in zip(real, ends, torn, strict=True)]


def _is_padding_mask(mask: Any) -> bool:
    """Whether a mask tells padding alone: of two dimensions, and of 0 and 1, not of segments' numbers."""
    mask = torch.as_tensor(mask)
    return mask.dim() == 2 and bool(((mask == 0) | (mask == 1)).all())


def _same(value: Any, other: Any) -> bool:
    if value is other:
        return True
    tensors = isinstance(value, Tensor) and isinstance(other, Tensor)
    return tensors and value.shape == other.shape and torch.equal(value.cpu(), other.cpu())


def _canonical(name: str, row: Any) -> bytes:
    """Bytes that differ wherever name, shape or values do, the same on every device and for every width of integer."""
    if isinstance(row, (str, bytes)):
        data, kind = row.encode("utf-8", "surrogatepass") if isinstance(row, str) else row, type(row).__name__
        return f"{name}\0{kind}\0{len(data)}\0".encode() + data
    if isinstance(row, Sequence):
        return f"{name}\0{len(row)}\0".encode() + b"".join(_canonical(name, item) for item in row)
    array = _array(row)
    return f"{name}\0{array.dtype.str}\0{array.shape}\0".encode() + array.tobytes()


def _array(row: Any) -> NDArray[Any]:
    if isinstance(row, Tensor):
        row = row.detach().cpu()
        row = row.float().numpy() if row.dtype in (torch.float16, torch.bfloat16) else row.numpy()
    array = np.asarray(row)
    if array.dtype.kind in "biu":
        return array.astype("<i8")
    if array.dtype.kind == "f":
        return array.astype("<f4" if array.dtype.itemsize <= 4 else "<f8")
    raise ValueError(f"a key cannot be made of {array.dtype} values: give key=(lambda batch: ...)")
