"""Loading a causal language model of Hugging Face, or one of llama.cpp's .gguf files, as plain dense weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kdfast._optional import import_optional

__all__ = ["load_causal_model", "load_tokenizer"]


def load_causal_model(name: str | Path, dtype: str | torch.dtype = "auto") -> Any:
    """Load a causal model in evaluation mode, on the CPU.

    Args:
        name: a folder, a name, or a .gguf file. A file's weights are always unpacked: transformers 5 would otherwise
            keep them in blocks where it has a kernel for them, which computes in float32 whatever ``dtype`` says and
            has no gradient; and it warns of that even where it has none.
        dtype: of the weights; "auto": the model's own.

    Raises:
        ImportError: transformers is not installed, or gguf or accelerate for a .gguf file.
        FileNotFoundError: there is no such .gguf file.
    """
    transformers = import_optional("transformers", "a language model", extra="lm")
    where, options = _where(name)
    config = getattr(transformers, "GgufConfig", None)
    if options and config is not None:  # older versions always unpack
        options["quantization_config"] = config(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options).eval()


def load_tokenizer(name: str | Path) -> Any:
    """Load a tokenizer: of a folder, a name, or a .gguf file. Raises as ``load_causal_model`` does."""
    transformers = import_optional("transformers", "a language model", extra="lm")
    where, options = _where(name)
    return transformers.AutoTokenizer.from_pretrained(where, **options)


def _where(name: str | Path) -> tuple[str, dict[str, Any]]:
    file = Path(name)
    if file.suffix != ".gguf" or file.is_dir():
        return str(name), {}
    for module in ("gguf", "accelerate"):
        import_optional(module, "a .gguf file", extra="lm")
    if not file.exists():
        raise FileNotFoundError(f"there is no file {file}")
    return str(file.parent), {"gguf_file": file.name}
