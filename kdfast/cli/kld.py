"""``kdfast kld``: how far models are from a teacher, from a cache of scored draws or llama.cpp's base file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import kdfast.cache
from kdfast.cache.capture.language_model import load_causal_model, load_tokenizer
from kdfast.cli.cache_sources import DTYPES, Field, MaxLength
from kdfast.cli.documents import documents
from kdfast.cli.terminal import check_choice, exit_on_error, progress_bar
from kdfast.meter import BaseFile, Measurement, compare, llama_cpp
from kdfast.meter.measure import Comparison
from kdfast.meter.models import Loader

__all__ = ["kld"]

BARS = 40  # characters of the longest bar


def kld(
    teacher: Annotated[
        str, typer.Argument(metavar="TEACHER", help="A cache of codec scored, or a base file of llama-perplexity.")
    ],
    models: Annotated[
        list[str], typer.Argument(metavar="MODELS...", help="Hugging Face folders or names, or .gguf files.")
    ],
    text: Annotated[list[Path] | None, typer.Option(help="The texts that the cache was captured from.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Default: the first model's.")] = None,
    max_length: MaxLength = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per batch.")] = 8,
    dtype: Annotated[str, typer.Option(help=f"The models' dtype: {', '.join(DTYPES)}.")] = "auto",
    llama: Annotated[
        bool, typer.Option("--llama-cpp", help="Run .gguf files with llama-cpp-python, quantised as they are.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--json", help="Write everything there as JSON.")] = None,
    field: Field = None,
) -> None:
    """Measure KL(teacher || model) in nats; of several models also the order, with errors that are paired.

    Make the cache with: kdfast cache capture TEACHER TEXTS... --out CACHE --codec scored
    """
    check_choice(dtype, DTYPES)
    with exit_on_error(ValueError, TypeError, ImportError, KeyError):
        base = Path(teacher).is_file()
        source: Any = BaseFile(teacher) if base else kdfast.cache.open(teacher)
        ids = None
        if not base:
            if not text:
                raise ValueError("a cache is measured on the texts that it was captured from: --text FILE")
            ids = kdfast.cache.windows(load_tokenizer(tokenizer or models[0]), documents(text, field), max_length)
        longest = source.context if base else max_length
        loaders = {name: Loader(_loading(name, dtype, llama, longest)) for name in models}
        count = (len(source) if ids is None else len(ids)) * len(models)
        with progress_bar("documents", count) as advance:
            found = compare(source, loaders, ids, batch_size=batch_size, progress=lambda: advance(1))
    if out is not None:
        out.write_text(json.dumps(_json(found), indent=1) + "\n")
    _print(found)


def _loading(name: str, dtype: str, llama: bool, context: int) -> Any:
    def load() -> Any:
        if llama and name.endswith(".gguf"):
            return llama_cpp(name, context=context)
        model = load_causal_model(name, dtype)
        return model.cuda() if torch.cuda.is_available() else model

    return load


def _json(found: Comparison) -> list[Mapping[str, Any]]:
    steps = [
        None if step is None else {"difference": step[0], "error": None if math.isnan(step[1]) else step[1]}
        for step in found.steps
    ]
    pairs = zip(found.measurements, steps, strict=True)
    return [{**measurement.to_json(), "from_the_one_before": step} for measurement, step in pairs]


def _print(found: Comparison) -> None:
    table = Table(
        "model", "KL, nats", "± 1.96 s.e.", "from the one before", "same top-1", "PPL ratio", "median", "99 %"
    )
    for measurement, step in zip(found.measurements, found.steps, strict=True):
        table.add_row(*_cells(measurement, step))
    console = Console()
    console.print(table)
    longest = max(measurement.kl for measurement in found.measurements) or 1.0
    for measurement in found.measurements:
        console.print(f"{measurement.name} {'█' * max(1, round(BARS * measurement.kl / longest))}", soft_wrap=True)
    first = found.measurements[0]
    kind = "exact KL of each row" if first.exact else "KL of each row estimated from draws, without bias"
    console.print(f"{first.rows} rows of {first.documents} documents; {kind}; errors over documents", soft_wrap=True)


def _cells(found: Measurement, step: tuple[float, float] | None) -> list[str]:
    return [
        found.name,
        f"{found.kl:.5f}",
        f"{1.96 * found.kl_error:.5f}",
        "" if step is None else f"{step[0]:+.5f} ± {1.96 * step[1]:.5f}",
        f"{found.agreement:.2%}",
        "" if found.perplexity_ratio is None else f"{found.perplexity_ratio:.4f}",
        f"{found.quantiles['0.5']:.5f}",
        f"{found.quantiles['0.99']:.4f}",
    ]
