"""Calling models: a batch's arguments, evaluation mode without gradients, and the logits of an output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from kdfast._checks import can_look
from kdfast._modules import evaluating, modules_in
from kdfast._record_keys import NON_MODEL_FIELDS, record_keys
from kdfast.masks import as_mask

__all__ = [
    "FLOATS",
    "NON_MODEL_FIELDS",
    "BatchFields",
    "apply",
    "autocast_dtype",
    "call",
    "call_outputs",
    "check_classes_last",
    "check_logits",
    "check_no_sigmoid",
    "check_plain",
    "check_several_classes",
    "decoder_mask",
    "device_of",
    "evaluating",
    "given_mask",
    "is_encoder_decoder",
    "labelled",
    "logits_of",
    "look_like_probabilities",
    "modules_in",
    "move",
    "row_mask",
    "unwrap",
    "with_decoder_inputs",
]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class BatchFields:
    """Where a batch has a model's arguments and its records' keys: functions of the batch, or None for the convention.

    Args:
        inputs: the model's argument, tuple of arguments, or mapping of keywords. By default a mapping's fields but
            ``key`` and ``labels``, the first item of a tuple or list, or the batch itself.
        key: a key per record. By default the field ``key``, or what the model is given of the record: ``record_keys``.
        outputs: of a model's output and the batch: the logits, (..., classes). By default the output or its ``logits``.
        mask: which rows of the logits are real: the name of a field, or a function of the batch that returns a mask or
            None. By default see ``row_mask``.
    """

    inputs: Callable[[Any], Any] | None = None
    key: Callable[[Any], Sequence[Any]] | None = None
    outputs: Callable[[Any, Any], Any] | None = None
    mask: str | Callable[[Any], Any] | None = None

    def arguments(self, batch: Any, model: Any = None) -> Any:
        """What a model is called with for ``batch``: a mapping of keywords, a tuple of positions, or one argument.

        Labels are no argument, but an encoder-decoder ``model`` gets the decoder's inputs that it makes of them.
        """
        if self.inputs is not None:
            return self.inputs(batch)
        if isinstance(batch, Mapping):
            arguments = {name: value for name, value in batch.items() if name not in NON_MODEL_FIELDS}
            return with_decoder_inputs(model, arguments, batch.get("labels"))
        return batch[0] if isinstance(batch, (tuple, list)) else batch

    def keys(self, batch: Any, model: Any = None) -> list[Any]:
        """One key per record of ``batch``.

        Args:
            batch: the batch.
            model: the one that is called with it: of an encoder-decoder, the labels may be inputs.

        Raises:
            ValueError: the batch has no key and no ids, or more than ids of which nothing tells whose it is, and no
                function was given.
        """
        if self.key is not None:
            return _each(self.key(batch))
        if isinstance(batch, Mapping) and "key" in batch:
            return _each(batch["key"])
        if isinstance(batch, Mapping) and "input_ids" in batch:
            return record_keys(batch, self.arguments(batch), decodes_labels=_decodes(unwrap(model)))
        raise ValueError(
            f"a batch that is a {type(batch).__name__} without input_ids or key needs key=(lambda batch: ...), which "
            "gives one key per record"
        )


def _each(keys: Any) -> list[Any]:
    """Numbers of a 1-D tensor are keys one by one, as Python's integers are; rows of a 2-D one are ids."""
    if isinstance(keys, (str, bytes)):
        raise TypeError(f"key must give one key per record, got one {type(keys).__name__}, {keys!r}")
    if isinstance(keys, Tensor) and keys.dim() == 1:
        return keys.tolist()  # type: ignore[no-any-return]
    return [key.item() if isinstance(key, Tensor) and key.dim() == 0 else key for key in keys]


