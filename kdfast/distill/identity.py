"""Which run a checkpoint is of: a description of all that a run was asked for, and what may differ when it resumes."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader

from kdfast._description import MOVES, Description, differences
from kdfast.distill import parallel
from kdfast.distill.arguments import FitOptions
from kdfast.distill.fields import Fields
from kdfast.distill.state import TrainState
from kdfast.distill.step import Objective
from kdfast.distill.teachers import Teachers

__all__ = ["Identity", "SupportsIdentity", "check_same_run", "refusal", "tell"]

SPEED_ONLY = ("foreach", "fused", "capturable", "differentiable")  # options of optimizers
SHOWN = 8  # differences in a message
EPOCHS, SEED, PROCESSES = "epochs", "torch.initial_seed()", "processes"  # which may differ, and is told


class SupportsIdentity(Protocol):
    """The part of ``Distiller`` that says which run it is."""

    student: nn.Module
    objective: Objective
    teachers: Teachers
    fields: Fields
    optimizer: Any
    schedule: Any
    amp: torch.dtype | None
    accumulate: int
    clip_norm: float | None
    frozen_norms: list[nn.Module]


class Identity:
    """Describes a run that is about to begin: texts by name, such as ``objective.temperature``.

    They say what the result depends on, without the initial weights, which a checkpoint replaces, and without what only
    changes where or how fast a run goes, what it logs, and for how many epochs.

    Args:
        distiller: a ``Distiller``.
        loader, eval_loader, options: as ``Distiller.fit`` takes them.
    """

    def __init__(
        self, distiller: SupportsIdentity, loader: Iterable[Any], eval_loader: Iterable[Any] | None, options: FitOptions
    ) -> None:
        self._distiller, self._loaders = distiller, {"loader": loader, "eval_loader": eval_loader}
        self._before = self._of_parts(values=False)
        found = self._all = self._of_parts(values=True)
        _add_modes(found, parallel.unwrap(distiller.student), distiller.frozen_norms)
        _add_optimizer(found, distiller)
        for field in fields(distiller.fields):
            found.add(field.name, getattr(distiller.fields, field.name))
        for name in ("schedule", "amp", "accumulate", "clip_norm"):
            found.add(name, getattr(distiller, name))
        for name in ("eval_every", "patience", "monitor"):
            found.add(name, getattr(options, name))
        found.add("metrics", _metrics(options.metrics))
        about = {EPOCHS: options.epochs, SEED: torch.initial_seed(), PROCESSES: parallel.world_size()}
        self._about = {name: str(value) for name, value in about.items()}
        for description in (self._before, found):
            description.let_go()

    def keep_moving(self, then: Mapping[str, str]) -> None:
        """Take over from a checkpoint what is known to change while the run goes on."""
        self._all.entries |= {path: text for path, text in then.items() if text == MOVES}

    def texts(self) -> dict[str, str]:
        """The description. What has changed since the run began, such as a counter, is marked: it is no option."""
        self._all.mark_moving(self._before, self._of_parts(values=False))
        return {**self._all.folded(), **self._about}

    def _of_parts(self, *, values: bool) -> Description:
        """The models, the objective and the data."""
        d = self._distiller
        student = parallel.unwrap(d.student)
        found = Description(restored=[student, d.objective], values=values)
        found.add_module("student", student)
        found.add("objective", d.objective)
        for number, teacher in enumerate(d.teachers.members):
            name = f"teacher[{number}]" if d.teachers.several else "teacher"
            found.add(name, parallel.unwrap(teacher) if isinstance(teacher, nn.Module) else teacher)
        for path, loader in self._loaders.items():
            _add_loader(found, path, loader)
        return found


def check_same_run(path: Path, then: Mapping[str, str], now: Mapping[str, str], state: TrainState, epochs: int) -> None:
    """Check that a checkpoint is of the run that is asked for, and tell what differs and may.

    The seed may differ, for a run goes on with the random state of the checkpoint. Another number of processes may go
    on between epochs.

    Args:
        path: the checkpoint's file.
        then: its description.
        now: this run's.
        state: how far the checkpoint is.
        epochs: the number of epochs that this run was asked for.

    Raises:
        ValueError: it is of another run, with all that differs; or it is beyond ``epochs``.
    """
    if state.epoch + (state.updates > 0) > epochs:
        raise ValueError(
            f"{path} is in epoch {state.epoch + (state.updates > 0)}, and epochs={epochs} are asked for: they are in "
            "all, those before a run was resumed included. resume=False, or another folder, starts over"
        )
    changed = differences(then, now)
    told = {EPOCHS, SEED, *(() if state.updates else (PROCESSES,))}
    refused = {name: texts for name, texts in changed.items() if name not in told}
    if refused:
        raise ValueError(refusal(path, refused))
    for name in sorted(told & set(changed)):
        tell(f"{path} is of a run with {name}={changed[name][0]}; this one has {changed[name][1]}")


def refusal(path: Path, changed: Mapping[str, tuple[str, str]]) -> str:
    """Say that ``path`` is of another run, what differs, and what to do."""
    parts = list(dict.fromkeys(name.split(".")[0].split("[")[0] for name in changed))
    names = list(changed)[:SHOWN]
    more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    then = ", ".join(f"{name}={changed[name][0]}" for name in names)
    now = changed[names[0]][1] if len(changed) == 1 else ", ".join(f"{name}={changed[name][1]}" for name in names)
    return (
        f"{path} is of another {', '.join(parts)}: it is a run with {then}{more}; this one has {now}{more}. "
        "resume=False, or another folder, starts over"
    )


def tell(text: str) -> None:
    """Print a line on standard error, once for all processes."""
    if parallel.is_first():
        print(text, file=sys.stderr, flush=True)


def _metrics(metrics: Any) -> Any:
    """Metrics by name; of objects that measure the class alone, for they hold what they have measured."""
    if isinstance(metrics, Mapping):
        return {name: type(metric) for name, metric in metrics.items()}
    function = isinstance(metrics, (types.FunctionType, types.MethodType))
    return getattr(metrics, "__func__", metrics) if function or not callable(metrics) else type(metrics)


def _add_modes(found: Description, student: nn.Module, frozen_norms: Sequence[nn.Module]) -> None:
    """The parts of a student that are in evaluation mode while it is trained."""
    trained = {module: module.training or not student.training for module in student.modules()}
    trained |= dict.fromkeys(frozen_norms, False)
    still = [name or "student" for name, module in student.named_modules() if not trained[module]]
    found.add("student.in evaluation mode", still)


def _add_optimizer(found: Description, distiller: SupportsIdentity) -> None:
    optimizer = distiller.optimizer
    found.entries["optimizer"] = type(optimizer).__qualname__
    names = {id(x): name for name, x in parallel.unwrap(distiller.student).named_parameters()}
    if isinstance(distiller.objective, nn.Module):
        names |= {id(x): f"objective's {name}" for name, x in distiller.objective.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        place = "optimizer" if len(optimizer.param_groups) == 1 else f"optimizer.group {number}"
        for name in sorted(set(group) & set(optimizer.defaults) - set(SPEED_ONLY)):
            found.add(f"{place}.{name}", group[name])
        held = [names.get(id(x), "another") for x in group["params"] if x.requires_grad]
        found.add(f"{place}.parameters", held)


def _add_loader(found: Description, path: str, loader: Any) -> None:
    if not isinstance(loader, DataLoader):
        found.add(path, loader, data=True)
        if hasattr(loader, "__len__") and not hasattr(loader, "state_dict"):
            found.add(f"{path}.batches", len(loader))
        return
    found.entries[path] = "DataLoader"
    batches, samples = loader.batch_sampler, loader.sampler
    whole = isinstance(batches, torch.utils.data.BatchSampler)
    for name in ("batch_size", "drop_last"):
        found.add(f"{path}.{name}", getattr(batches if batches is not None else loader, name, None))
    _add_sampler(found, f"{path}.sampler", samples if whole or batches is None else batches)
    found.add(f"{path}.generator", loader.generator)
    found.add(f"{path}.collate_fn", loader.collate_fn, data=True)
    found.add(f"{path}.dataset", loader.dataset, data=True)
    if hasattr(loader.dataset, "__len__"):
        found.add(f"{path}.samples", len(loader.dataset))


def _add_sampler(found: Description, path: str, sampler: Any) -> None:
    """Describe a sampler: its class and options, without its place in the epoch and this process's part of it."""
    found.entries[path] = type(sampler).__qualname__
    place = {"epoch", "samples_consumed", "exhausted", "rank", "num_replicas", "world_size", "data_source", "dataset"}
    place |= {"num_samples", "total_size"} if hasattr(sampler, "num_replicas") else set()
    for name, value in sorted(vars(sampler).items()):
        if name.lstrip("_") not in place:
            found.add(f"{path}.{name.lstrip('_')}", value, data=True)
