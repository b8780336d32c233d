"""Fingerprints of a teacher, its output layer and its tokenizer: they change with whatever changes the labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kdfast.labels.digest import TensorDigest
from kdfast.labels.head import OutputLayer

__all__ = ["fingerprint", "head_fingerprint", "tokenizer_fingerprint", "with_tokenizer"]

# Of a configuration: where it came from and who saved it, not what it computes. Tensors bring their own dtype.
UNRELATED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits of a model's configuration, if it has one, and of every parameter and buffer it saves.

    BLAKE2b-128 over names, dtypes, shapes and bytes. It reads all weights once: about a second per gigabyte.

    Raises:
        ValueError: a weight is on the meta device.
    """
    digest = TensorDigest()
    digest.text(_json(_config(model)))
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.tensor(name, value)
        else:  # a module's extra state
            digest.text(f"{name} {value!r}")
    return digest.hex()


def head_fingerprint(weight: Tensor, bias: Tensor | None = None, **options: Any) -> str:
    """``kdfast.OutputLayer(weight, bias, **options).fingerprint``, under the name it had before 0.2."""
    return OutputLayer(weight, bias, **options).fingerprint


def tokenizer_fingerprint(tokenizer: Any, add_special_tokens: bool) -> str:
    """32 hexadecimal digits of a Hugging Face tokenizer and of the policy for special tokens.

    All of a fast tokenizer goes in (merges, normalisers, templates); vocabulary and special tokens of a slow one.
    """
    digest = TensorDigest()
    digest.text(_json({"add_special_tokens": add_special_tokens, "special": tokenizer.special_tokens_map}))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.text(_json(tokenizer.get_vocab()) if backend is None else _rules(backend.to_str()))
    return digest.hex()


def with_tokenizer(teacher: str, tokenizer: Any, add_special_tokens: bool) -> str:
    """The fingerprint ``teacher`` of a language model, with the tokenizer's added if one makes its ids."""
    return (
        teacher if tokenizer is None else f"{teacher} tokenizer {tokenizer_fingerprint(tokenizer, add_special_tokens)}"
    )


def _rules(serialised: str) -> str:
    """A serialised fast tokenizer without truncation and padding, which an earlier call may have set."""
    rules = json.loads(serialised)
    return _json({name: rule for name, rule in rules.items() if name not in ("truncation", "padding")})


def _config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if isinstance(config, Mapping):
        return {str(name): value for name, value in config.items() if name not in UNRELATED}
    return None


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
