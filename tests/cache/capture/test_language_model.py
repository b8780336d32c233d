"""A .gguf file's weights come out unpacked, as the gguf package itself dequantises them."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from kdfast.cache.capture.language_model import load_causal_model, load_tokenizer

WIDTH, INNER, HEADS, VOCAB = 64, 96, 4, 96


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A Llama of one layer, its matrices in blocks of 4 and 8 bits."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(f"<{i}>" if i < 3 else chr(30 + i) for i in range(VOCAB - 1)), "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    random = np.random.default_rng(0)
    for name, shape in {
        "token_embd.weight": (VOCAB, WIDTH),
        "blk.0.attn_q.weight": (WIDTH, WIDTH),
        "blk.0.attn_k.weight": (WIDTH // 2, WIDTH),
        "blk.0.attn_v.weight": (WIDTH // 2, WIDTH),
        "blk.0.attn_output.weight": (WIDTH, WIDTH),
        "blk.0.ffn_gate.weight": (INNER, WIDTH),
        "blk.0.ffn_up.weight": (INNER, WIDTH),
        "blk.0.ffn_down.weight": (WIDTH, INNER),
        "output_norm.weight": (WIDTH,),
        "blk.0.attn_norm.weight": (WIDTH,),
        "blk.0.ffn_norm.weight": (WIDTH,),
    }.items():
        values = random.normal(size=shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.F32
        if len(shape) > 1:
            kind = gguf.GGMLQuantizationType.Q8_0 if "token" in name else gguf.GGMLQuantizationType.Q4_1
            values = gguf.quantize(values, kind)
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def unpacked(path):
    gguf = pytest.importorskip("gguf")
    return {t.name: np.array(gguf.dequantize(t.data, t.tensor_type)) for t in gguf.GGUFReader(path).tensors}


def half_split(weight, heads):
    """Rows of rotary projections: llama.cpp has pairs side by side, transformers the two halves of a head."""
    return weight.reshape(heads, -1, 2, WIDTH).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_that_the_gguf_package_unpacks(file, dtype, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        model = load_causal_model(file, dtype)
    weights = unpacked(file)
    weights["blk.0.attn_q.weight"] = half_split(weights["blk.0.attn_q.weight"], HEADS)
    weights["blk.0.attn_k.weight"] = half_split(weights["blk.0.attn_k.weight"], HEADS // 2)
    layer = model.model.layers[0]
    found = {
        "token_embd": model.model.embed_tokens,
        "output_norm": model.model.norm,
        "blk.0.attn_norm": layer.input_layernorm,
        "blk.0.ffn_norm": layer.post_attention_layernorm,
        **{f"blk.0.attn_{name}": getattr(layer.self_attn, f"{name}_proj") for name in "qkv"},
        "blk.0.attn_output": layer.self_attn.o_proj,
        **{f"blk.0.ffn_{name}": getattr(layer.mlp, f"{name}_proj") for name in ("gate", "up", "down")},
    }
    assert {f"{name}.weight" for name in found} == set(weights)
    for name, module in found.items():
        assert type(module.weight) is torch.nn.Parameter
        assert torch.equal(module.weight, torch.from_numpy(weights[f"{name}.weight"]).to(dtype)), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.training
    assert "packed" not in caplog.text  # as transformers warns of what it did not do


def test_gradients_reach_the_unpacked_weights(file):
    model = load_causal_model(file, torch.float32)
    model(torch.tensor([[1, 5, 9]])).logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_tokenizer_comes_out_of_the_same_file(file):
    tokenizer = load_tokenizer(file)
    assert tokenizer.vocab_size == VOCAB
    assert tokenizer.eos_token_id == 2
    assert tokenizer("abc", add_special_tokens=False).input_ids == [VOCAB - 1, ord("c") - 30]


@pytest.mark.parametrize("load", [load_causal_model, load_tokenizer])
def test_a_missing_file_is_named(load, tmp_path, monkeypatch):
    for module in ("gguf", "accelerate"):
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.gguf"):
        load(tmp_path / "none.gguf")


@pytest.mark.parametrize("module", ["gguf", "accelerate"])
def test_a_missing_package_is_named(module, tmp_path, monkeypatch):
    for name in ("gguf", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None if name == module else ModuleType(name))
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ImportError, match=rf'a \.gguf file needs the package {module}: pip install "kdfast\[lm\]"'):
        load_causal_model(tmp_path / "a.gguf")


def test_without_a_dtype_the_weights_are_floats(file):
    assert load_causal_model(file).dtype in (torch.float32, torch.float16, torch.bfloat16)
