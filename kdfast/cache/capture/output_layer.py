"""``output_layer``: what turns a Hugging Face model's last hidden states into its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdfast.labels.head import OutputLayer
from kdfast.labels.output_module import find_output_module
from kdfast.labels.running import Run, run_to_output_layer
from kdfast.models import device_of, evaluating, is_encoder_decoder, unwrap

__all__ = ["output_layer", "vocabulary_of"]


def output_layer(model: Any, **inputs: Any) -> OutputLayer:
    """The output layer of a Hugging Face model, which turns its last hidden states into logits.

    It includes the model's logit scale and softcap, which are measured: the model is run once, on two tokens. Weight
    and bias are the model's own, but detached: the layer is for caches, whose labels are not trained. For a student,
    whose output layer is, use ``kdfast.Head.of(model, **inputs)``.

    Args:
        model: a module with ``get_output_embeddings``. Its ``base_model`` gives the last hidden states.
        inputs: what to run the model on instead, where token ids alone do not do.

    Raises:
        TypeError: an output layer that is adapted (LoRA), quantised or of another kind.
        ValueError: the model does not say what its output layer is; or it does more than that with its last hidden
            states (BERT transforms them first), or more with its logits than a scale and a softcap.
    """
    if find_output_module(model) is None:
        raise ValueError(f"a {type(model).__name__} has no get_output_embeddings() with a weight")
    inputs = inputs or _two_tokens(model)
    base, source = _sources(model)
    seen: list[Tensor | None] = []
    hook = source.register_forward_hook(lambda module, args, output: seen.append(_last_hidden(output)))
    try:
        with evaluating(model), torch.inference_mode(False), torch.no_grad(), _no_autocast(model):
            run = run_to_output_layer(model, None, (), inputs)
            if base is not None:
                seen = [_last_hidden(base(**inputs))]  # as a capture calls it
    finally:
        hook.remove()
    scale = run.scale * _factor(model, run, seen)
    bias = None if run.bias is None else run.bias.detach()
    return OutputLayer(run.weight.detach(), bias, scale=scale, softcap=run.softcap)


def vocabulary_of(model: Any) -> int:
    """The number of a language model's logits.

    Raises:
        ValueError: the model does not say it.
    """
    weight = getattr(find_output_module(model), "weight", None)
    if isinstance(weight, Tensor):
        return weight.shape[0]
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is None:
        raise ValueError(f"a {type(model).__name__} has neither get_output_embeddings() nor config.vocab_size")
    return int(size)


def _two_tokens(model: Any) -> dict[str, Tensor]:
    ids = torch.tensor([[0, 1]], device=device_of(model))
    return {"input_ids": ids, **({"decoder_input_ids": ids} if is_encoder_decoder(model) else {})}


def _no_autocast(model: Any) -> Any:
    device = device_of(model)
    return torch.autocast("cpu" if device is None else device.type, enabled=False)


def _sources(model: Any) -> tuple[nn.Module | None, nn.Module]:
    """The base model, where there is one, and the module whose output is looked at where there is none: the decoder."""
    inner = unwrap(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # PEFT's base_model is another thing
    base = getattr(inner, "base_model", inner)
    if base is not inner:
        return base, base
    return None, inner.get_decoder() if hasattr(inner, "get_decoder") else inner


def _last_hidden(output: Any) -> Tensor | None:
    found = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
    return found if isinstance(found, Tensor) else None


def _factor(model: Any, run: Run, seen: list[Tensor | None]) -> float:
    """What the last hidden states are multiplied by before the output layer (T5's tied one): 1, as a rule.

    Raises:
        ValueError: they are not merely multiplied.
    """
    given = seen[0].float() if len(seen) == 1 and seen[0] is not None else None
    taken = run.hidden.float()
    if given is not None and given.shape == taken.shape:
        largest, accuracy = given.abs().argmax(), 16 * torch.finfo(run.hidden.dtype).eps
        factor = float(taken.reshape(-1)[largest] / given.reshape(-1)[largest])
        factor = 1.0 if abs(factor - 1.0) <= accuracy else factor
        close = (taken - factor * given).abs() <= accuracy * taken.abs().amax()
        if factor > 0 and (factor == 1.0 or run.bias is None) and bool(close.all()):
            return factor
    raise ValueError(
        f"a {type(unwrap(model)).__name__} does more to its last hidden states than its output layer and a scale: "
        "kdfast.Head.of(model, **inputs) takes the hidden states that enter the layer"
    )
