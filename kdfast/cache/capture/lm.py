"""``capture_lm``: a causal language model's labels for a corpus."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.cache import codecs
from kdfast.cache.capture.capture import capture
from kdfast.cache.capture.corpus import Corpus, Document, cut
from kdfast.cache.capture.fingerprint import fingerprint, with_tokenizer
from kdfast.cache.capture.output_layer import output_layer, vocabulary_of
from kdfast.cache.capture.report import CaptureReport
from kdfast.cache.capture.suitable import check_causal, check_fits
from kdfast.divergences import Divergence
from kdfast.labels.head import OutputLayer
from kdfast.models import call, device_of, evaluating

__all__ = ["capture_lm", "next_tokens", "windows"]

NO_TARGET = -100  # of a window's last position
AGREEMENT = 0.02  # of the largest logit: bfloat16 through an output layer


def capture_lm(
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[Document],
    path: str | os.PathLike[str],
    *,
    max_length: int,
    batch_size: int,
    stride: int | None = None,
    bos: bool = False,
    field: str | None = None,
    vocab_size: int | None = None,
    causal: bool = True,
    codec: str = "auto",
    temperatures: Sequence[float] = (1.0,),
    divergence: str | Divergence | None = None,
    student_kl: float | str | None = None,
    add_special_tokens: bool = True,
    mask: Callable[[Tensor], Tensor] | None = None,
    teacher: str | None = None,
    epochs: int = 1,
    reuse: str = "refine",
    on_bad: str = "raise",
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

    The ids of the whole corpus are held in memory, 4 bytes each and 16 a window. Batches are right-padded runs of
    consecutive windows; padding is never stored.

    With ``codec="hidden"`` (or "auto", where it comes to that) the last hidden states are stored, and a cache is opened
    with ``head=output_layer(model)``. That the two give the model's logits is checked on the first window.

    Args:
        model: takes ``input_ids`` and ``attention_mask`` and returns something with ``logits``; for hidden states a
            Hugging Face model, with ``base_model`` and ``get_output_embeddings``.
        tokenizer: a Hugging Face tokenizer; None if the documents are ids.
        documents: any iterable of texts, of ids, of chats, which are lists of messages and go through the tokenizer's
            chat template, or of rows, as the data sets of Hugging Face give them. Empty documents have no record.
        path: the cache's directory.
        max_length: of a window, in tokens. Longer documents are cut into windows that follow one another without
            overlap: the first token of a window sees no context.
        batch_size: windows in a batch.
        stride: from one window of a document to the next; less than a window makes them overlap, so that tokens have
            more context in the second one. Each window is a record of its own, whole.
        bos: begin every window with the tokenizer's BOS, which takes one of its tokens; not only a document's first.
        field: of a row: which field is the document. By default the one of text, messages and input_ids that it has.
        vocab_size: columns of the logits to store, the first ones, where the model has more than its tokenizer.
        causal: False takes a model whose rows see the tokens after them, too. It is tried on the first window.
        codec, temperatures, divergence, student_kl, epochs, reuse, on_bad, progress, options: as ``capture`` takes
            them.
        add_special_tokens: the tokenizer's policy. It is a part of the fingerprint.
        mask: of a window's ids: which rows to store, a bool each (position i's row predicts token i + 1).
        teacher: a fingerprint to take instead of the weights'. The tokenizer's is added to it.

    Raises:
        TypeError: documents that are one text, or of no kind that is known.
        ValueError: no tokenizer for texts, bad sizes, ids or windows beyond the model's, a model that is not causal, or
            one whose hidden states do not give its logits.
        CacheMismatchError: ``path`` holds the cache of another teacher, tokenizer or options.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    corpus = cut(
        tokenizer,
        documents,
        max_length,
        stride=stride,
        bos=bos,
        add_special_tokens=add_special_tokens,
        field=field,
        progress=progress,
    )
    check_fits(model, corpus)
    size = width = vocabulary_of(model)
    if vocab_size is not None:
        options, size = _narrowed(options, vocab_size, width), vocab_size
    if codec == "auto":
        chosen = codecs.choose(size, temperatures, divergence, prototypes=True, student_kl=student_kl)
        codec, options = chosen.name, {**chosen.options, **options}
    runs, outputs = _Causal(model), None
    wanted = codecs.find(codec)
    if wanted.input_name == codecs.HIDDEN_STATES:
        layer = output_layer(model)
        options = wanted.for_head(options, layer)
        runs, outputs = _Causal(model.base_model), _last_hidden
        if vocab_size is not None and vocab_size != layer.vocab_size:
            raise ValueError(f"codec 'hidden' stores no logits: its vocab_size is {layer.vocab_size}, got {vocab_size}")
        if corpus:
            _check_agreement(model, layer, corpus[0])
    if causal:
        check_causal(model, corpus, _Causal(model))
    with evaluating(model):
        return capture(
            runs,
            _Batches(corpus, batch_size, device_of(model)),
            path,
            vocab_size=size,
            codec=codec,
            temperatures=temperatures,
            student_kl=student_kl,
            teacher=with_tokenizer(fingerprint(model) if teacher is None else teacher, tokenizer, add_special_tokens),
            outputs=outputs,
            targets=lambda batch: [next_tokens(ids) for ids in _padded(batch)],
            mask=None if mask is None else lambda batch: _masks(batch, mask),
            epochs=epochs,
            reuse=reuse,
            on_bad=on_bad,
            progress=progress,
            **options,
        )


def windows(
    tokenizer: Any,
    documents: Iterable[Document],
    max_length: int,
    *,
    stride: int | None = None,
    bos: bool = False,
    add_special_tokens: bool = True,
    field: str | None = None,
) -> list[Tensor]:
    """The ids of each window of each document, (length,) int32: the keys of the records that ``capture_lm`` writes.

    Args:
        tokenizer, documents, max_length, stride, bos, add_special_tokens, field: as ``capture_lm`` takes them.

    Raises:
        TypeError: ``documents`` is one text, or one of them is of no kind that is known.
        ValueError: sizes that do not fit, there is no tokenizer for a text, or a row has no document.
    """
    options: dict[str, Any] = {"stride": stride, "bos": bos, "add_special_tokens": add_special_tokens, "field": field}
    return list(cut(tokenizer, documents, max_length, **options))


def next_tokens(ids: Tensor) -> Tensor:
    """(length,) int64 targets of a window's rows: the ids shifted by one, and -100 (none) at the end."""
    return torch.cat([ids[1:].long(), torch.tensor([NO_TARGET], device=ids.device)])


