"""Documents of every kind become the same windows; what is one document, or none, is named; memory is flat."""

import tracemalloc
from collections import UserDict

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import kdfast.cache
from kdfast.cache import capture_lm, windows
from kdfast.cache.capture.corpus import cut

WORDS = ["<s>", "<unk>", "the", "cat", "sat", "on", "a", "mat", "user", ":"]
TEXTS = ["the cat sat on a mat", "a mat", "", "the mat sat"]
IDS = [[0, 2, 3, 4, 5, 6, 7], [0, 6, 7], [0], [0, 2, 7, 4]]
TEMPLATE = "{{ bos_token }}{% for m in messages %} {{ m['role'] }} : {{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>", chat_template=TEMPLATE)


def lists(found):
    return [ids.tolist() for ids in found]


def frames(rows):
    yield from rows  # a stream of rows, as a data set of Hugging Face gives them


def test_documents_of_every_kind_are_cut_alike(tokenizer):
    want = [[0, 2, 3, 4], [5, 6, 7], [0, 6, 7], [0], [0, 2, 7, 4]]
    kinds = {
        "texts": TEXTS,
        "a stream": iter(TEXTS),
        "ids": IDS,
        "tensors": [torch.tensor(ids) for ids in IDS],
        "arrays": [np.array(ids, np.uint16) for ids in IDS],
        "rows of texts": frames({"text": text, "source": "web"} for text in TEXTS),
        "rows of ids": frames({"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in IDS),
        "other mappings": [UserDict({"text": text}) for text in TEXTS],
    }
    for name, documents in kinds.items():
        assert lists(windows(tokenizer, documents, 4)) == want, name
    assert lists(windows(tokenizer, [{"text": "a", "body": t} for t in TEXTS], 4, field="body")) == want


def test_chats_go_through_the_template(tokenizer):
    chat = [{"role": "user", "content": "the cat"}]
    for documents in ([chat], [{"messages": chat}], [{"messages": chat, "text": None}]):
        assert lists(windows(tokenizer, documents, 9)) == [[0, 8, 9, 2, 3]]


def test_windows_may_overlap_and_each_begin_with_bos(tokenizer):
    assert lists(windows(tokenizer, TEXTS[:1], 4, stride=2)) == [[0, 2, 3, 4], [3, 4, 5, 6], [5, 6, 7]]
    assert lists(windows(tokenizer, TEXTS[:2], 4, bos=True)) == [[0, 2, 3, 4], [0, 5, 6, 7], [0, 6, 7]]
    assert lists(windows(tokenizer, IDS[:1], 4, bos=True, stride=2)) == [[0, 2, 3, 4], [0, 4, 5, 6], [0, 6, 7]]
    assert lists(windows(tokenizer, [range(6)], 6, bos=True)) == [[0, 1, 2, 3, 4, 5]]
    corpus = cut(tokenizer, TEXTS, 4, bos=True)
    assert (corpus.longest, corpus.bounds) == (4, (0, 7))
    assert lists(corpus[1::2]) == lists(corpus)[1::2]
    for wrong in ({"stride": 0}, {"stride": 5}, {"stride": 4, "bos": True}):
        with pytest.raises(ValueError, match=r"stride must lie between 1 and \d, the ids of a window"):
            windows(tokenizer, TEXTS, 4, **wrong)
    with pytest.raises(ValueError, match="max_length must be at least 2 with bos=True, got 1"):
        windows(tokenizer, TEXTS, 1, bos=True)
    with pytest.raises(ValueError, match="bos=True needs a tokenizer with a bos_token_id"):
        windows(None, IDS, 4, bos=True)


@pytest.mark.parametrize(
    ("documents", "error", "message"),
    [
        ("the cat", TypeError, r"one str: give a list of documents, \[text\]"),
        (b"the cat", TypeError, "one bytes"),
        ({"train": ["the cat"]}, TypeError, "a mapping with train: give one of these"),
        (torch.arange(5), TypeError, r"a Tensor of shape \(5,\): give a list of documents, \[ids\]"),
        ([1, 2, 3], TypeError, "document 0 is the number 1: the ids of one document are a list of their own"),
        (3, TypeError, "must be an iterable of texts, chats or ids, got a int"),
        (["the", None], TypeError, "document 1 must be a text, a chat or ids, got NoneType"),
        ([b"the"], TypeError, "document 0 must be a text, a chat or ids, got bytes"),
        ([torch.rand(3)], TypeError, "document 0 must be 1-D integer ids, got float32"),
        ([[[1, 2]]], TypeError, r"document 0 must be 1-D integer ids, got int64 of shape \(1, 2\)"),
        ([[5, -100]], ValueError, r"document 0: ids must lie in \[0, 2\*\*31\), got -100 to 5"),
        ([{"text": None}], ValueError, "document 0: there is none of text, messages, input_ids, only text"),
        ([{"body": "a"}], ValueError, "none of text, messages, input_ids, only body: say by field="),
        ([{"text": "a", "input_ids": [1]}], ValueError, "there are text and input_ids: say by field="),
    ],
)
def test_what_is_no_list_of_documents_is_named(tokenizer, documents, error, message):
    with pytest.raises(error, match=message):
        windows(tokenizer, documents, 4)


def test_a_named_field_that_lacks_is_named(tokenizer):
    for row, message in (({"text": "a"}, "there is no 'body', only text"), ({"body": None}, "'body' is null")):
        with pytest.raises(ValueError, match=f"document 0: {message}"):
            windows(tokenizer, [row], 4, field="body")


def test_a_corpus_takes_four_bytes_a_token():
    documents = [list(range(20))] * 5000
    cut(None, documents[:10], 20)
    tracemalloc.start()
    corpus = cut(None, documents, 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(corpus) == 5000
    assert peak < 2 * 5000 * (20 * 4 + 16)  # arrays that grow are copied; it was 1,191 bytes a document


# ---- models that suit ----------------------------------------------------------------------------------------------


def llama(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=12, **sizes, **options))


def capture(model, path, documents=IDS, **options):
    defaults = {"max_length": 4, "batch_size": 2, "codec": "dense", "progress": False}
    return capture_lm(model, None, documents, path, **{**defaults, **options})


def test_models_that_see_what_they_would_predict_are_refused(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    masked = BertForMaskedLM(BertConfig(vocab_size=12, **sizes))
    with pytest.raises(ValueError, match=r"BertForMaskedLM is no causal model, it is a masked.*causal=False"):
        capture(masked, tmp_path / "a")
    assert capture(masked, tmp_path / "a", causal=False).records == 5
    bert = BertLMHeadModel(BertConfig(vocab_size=12, is_decoder=True, **sizes))
    assert capture(bert, tmp_path / "b").records == 5
    encoder = BertLMHeadModel(BertConfig(vocab_size=12, initializer_range=0.5, **sizes))
    with pytest.raises(ValueError, match="BertLMHeadModel is no causal model, its logits change with the tokens after"):
        capture(encoder, tmp_path / "c")
    with pytest.raises(TypeError, match="without logits"):
        capture(masked.bert, tmp_path / "e")
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="no causal model, it is an encoder with a decoder"):
        capture(t5, tmp_path / "d")


def test_a_wrapped_encoder_is_one(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    for model in (BertForMaskedLM(BertConfig(vocab_size=12, **sizes)), llama()):
        wrapped = torch.nn.DataParallel(model)
        if isinstance(model, BertForMaskedLM):
            with pytest.raises(ValueError, match="BertForMaskedLM is no causal model"):
                capture(wrapped, tmp_path / "bert")
        else:
            assert capture(wrapped, tmp_path / "llama").records == 5


@pytest.mark.parametrize("length", [2, 4])
def test_a_mask_of_another_length_than_its_window_is_named(tmp_path, length):
    """Neither are rows taken for masked that it does not speak of, nor is what is too long cut off."""
    with pytest.raises(ValueError, match=rf"mask must give one bool per id of a window, 3, got \({length},\)"):
        capture(llama(), tmp_path, [[1, 2, 3]], mask=lambda ids: torch.ones(length, dtype=torch.bool))
    report = capture(llama(), tmp_path, [[1, 2, 3]], mask=lambda ids: [True, False, True])
    assert (report.records, report.rows) == (1, 2)


def test_the_padding_of_tokenised_rows_is_no_text(tokenizer):
    rows = [
        {"input_ids": [4, 5, 0, 0], "attention_mask": [1, 1, 0, 0]},
        {"input_ids": torch.tensor([0, 6]), "attention_mask": torch.tensor([0, 1])},
        {"input_ids": [7], "attention_mask": [1]},
    ]
    assert lists(windows(tokenizer, rows, 8)) == [[4, 5], [6], [7]]
    with pytest.raises(ValueError, match=r"document 0: input_ids are \(2,\), their attention_mask is \(3,\)"):
        windows(tokenizer, [{"input_ids": [4, 5], "attention_mask": [1, 1, 1]}], 8)


def test_sizes_and_messages_of_another_kind_are_named(tokenizer):
    with pytest.raises(TypeError, match=r"max_length must be an int, got 8.0"):
        windows(tokenizer, [[1]], 8.0)
    with pytest.raises(TypeError, match=r"stride must be an int, got 2.5"):
        windows(tokenizer, [[1]], 8, stride=2.5)
    with pytest.raises(ValueError, match="document 0: each message of a chat has a role, got from, value"):
        windows(tokenizer, [[{"from": "human", "value": "a"}]], 8)


def test_ids_and_windows_beyond_the_model_s_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"have the id 12, the model's embedding 12 rows.*resize_token_embeddings"):
        capture(llama(), tmp_path, [[3, 12]])
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=12, n_positions=3, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"windows of 4 tokens, and the model has 3 positions \(transformer.wpe\)"):
        capture(gpt, tmp_path)
    assert capture(gpt, tmp_path, max_length=3).records == 7
    assert capture(llama(max_position_embeddings=3), tmp_path / "rotary").records == 5


@pytest.mark.parametrize("codec", ["dense", "prototype"])
def test_a_vocabulary_without_the_model_s_padding(tmp_path, codec):
    model = llama().eval()
    capture(model, tmp_path, vocab_size=10, codec=codec)
    cache = kdfast.cache.open(tmp_path)
    assert cache.info.vocab_size == 10
    if codec == "dense":
        with torch.no_grad():
            want = model(torch.tensor([IDS[1]])).logits[0, :, :10].log_softmax(-1)
        torch.testing.assert_close(cache[torch.tensor(IDS[1])].values, want, rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="vocab_size must be at most the model's 12, got 13"):
        capture(model, tmp_path / "more", vocab_size=13)
    with pytest.raises(ValueError, match="'hidden' stores no logits: its vocab_size is 12, got 10"):
        capture(model, tmp_path / "hidden", vocab_size=10, codec="hidden")


def test_overlapping_windows_are_records_of_their_own(tmp_path, tokenizer):
    capture_lm(
        llama(), tokenizer, TEXTS[::3], tmp_path, max_length=4, batch_size=2, stride=2, bos=True, codec="dense",
        progress=False,
    )  # fmt: skip
    cache = kdfast.cache.open(tmp_path)
    parts = windows(tokenizer, TEXTS[::3], 4, stride=2, bos=True)
    assert len(cache.gather(parts)) == sum(map(len, parts)) == cache.info.rows
