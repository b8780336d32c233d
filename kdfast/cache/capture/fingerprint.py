"""Fingerprints of a teacher, its output layer and its tokenizer: they change with whatever changes the labels."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.cache.format.teacher import Fingerprint
from kdfast.labels.digest import TensorDigest
from kdfast.labels.head import OutputLayer

__all__ = ["fingerprint", "head_fingerprint", "with_tokenizer"]

# Of a configuration: where it came from and who saved it, not what it computes. Tensors bring their own dtype.
UNRELATED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
# Of a Hugging Face configuration, in every part of it: what saving adds, what names things, what is only returned or
# remembered, what training or generation alone look at.
NO_ANSWER = (
    *UNRELATED,
    "architectures",
    "attn_implementation",
    "finetuning_task",
    "generation_config",
    "gradient_checkpointing",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "prefix",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "tokenizer_class",
    "torchscript",
    "use_cache",
)
DROPOUT = re.compile(r".*(dropout|dropout_prob|dropout_rate|dropout_p|_pdrop|drop_rate|layerdrop|drop_path_rate)")
# Ids that only generation looks at, but in models that search their inputs for them.
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Options of a module that say how it is trained or run.
NO_OPTION = re.compile(r"training|.*checkpoint.*")
# Integers among them that may change answers: others count steps, say how wide a layer is, or where to stop.
SIZE = re.compile(r".*(head|group|stride|dilation|window|scale|factor|repeat).*")
WITHOUT_ANSWER = re.compile(r"Identity|Sequential|Module(List|Dict)|Container|(Feature)?(Alpha)?Dropout[123]?d?")
# Names that wrappers put between those of a module's own parts.
WRAPPED = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.)")
SHORT = 40  # characters of a part that is kept as it is


def fingerprint(model: nn.Module) -> Fingerprint:
    """32 hexadecimal digits of what a model computes: its configuration, if it has one, or else its kinds of modules
    with their options and the buffers that they do not save; and every parameter and buffer that it saves.

    The options of a module of your own are the numbers, texts, tensors and functions of PyTorch that it keeps under
    the names of its constructor's parameters, for other attributes may count what happens; of integers those that are
    named as numbers of heads or groups, strides, windows or factors.

    What changes no answer stays out: who saved the model and where, the names of its labels, dropout, caching, what it
    returns besides, padding where it does not look at it, and wrappers (``torch.compile``, data parallelism).

    BLAKE2b-128 over names, dtypes, shapes and bytes. It reads all weights once: about a second per gigabyte. The text
    remembers its parts, so that a writer can say in what two teachers differ.

    Raises:
        ValueError: a weight is on the meta device.
    """
    inner = _unwrapped(model)
    parts = dict(_configuration(inner))
    parts |= {f"adapter.{name}": value for name, value in _adapters(inner)}
    if not parts:
        parts = dict(_modules_parts(inner))
    parts |= {f"weight.{name}": value for name, value in _weights(inner)}
    digest = TensorDigest()
    digest.text(_json(sorted(parts.items())))
    return Fingerprint(digest.hex(), parts, lambda: [_first_form(model), _first_form(inner)])


def _first_form(model: nn.Module) -> str:
    """The fingerprint that versions up to 0.2 made."""
    digest = TensorDigest()
    digest.text(_json(_config(model)))
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.tensor(name, value)
        else:  # a module's extra state
            digest.text(f"{name} {value!r}")
    return digest.hex()


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile`` and data parallelism."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _configuration(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield what a model's configuration says about its answers, by name."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        looks_at_ids = bool(getattr(config, "is_encoder_decoder", False)) or hasattr(model, "score")
        yield from _answers("config", config.to_dict(), () if looks_at_ids else SPECIAL_IDS)
        for name, module in model.named_modules():  # RoBERTa counts positions from it
            if isinstance(index := getattr(module, "padding_idx", None), int) and not isinstance(module, nn.Embedding):
                yield f"config.padding_idx.{_own(name)}", str(index)
    elif isinstance(config, Mapping):
        for name, value in config.items():
            if name not in UNRELATED:
                yield f"config.{name}", _brief(value)


def _answers(path: str, config: Mapping[str, Any], others: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for name, value in config.items():
        name = str(name)
        if name in NO_ANSWER or name in others or name.startswith("_") or DROPOUT.fullmatch(name):
            continue
        if isinstance(value, Mapping) and "model_type" in value:  # the configuration of a part
            yield from _answers(f"{path}.{name}", value, others)
        elif value is not None:  # saving drops and adds what is None
            yield f"{path}.{name}", _brief(value)


def _adapters(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield what decides how adapters (PEFT's) take part, and weights as layers use them: those saved do not tell."""
    for name, module in model.named_modules():
        scaling, active = getattr(module, "scaling", None), getattr(module, "active_adapters", None)
        if isinstance(scaling, Mapping) and active is not None and not callable(active):
            state = [list(active), {str(key): float(value) for key, value in scaling.items()}]
            yield _own(name), _brief([*state, bool(getattr(module, "disable_adapters", False))])
        if isinstance(rounded := getattr(module, "rounded_weight", None), Tensor):  # as recipes.fake_quantize makes it
            yield f"{_own(name)}.rounded_weight", _tensor(rounded.detach())


