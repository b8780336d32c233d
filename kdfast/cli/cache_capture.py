"""``kdfast cache capture``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from kdfast.cache import CacheError, windows
from kdfast.cache.capture.ranks import Ranks, capture_share
from kdfast.cli.cache_convert import option_of
from kdfast.cli.failing import failing

__all__ = ["capture", "documents", "load_tokenizer"]


def capture(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face causal model: a folder or a name.")],
    texts: Annotated[
        list[Path], typer.Argument(metavar="TEXTS...", help=".jsonl files, or others of one document each.")
    ],
    out: Annotated[str, typer.Option(help="The cache's directory or URL.", show_default=False)],
    codec: Annotated[str, typer.Option(help="How to store the labels.")] = "auto",
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE: an option of the codec or the writer.")] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="That the student will use. [default: 1]")] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows that the teacher sees at once.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of the teacher's weights: auto, float32, bfloat16 or float16.")] = "auto",
    field: Annotated[str, typer.Option(help="Of a .jsonl file's lines: which holds the document.")] = "text",
) -> None:
    """Run a language model over documents and store what it says, or go on with doing so.

    With torchrun --no-python every process runs a part, on a GPU of its own if there are any, and their number may
    change from one start to the next.
    """
    ranks = Ranks.of_environment()
    with failing(ValueError, TypeError):
        teacher, tokenizer = _load(model, dtype)
        corpus = windows(tokenizer, documents(texts, field), max_length)
        report = capture_share(
            teacher,
            tokenizer,
            corpus,
            out,
            ranks,
            codec=codec,
            temperatures=tuple(temperature or (1.0,)),
            max_length=max_length,
            batch_size=batch_size,
            progress=ranks.rank == 0,
            **dict(option_of(text) for text in option or ()),
        )
    Console().print(
        f"process {ranks.rank} of {ranks.world}: {report.records:,} records, {report.rows:,} rows added; "
        f"{report.skipped:,} batches were there"
    )


def _load(name: str, dtype: str) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(name)
    from transformers import AutoModelForCausalLM

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to(device), tokenizer


def load_tokenizer(name: str) -> Any:
    """A Hugging Face tokenizer. Raises ``CacheError`` if transformers is not installed."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise CacheError('a language model needs transformers: pip install "kdfast[lm]"') from error
    return AutoTokenizer.from_pretrained(name)


def documents(files: Sequence[Path], field: str) -> Iterator[str]:
    """A document per file, or per line of a .jsonl file. Raises ``CacheError`` for a line without ``field``."""
    for file in files:
        if file.suffix != ".jsonl":
            yield file.read_text()
            continue
        with file.open() as lines:
            for number, line in enumerate(lines, 1):
                record = json.loads(line)
                if field not in record:
                    raise CacheError(f"{file}, line {number}: there is no {field!r}, only {', '.join(record)}")
                yield record[field]
