"""``kdfast cache capture-vllm``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import kdfast.cache
from kdfast.cli.cache_capture import documents, load_tokenizer
from kdfast.cli.cache_convert import option_of, print_bias
from kdfast.cli.failing import failing

__all__ = ["capture_vllm"]


def capture_vllm(
    url: Annotated[str, typer.Argument(metavar="URL", help="The server: http://host:8000.", show_default=False)],
    texts: Annotated[
        list[Path], typer.Argument(metavar="TEXTS...", help=".jsonl files, or others of one document each.")
    ],
    out: Annotated[str, typer.Option(help="The cache's directory or URL.", show_default=False)],
    tokenizer: Annotated[str, typer.Option(help="The teacher's, of Hugging Face: a folder or a name.")],
    vocab_size: Annotated[int, typer.Option(min=1, help="Of the teacher's logits.", show_default=False)],
    teacher: Annotated[str, typer.Option(help="Its fingerprint: a text that changes with its weights.")],
    k: Annotated[int, typer.Option(min=1, help="Entries per row; above 20 the server needs --max-logprobs.")] = 20,
    option: Annotated[list[str] | None, typer.Option(help="NAME=VALUE: another option, such as value_dtype.")] = None,
    model: Annotated[str | None, typer.Option(help="The served model's name, if there are several.")] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a window.")] = 1024,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 32,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 600.0,
    retries: Annotated[int, typer.Option(min=0, help="When the connection is lost or the server busy.")] = 5,
    api_key: Annotated[str | None, typer.Option(envvar="VLLM_API_KEY", help="The server's.")] = None,
    field: Annotated[str, typer.Option(help="Of a .jsonl file's lines: which holds the document.")] = "text",
) -> None:
    """Store the top-k log-probabilities that a vLLM server gives for documents, or go on with doing so."""
    options = dict(option_of(text) for text in option or ())
    with failing(ValueError, TypeError):
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
