"""``capture``: running a teacher over a loader once, and storing its labels."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from kdfast.cache import codecs
from kdfast.cache.capture.batches import Fields
from kdfast.cache.capture.fingerprint import fingerprint
from kdfast.cache.codecs.base import PREPARE_ROWS
from kdfast.cache.format.keys import replica_key
from kdfast.cache.format.storage import Storage, open_storage
from kdfast.cache.write.writer import Writer
from kdfast.divergences import Divergence
from kdfast.models import evaluating

__all__ = ["CaptureReport", "capture"]


class CaptureReport(NamedTuple):
    """What one call of ``capture`` did."""

    batches: int  # run through the teacher
    skipped: int  # batches whose records were all there
    records: int  # added
    rows: int  # added


def capture(
    model: Callable[..., Any],
    loader: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    vocab_size: int,
    codec: str = "auto",
    temperatures: Sequence[float] = (1.0,),
    divergence: str | Divergence | None = None,
    teacher: str | None = None,
    inputs: Callable[[Any], Any] | None = None,
    outputs: Callable[[Any, Any], Any] | None = None,
    key: Callable[[Any], Sequence[Any]] | None = None,
    targets: Callable[[Any], Any] | None = None,
    mask: str | Callable[[Any], Any] | None = None,
    views: Callable[[Any], Any] | None = None,
    epochs: int = 1,
    reuse: str = "refine",
    progress: bool = True,
    **options: Any,
) -> CaptureReport:
    """Run the teacher over ``loader`` and write its labels to the cache at ``path``, or resume doing so.

    A batch whose records are all in the cache is skipped without a teacher pass. One of which some are there is run
    whole, for the shape of a batch is part of the numbers, and only the missing records are added. So with the same
    batches in the same order a capture that was stopped and resumed leaves the files of one that was not, bit for bit.
    The teacher runs in evaluation mode without gradients, and gets its modules' training flags back, also on an error.

    Images, with augmentations that the student's loader can repeat::

        def views(batch):  # one View per sample
            return [View(crop=crop, flip=flip, seed=seed) for crop, flip, seed in batch["augmentation"]]

        capture(teacher, loader, path, vocab_size=1000, key=lambda batch: batch["name"], views=views,
                inputs=lambda batch: batch["image"].cuda(), targets=lambda batch: batch["label"])

    With ``mask`` a record holds the supervised rows alone, in order, and nothing of the others: whoever reads it
    applies the same mask to the student's rows. The checksum of the ``targets`` of these rows tells if it is another.

    A stored draw's noise does not average out over the epochs that use it. For codecs that draw (``sample``,
    ``threshold``) E ``epochs`` are provided for in one of two ways; for others E changes nothing.

    * ``reuse="refine"``: one record of E times the draws, or a threshold E times lower. Its variance is at most that
      of the mean of E redraws, and it has at most E times the entries, mostly far fewer, for likely tokens repeat.
    * ``reuse="replicas"``: E independent records, ``replica_key(key, epoch)`` for epoch 0 ... E - 1 (epoch 0's is
      the key itself). Each step's labels are as noisy as before and as short.

    Args:
        model: an ``nn.Module`` or any callable.
        loader: batches, in an order that is the same each time.
        path: the cache's directory.
        vocab_size: columns of the logits.
        codec: a codec's name, or "auto": see ``codecs.choose``.
        temperatures: those that the student will be trained at.
        divergence: the student's, for "auto".
        teacher: the teacher's fingerprint. By default that of the module's weights; a callable needs one.
        inputs: of a batch: the model's argument, tuple of arguments, or mapping of keywords. By default a mapping's
            fields but ``key`` and ``labels``, a tuple's first item, or the batch, on the model's device.
        outputs: of the model's output and the batch: (records, vocab) logits, (records, rows, vocab), or a list of
            (rows, vocab). By default the output or its ``logits``. For the ``hidden`` codec: the hidden states.
        key: of a batch: a key per record. By default the field ``key``, or each row of ``input_ids`` without padding.
        targets: of a batch: per record the ids that its rows predict, negative where there is none.
        mask: of a batch: per record a bool per row; only True rows are stored. Rows at which a field
            ``attention_mask`` is 0 never are. An encoder-decoder's rows are its decoder's: there it is
            ``decoder_attention_mask``, or where the labels are not -100. A text names the one field that is looked at
            instead, for a model whose ``attention_mask`` goes with something else than its rows.
        views: of a batch: per record its ``View``, or one per row.
        epochs: how many epochs the labels will serve.
        reuse: "refine" or "replicas".
        progress: show a bar with rows per second and the time left.
        options: the codec's and the writer's: ``k``, ``draws``, ``writer``, ``keys``, ``shard_bytes``, ... For
            ``prototype``, ``prototypes`` is a table or how many to learn from the first rows (256): the loader is
            then iterated more than once.

    Raises:
        ValueError: no fingerprint for a callable, no key, or parts of a batch that do not fit one another.
        CacheMismatchError: ``path`` holds another teacher's cache, or one with other options.
        OSError: a shard cannot be written.
    """
    if epochs < 1 or reuse not in ("refine", "replicas"):
        raise ValueError(f'epochs must be positive and reuse "refine" or "replicas", got {epochs} and {reuse!r}')
    fields = Fields(inputs=inputs, outputs=outputs, key=key, targets=targets, mask=mask, views=views)
    source = _Source(model, loader, fields, open_storage(path), vocab_size, temperatures)
    options = codecs.current_options(codec, options)
    if codec == "auto":
        prototypes = "prototypes" in options or source.repeatable
        codec, chosen, _ = codecs.choose(vocab_size, temperatures, divergence, prototypes=prototypes)
        options = {**chosen, **options}
    wanted = codecs.find(codec)
    with evaluating(model):
        options = wanted.prepare(options, source)
    replicas = epochs if reuse == "replicas" and wanted.drawn else 1
    if reuse == "refine" and epochs > 1:
        options = wanted.refined(options, epochs)
    teacher = _teacher_of(model, teacher)
    writer = Writer(path, vocab_size=vocab_size, codec=codec, temperatures=temperatures, teacher=teacher, **options)
    with writer, evaluating(model), _bar(loader, progress) as advance:
        ran = skipped = 0
        for batch in loader:
            keys = fields.keys(batch)
            if any(name not in writer for key in keys for name in _names(key, replicas)):
                for part in fields.parts(model, batch, keys):
                    for name in _names(part.key, replicas):  # the writer keeps what it has
                        writer.add(name, part.logits, targets=part.targets, views=part.views)
                ran += 1
            else:
                skipped += 1
            advance(writer.rows)
    return CaptureReport(ran, skipped, writer.records, writer.rows)


@dataclass(frozen=True)
class _Source:
    """A capture as its codec sees it before it begins; see ``codecs.base.CaptureSource``."""

    model: Callable[..., Any]
    loader: Iterable[Any]
    fields: Fields
    files: Storage
    vocab_size: int
    temperatures: Sequence[float]

    @property
    def repeatable(self) -> bool:
        return not isinstance(self.loader, Iterator)

    def first_rows(self) -> Iterator[Tensor]:
        rows = 0
        for batch in self.loader:
            for part in self.fields.parts(self.model, batch, self.fields.keys(batch)):
                logits = part.logits.reshape(-1, part.logits.shape[-1])[: PREPARE_ROWS - rows, : self.vocab_size]
                rows += len(logits)
                yield logits
            if rows >= PREPARE_ROWS:
                return


def _names(key: Any, replicas: int) -> list[Any]:
    """The keys of a record's replicas. The first is ``key`` itself, which a writer may turn into a number."""
    return [key, *(replica_key(key, replica) for replica in range(1, replicas))]


def _teacher_of(model: Any, teacher: str | None) -> str:
    if teacher is not None:
        return teacher
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"a teacher that is a {type(model).__name__} and no nn.Module needs teacher=..., a text that changes with "
            "whatever changes its answers"
        )
    return fingerprint(model)


@contextmanager
def _bar(loader: Iterable[Any], shown: bool) -> Iterator[Callable[[int], None]]:
    """A context with a progress bar over batches. It gives a function to call after each, with the rows so far."""
    if not shown:
        yield lambda rows: None
        return
    from tqdm import tqdm

    start = time.monotonic()
    layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} batches [{elapsed}<{remaining}{postfix}]"
    with tqdm(total=len(loader) if isinstance(loader, Sized) else None, desc="capture", bar_format=layout) as bar:

        def advance(rows: int) -> None:
            bar.set_postfix_str(f"{rows / max(time.monotonic() - start, 1e-9):,.0f} tokens/s", refresh=False)
            bar.update()

        yield advance