def row_mask(batch: Any, rows: torch.Size, mask: str | Callable[[Any], Any] | None = None) -> Tensor | None:
    """Find which rows of a batch's logits are real and which are padding: a bool tensor of the shape ``rows``, or None.

    None says that there is no mask, and every row is real.

    Args:
        batch: the batch.
        rows: the shape of the logits without the classes.
        mask: the name of a field, or a function of the batch. By default the field ``attention_mask``, if there is one,
            or ``decoder_attention_mask``, where the batch has a decoder's inputs. One row per sample has no padding,
            and needs no mask.

    Raises:
        TypeError, ValueError: a mask that is no tensor of this shape. An ``attention_mask`` of another length is that
            of other positions, such as an encoder's or of audio samples.
    """
    if mask is not None:
        found = given_mask(batch, mask)
    elif len(rows) < 2:
        return None
    else:
        named = _named_fields(batch)
        decodes = "decoder_input_ids" in named or "decoder_attention_mask" in named
        found = named.get("decoder_attention_mask" if decodes else "attention_mask")
        if not isinstance(found, Tensor):
            return None
        if found.dim() > 2 and found.numel() == rows.numel():  # (records, 1, 1, length), as attention takes it
            found = found.reshape(rows)
        if found.dim() > 2:  # of pairs of positions
            return None
        if found.is_floating_point() and can_look(found) and bool((found < 0).any()):
            raise ValueError(
                "the attention_mask has negative numbers, as one that is added to scores: say by mask=(lambda batch: "
                "batch['attention_mask'] == 0) which rows are real"
            )
    if found is None:
        return None
    if found.shape != rows:
        raise ValueError(
            f"the {'mask' if mask is not None else 'attention_mask'} is {tuple(found.shape)}, the logits' rows are "
            f"{tuple(rows)}: say by mask=(lambda batch: ...) which rows are real, one value each, or by a lambda that "
            "returns None that all are"
        )
    # A tokenizer may give numbers, too: what it gives is a mask.
    return as_mask("mask", found, rows) if mask is not None else found != 0


def given_mask(batch: Any, mask: str | Callable[[Any], Any]) -> Tensor | None:
    """The mask that a field or a function of the batch gives, of whatever shape.

    Raises:
        TypeError, ValueError: the batch does not have the field, or it is no tensor.
    """
    if isinstance(mask, str):
        named = _named_fields(batch)
        if mask not in named:
            raise ValueError(f"mask={mask!r} names a field that the batch does not have")
        found = named[mask]
    else:
        found = mask(batch)
    if found is not None and not isinstance(found, Tensor):
        raise TypeError(f"a mask must be a tensor, got {type(found).__name__}")
    return found


def _named_fields(batch: Any) -> Mapping[str, Any]:
    """The fields of a batch that have names: its own, or those of the inputs in a pair (inputs, labels)."""
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Mapping):
        return batch[0]
    return batch if isinstance(batch, Mapping) else {}


def decoder_mask(batch: Any) -> Tensor | None:
    """An encoder-decoder's ``row_mask``: the ``decoder_attention_mask``, else where the labels are not -100.

    ``attention_mask`` is its encoder's.
    """
    named = _named_fields(batch)
    found = named.get("decoder_attention_mask")
    return labelled(named.get("labels")) if found is None else found


def labelled(labels: Any) -> Tensor | None:
    """Mark the class indices that are no padding: ``labels != -100``, with which collators pad.

    None for what are no class indices: floats, and what is no tensor.
    """
    return labels != -100 if isinstance(labels, Tensor) and not labels.is_floating_point() else None


def apply(model: Callable[..., Any], arguments: Any) -> Any:
    """Call ``model`` with a mapping as keywords, with a tuple as positional arguments, or with one argument."""
    if isinstance(arguments, Mapping):
        return model(**arguments)
    return model(*arguments) if isinstance(arguments, tuple) else model(arguments)


def call(model: Callable[..., Any], arguments: Any) -> Any:
    """``apply(model, arguments)`` without gradients.

    It uses ``no_grad``: tensors of ``inference_mode`` could not be used under autograd by a caller's functions.
    """
    with torch.inference_mode(False), torch.no_grad():
        return apply(model, arguments)


def call_outputs(outputs: Callable[[Any, Any], Any], output: Any, batch: Any) -> Any:
    """``outputs(output, batch)`` of a teacher: without gradients, and in evaluation mode if it has modules."""
    with evaluating(outputs), torch.inference_mode(False), torch.no_grad():
        return outputs(output, batch)