def _modules_parts(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield what tells a model without a configuration from others: the configurations of the models in it, the kind
    and options of each other module, and the buffers that are not saved."""
    inside: list[str] = []  # models with a configuration of their own, which says all about their modules
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in inside):
            continue
        own = _own(name)
        found = dict(_configuration(module)) if name else {}
        if found:
            inside.append(name)
            yield from ((f"{part} of {own}", value) for part, value in found.items())
            continue
        yield from _kind(own, module)
        unsaved = module._non_persistent_buffers_set
        yield from ((f"buffer.{own}.{x}", _tensor(module._buffers[x])) for x in sorted(unsaved))


def _kind(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the kind of a module and its options, as far as they can be told."""
    kind = next(x for x in type(module).__mro__ if not x.__module__.startswith("torch.distributed"))
    torchs = kind.__module__.startswith("torch.nn.modules")
    if WITHOUT_ANSWER.fullmatch(kind.__name__) if torchs else kind.__module__.startswith("torch."):  # a wrapper
        return
    yield f"module.{name}", _brief(f"{kind.__name__}({module.extra_repr()})" if torchs else kind.__name__)
    parameters = inspect.signature(kind).parameters
    for attribute, value in sorted(vars(module).items()):
        option = attribute.lstrip("_")
        if option not in parameters or NO_OPTION.fullmatch(option) or DROPOUT.fullmatch(option):
            continue
        if type(value) is int and not (torchs or SIZE.fullmatch(option)):
            continue
        text = _plain(value)
        if text is not None:
            yield f"module.{name}.{attribute}", text


def _plain(value: Any) -> str | None:
    """A number, text, tensor or function of PyTorch, or a list of some, as a text; None for what is none of these."""
    if isinstance(value, (bool, int, float, str, torch.dtype)):
        return _brief(value)
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, (list, tuple)):
        texts = [_plain(item) for item in value]
        return None if None in texts else _brief(texts)
    ours = callable(value) and str(getattr(value, "__module__", None) or "torch").startswith("torch")
    name = getattr(value, "__name__", None) if ours else None
    return None if name is None else _brief(name)


def _weights(model: nn.Module) -> Iterator[tuple[str, str]]:
    for name, value in sorted(model.state_dict().items()):
        yield _own(name), _tensor(value)


def _tensor(value: Any) -> str:
    """A digest of a tensor, or of what a module calls its extra state."""
    digest = TensorDigest()
    _take(digest, value)
    return digest.hex()


def _take(digest: TensorDigest, value: Any) -> None:
    if isinstance(value, Tensor) and not value.is_quantized:
        digest.tensor("", value)
    elif isinstance(value, Tensor):
        digest.text(f"{value.dtype} {value.qscheme()}")
        _take(digest, value.int_repr())
        _take(digest, value.dequantize())  # for the scales
    elif isinstance(value, Mapping):
        for name, item in value.items():
            digest.text(str(name))
            _take(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.text(f"{len(value)} values")
        for item in value:
            _take(digest, item)
    elif isinstance(value, BytesIO):
        digest.text(value.getvalue().hex())
    else:
        digest.text(repr(value))


def _own(name: str) -> str:
    """A part's name without what wrappers put in between."""
    return WRAPPED.sub("", name).lstrip(".")


def _brief(value: Any) -> str:
    """A value as JSON, or its digest where that is long."""
    text = _json(value)
    return text if len(text) <= SHORT else blake2b(text.encode(), digest_size=8).hexdigest()


def head_fingerprint(weight: Tensor, bias: Tensor | None = None, **options: Any) -> str:
    """``kdfast.OutputLayer(weight, bias, **options).fingerprint``, under the name it had before 0.2."""
    return OutputLayer(weight, bias, **options).fingerprint


def _tokenizer_parts(tokenizer: Any, add_special_tokens: bool, *, padding: bool = False) -> list[tuple[str, str]]:
    """What a Hugging Face tokenizer is, and the policy for special tokens, by name.

    All of a fast tokenizer goes in (merges, normalisers, templates); vocabulary and special tokens of a slow one. Which
    token pads stays out but for older caches: texts are tokenised one by one.
    """
    if not hasattr(tokenizer, "special_tokens_map"):
        raise TypeError(
            f"tokenizer must be one of transformers, got {type(tokenizer).__name__}: of the library tokenizers, "
            "PreTrainedTokenizerFast(tokenizer_object=tokenizer)"
        )
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if padding or name != "pad_token"}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return [
        ("special", _json({"add_special_tokens": add_special_tokens, "special": special})),
        ("rules", _json(tokenizer.get_vocab()) if backend is None else _rules(backend.to_str())),
    ]


def _digest_of(parts: list[tuple[str, str]]) -> str:
    digest = TensorDigest()
    for _, text in parts:
        digest.text(text)
    return digest.hex()


def with_tokenizer(teacher: str, tokenizer: Any, add_special_tokens: bool) -> str:
    """The fingerprint ``teacher`` of a language model, with the tokenizer's added if one makes its ids."""
    if tokenizer is None:
        return teacher
    parts = _tokenizer_parts(tokenizer, add_special_tokens)
    older = _digest_of(_tokenizer_parts(tokenizer, add_special_tokens, padding=True))
    named = {name: blake2b(text.encode(), digest_size=8).hexdigest() for name, text in parts}
    return Fingerprint.of(teacher).with_part("tokenizer", _digest_of(parts), named, older)


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
