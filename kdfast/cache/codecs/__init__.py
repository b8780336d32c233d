"""The codecs by name, one file each. ``register`` adds another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kdfast.cache.codecs.auto import Choice, choose
from kdfast.cache.codecs.base import Codec, FixedWidthCodec
from kdfast.cache.codecs.dense import Dense
from kdfast.cache.codecs.hard import Hard
from kdfast.cache.codecs.hidden import Hidden
from kdfast.cache.codecs.prototype import Prototype
from kdfast.cache.codecs.topk import TopK
from kdfast.cache.codecs.weights import Sample, Threshold

__all__ = [
    "Choice",
    "Codec",
    "Dense",
    "FixedWidthCodec",
    "Hard",
    "Hidden",
    "Prototype",
    "Sample",
    "Threshold",
    "TopK",
    "choose",
    "create",
    "current_options",
    "find",
    "register",
    "restore",
]

_registry: dict[str, type[Codec]] = {}


def register(codec: type[Codec]) -> type[Codec]:
    """Make a codec available under its ``name``. Use it as a class decorator."""
    if _registry.setdefault(codec.name, codec) is not codec:
        raise ValueError(f"a codec named {codec.name!r} is already registered: {_registry[codec.name].__qualname__}")
    return codec


def find(name: str) -> type[Codec]:
    """The codec's class. Raises ``ValueError`` if there is none of this name."""
    if name not in _registry:
        raise ValueError(f"codec must be one of {sorted(_registry)}, got {name!r}")
    return _registry[name]


def current_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A codec's options under their present names. Before 0.2 ``prototypes`` was called ``shapes``."""
    return {"prototypes" if name == "shapes" else name: value for name, value in options.items()}


def create(name: str, vocab_size: int, temperatures: Sequence[float], options: Mapping[str, Any]) -> Codec:
    """The codec ``name`` with its options. "auto" is the one that ``choose`` names, with the options that it lacks.

    Raises:
        ValueError: an unknown codec, or an option out of range.
        TypeError: an option that the codec does not have.
    """
    options = current_options(options)
    if name == "auto":
        name, chosen, _ = choose(vocab_size, temperatures)
        options = {**chosen, **options}
    made = find(name)
    try:
        return made(vocab_size, temperatures, **options)
    except TypeError as error:
        raise TypeError(f"codec {name!r}: {error}") from error
    except ValueError as error:
        raise ValueError(f"codec {name!r}: {error}") from error


def restore(
    name: str,
    vocab_size: int,
    temperatures: Sequence[float],
    config: Mapping[str, Any],
    read_asset: Callable[[str], bytes],
) -> Codec:
    """The codec whose ``config()`` is given. ``read_asset(file name)`` gives the bytes of one of its assets.

    Raises:
        ValueError, TypeError: as ``create`` does, and for an asset that is not what the configuration asks for.
        OSError: an asset cannot be read.
    """
    return create(name, vocab_size, temperatures, find(name).options(config, read_asset))


for _codec in (Dense, Hard, Hidden, Prototype, Sample, Threshold, TopK):
    register(_codec)
