"""capture_lm: the shift, the padding, the windows and the tokenizer of a tiny random Llama."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import kdfast.cache
from kdfast import kd_loss
from kdfast.cache import CacheMismatchError, capture_lm, output_layer, windows
from kdfast.cache.capture.lm import next_tokens
from kdfast.cache.codecs.auto import SMALL_VOCAB

WORDS = ["<s>", "<unk>", *["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran"]]
TEXTS = ["the cat sat on a mat and then it ran", "a mat", "", "it ran and then the cat sat on the mat a cat", "cat"]
IDS = [torch.arange(2, 9), torch.tensor([5]), torch.tensor([3, 4, 3, 4, 3]), torch.arange(11, 2, -1)]


def make_model(vocab_size):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        made.lm_head.weight *= 20  # logits of some size
    return made


@pytest.fixture(scope="module")
def model():
    return make_model(len(WORDS) + 4)


@pytest.fixture(scope="module")
def large_model():
    """With a vocabulary for which "auto" does not store whole rows."""
    return make_model(SMALL_VOCAB + 1)


@pytest.fixture
def tokenizer():
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>", model_max_length=8)


def run(model, documents, path, tokenizer=None, **options):
    defaults = {"max_length": 5, "batch_size": 3, "codec": "dense", "progress": False}
    return capture_lm(model, tokenizer, documents, path, **{**defaults, **options})


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids[None].long()).logits[0]


def run_exactly(model, documents, path, **options):
    """A capture that keeps every column in float32; and the log-probabilities of a record."""
    size = model.config.vocab_size
    report = run(model, documents, path, codec="topk", k=size, value_dtype="float32", **options)
    cache = kdfast.cache.open(path)

    def stored(ids):
        labels = cache[ids]
        values = labels.values.view(-1, size)
        return torch.zeros_like(values).scatter(1, labels.ids.view(-1, size).long(), values)

    return report, cache, stored


def test_a_row_is_the_distribution_of_the_next_token(tmp_path, model):
    report, cache, stored = run_exactly(model, IDS, tmp_path)
    parts = windows(None, IDS, 5)
    assert [part.tolist() for part in parts] == [
        [2, 3, 4, 5, 6],
        [7, 8],
        [5],
        [3, 4, 3, 4, 3],
        [11, 10, 9, 8, 7],
        [6, 5, 4, 3],
    ]
    assert report == (2, 0, len(parts), sum(map(len, parts)))
    for ids in parts:
        rows, targets = stored(ids), torch.tensor([*ids[1:].tolist(), -100])
        torch.testing.assert_close(rows, logits(model, ids).log_softmax(1), rtol=1e-4, atol=1e-5)
        cache.check_targets([ids], [targets])
        # Row i is what a student's shifted loss compares with token i + 1.
        student = torch.randn(len(ids), rows.shape[1])
        assert kd_loss(student, rows, targets, ce_weight=1.0).isfinite() or len(ids) == 1


def test_what_is_stored_does_not_depend_on_the_padding(tmp_path, model):
    for size in (1, 2, 6):
        run(model, IDS, tmp_path / str(size), batch_size=size)
    alone, *padded = (kdfast.cache.open(tmp_path / str(size)) for size in (1, 2, 6))
    for cache in padded:
        assert set(cache) == set(alone)
        for key in alone:
            span = alone[key].values.amax(1) - alone[key].values.amin(1)
            assert ((cache[key].values - alone[key].values).abs().amax(1) <= span / 254 + 1e-4).all()


def test_texts_are_cut_into_windows_without_overlap(tmp_path, model, tokenizer):
    run(model, TEXTS, tmp_path, tokenizer)
    cache = kdfast.cache.open(tmp_path)
    parts = windows(tokenizer, TEXTS, 5)
    assert torch.cat(parts).tolist() == [i for text in TEXTS for i in tokenizer(text)["input_ids"]]
    assert max(map(len, parts)) == 5
    assert len(cache.gather(parts)) == sum(map(len, parts))
    assert sum(part[0] == 0 for part in parts) == len(TEXTS)


def test_the_policy_for_special_tokens_is_part_of_the_fingerprint(tmp_path, model, tokenizer):
    run(model, TEXTS, tmp_path, tokenizer)
    plain = windows(tokenizer, TEXTS, 5, add_special_tokens=False)
    assert not any((part == 0).any() for part in plain)
    with pytest.raises(CacheMismatchError, match=r"teacher='[0-9a-f]{32} tokenizer [0-9a-f]{32}', but"):
        run(model, TEXTS, tmp_path, tokenizer, add_special_tokens=False)
    # Truncation and padding that a call has set are not.
    tokenizer(TEXTS[0], truncation=True, max_length=2)
    assert run(model, TEXTS, tmp_path, tokenizer).batches == 0


def test_another_tokenizer_or_model_is_refused(tmp_path, model, tokenizer):
    run(model, TEXTS, tmp_path, tokenizer)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = rules["model"]["vocab"]
    vocabulary["cat"], vocabulary["mat"] = vocabulary["mat"], vocabulary["cat"]
    swapped = Tokenizer.from_str(json.dumps(rules))
    other = PreTrainedTokenizerFast(tokenizer_object=swapped, bos_token="<s>", unk_token="<unk>")
    with pytest.raises(CacheMismatchError, match="tokenizer"):
        run(model, TEXTS, tmp_path, other)
    with pytest.raises(CacheMismatchError, match="another"):
        run(model, TEXTS, tmp_path, tokenizer, teacher="another")


def mean_cross_entropy(model, parts):
    losses = [
        torch.nn.functional.cross_entropy(logits(model, ids)[:-1], ids[1:].long(), reduction="none") for ids in parts
    ]
    return torch.cat(losses).mean().item()


def test_a_retokenised_or_shifted_corpus_is_noticed(tmp_path, model, tokenizer):
    run(model, TEXTS, tmp_path, tokenizer)
    cache = kdfast.cache.open(tmp_path)
    with pytest.raises(KeyError):
        cache.gather(windows(tokenizer, TEXTS, 5, add_special_tokens=False))
    parts = windows(tokenizer, TEXTS, 5)
    cache.check_targets(parts, [next_tokens(ids) for ids in parts])
    for wrong in ([ids.long() for ids in parts], [next_tokens(ids).roll(1) for ids in parts]):
        with pytest.raises(CacheMismatchError, match="shifted, tokenised otherwise, or another"):
            cache.check_targets(parts, wrong)
    assert cache.info.cross_entropy == pytest.approx(mean_cross_entropy(model, parts), rel=1e-4)


def test_a_capture_resumes_where_it_was_stopped(tmp_path, model):
    run(model, IDS, tmp_path / "whole", batch_size=2, block_rows=3, shard_bytes=80)
    calls = 0

    def fail(*_):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of memory")

    hook = model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(model, IDS, tmp_path / "again", batch_size=2, block_rows=3, shard_bytes=80)
    hook.remove()
    assert run(model, IDS, tmp_path / "again", batch_size=2, block_rows=3, shard_bytes=80).skipped == 1
    whole, again = ({f.name: f.read_bytes() for f in (tmp_path / d).glob("*.safetensors")} for d in ("whole", "again"))
    assert whole == again


def test_a_mask_of_a_window_s_ids(tmp_path, model):
    _, cache, stored = run_exactly(model, IDS, tmp_path, mask=lambda ids: ids >= 5)
    for ids in windows(None, IDS, 5):
        cache.check_targets([ids], [next_tokens(ids)[ids >= 5]])
        torch.testing.assert_close(stored(ids), logits(model, ids).log_softmax(1)[ids >= 5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [16, 8])
def test_hidden_states_serve_the_model_s_own_logits(tmp_path, model, bits):
    run(model, IDS, tmp_path, codec="hidden", bits=bits)
    cache = kdfast.cache.open(tmp_path, head=output_layer(model))
    assert cache.info.config["width"] == 16
    for ids in windows(None, IDS, 5):
        want = logits(model, ids)
        got = cache[ids].to_dense().values
        assert (got - want).abs().max() < 0.03 * want.abs().max()
        student = torch.randn_like(want)
        for divergence in ("reverse_kl", "jsd"):
            ours, exact = (
                kd_loss(student, teacher, divergence=divergence, temperature=2.0) for teacher in (cache[ids], want)
            )
            torch.testing.assert_close(ours, exact, rtol=0.05, atol=0.01)


def test_auto_takes_hidden_states_where_the_divergence_needs_them(tmp_path, large_model):
    run(large_model, IDS, tmp_path, codec="auto", divergence="logit_mse")
    info = kdfast.cache.open(tmp_path).info
    assert (info.codec, info.config["head"]) == ("hidden", output_layer(large_model).fingerprint)


def test_auto_takes_what_holds_no_near_student_back(tmp_path, large_model):
    found = {}
    for name, options in {"plain": {}, "reverse": {"divergence": "reverse_kl"}}.items():
        run(large_model, IDS, tmp_path / name, codec="auto", **options)
        head = output_layer(large_model) if name == "reverse" else None
        found[name] = kdfast.cache.open(tmp_path / name, head=head).info
    assert [info.codec for info in found.values()] == ["sample", "hidden"]
    assert found["reverse"].floor.kl < 1e-5  # the rounding to bfloat16
    assert found["plain"].floor is None


def test_auto_takes_prototypes_of_a_large_vocabulary_for_a_far_student(tmp_path, large_model):
    far = {"divergence": "reverse_kl", "temperatures": (2.0,), "student_kl": 2.5}
    run(large_model, IDS, tmp_path, codec="auto", **far)
    info = kdfast.cache.open(tmp_path).info
    assert (info.codec, info.temperatures) == ("prototype", (2.0,))
    assert info.why == info.codec_reason
    assert "best such student per byte" in info.codec_reason
    assert info.asset_bytes == sum(path.stat().st_size for path in tmp_path.glob("shapes-*.safetensors")) > 0


def test_a_model_that_does_more_than_its_output_layer_is_refused(tmp_path, model):
    hook = model.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
    try:
        with pytest.raises(ValueError, match="output layer of LlamaForCausalLM does not return hidden @ weight"):
            run(model, IDS, tmp_path, codec="hidden")
    finally:
        hook.remove()
    model.config.logit_scale = 1.5  # which this model's forward does not look at
    try:
        assert output_layer(model).scale == 1.0
    finally:
        del model.config.logit_scale


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"documents": TEXTS}, "documents that are texts need a tokenizer"),
        ({"max_length": 0}, "max_length must be positive, got 0"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
    ],
)
def test_bad_arguments_are_named(tmp_path, model, options, message):
    with pytest.raises(ValueError, match=message):
        run(model, **{"documents": IDS, "path": tmp_path, **options})


def test_a_model_without_an_output_layer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"a Linear has neither get_output_embeddings\(\) nor config.vocab_size"):
        run(torch.nn.Linear(2, 2), IDS, tmp_path)
    with pytest.raises(ValueError, match=r"a Linear has no get_output_embeddings\(\)"):
        output_layer(torch.nn.Linear(2, 2))
