"""From documents to windows of token ids: texts, chats, ids, and rows of data sets that have one of these."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence, Sized
from numbers import Integral
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast._progress import Progress

__all__ = ["Corpus", "Document", "cut", "document_of"]

# A text, a chat (messages with a role), ids, or a row of a data set that has one of these.
Document = str | Sequence[int] | Sequence[Mapping[str, Any]] | Tensor | Mapping[str, Any]
FIELDS = ("text", "messages", "input_ids")  # of a row, where none is named


class Corpus(Sequence[Tensor]):
    """Windows of ids, (length,) int32 each, as flat arrays: 4 bytes a token and 16 a window.

    A slice is a ``Corpus`` of the same memory.

    Args:
        ids: of all documents, one after another.
        spans: (windows, 2) int64: where each begins and how long it is.
        first: an id that every window begins with besides; None: there is none.
    """

    def __init__(self, ids: NDArray[np.int32], spans: NDArray[np.int64], first: int | None = None) -> None:
        self._ids, self._spans, self._first = ids, spans, first

    def __len__(self) -> int:
        return len(self._spans)

    @overload
    def __getitem__(self, at: int) -> Tensor: ...

    @overload
    def __getitem__(self, at: slice) -> Corpus: ...

    def __getitem__(self, at: int | slice) -> Tensor | Corpus:
        if isinstance(at, slice):
            return Corpus(self._ids, self._spans[at], self._first)
        start, length = self._spans[at].tolist()
        ids = torch.from_numpy(self._ids[start : start + length])
        return ids if self._first is None else torch.cat([ids.new_tensor([self._first]), ids])

    @property
    def longest(self) -> int:
        """The length of the longest window; 0 without one."""
        return int(self._spans[:, 1].max(initial=0)) + (len(self) > 0 and self._first is not None)

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest id; 0 and -1 without one."""
        found = self._ids if self._first is None else np.append(self._ids, np.int32(self._first))
        return (int(found.min()), int(found.max())) if len(found) else (0, -1)


def cut(
    tokenizer: Any,
    documents: Iterable[Document],
    max_length: int,
    *,
    stride: int | None = None,
    bos: bool = False,
    add_special_tokens: bool = True,
    field: str | None = None,
    progress: bool = False,
) -> Corpus:
    """The windows of ``documents``; see ``windows``. A ``Corpus`` is one already.

    Raises:
        TypeError: ``documents`` is one document, or no list of documents; or one is of no kind that is known.
        ValueError: sizes that do not fit, no tokenizer for a text, or a row of which nothing tells what to take.
    """
    if isinstance(documents, Corpus):
        return documents
    for name, size in (("max_length", max_length), ("stride", stride)):
        if size is not None and (not isinstance(size, Integral) or isinstance(size, bool)):
            raise TypeError(f"{name} must be an int, got {size!r}")
    first = _bos_of(tokenizer) if bos else None
    room = max_length - bos
    if room < 1:
        raise ValueError(f"max_length must be {'at least 2 with bos=True' if bos else 'positive'}, got {max_length}")
    step = room if stride is None else stride
    if not 1 <= step <= room:
        raise ValueError(f"stride must lie between 1 and {room}, the ids of a window that are a document's, got {step}")
    _check_several(documents)
    ids, spans = array("i"), array("q")
    total = len(documents) if isinstance(documents, Sized) else None
    with Progress("tokenise", total=total, unit="documents", shown=progress) as bar:
        for number, document in enumerate(documents):
            begin = len(ids)
            own = _ids(document, number, tokenizer, add_special_tokens, field)
            ids.frombytes((own[1:] if first is not None and len(own) and own[0] == first else own).tobytes())
            for start in range(begin, len(ids), step):
                spans.extend((start, min(room, len(ids) - start)))
                if start + room >= len(ids):
                    break
            bar.advance()
    return Corpus(np.frombuffer(ids, np.int32), np.frombuffer(spans, np.int64).reshape(-1, 2), first)


