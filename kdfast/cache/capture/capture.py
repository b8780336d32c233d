"""``capture``: running a teacher over a loader once, and storing its labels."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from kdfast._progress import Progress
from kdfast.cache import codecs
from kdfast.cache.capture.batches import Fields, Mark, Part, bad_row
from kdfast.cache.capture.fingerprint import fingerprint
from kdfast.cache.capture.report import CaptureReport, Repeats
from kdfast.cache.capture.stream import Stream
from kdfast.cache.codecs.base import PREPARE_ROWS
from kdfast.cache.errors import CacheError
from kdfast.cache.format.keys import describe, replica_key
from kdfast.cache.format.meta import RANGE
from kdfast.cache.format.storage import Storage, open_storage
from kdfast.cache.write.writer import Writer
from kdfast.divergences import Divergence
from kdfast.models import evaluating

__all__ = ["CaptureReport", "capture"]

ON_BAD_HINT = 'on_bad="skip" leaves such records out and counts them'


def capture(
    model: Callable[..., Any],
    loader: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    vocab_size: int,
    codec: str = "auto",
    temperatures: Sequence[float] = (1.0,),
    divergence: str | Divergence | None = None,
    student_kl: float | str | None = None,
    teacher: str | None = None,
    inputs: Callable[[Any], Any] | None = None,
    outputs: Callable[[Any, Any], Any] | None = None,
    key: Callable[[Any], Sequence[Any]] | None = None,
    targets: Callable[[Any], Any] | None = None,
    mask: str | Callable[[Any], Any] | None = None,
    views: Callable[[Any], Any] | None = None,
    epochs: int = 1,
    reuse: str = "refine",
    on_bad: str = "raise",
    progress: bool = True,
    **options: Any,
) -> CaptureReport:
    """Run the teacher over ``loader`` and write its labels to the cache at ``path``, or resume doing so.

    A batch whose records are all in the cache is skipped without a teacher pass. One of which some are there is run
    whole, for the shape of a batch is part of the numbers, and only the missing records are added. So with the same
    batches in the same order a capture that was stopped and resumed leaves the files of one that was not, bit for bit.
    The teacher runs in evaluation mode without gradients, and gets its modules' training flags back, also on an error.

    The loader is iterated over once, so that it may be a stream: whatever is read of it is stored.

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
        loader: batches, in an order that is the same each time a capture is begun or resumed.
        path: the cache's directory.
        vocab_size: columns of the logits.
        codec: a codec's name, or "auto": see ``codecs.choose``.
        temperatures: those that the student will be trained at.
        divergence: the student's, for "auto".
        student_kl: how far from its teacher the student is, for "auto": KL(teacher || student) in nats, or "far".
            Labels of prototypes train a far student best and pull a near one away, so that "auto" takes them for 1 nat
            and more alone, and unbiased draws where nothing is said.
        teacher: the teacher's fingerprint. By default that of the module's weights; a callable needs one.
        inputs: of a batch: the model's argument, tuple of arguments, or mapping of keywords. By default a mapping's
            fields but ``key`` and ``labels``, a tuple's first item, or the batch, on the model's device. It depends on
            the batch alone, for keys may be made of it, too.
        outputs: of the model's output and the batch: (records, vocab) logits, (records, rows, vocab), or a list of
            (rows, vocab). By default the output or its ``logits``. For the ``hidden`` codec: the hidden states.
        key: of a batch: a key per record. By default the field ``key``, or what the model is given of the record:
            ``record_keys`` says how. For text alone it is the row of ``input_ids`` without padding.
        targets: of a batch: per record the ids that its rows predict, negative where there is none.
        mask: of a batch: per record a bool, or 0 or 1, per row; only True rows are stored. Rows at which a field
            ``attention_mask`` is 0 never are. An encoder-decoder's rows are its decoder's: there it is
            ``decoder_attention_mask``, or where the labels are not -100. A text names the one field that is looked at
            instead, for a model whose ``attention_mask`` goes with something else than its rows.
        views: of a batch: per record its ``View``, or one per row.
        epochs: how many epochs the labels will serve.
        reuse: "refine" or "replicas".
        on_bad: what to do with a record that has a row with NaN or +inf, or with no finite value: "raise" ends the
            capture, "skip" leaves the record out and counts it as ``bad`` in the report. It is then not in the cache.
        progress: show how far it is on standard error: a bar on a terminal, elsewhere a line a minute.
        options: the codec's and the writer's: ``k``, ``draws``, ``writer``, ``keys``, ``shard_bytes``, ... For
            ``prototype``, ``prototypes`` is a table or how many to learn (256). It learns from the first 65,536 rows,
            and holds their batches in memory meanwhile, or from as many as 2 GiB of batches have.

    A teacher's answer is one tensor per row: several hidden layers of each token, as speculative decoding with EAGLE-3
    takes them, make as many caches, each with its ``outputs``.

    Returns:
        How many batches were run and records added; which records were known, and whether some came again with other
        targets or logits, of which the first is also warned of by name: their keys do not tell them apart.

    Raises:
        ValueError: no fingerprint for a callable, no key, parts of a batch that do not fit one another, or a row that
            cannot be stored. The message names record and row.
        CacheMismatchError: ``path`` holds another teacher's cache, one with other options, or one in which records have
            other rows, because ``mask`` was another.
        OSError: a shard cannot be written.
    """
    if epochs < 1 or reuse not in ("refine", "replicas"):
        raise ValueError(f'epochs must be positive and reuse "refine" or "replicas", got {epochs} and {reuse!r}')
    _check_on_bad(on_bad, options.get("keys"))
    fields = Fields(inputs=inputs, outputs=outputs, key=key, targets=targets, mask=mask, views=views)
    stream = loader if isinstance(loader, Stream) else Stream(loader)
    files = open_storage(path)
    options = codecs.current_options(codec, options)
    if codec == "auto":
        prototypes = "prototypes" in options or not isinstance(loader, Iterator)
        choose = partial(codecs.choose, vocab_size, temperatures, divergence, prototypes=prototypes)
        chosen = choose(student_kl=student_kl)
        _check_choice(chosen, choose(student_kl="far"), options)
        codec, options = chosen.name, {**chosen.options, **options}
    else:
        codecs.is_far(student_kl)  # raises for what is neither a number nor "far"
    wanted = codecs.find(codec)
    learns = progress and wanted.learns_first(options, files)
    with evaluating(model), Progress("learn", unit="batches", shown=learns) as bar:
        source = _Source(model, stream, fields, files, vocab_size, temperatures, on_bad, bar)
        options = wanted.prepare(options, source)
    replicas = epochs if reuse == "replicas" and wanted.drawn else 1
    if reuse == "refine" and epochs > 1:
        options = wanted.refined(options, epochs)
    teacher = _teacher_of(model, teacher)
    writer = Writer(path, vocab_size=vocab_size, codec=codec, temperatures=temperatures, teacher=teacher, **options)
    bar = Progress("capture", total=_length(loader), unit="batches", shown=progress)
    with writer, evaluating(model), bar:
        run = _Run(model, fields, writer, Repeats(files), replicas, on_bad)
        start = time.monotonic()
        for batch in stream:
            run.store(batch)
            bar.advance(note=f"{writer.rows / max(time.monotonic() - start, 1e-9):,.0f} rows/s")
    return run.report()


class _Run:
    """A capture under way: stores batch after batch, and counts what comes of it."""

    def __init__(
        self,
        model: Callable[..., Any],
        fields: Fields,
        writer: Writer,
        repeats: Repeats,
        replicas: int,
        on_bad: str,
    ) -> None:
        self._model, self._fields, self._writer = model, fields, writer
        self._repeats, self._replicas, self._on_bad = repeats, replicas, on_bad
        self._ran = self._skipped = self._bad = 0

    def store(self, batch: Any) -> None:
        """Run the teacher on a batch, unless all its records are known, and add those that are not."""
        keys = self._fields.keys(batch, self._model)
        known = [all(name in self._writer for name in _names(key, self._replicas)) for key in keys]
        if all(known) and not self._repeats.is_unsure(keys):
            self._repeats.count(keys, known, self._fields.marks(batch, keys))
            self._skipped += 1
            return
        pairs = zip(self._fields.parts(self._model, batch, keys), known, strict=True)
        stored = [(part, had) for part, had in pairs if self._add(part)]
        self._repeats.count(
            [part.key for part, _ in stored],
            [had for _, had in stored],
            [[Mark(part.targets, len(part.logits))] for part, _ in stored],
            [part.logits for part, _ in stored],
        )
        self._skipped += all(known)
        self._ran += not all(known)

    def _add(self, part: Part) -> bool:
        """Add what lacks of a record. False if it has a bad row, and such are left out."""
        try:
            for name in _names(part.key, self._replicas):
                if name not in self._writer:
                    self._writer.add(name, part.logits, targets=part.targets, views=part.views)
        except ValueError as error:
            if isinstance(error, CacheError) or not bad_row(part.logits[:, : self._writer.codec.input_width]):
                raise
            if self._on_bad == "raise":
                raise ValueError(f"{error}; {ON_BAD_HINT}") from error
            self._bad += 1
            return False
        return True

    def report(self) -> CaptureReport:
        counts, writer = self._repeats, self._writer
        return CaptureReport(
            self._ran,
            self._skipped,
            writer.records,
            writer.rows,
            known=counts.known,
            duplicates=counts.duplicates,
            conflicts=counts.conflicts,
            bad=self._bad,
            measured=writer.measured,
            temperature=writer.codec.temperatures[0],
            noise=writer.codec.noise,
        )


@dataclass(frozen=True)
class _Source:
    """A capture as its codec sees it before it begins; see ``codecs.base.CaptureSource``."""

    model: Callable[..., Any]
    stream: Stream
    fields: Fields
    files: Storage
    vocab_size: int
    temperatures: Sequence[float]
    on_bad: str
    bar: Progress

    def first_rows(self) -> Iterator[Tensor]:
        rows = 0
        for batch in self.stream.first():
            for part in self.fields.parts(self.model, batch, self.fields.keys(batch, self.model)):
                problem = bad_row(part.logits[:, : self.vocab_size])
                if problem and self.on_bad == "raise":
                    raise ValueError(f"{describe(part.key)}: {problem}; {ON_BAD_HINT}")
                if problem:
                    continue
                logits = part.logits[: PREPARE_ROWS - rows, : self.vocab_size]
                rows += len(logits)
                yield logits
            self.bar.advance()
            if rows >= PREPARE_ROWS:
                return


def _length(loader: Any) -> int | None:
    """The number of batches; None if the loader does not know, though it may have a method that says so."""
    try:
        return len(loader)
    except TypeError:
        return None


def _check_on_bad(on_bad: str, keys: Any) -> None:
    if on_bad not in ("raise", "skip"):
        raise ValueError(f'on_bad must be "raise" or "skip", got {on_bad!r}')
    if on_bad == "skip" and keys == RANGE:
        raise ValueError('on_bad="skip" leaves records out, and keys="range" are consecutive: give keys="hash"')


def _check_choice(chosen: codecs.Choice, for_far: codecs.Choice, options: dict[str, Any]) -> None:
    """Raise ``ValueError`` where "auto" comes to a codec that lacks what only the caller has, or options of another."""
    found = f'codec="auto" comes to {chosen.name!r}'
    far = f'student_kl="far" (1 nat and more) comes to {for_far.name!r}, which holds back a student near its teacher'
    if codecs.find(chosen.name).input_name == codecs.HIDDEN_STATES and "head" not in options:
        other = "" if for_far == chosen else f". {far}"
        raise ValueError(
            f"{found}, for this loss needs whole rows: capture_lm stores these by itself; here give codec='hidden' "
            f"with width=, head= and outputs= that are hidden states{other}"
        )
    if isinstance(options.get("prototypes"), int) and chosen.name != "prototype":
        raise ValueError(f'{found}, which learns no prototypes: give codec="prototype", or none. {far}')


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
