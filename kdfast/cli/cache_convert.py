"""``kdfast cache convert``."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import kdfast.cache
from kdfast.cache import CacheError
from kdfast.cli.failing import failing
from kdfast.cli.progress import bar

if TYPE_CHECKING:
    from kdfast.cache.convert import BiasReport, Source

__all__ = ["convert", "option_of", "print_bias"]


class Format(str, Enum):
    """Formats that can be imported."""

    distillkit = "distillkit"
    topk_logprobs = "topk-logprobs"
    megatron = "megatron"
    kdfast = "kdfast"


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A file or folder.", show_default=False)],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The cache's directory.", show_default=False)],
    form: Annotated[Format, typer.Option("--from", help="What SRC is.", show_default=False)],
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="The teacher's vocabulary. Known if SRC is a kdfast cache.")
    ] = None,
    codec: Annotated[str, typer.Option(help="How to store the labels.")] = "topk",
    k: Annotated[int | None, typer.Option(min=1, help="Entries to keep per row. [default: all]")] = None,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE: another option of the codec.")] = None,
    teacher: Annotated[str, typer.Option(help="The teacher's fingerprint. Kept if SRC is a kdfast cache.")] = "",
    temperature: Annotated[list[float] | None, typer.Option(help="kdfast: which to keep. [default: all]")] = None,
    config: Annotated[Path | None, typer.Option(help="distillkit: the compression config.")] = None,
    alignment: Annotated[
        str | None, typer.Option(help="topk-logprobs: 'position' (element i is of token i) or 'next' (of token i + 1).")
    ] = None,
    tokens: Annotated[Path | None, typer.Option(help="megatron: the samples' ids, as JSON lines.")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="How far above 1 a row's probabilities may add up.")] = 0.01,
    drop_broken: Annotated[bool, typer.Option("--drop-broken", help="Leave out records with a broken row.")] = False,
) -> None:
    """Import labels that another tool has stored, or store a kdfast cache in another way; and say what is left out."""
    options = dict(option_of(text) for text in option or ())
    if k is not None:
        options["k"] = k
    with failing(ValueError, TypeError):
        if form is Format.kdfast:
            report = _recompress(source, destination, codec=codec, temperatures=temperature, **options)
        else:
            if vocab_size is None:
                raise CacheError(f"--vocab-size is needed: {form.value} files do not say it")
            checks = {"tolerance": tolerance, "drop_broken": drop_broken}
            records = _source(form, source, config, alignment, tokens)
            stored = {"vocab_size": vocab_size, "codec": codec, "teacher": teacher, **options}
            report = _import(records, destination, **checks, **stored)
    print_bias(report)


def _recompress(source: Path, destination: Path, **options: Any) -> BiasReport:
    from kdfast.cache.convert import recompress

    with bar("Records", len(kdfast.cache.open(source))) as advance:
        return recompress(source, destination, progress=lambda: advance(1), **options)


def _import(records: Source, destination: Path, **options: Any) -> BiasReport:
    from kdfast.cache.convert import import_records

    with bar("Records", records.size) as advance:
        return import_records(records, destination, progress=lambda: advance(1), **options)


def _source(form: Format, path: Path, config: Path | None, alignment: str | None, tokens: Path | None) -> Source:
    from kdfast.cache.convert import DistillKit, Megatron, TopKLogProbs

    if form is Format.distillkit:
        return DistillKit(path, config)
    if form is Format.topk_logprobs:
        return TopKLogProbs(path, alignment)
    if tokens is None:
        raise CacheError("--tokens is needed: megatron files are keyed by the run's position and hold no ids")
    return Megatron(path, tokens)


def option_of(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise typer.BadParameter(f"an option is NAME=VALUE, such as value_dtype=float32; got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def print_bias(report: BiasReport) -> None:
    console = Console()
    for line in report.lines():
        console.print(
            f"* {line}", soft_wrap=True, markup=False, highlight=False, style="red" if "WARNING" in line else ""
        )