def document_of(row: Mapping[str, Any], field: str | None) -> Any:
    """What a row of a data set holds: its ``field``, or the one field of ``FIELDS`` that it has.

    Raises:
        ValueError: it has no such field, several, or null in it.
    """
    found = [field] if field is not None else [name for name in FIELDS if row.get(name) is not None]
    if not found:
        raise ValueError(f"there is none of {', '.join(FIELDS)}, only {', '.join(map(str, row))}: say by field=")
    if len(found) > 1:
        raise ValueError(f"there are {' and '.join(found)}: say by field= which is the document")
    if found[0] not in row:
        raise ValueError(f"there is no {found[0]!r}, only {', '.join(map(str, row))}")
    if row[found[0]] is None:
        raise ValueError(f"{found[0]!r} is null")
    return row[found[0]]


def _check_several(documents: Any) -> None:
    """Raise ``TypeError`` where iterating would give the parts of one document, or names of columns."""
    problem = ""
    if isinstance(documents, (str, bytes)):
        problem = f"one {type(documents).__name__}: give a list of documents, [text]"
    elif isinstance(documents, Mapping):
        problem = f"a mapping with {', '.join(map(str, list(documents)[:5]))}: give one of these"
    elif isinstance(documents, (Tensor, np.ndarray)) and documents.ndim != 2:
        problem = f"a {type(documents).__name__} of shape {tuple(documents.shape)}: give a list of documents, [ids]"
    elif hasattr(documents, "columns") and hasattr(documents, "iloc"):
        problem = "a data frame: give one of its columns"
    elif not isinstance(documents, Iterable):
        problem = f"a {type(documents).__name__}"
    if problem:
        raise TypeError(f"documents must be an iterable of texts, chats or ids, got {problem}")


def _ids(document: Any, number: int, tokenizer: Any, add_special_tokens: bool, field: str | None) -> NDArray[np.int32]:
    try:
        if isinstance(document, Mapping):
            document = _without_padding(document, document_of(document, field))
    except ValueError as error:
        raise ValueError(f"document {number}: {error}") from error
    chat = isinstance(document, Sequence) and len(document) > 0 and isinstance(document[0], Mapping)
    if chat and not all(isinstance(message, Mapping) and "role" in message for message in document):
        raise ValueError(
            f"document {number}: each message of a chat has a role, got {', '.join(map(str, document[0]))}"
        )
    if isinstance(document, str) or chat:
        document = _tokenised(document, tokenizer, add_special_tokens)
    elif isinstance(document, Integral):
        raise TypeError(f"document {number} is the number {document}: the ids of one document are a list of their own")
    if not isinstance(document, (Tensor, np.ndarray, list, tuple, array, range)):
        raise TypeError(f"document {number} must be a text, a chat or ids, got {type(document).__name__}")
    found = document.cpu().numpy() if isinstance(document, Tensor) else np.asarray(document)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise TypeError(f"document {number} must be 1-D integer ids, got {found.dtype} of shape {found.shape}")
    if found.size and (int(found.min()) < 0 or int(found.max()) >= 2**31):
        raise ValueError(f"document {number}: ids must lie in [0, 2**31), got {found.min()} to {found.max()}")
    return found.astype(np.int32)


def _without_padding(row: Mapping[str, Any], document: Any) -> Any:
    """A row's ``input_ids`` without those that its ``attention_mask`` says are padding; other documents as they are."""
    mask = row.get("attention_mask")
    if mask is None or document is not row.get("input_ids"):
        return document
    ids, real = np.asarray(document), np.asarray(mask)
    if ids.ndim != 1 or real.shape != ids.shape:
        raise ValueError(f"input_ids are {ids.shape}, their attention_mask is {real.shape}")
    return ids[real != 0]


def _tokenised(document: Any, tokenizer: Any, add_special_tokens: bool) -> Any:
    if tokenizer is None:
        raise ValueError("documents that are texts need a tokenizer, got None")
    if not isinstance(document, str):  # a chat, whose template says which special tokens there are
        found = tokenizer.apply_chat_template(list(document), tokenize=True)
        return found["input_ids"] if isinstance(found, Mapping) else found
    # verbose: a document longer than the model's context is no cause for a warning, for it will be cut.
    return tokenizer(document, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]


def _bos_of(tokenizer: Any) -> int:
    first = getattr(tokenizer, "bos_token_id", None)
    if first is None:
        raise ValueError(f"bos=True needs a tokenizer with a bos_token_id, got {type(tokenizer).__name__}")
    return int(first)
