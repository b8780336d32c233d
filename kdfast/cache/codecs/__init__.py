"""What a row can be stored as: the codecs, one file each.

Every file of this folder is imported here, and a codec registers itself where it is defined: a new one needs no line in
any other file. ``names`` lists them, ``create`` makes one from its name and options, ``register`` adds one from
elsewhere. A codec's class is also an attribute of this module: ``codecs.TopK``.
"""

from importlib import import_module
from pkgutil import iter_modules

from kdfast.cache.codecs.auto import Choice, choose, is_far
from kdfast.cache.codecs.base import HIDDEN_STATES, LOGITS, Codec, FixedWidthCodec
from kdfast.cache.codecs.registry import create, current_options, find, names, register, restore

__all__ = [
    "HIDDEN_STATES",
    "LOGITS",
    "Choice",
    "Codec",
    "FixedWidthCodec",
    "choose",
    "create",
    "current_options",
    "find",
    "is_far",
    "names",
    "register",
    "restore",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def __getattr__(name: str) -> type[Codec]:
    for codec in map(find, names()):
        if codec.__name__ == name:
            return codec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
