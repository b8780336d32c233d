"""Commands that bring labels into a cache: from a model, from a vLLM server, or from the files of another tool."""

from __future__ import annotations

import json
import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console

import kdfast.cache
from kdfast._paths import local_path
from kdfast.cache import CacheError
from kdfast.cache.capture.corpus import cut
from kdfast.cache.capture.language_model import load_causal_model, load_tokenizer
from kdfast.cache.capture.ranks import Ranks, capture_share
from kdfast.cli.documents import documents
from kdfast.cli.terminal import check_choice, exit_on_error, progress_bar

if TYPE_CHECKING:
    from kdfast.cache.convert import BiasReport, Source

__all__ = ["capture", "capture_vllm", "convert"]

Texts = Annotated[
    list[Path],
    typer.Argument(
        metavar="TEXTS...", help=".jsonl and .parquet files, or other files of one document each. .gz is unpacked."
    ),
]
Destination = Annotated[str, typer.Option(help="The cache's directory or URL.", show_default=False)]
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens per window.")]
Field = Annotated[
    str | None,
    typer.Option(help="The field of a row that holds the document. Default: the one of text, messages and input_ids."),
]
DTYPES = ("auto", "float32", "bfloat16", "float16")


def capture(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A Hugging Face causal model: a folder, a name, or a .gguf file.")
    ],
    texts: Texts,
    out: Destination,
    codec: Annotated[str, typer.Option(help="How to store the labels.")] = "auto",
    student_kl: Annotated[
        str | None,
        typer.Option(help="The student's KL from the teacher in nats, or 'far' (1 and more): for codec 'auto'."),
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE: an option of the codec or the writer.")] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="The student's; may be repeated. Default: 1.")] = None,
    max_length: MaxLength = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per batch.")] = 8,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens from one window to the next. Default: windows do not overlap.")
    ] = None,
    bos: Annotated[
        bool, typer.Option("--bos", help="Begin every window with BOS, not only a document's first.")
    ] = False,
    dtype: Annotated[str, typer.Option(help=f"The teacher's dtype: {', '.join(DTYPES)}.")] = "auto",
    on_bad: Annotated[
        str, typer.Option(help="Records with NaN in a row: 'raise', or 'skip' and count them.")
    ] = "raise",
    field: Field = None,
) -> None:
    """Run a language model over documents and store its soft labels. A capture that was stopped is resumed.

    With torchrun --no-python each process captures a share, on a GPU of its own if there are any. The number of
    processes may change from one start to the next.
    """
    ranks = Ranks.of_environment()
    check_choice(dtype, DTYPES)
    options = dict(parse_option(text) for text in option or ())
    with exit_on_error(ValueError, TypeError, ImportError):
        teacher, tokenizer = _load(model, dtype)
        shown = ranks.rank == 0
        corpus = cut(tokenizer, documents(texts, field), max_length, stride=stride, bos=bos, progress=shown)
        report = capture_share(
            teacher,
            tokenizer,
            corpus,
            out,
            ranks,
            codec=codec,
            temperatures=tuple(temperature or (1.0,)),
            student_kl=_distance(student_kl),
            max_length=max_length,
            batch_size=batch_size,
            on_bad=on_bad,
            progress=shown,
            **options,
        )
    Console().print(f"process {ranks.rank} of {ranks.world}: {report.text()}", soft_wrap=True)


def capture_vllm(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server: http://host:8000.", show_default=False)],
    texts: Texts,
    out: Destination,
    tokenizer: Annotated[
        str, typer.Option(help="The teacher's tokenizer, of Hugging Face: a folder, a name, or a .gguf file.")
    ],
    vocab_size: Annotated[int, typer.Option(min=1, help="Size of the teacher's vocabulary.", show_default=False)],
    teacher: Annotated[str, typer.Option(help="The teacher's fingerprint: a text that changes with its weights.")],
    k: Annotated[int, typer.Option(min=1, help="Entries per row; above 20 the server needs --max-logprobs.")] = 20,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE: another option, such as value_dtype.")] = None,
    model: Annotated[str | None, typer.Option(help="The served model's name, if there are several.")] = None,
    max_length: MaxLength = 1024,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 32,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 600.0,
    retries: Annotated[int, typer.Option(min=0, help="Retries when the connection is lost or the server is busy.")] = 5,
    api_key: Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", help="The server's API key.")] = None,
    field: Field = None,
) -> None:
    """Store top-k log-probabilities of documents from a vLLM server. A capture that was stopped is resumed."""
    options = dict(parse_option(text) for text in option or ())
    with exit_on_error(ValueError, TypeError, ImportError):
        report = kdfast.cache.capture_vllm(
            url,
            documents(texts, field),
            out,
            tokenizer=load_tokenizer(tokenizer),
            vocab_size=vocab_size,
            teacher=teacher,
            k=k,
            model=model,
            max_length=max_length,
            concurrency=concurrency,
            timeout=timeout,
            retries=retries,
            api_key=api_key,
            **options,
        )
    print_bias(report)


