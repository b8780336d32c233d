"""Models for the meter: loaded one at a time, by transformers or by llama-cpp-python."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Loader", "bos_of", "llama_cpp"]


class Loader:
    """A model that is loaded when it is measured: ``Loader(lambda: AutoModelForCausalLM.from_pretrained(name))``."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load

    def __call__(self) -> Any:
        """The model."""
        return self._load()


def llama_cpp(path: str | Path, *, context: int = 4096, **options: Any) -> Callable[[Tensor], Tensor]:
    """A .gguf model that llama.cpp runs, quantised as it is: a function from (batch, length) ids to float32 logits.

    Args:
        path: the file.
        context: the most tokens of a document.
        options: others of ``llama_cpp.Llama``, such as ``n_gpu_layers=-1``.

    Raises:
        ImportError: llama-cpp-python is not installed.
        ValueError: a document is longer than the context.
    """
    try:
        library = importlib.import_module("llama_cpp")
    except ImportError as error:
        raise ImportError("a .gguf model is run by llama-cpp-python: pip install llama-cpp-python") from error
    model = library.Llama(model_path=str(path), n_ctx=context, logits_all=True, verbose=False, **options)

    def logits(ids: Tensor) -> Tensor:
        if ids.shape[1] > context:
            raise ValueError(f"a document of {ids.shape[1]} tokens, and context={context}: give llama_cpp a larger one")
        rows = []
        for document in ids.tolist():
            model.reset()
            model.eval(document)
            rows.append(torch.from_numpy(np.array(model.scores[: len(document)], np.float32)))
        return torch.stack(rows)

    logits.bos = model.token_bos()  # type: ignore[attr-defined]
    return logits


def bos_of(model: Any) -> int | None:
    """The id of the token that a model's texts begin with, if it says so: one of Hugging Face or of ``llama_cpp``."""
    found = getattr(model, "bos", getattr(getattr(model, "config", None), "bos_token_id", None))
    return found if isinstance(found, int) and found >= 0 else None
