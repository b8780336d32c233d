"""``capture_lm``: a causal language model's labels for a corpus."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.cache import codecs
from kdfast.cache.capture.capture import CaptureReport, capture
from kdfast.cache.capture.fingerprint import fingerprint, with_tokenizer
from kdfast.cache.capture.output_layer import output_layer, vocabulary_of
from kdfast.divergences import Divergence
from kdfast.labels.head import OutputLayer
from kdfast.models import call, device_of, evaluating

__all__ = ["capture_lm", "next_tokens", "windows"]

NO_TARGET = -100  # of a window's last position
AGREEMENT = 0.02  # of the largest logit: bfloat16 through an output layer


def capture_lm(
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[str | Sequence[int] | Tensor],
    path: str | os.PathLike[str],
    *,
    max_length: int,
    batch_size: int,
    codec: str = "auto",
    temperatures: Sequence[float] = (1.0,),
    divergence: str | Divergence | None = None,
    add_special_tokens: bool = True,
    mask: Callable[[Tensor], Tensor] | None = None,
    teacher: str | None = None,
    epochs: int = 1,
    reuse: str = "refine",
    progress: bool = True,
    **options: Any,
) -> CaptureReport:
    """Run a causal language model over documents, and store a record per window of at most ``max_length`` tokens.

    A record is stored under its window's ids. Its row i is the distribution of the token after position i, and the
    row's target is that token. The last row's target is unknown (the next window begins there, or nothing): the row is
    stored, and counts as ignored in the targets. A student's loader cuts the same ``windows`` and asks for them by
    their ids, in any order and packing::

        ids = windows(tokenizer, documents, max_length)
        cache = kdfast.cache.open(path)
        labels = cache.gather(ids[:8])  # row by row what the teacher says after each token

    The ids of the whole corpus are held in memory, 4 bytes each. Batches are right-padded runs of consecutive windows;
    padding is never stored.

    With ``codec="hidden"`` (or "auto", where it comes to that) the last hidden states are stored, and a cache is opened
    with ``head=output_layer(model)``. That the two give the model's logits is checked on the first window.

    Args:
        model: takes ``input_ids`` and ``attention_mask`` and returns something with ``logits``; for hidden states a
            Hugging Face model, with ``base_model`` and ``get_output_embeddings``.
        tokenizer: a Hugging Face tokenizer; None if the documents are ids.
        documents: texts, or sequences of ids. Empty ones have no record.
        path: the cache's directory.
        max_length: of a window, in tokens. Longer documents are cut into windows that follow one another without
            overlap: the first token of a window sees no context.
        batch_size: windows in a batch.
        codec, temperatures, divergence, epochs, reuse, progress, options: as ``capture`` takes them.
        add_special_tokens: the tokenizer's policy. It is a part of the fingerprint.
        mask: of a window's ids: which rows to store, a bool each (position i's row predicts token i + 1).
        teacher: a fingerprint to take instead of the weights'. The tokenizer's is added to it.

    Raises:
        ValueError: no tokenizer for texts, bad sizes, or a model whose hidden states do not give its logits.
        CacheMismatchError: ``path`` holds the cache of another teacher, tokenizer or options.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    corpus = windows(tokenizer, documents, max_length, add_special_tokens=add_special_tokens)
    size = vocabulary_of(model)
    if codec == "auto":
        codec, chosen, _ = codecs.choose(size, temperatures, divergence, prototypes=True)
        options = {**chosen, **options}
    runs, outputs = _Causal(model), None
    wanted = codecs.find(codec)
    if wanted.input_name == codecs.HIDDEN_STATES:
        layer = output_layer(model)
        options = wanted.for_head(options, layer)
        runs, outputs = _Causal(model.base_model), _last_hidden
        if corpus:
            _check_agreement(model, layer, corpus[0])
    with evaluating(model):
        return capture(
            runs,
            _Batches(corpus, batch_size, device_of(model)),
            path,
            vocab_size=size,
            codec=codec,
            temperatures=temperatures,
            teacher=with_tokenizer(fingerprint(model) if teacher is None else teacher, tokenizer, add_special_tokens),
            outputs=outputs,
            targets=lambda batch: [next_tokens(ids) for ids in _padded(batch)],
            mask=None if mask is None else lambda batch: _masks(batch, mask),
            epochs=epochs,
            reuse=reuse,
            progress=progress,
            **options,
        )


def windows(
    tokenizer: Any,
    documents: Iterable[str | Sequence[int] | Tensor],
    max_length: int,
    *,
    add_special_tokens: bool = True,
) -> list[Tensor]:
    """The ids of each window of each document, (length,) int32: the keys of the records that ``capture_lm`` writes.

    Args:
        tokenizer, documents, max_length, add_special_tokens: as ``capture_lm`` takes them.

    Raises:
        ValueError: ``max_length`` is not positive, or there is no tokenizer for a text.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be positive, got {max_length}")
    parts: list[Tensor] = []
    for document in documents:
        if isinstance(document, str):
            if tokenizer is None:
                raise ValueError("documents that are texts need a tokenizer, got None")
            # verbose: a document longer than the model's context is no cause for a warning, for it will be cut.
            document = tokenizer(document, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        ids = torch.as_tensor(document, dtype=torch.int32)
        parts.extend(ids[start : start + max_length] for start in range(0, len(ids), max_length))
    return parts


def next_tokens(ids: Tensor) -> Tensor:
    """(length,) int64 targets of a window's rows: the ids shifted by one, and -100 (none) at the end."""
    return torch.cat([ids[1:].long(), torch.tensor([NO_TARGET], device=ids.device)])


def _check_agreement(model: Any, layer: OutputLayer, ids: Tensor) -> None:
    batch = next(iter(_Batches([ids], 1, device_of(model))))
    with evaluating(model):
        want = call(_Causal(model), batch).logits.float()
        got = layer.logits(_last_hidden(call(_Causal(model.base_model), batch), batch))
    if got.shape != want.shape or bool(((got - want).abs() > AGREEMENT * want.abs().max()).any()):
        raise ValueError(
            f"the last hidden states and the output layer of {type(model).__name__} do not give its logits: it does "
            "something to them that kdfast does not know of; take another codec"
        )


def _last_hidden(output: Any, batch: Any) -> Tensor:
    hidden: Tensor = output.last_hidden_state
    return hidden


def _padded(batch: dict[str, Tensor]) -> Iterator[Tensor]:
    """Yield each window's ids at the batch's length, with -100 in place of padding."""
    for ids, real in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        yield torch.where(real, ids, NO_TARGET)


def _masks(batch: dict[str, Tensor], mask: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """``mask`` of each window's own ids, and False on padding."""
    length = batch["input_ids"].shape[1]
    kept = [mask(ids[real]) for ids, real in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)]
    return [nn.functional.pad(row, (0, length - len(row))) for row in kept]


class _Causal:
    """Calls a model without the key-value cache, which only generation needs."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._more = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}

    def __call__(self, **batch: Tensor) -> Any:
        return self._model(**batch, **self._more)


class _Batches:
    """Batches of consecutive windows, right-padded with id 0, which the attention mask hides."""

    def __init__(self, corpus: list[Tensor], batch_size: int, device: torch.device | None) -> None:
        self._corpus, self._size, self._device = corpus, batch_size, device

    def __len__(self) -> int:
        return -(-len(self._corpus) // self._size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self._corpus), self._size):
            rows = self._corpus[start : start + self._size]
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).long()
            real = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).long()
            yield {"input_ids": ids.to(self._device), "attention_mask": real.to(self._device)}