class Format(str, Enum):
    """Formats that ``convert`` reads."""

    distillkit = "distillkit"
    topk_logprobs = "topk-logprobs"
    megatron = "megatron"
    kdfast = "kdfast"


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A file or folder.", show_default=False)],
    destination: Annotated[
        str, typer.Argument(metavar="DST", help="The cache's directory or URL.", show_default=False)
    ],
    form: Annotated[Format, typer.Option("--from", help="What SRC is.", show_default=False)],
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="The teacher's vocabulary. Known if SRC is a kdfast cache.")
    ] = None,
    codec: Annotated[str, typer.Option(help="How to store the labels.")] = "topk",
    k: Annotated[int | None, typer.Option(min=1, help="Entries to keep per row. Default: all.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE: another option of the codec.")] = None,
    teacher: Annotated[str, typer.Option(help="The teacher's fingerprint. Kept if SRC is a kdfast cache.")] = "",
    temperature: Annotated[list[float] | None, typer.Option(help="kdfast: one to keep. Default: all.")] = None,
    config: Annotated[Path | None, typer.Option(help="distillkit: the compression config.")] = None,
    alignment: Annotated[
        str | None, typer.Option(help="topk-logprobs: 'position' (element i is of token i) or 'next' (of token i + 1).")
    ] = None,
    tokens: Annotated[Path | None, typer.Option(help="megatron: the samples' ids, as JSON lines.")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="How far above 1 a row's probabilities may add up.")] = 0.01,
    drop_broken: Annotated[bool, typer.Option("--drop-broken", help="Leave out records with a broken row.")] = False,
) -> None:
    """Import labels of another tool, or re-encode a kdfast cache, and report the bias of what is left out."""
    options = dict(parse_option(text) for text in option or ())
    if k is not None:
        options["k"] = k
    with exit_on_error(ValueError, TypeError):
        if form is Format.kdfast:
            report = _recompress(source, destination, codec=codec, temperatures=temperature, **options)
        else:
            if vocab_size is None:
                raise CacheError(f"--vocab-size is needed: {form.value} files do not say it")
            checks = {"tolerance": tolerance, "drop_broken": drop_broken}
            records = _source(form, local_path(source), config, alignment, tokens)
            stored = {"vocab_size": vocab_size, "codec": codec, "teacher": teacher, **options}
            report = _import(records, destination, **checks, **stored)
    print_bias(report)


def _distance(text: str | None) -> float | str | None:
    """A student's distance as ``capture`` takes it: the number that the text is, or the text."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def _load(name: str, dtype: str) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(name)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if gpu else torch.device("cpu")
    return load_causal_model(name, dtype).to(device), tokenizer


def _recompress(source: str, destination: str, **options: Any) -> BiasReport:
    from kdfast.cache.convert import recompress

    with progress_bar("Records", len(kdfast.cache.open(source))) as advance:
        return recompress(source, destination, progress=lambda: advance(1), **options)


def _import(records: Source, destination: str, **options: Any) -> BiasReport:
    from kdfast.cache.convert import import_records

    with progress_bar("Records", records.size) as advance:
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


def parse_option(text: str) -> tuple[str, Any]:
    """Split NAME=VALUE. The value is read as JSON, or else is a string. Raises ``typer.BadParameter``."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise typer.BadParameter(f"an option is NAME=VALUE, such as value_dtype=float32; got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def print_bias(report: BiasReport) -> None:
    """Print what an import kept and its bias, warnings in red."""
    console = Console()
    for line in report.lines():
        console.print(
            f"* {line}", soft_wrap=True, markup=False, highlight=False, style="red" if "WARNING" in line else ""
        )
