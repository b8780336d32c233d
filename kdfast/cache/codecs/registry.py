"""The codecs by name: finding one, making one from options, and making it again from what a shard says of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from types import MappingProxyType
from typing import Any

from kdfast._names import did_you_mean, no_option
from kdfast.cache.codecs.auto import choose
from kdfast.cache.codecs.base import Codec

__all__ = ["create", "current_options", "find", "names", "register", "restore"]

_registry: dict[str, type[Codec]] = {}

# What codecs, and their options, are called elsewhere.
_CODECS: Mapping[str, str] = MappingProxyType(
    {
        "top_k": "topk",
        "topk_logprobs": "topk",
        "sparse": "topk",
        "logits": "dense",
        "full": "dense",
        "quantized": "dense",
        "rskd": "sample",
        "random_sampling": "sample",
        "sampling": "sample",
        "nucleus": "threshold",
        "top_p": "threshold",
        "argmax": "hard",
        "hard_labels": "hard",
        "hidden_states": "hidden",
    }
)
_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "top_k": "k",
        "topk": "k",
        "num_logprobs": "k",
        "n": "draws",
        "num_samples": "draws",
        "samples": "draws",
        "threshold": "tau",
        "num_bits": "bits",
    }
)


def register(codec: type[Codec]) -> type[Codec]:
    """Make a codec available under its ``name``. Use it as a class decorator.

    Raises:
        ValueError: another class has this name already.
    """
    if _registry.setdefault(codec.name, codec) is not codec:
        raise ValueError(f"a codec named {codec.name!r} is already registered: {_registry[codec.name].__qualname__}")
    return codec


def find(name: str) -> type[Codec]:
    """The class of the codec ``name``. Raises ``ValueError`` if there is none of this name."""
    if not isinstance(name, str) or name not in _registry:
        raise ValueError(f"codec must be one of {names()}, got {name!r}{did_you_mean(name, _registry, _CODECS)}")
    return _registry[name]


def names() -> list[str]:
    """The names of all codecs, sorted."""
    return sorted(_registry)


def current_options(codec: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A codec's options under their present names. Before 0.2 ``prototypes`` was called ``shapes``.

    A codec from elsewhere that has an option ``shapes`` of its own keeps it. "auto" stands for none of these.
    """
    if codec != "auto" and "shapes" in signature(find(codec)).parameters:
        return dict(options)
    return {"prototypes" if name == "shapes" else name: value for name, value in options.items()}


def create(name: str, vocab_size: int, temperatures: Sequence[float], options: Mapping[str, Any]) -> Codec:
    """Make the codec ``name`` with its options. "auto" stands for what ``choose`` says; ``options`` take precedence.

    Raises:
        ValueError: an unknown codec, or an option out of range.
        TypeError: an option that the codec does not have.
    """
    options = current_options(name, options)
    if name == "auto":
        name, chosen, _ = choose(vocab_size, temperatures)
        options = {**chosen, **options}
    made = find(name)
    takes = signature(made).parameters
    known = {option for option in takes if option not in ("vocab_size", "temperatures")}
    if not known.issuperset(options) and not any(x.kind is x.VAR_KEYWORD for x in takes.values()):
        raise no_option(f"codec {name!r}", set(options) - known, known, _OPTIONS)
    try:
        return made(vocab_size, temperatures, **options)
    except TypeError as error:
        given = ", ".join(f"{n}={v!r}" for n, v in options.items() if isinstance(v, (bool, int, float, str)))
        keywords = ", ".join(p.name for p in takes.values() if p.kind is p.KEYWORD_ONLY)
        raise TypeError(f"codec {name!r}: {error}; it was given {given or 'nothing'}, and takes {keywords}") from error
    except ValueError as error:
        raise ValueError(f"codec {name!r}: {error}") from error


def restore(
    name: str,
    vocab_size: int,
    temperatures: Sequence[float],
    config: Mapping[str, Any],
    read_asset: Callable[[str], bytes],
) -> Codec:
    """Make the codec ``name`` again from its ``config()``. ``read_asset(file name)`` gives the bytes of an asset.

    Raises:
        ValueError, TypeError: as ``create`` does, and for an asset that is not what the configuration asks for.
        OSError: an asset cannot be read.
    """
    return create(name, vocab_size, temperatures, find(name).options(config, read_asset))
