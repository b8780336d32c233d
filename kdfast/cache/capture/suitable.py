"""Whether a language model suits a corpus: its ids and lengths fit, and its rows do not see what they predict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kdfast.cache.capture.corpus import Corpus
from kdfast.models import call, device_of, evaluating, logits_of, unwrap

__all__ = ["check_causal", "check_fits"]

TRIED = 64  # tokens of the first window
LOOKS_AHEAD = 0.02  # of the largest logit: quantised layers, whose scales depend on all tokens, change less
POSITIONS = ("wpe", "position_embeddings", "embed_positions")  # tables of positions, by the names that models give them


def check_fits(model: Any, corpus: Corpus) -> None:
    """Raise ``ValueError`` for ids outside the model's embedding, and windows longer than its table of positions."""
    model = unwrap(model)
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    size = getattr(getattr(embedding, "weight", None), "shape", (None,))[0]
    largest = corpus.bounds[1]
    if size is not None and largest >= size:
        raise ValueError(
            f"the documents have the id {largest}, the model's embedding {size} rows: it is another tokenizer's, or "
            "tokens were added to it, for which model.resize_token_embeddings(len(tokenizer)) makes room"
        )
    config = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    tables = [name for name, part in _modules(model) if isinstance(part, nn.Embedding) and name.endswith(POSITIONS)]
    if most is not None and tables and corpus.longest > most:
        raise ValueError(
            f"there are windows of {corpus.longest} tokens, and the model has {most} positions ({tables[0]}): give a "
            f"max_length of at most {most}"
        )


def check_causal(model: Any, corpus: Corpus, run: Callable[..., Any]) -> None:
    """Raise ``ValueError`` if a row's logits depend on the tokens after it, as those of an encoder do.

    Such rows say nothing of the next token, which they have seen. The last token of a window is exchanged to find out.

    Args:
        model: the language model.
        corpus: its windows.
        run: calls the model with ``input_ids`` and ``attention_mask``.
    """
    inner = unwrap(model)
    name = type(inner).__name__
    reason = "it is a masked language model" if name.endswith("ForMaskedLM") else ""
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        reason = "it is an encoder with a decoder"
    window = next((ids for ids in corpus[:100] if len(ids) > 1), None)
    if not reason and _may_look_ahead(inner) and window is not None:
        ids = window[:TRIED].long().to(device_of(model))
        other = ids.clone()
        other[-1] = ids[0] if ids[0] != ids[-1] else (ids[-1] + 1) % max(2, corpus.bounds[1] + 1)
        batch = {"input_ids": torch.stack([ids, other]), "attention_mask": torch.ones_like(ids).expand(2, -1)}
        with evaluating(model):
            one, two = logits_of(call(run, batch))[:, :-1].float()
        if bool(((one - two).abs() > LOOKS_AHEAD * one.abs().amax()).any()):
            reason = "its logits change with the tokens after them"
    if reason:
        raise ValueError(
            f"{name} is no causal model, {reason}: a row would not be the distribution of the next token. capture() "
            "takes such models with targets and a mask of its own; causal=False stores the rows as they are"
        )


def _may_look_ahead(model: Any) -> bool:
    """Whether a model may be an encoder: unless its name says that it is causal, and its kind is no encoder's.

    A BERT is bidirectional as a ``BertLMHeadModel`` too, if its configuration does not make it a decoder.
    """
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return True
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
    except ImportError:
        return False
    return getattr(getattr(model, "config", None), "model_type", None) in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _modules(model: Any) -> list[tuple[str, Any]]:
    return list(model.named_modules()) if isinstance(model, nn.Module) else []