def logits_of(output: Any, whose: str = "the teacher") -> Any:
    """The logits of what a model returns: a tensor, or something that has ``logits``.

    Args:
        output: what it returned.
        whose: the model, for the error.

    Raises:
        TypeError: neither.
    """
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, Mapping) and "logits" in output:
        return output["logits"]
    raise TypeError(
        f"{whose} returned a {type(output).__name__} without logits: say by outputs=(lambda output, batch: ...) "
        "where its logits are"
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of products under autocast; None where it is off, or there is none, as on the meta device."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def device_of(model: Any) -> torch.device | None:
    """The device of a module's first weight; None for another callable, or a module without weights."""
    first = next(chain(model.parameters(), model.buffers()), None) if isinstance(model, nn.Module) else None
    return None if first is None else first.device


def move(value: Any, device: torch.device | None) -> Any:
    """``value`` with its tensors moved to ``device``: a tensor, or a tuple or mapping of them. None: as it is."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: move(item, device) for name, item in value.items()}
    return tuple(move(item, device) for item in value) if isinstance(value, tuple) else value


def check_plain(name: str, x: object) -> None:
    """Raise ``TypeError`` under ``name`` for what is no tensor whose numbers lie in memory as its strides say."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.is_nested:
        raise TypeError(
            f"{name} is a nested tensor: pass its values, (total rows, ...), or a padded tensor with a mask"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name} is a {x.layout} tensor: pass {name}.to_dense()")
    if type(x) is not Tensor and hasattr(x, "device_mesh"):
        raise TypeError(
            f"{name} is a DTensor: pass {name}.full_tensor(), or its to_local() and group= if the vocabulary is shared"
        )
    if x.is_floating_point() and x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {x.dtype}: pass {name}.float()")


def check_logits(name: str, x: object) -> Tensor:
    """``x``, where it is (..., vocabulary) logits. Raises ``TypeError`` or ``ValueError`` under ``name`` otherwise."""
    if not isinstance(x, Tensor):
        mends = {f"{name}.logits": hasattr(x, "logits"), f"torch.from_numpy({name})": type(x).__name__ == "ndarray"}
        hint = next((f": pass {mend}" for mend, fits in mends.items() if fits), "")
        raise TypeError(f"{name} must be a tensor of logits, got {type(x).__name__}{hint}")
    check_plain(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16 logits, got {x.dtype}")
    if x.dim() < 1:
        raise ValueError(f"{name} must be (..., vocabulary), got a scalar")
    if x.shape[-1] < 1:
        raise ValueError(f"{name} must have a vocabulary of at least 1, got shape {tuple(x.shape)}")
    return x


def check_classes_last(name: str, model: Any, logits: Tensor, sure: bool) -> None:
    """Raise ``ValueError`` where classes are not, or may not be, the last dimension of a model's logits.

    Args:
        name: the model's, for the error.
        model: the model. One whose last layer with a weight is a convolution has classes in dimension 1.
        logits: what it returned.
        sure: whether something else says that classes are last: labels, or the labels of a cache.
    """
    either = len(set(logits.shape[1:])) == 1  # labels of one order have the shape of the other, too
    if logits.dim() < 3 or (sure and not either):
        return
    weighted = [module for inner in modules_in(model) for module in inner.modules() if _has_weight(module)]
    last = weighted[-1] if weighted else None
    convolved = isinstance(last, _CONVOLUTIONS) and last.out_channels == logits.shape[1]
    if (logits.dim() > 3 and not sure) or convolved:
        raise ValueError(
            f"the {name}'s logits are {tuple(logits.shape)}: classes must be the last dimension"
            + (", and a convolution puts them in dimension 1" if convolved else ", which nothing says here")
            + ". Say by outputs=(lambda output, batch: output.movedim(1, -1)) where they are; without movedim if they "
            "are last"
        )


def _has_weight(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("weight"), Tensor) and not isinstance(module, _NORMS)


def check_no_sigmoid(name: str, model: Any, logits: Tensor) -> None:
    """Raise ``ValueError`` for a model whose last part is a sigmoid, if its values are those of one: no logits."""
    parts = [module for inner in modules_in(model) for module in inner.modules() if not any(module.children())]
    if parts and isinstance(parts[-1], nn.Sigmoid) and bool(((logits >= 0) & (logits <= 1)).all()):
        raise ValueError(
            f"the {name} ends in a sigmoid, and gives a probability per class: a softmax over these is no choice among "
            "classes. Leave the sigmoid out; several independent classes need a loss of your own: objective=..."
        )


def check_several_classes(name: str, logits: Tensor, batched: bool) -> None:
    """Raise ``ValueError`` for a model with one logit per sample, of which a softmax tells nothing.

    ``batched`` says whether a dimension of (n,) logits would be that of a batch: they may be one sample's, too.
    """
    if logits.dim() == 1 and batched:
        raise ValueError(
            f"the {name}'s logits are {tuple(logits.shape)}, one per sample: a softmax would be over the batch. For "
            "two classes give both: outputs=(lambda output, batch: torch.stack([torch.zeros_like(output), output], -1))"
        )
    if logits.dim() and logits.shape[-1] == 1:
        raise ValueError(
            f"the {name} has one logit, {tuple(logits.shape)}, and a softmax over it is 1 always. For two classes give "
            "both: outputs=(lambda output, batch: torch.cat([torch.zeros_like(output), output], -1))"
        )


def look_like_probabilities(x: Tensor) -> bool:
    """Whether all rows lie in [0, 1] and sum to 1, as logits hardly ever do; or to 0, as rows of padding.

    Rows that are one-hot may be either, and of a constant row the softmax is the same: they alone are no evidence.
    """
    if x.numel() == 0 or x.shape[-1] < 2:
        return False
    low, high = x.amin(-1), x.amax(-1)
    if not bool(((low >= 0) & (high <= 1)).all()):
        return False
    total = x.float().sum(-1)
    telling = (low < high) & ((x > 0) & (x < 1)).any(-1)
    # One row of few logits may sum to about 1 by chance.
    accuracy = 1e-2 if low.numel() > 1 or x.dtype.itemsize == 2 else 1e-3
    return bool(((total - 1.0).abs() < accuracy).logical_or(high == 0).all()) and bool(telling.any())


def unwrap(model: Any) -> Any:
    """What DDP, FSDP, ``DataParallel`` and ``torch.compile`` have wrapped, through any number of them."""
    while isinstance(model, nn.Module):
        inner = model._modules.get("_orig_mod")
        if inner is None and _is_torch_s(model):
            inner = model._modules.get("module") or model._modules.get("_fsdp_wrapped_module")
        if inner is None:
            return model
        model = inner
    return model


def _is_torch_s(model: nn.Module) -> bool:
    """Whether a module's class, or one that it is derived from, is PyTorch's, as DDP's and ``AveragedModel``'s are."""
    return any(kind.__module__.startswith("torch.") for kind in type(model).__mro__ if kind is not nn.Module)


def with_decoder_inputs(model: Any, arguments: Any, labels: Any) -> Any:
    """``arguments``, where an encoder-decoder would lack its decoder's inputs with those that it makes of the labels.

    Args:
        model: a module, wrapped or not.
        arguments: what it is called with. Only a mapping is added to.
        labels: the decoder's targets, if there are any.

    Raises:
        ValueError: there are labels, and the model does not say how it makes its decoder's inputs of them.
    """
    inner = unwrap(model)
    if not isinstance(arguments, Mapping) or not isinstance(labels, Tensor):
        return arguments
    if not _decodes(inner):
        return arguments
    if any(arguments.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds")):
        return arguments
    if hasattr(inner, "prepare_decoder_input_ids_from_labels"):
        ids = inner.prepare_decoder_input_ids_from_labels(labels=labels)
    else:
        ids = _shifted_right(inner, labels)
    return {**arguments, "decoder_input_ids": ids}


def _shifted_right(model: Any, labels: Tensor) -> Tensor:
    """The labels after the token that a decoder starts with, as most models that do not say make their inputs."""
    start = getattr(model.config, "decoder_start_token_id", None)
    pad = getattr(model.config, "pad_token_id", None)
    if start is None or labels.dim() != 2 or labels.is_floating_point():
        raise ValueError(
            f"a {type(model).__name__} does not say how it makes its decoder's inputs of labels (no "
            "prepare_decoder_input_ids_from_labels, no decoder_start_token_id): give decoder_input_ids"
        )
    ids = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
    return ids.masked_fill(ids == -100, start if pad is None else pad)


def is_encoder_decoder(model: Any) -> bool:
    """Whether a model's rows are its decoder's, while ``attention_mask`` is its encoder's.

    Its configuration says so, or that of the first language model inside a module that has none. A classifier on top of
    an encoder-decoder has no output embeddings, and a row per sample.
    """
    inner = unwrap(model)
    if hasattr(inner, "config") or not isinstance(inner, nn.Module):
        return _decodes(inner)
    inside: Iterator[Any] = (x for x in inner.modules() if hasattr(x, "config") and hasattr(x, "get_output_embeddings"))
    return any(_decodes(x) for x in islice((x for x in inside if x.get_output_embeddings() is not None), 1))


def _decodes(model: Any) -> bool:
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else True
    return layer is not None and bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
