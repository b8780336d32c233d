"""Where the Triton kernels' tests run: on a GPU if there is one, else in Triton's interpreter."""

import contextlib

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _patch_language_once():
    """The interpreter patches triton.language anew in every call of a device function, which takes half of its time."""
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def patch_once(function):
        # What an outer call has patched is no builtin of the language any more.
        modules = [x for x in (language, language.core) if any(x is y for y in function.__globals__.values())]
        return patch(function) if any(language.core.is_builtin(x.load) for x in modules) else None

    interpreter._patch_lang = patch_once


if DEVICE == "cpu":
    # Without Triton, or with one that does it otherwise, there is nothing to save.
    with contextlib.suppress(ImportError, AttributeError):
        _patch_language_once()