def _narrowed(options: dict[str, Any], vocab_size: int, width: int) -> dict[str, Any]:
    """``options`` for a writer that stores the first ``vocab_size`` of ``width`` columns."""
    if vocab_size > width:
        raise ValueError(f"vocab_size must be at most the model's {width}, got {vocab_size}")
    return {**options, "teacher_vocab_size": width} if vocab_size < width else options


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
    length, found = batch["input_ids"].shape[1], []
    for ids, real in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        row = torch.as_tensor(mask(ids[real]))
        if row.shape != ids[real].shape:
            raise ValueError(f"mask must give one bool per id of a window, {int(real.sum())}, got {tuple(row.shape)}")
        found.append(nn.functional.pad(row, (0, length - len(row))))
    return found


class _Causal:
    """Calls a model without the key-value cache, which only generation needs."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._more = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}

    def __call__(self, **batch: Tensor) -> Any:
        return self._model(**batch, **self._more)


class _Batches:
    """Batches of consecutive windows, right-padded with id 0, which the attention mask hides."""

    def __init__(self, corpus: Corpus | list[Tensor], batch_size: int, device: torch.device | None) -> None:
        self._corpus, self._size, self._device = corpus, batch_size, device

    def __len__(self) -> int:
        return -(-len(self._corpus) // self._size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self._corpus), self._size):
            rows = list(self._corpus[start : start + self._size])
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).long()
            real = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).long()
            yield {"input_ids": ids.to(self._device), "attention_mask": real.to(self._device)}
