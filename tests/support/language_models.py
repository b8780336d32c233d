"""Tiny random language models of transformers' architectures, for what they do around their output layers."""

from __future__ import annotations

import torch
import transformers as hf
from torch import nn

__all__ = ["ARCHITECTURES", "VOCAB", "WIDTH", "make", "token_ids"]

VOCAB, WIDTH = 40, 16
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MARIAN = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
_MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4}
_GEMMA_3N = {
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 4,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "num_hidden_layers": 2,
    "layer_types": ["full_attention", "sliding_attention"],
    "activation_sparsity_pattern": [0.0, 0.0],
    "altup_num_inputs": 2,
    "altup_active_idx": 0,
}
_RECURRENT = {**_SIZES, "num_hidden_layers": 3, "logits_soft_cap": 0.7}
# What their logits are of hidden @ weight.T: by name the model class, its configuration, and the scale and softcap.
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", _SIZES, 1.0, None),
    "tied": ("LlamaForCausalLM", {**_SIZES, "tie_word_embeddings": True}, 1.0, None),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 1, "n_head": 2}, 1.0, None),
    "opt": ("OPTForCausalLM", {**_SIZES, "ffn_dim": 16, "word_embed_proj_dim": WIDTH}, 1.0, None),
    "phi": ("PhiForCausalLM", _SIZES, 1.0, None),  # with a bias
    "gemma2": ("Gemma2ForCausalLM", {**_SIZES, "final_logit_softcapping": 0.7}, 1.0, 0.7),
    "gemma3n": ("Gemma3nForCausalLM", {**_SIZES, **_GEMMA_3N, "final_logit_softcapping": 0.7}, 1.0, 0.7),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        {**_SIZES, "num_hidden_layers": 3, "logits_soft_cap": 0.7},
        1.0,
        0.7,
    ),
    "cohere": ("CohereForCausalLM", {**_SIZES, "logit_scale": 3.0}, 3.0, None),
    "cohere2": ("Cohere2ForCausalLM", _SIZES, 0.0625, None),
    "granite": ("GraniteForCausalLM", {**_SIZES, "logits_scaling": 6.0}, 1 / 6.0, None),
    "hyperclovax": ("HyperCLOVAXForCausalLM", {**_SIZES, "logits_scaling": 0.3}, 0.3, None),
    "falcon_h1": ("FalconH1ForCausalLM", {**_SIZES, **_MAMBA, "lm_head_multiplier": 0.25}, 0.25, None),
    "bert": ("BertForMaskedLM", _SIZES, 1.0, None),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"vocab_size": VOCAB, "dim": WIDTH, "hidden_dim": 16, "n_heads": 2, "n_layers": 1},
        1.0,
        None,
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        | {"decoder_start_token_id": 0},
        1.0,
        None,
    ),
    "marian": ("MarianMTModel", {"vocab_size": VOCAB, "d_model": WIDTH, **_MARIAN}, 1.0, None),
}


def make(name: str) -> nn.Module:
    """A model in evaluation mode, with logits of some size."""
    class_name, options, _, _ = ARCHITECTURES[name]
    model_class = getattr(hf, class_name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2.0)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias += torch.randn(1, VOCAB)
    return model


def token_ids(rows: int = 2, length: int = 5, seed: int = 0) -> torch.Tensor:
    """(rows, length) ids of no special token."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
