"""``ray_capture``: running a teacher over a Ray dataset, on several workers of a cluster."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from kdfast.cache import codecs
from kdfast.cache.capture.ranks import Ranks
from kdfast.cache.capture.report import CaptureReport
from kdfast.cache.errors import CacheError
from kdfast.cache.format.storage import open_storage

if TYPE_CHECKING:
    from ray.data import Dataset

__all__ = ["ray_capture"]

OURS = ("progress", "writer")  # of capture's options


def ray_capture(
    make_teacher: Callable[[], Any],
    dataset: Dataset,
    path: str | os.PathLike[str],
    *,
    workers: int,
    batch_size: int,
    vocab_size: int,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    **options: Any,
) -> CaptureReport:
    """``capture`` of a ``ray.data.Dataset`` by several Ray actors, each with a teacher and a writer of its own.

    ::

        texts = ray.data.read_parquet("s3://corpus/windows")  # columns input_ids and attention_mask
        ray_capture(lambda: load_teacher().cuda(), texts, "s3://labels/corpus", workers=64, num_gpus=1, batch_size=8,
                    vocab_size=151936)

    Columns of numbers reach ``inputs``, ``key`` and the other functions of a batch as tensors, the others as lists.

    Started again, with any number of workers, it seals the shards that earlier ones have left and skips the batches
    that are stored. When a worker fails or dies the others seal what they have, and nothing of that is done again.

    What a second capture has in common with a first: the same records under the same keys, and, where the dataset comes
    in the same blocks, the same labels to the bit, a row's entries perhaps in another order. For no batch spans two
    blocks, which also means that blocks of few rows make small batches: ``dataset.repartition`` gives others. Which
    worker stores a record, and when, is only the same if the dataset's ``execution_options.preserve_order`` is set. A
    table of prototypes is learned of the records that come first, and is another one if these are.

    Args:
        make_teacher: called once in each worker; returns an ``nn.Module`` or any callable.
        dataset: of one row per record. Its first rows are read once more if prototypes are learned.
        path: the cache: a URL that fsspec knows, or a folder that all nodes see. Of a worker that died, the shard that
            it was writing to a URL is found again only by a worker on that node.
        workers: how many. The dataset is read on what they leave of the cluster's CPUs.
        batch_size: records that a teacher sees at once, at most.
        vocab_size: columns of the logits.
        num_cpus, num_gpus: of each worker, as Ray's actors take them.
        options: ``capture``'s, but ``writer`` and ``progress``; Ray has a bar of its own.

    Returns:
        The sum of the workers' reports. Batches that prototypes were learned of are run, and skipped later on.

    Raises:
        CacheError: Ray Data is not installed.
        TypeError, ValueError: an argument of the wrong kind or value.
        ray.exceptions.RayTaskError: a worker has failed. It is also of the type of what the teacher, the dataset or
            ``capture`` has raised there.
        ray.exceptions.RayActorError: a worker has died.
    """
    ray, worker = _ray()
    _check(ray, make_teacher, dataset, workers, batch_size, options)
    _check_room(ray, dataset, workers * num_cpus)
    where = _everywhere(path)
    options["vocab_size"] = vocab_size
    actor = ray.remote(worker).options(num_cpus=num_cpus, num_gpus=num_gpus, max_concurrency=2)
    actors = [actor.remote(make_teacher, where, Ranks(i, workers), batch_size, options) for i in range(workers)]
    parts = dataset.streaming_split(workers)
    try:
        ray.get([one.prepare.remote() for one in actors])
        reports = []
        if _learns_first(where, **options):
            reports.append(ray.get(actors[0].learn.remote(dataset.iterator())))
        reports += _run(ray, actors, parts)
    finally:
        for one in actors:
            ray.kill(one)
    return CaptureReport.total(reports)


def _run(ray: Any, actors: list[Any], parts: list[Any]) -> list[CaptureReport]:
    """Run all workers at once. If one fails, the others seal their records; then its error is raised."""
    running = {one.run.remote(part): one for one, part in zip(actors, parts, strict=True)}
    left = list(running)
    try:
        while left:
            (done,), left = ray.wait(left)
            ray.get(done)
    except BaseException:
        for one in left:
            running[one].stop.remote()
        if left:
            ray.wait(left, num_returns=len(left))
        raise
    return ray.get(list(running))


def _learns_first(
    path: str,
    *,
    vocab_size: int,
    codec: str = "auto",
    temperatures: Any = (1.0,),
    divergence: Any = None,
    student_kl: Any = None,
    **others: Any,
) -> bool:
    """Whether this capture's codec first learns from its first rows, as what it needs is neither given nor stored."""
    if codec == "auto":
        codec = codecs.choose(vocab_size, temperatures, divergence, prototypes=True, student_kl=student_kl).name
    return codecs.find(codec).learns_first(codecs.current_options(codec, others), open_storage(path))


def _everywhere(path: str | os.PathLike[str]) -> str:
    """``path`` as workers, which have another working directory, understand it."""
    return open_storage(path).url  # which is absolute


def _check(ray: Any, make_teacher: Any, dataset: Any, workers: int, batch_size: int, options: dict[str, Any]) -> None:
    if isinstance(make_teacher, nn.Module) or not callable(make_teacher):
        got = type(make_teacher).__name__
        raise TypeError(f"make_teacher must be a function that each worker makes its teacher with, got a {got}")
    if not isinstance(dataset, ray.data.Dataset):
        raise TypeError(f"dataset must be a ray.data.Dataset, got a {type(dataset).__name__}")
    for name, value in (("workers", workers), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r}")
    for name in OURS:
        if name in options:
            raise ValueError(f"ray_capture gives each worker its {name}, got {options[name]!r}")


def _check_room(ray: Any, dataset: Any, taken: float) -> None:
    """Warn if no CPU is left to read the dataset on: Ray would wait silently, until the cluster grows."""
    there = ray.cluster_resources().get("CPU", 0.0)
    if taken > there - 1 and not isinstance(dataset, ray.data.dataset.MaterializedDataset):
        warnings.warn(
            f"the workers take {taken:g} of the cluster's {there:g} CPUs: the dataset needs one", stacklevel=3
        )


def _ray() -> tuple[Any, Any]:
    try:
        import ray

        from kdfast.cache.capture.ray_worker import Worker
    except ImportError as error:
        raise CacheError('capturing a Ray dataset needs Ray Data: pip install "kdfast[ray]"') from error
    return ray, Worker
