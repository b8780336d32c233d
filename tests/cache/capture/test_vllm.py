"""capture_vllm: what a vLLM server says of a known toy distribution comes into the cache as that distribution."""

import json
import re
import socket
import sys
import threading

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import kdfast.cache
from kdfast.cache import CacheError, CacheMismatchError, capture_lm, capture_vllm
from kdfast.cache.capture.fingerprint import with_tokenizer
from kdfast.cache.capture.lm import next_tokens
from kdfast.cache.capture.vllm import AHEAD, _in_order
from support.caches import contents
from support.vllm import FIXTURES, PICKY, VOCAB, WINDOWS, K, Replay, log_probs, serving

testing = pytest.importorskip("typer.testing")


@pytest.fixture
def replay():
    return Replay()


@pytest.fixture
def url(replay):
    with serving(replay) as url:
        yield url


@pytest.fixture
def tokenizer(tmp_path):
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0")


def run(url, path, documents=WINDOWS, **options):
    defaults = {"vocab_size": VOCAB, "k": K, "teacher": "toy", "max_length": 5, "value_dtype": "float32"}
    return capture_vllm(url, documents, path, **{**defaults, "progress": False, **options})


def elements_of(text):
    return json.loads(text)["choices"][0]["prompt_logprobs"]


def editing(edit):
    """A change of the last window's answer: ``edit`` gets its prompt_logprobs."""

    def change(prompt, text):
        answer = json.loads(text)
        if prompt[:-1] == WINDOWS[-1].tolist():
            answer["choices"][0]["prompt_logprobs"] = edit(answer["choices"][0]["prompt_logprobs"])
        return json.dumps(answer)

    return change


def assert_is_the_toy_s_top(labels, ids, k=K):
    """Row by row the likeliest tokens after each of ``ids``, those that are possible, and the mass of the others."""
    for row, dist in enumerate(log_probs(ids)):
        entries = slice(*labels.offsets[row : row + 2])
        top, expected = dist.topk(min(k, int(dist.isfinite().sum())))
        assert labels.ids[entries].tolist() == expected.tolist()
        torch.testing.assert_close(labels.values[entries], top)
        torch.testing.assert_close(labels.tails[0, row].exp(), 1 - top.exp().sum(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_the_labels_are_the_distribution_after_each_token(tmp_path, url, suffix):
    report = run(url + suffix, tmp_path)
    assert (report.records, report.rows, report.duplicates) == (5, 15, 0)
    cache = kdfast.cache.open(tmp_path)
    assert (cache.info.codec, cache.info.temperatures, cache.info.teacher) == ("topk", (1.0,), "toy")
    for ids in WINDOWS:
        assert_is_the_toy_s_top(cache[ids], ids)
    cache.check_targets(WINDOWS, map(next_tokens, WINDOWS))


def test_the_prompt_s_own_token_is_an_entry_only_among_the_likeliest(tmp_path, url, replay):
    sizes = set()
    replay.change = lambda prompt, text: sizes.update(map(len, elements_of(text)[1:])) or text
    run(url, tmp_path)
    assert sizes == {K, K + 1}  # the recorded answers have both kinds
    labels = kdfast.cache.open(tmp_path).gather(WINDOWS)
    assert labels.offsets.diff().tolist() == [3 if token == PICKY else K for ids in WINDOWS for token in ids]


@pytest.mark.parametrize("written", ["null", "-Infinity"])
def test_impossible_tokens_are_no_entries(tmp_path, url, replay, written):
    run(url, tmp_path / "a")
    replay.change = lambda prompt, text: text.replace("-9999.0", written)
    run(url, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_student_finds_the_labels_as_it_does_those_of_capture_lm(tmp_path, url, tokenizer):
    class Model(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return type("Output", (), {"logits": torch.stack([log_probs(ids) for ids in input_ids])})

        config = type("Config", (), {"vocab_size": VOCAB})

    texts = [" ".join(f"w{token}" for token in ids) for ids in WINDOWS]
    run(url, tmp_path / "a", texts, tokenizer=tokenizer)
    options = {"max_length": 5, "batch_size": 2, "teacher": "toy", "codec": "topk", "k": K, "value_dtype": "float32"}
    capture_lm(Model(), tokenizer, texts, tmp_path / "b", **options, progress=False)
    ours, theirs = (kdfast.cache.open(tmp_path / name) for name in "ab")
    assert list(ours) == list(theirs)
    assert ours.info.teacher == theirs.info.teacher == with_tokenizer("toy", tokenizer, True)
    for ids in WINDOWS:
        assert torch.equal(ours[ids].ids, theirs[ids].ids)
        torch.testing.assert_close(ours[ids].tails.exp(), theirs[ids].tails.exp(), atol=1e-6, rtol=0)
        ours.check_targets([ids], [next_tokens(ids)])
        theirs.check_targets([ids], [next_tokens(ids)])


def test_the_report_says_what_is_left_out(tmp_path, url):
    report = run(url, tmp_path)
    rows = torch.cat([log_probs(ids).exp().sort(descending=True).values[:, :K].sum(1) for ids in WINDOWS])
    assert report.mean_mass == pytest.approx(float(rows.mean()), abs=1e-6)
    # Of rows that have two tokens after them, so that the report can tell another alignment.
    labels = [kdfast.cache.open(tmp_path)[ids, 0, max(0, len(ids) - 2)] for ids in WINDOWS]
    hits = [
        token in part.ids[slice(*part.offsets[row : row + 2])]
        for part, ids in zip(labels, WINDOWS, strict=True)
        for row, token in enumerate(ids[1:-1])
    ]
    assert report.missing_targets == pytest.approx(1 - sum(hits) / len(hits))
    assert "stored as one tail mass per row" in " ".join(report.lines())


# ---- order, stops and retries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [2, 32])
def test_the_files_do_not_depend_on_the_order_of_the_answers(tmp_path, url, replay, concurrency):
    run(url, tmp_path / "one", concurrency=1, block_rows=4)
    second = threading.Event()

    def hold_the_first(prompt, text):
        if prompt[:-1] == WINDOWS[0].tolist():
            assert second.wait(60)
        elif prompt[:-1] == WINDOWS[1].tolist():
            second.set()
        return text

    replay.change = hold_the_first
    run(url, tmp_path / "many", concurrency=concurrency, block_rows=4)
    assert second.is_set()
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_capture_resumes_where_it_was_stopped(tmp_path, url, replay, concurrency):
    run(url, tmp_path / "whole", block_rows=4)
    replay.change = lambda prompt, text: "{}" if prompt[:-1] == WINDOWS[3].tolist() else text
    with pytest.raises(CacheError, match="window 3: "):
        run(url, tmp_path / "cut", concurrency=concurrency, block_rows=4)
    replay.change = lambda prompt, text: text
    replay.prompts.clear()
    report = run(url, tmp_path / "cut", concurrency=1, block_rows=4)
    assert replay.prompts == [[*ids.tolist(), 0] for ids in WINDOWS[3:]]
    assert (report.records, report.duplicates) == (2, 3)
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")
    replay.prompts.clear()
    assert run(url, tmp_path / "cut").records == 0
    assert replay.prompts == []


def test_what_an_error_left_can_be_salvaged(tmp_path, url, replay):
    replay.change = lambda prompt, text: "{}" if prompt[:-1] == WINDOWS[2].tolist() else text
    with pytest.raises(CacheError, match="window 2: "):
        run(url, tmp_path)
    assert kdfast.cache.salvage(tmp_path) == 2
    assert_is_the_toy_s_top(kdfast.cache.open(tmp_path)[WINDOWS[0]], WINDOWS[0])


def test_a_text_that_occurs_twice_is_asked_for_once(tmp_path, url, replay):
    report = run(url, tmp_path, [WINDOWS[1], WINDOWS[0], WINDOWS[1], WINDOWS[0]], concurrency=1)
    assert replay.prompts == [[*ids.tolist(), 0] for ids in (WINDOWS[1], WINDOWS[0])]
    assert (report.records, report.duplicates) == (2, 2)


def test_few_answers_wait_to_be_written():
    taken = []
    results = _in_order(lambda number: -number, (taken.append(i) or i for i in range(100)), 3)
    assert next(results) == 0
    assert len(taken) == AHEAD * 3 + 1
    assert list(results) == [-i for i in range(1, 100)]


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_busy_server_is_asked_again(tmp_path, url, replay, status, monkeypatch):
    slept = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", slept.append)
    replay.failures = [(status, {"Retry-After": "7"}, "busy"), (status, {}, "busy")]
    run(url, tmp_path, WINDOWS[:1])
    assert len(replay.prompts) == 3
    assert slept == [7, 1.0]
    assert_is_the_toy_s_top(kdfast.cache.open(tmp_path)[WINDOWS[0]], WINDOWS[0])


def test_retries_end(tmp_path, url, replay):
    replay.failures = [(503, {}, "still busy")] * 2
    with pytest.raises(CacheError, match=r"window 0: .*/v1/completions answers HTTP 503: still busy"):
        run(url, tmp_path, WINDOWS[:1], retries=1)
    assert len(replay.prompts) == 2


def test_no_server(tmp_path):
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=re.escape(f"no answer from {url}/v1/models")):
            run(url, tmp_path / "cache", retries=0)
    assert not (tmp_path / "cache").exists()


def test_the_key_is_sent(tmp_path, url, replay):
    run(url, tmp_path, WINDOWS[:1], api_key="secret")
    assert replay.headers[0]["Authorization"] == "Bearer secret"


# ---- what is refused ------------------------------------------------------------------------------------------------

WRAPPED = (FIXTURES / "refused.json").read_text()


@pytest.mark.parametrize("body", [WRAPPED, json.dumps({"object": "error", **json.loads(WRAPPED)["error"]})])
def test_the_server_s_message_is_passed_on(tmp_path, url, replay, body):
    replay.failures = [(400, {}, body)]
    message = r"window 0: .*/v1/completions answers HTTP 400: Requested prompt logprobs of 13, .* max allowed: 4"
    with pytest.raises(CacheError, match=message):
        run(url, tmp_path, WINDOWS[:1])
    assert len(replay.prompts) == 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda elements: None, r"window 4: the answer has no list choices\[0\].prompt_logprobs"),
        (lambda elements: elements[:-1], "window 4: prompt_logprobs has 2 elements for a prompt of 3 tokens"),
        (lambda elements: [None, *elements], "window 4: prompt_logprobs has 4 elements for a prompt of 3 tokens"),
        (lambda elements: [None, None, elements[2]], "window 4: position 1: no entries"),
        (lambda elements: [None, {"the": -1.0}, elements[2]], "window 4: position 1: .*'the' is not a token's id"),
        # Each element where the one before it belongs, as if they spoke of the next token.
        (
            lambda elements: [None, elements[2], elements[1]],
            r"window 4: position 1: the prompt's token 11 is not among",
        ),
        (
            lambda elements: [None, elements[1], dict(list(elements[2].items())[:2])],
            "window 4: position 2: [12] entries besides the prompt's own token, where 4 were asked for",
        ),
        (
            lambda elements: [None, elements[1], {**elements[2], "8": {"logprob": -9.0}, "9": {"logprob": -9.0}}],
            "window 4: position 2: [56] entries besides the prompt's own token, where 4 were asked for",
        ),
        (
            lambda elements: [None, elements[1], rename_the_second(elements[2], str(VOCAB))],
            "window 4: row 1: id 13 is outside the vocabulary of 13",
        ),
        (
            lambda elements: [None, elements[1], {**elements[2], "0": {"logprob": 3.0}}],
            "window 4: row 1: a log-probability of 3",
        ),
    ],
)
def test_a_broken_answer_is_named(tmp_path, url, replay, edit, message):
    replay.change = editing(edit)
    with pytest.raises(CacheError, match=message):
        run(url, tmp_path)


def rename_the_second(element, token):
    return {token if entry["rank"] == 2 else name: entry for name, entry in element.items()}


def test_what_is_not_json(tmp_path, url, replay):
    replay.change = lambda prompt, text: "<html>"
    with pytest.raises(CacheError, match=r"window 0: .* answers with what is not JSON: '<html>'"):
        run(url, tmp_path, WINDOWS[:1])


@pytest.mark.parametrize(
    ("served", "model", "message"),
    [
        (["a", "b"], "c", "there is no model 'c': it serves a, b"),
        (["a", "b"], None, r"model=\.\.\. is needed: it serves a, b"),
        ([], None, r"model=\.\.\. is needed: it serves none"),
        (None, None, "is not a list of models"),
    ],
)
def test_the_models_are_listed(tmp_path, url, replay, served, model, message):
    replay.models = json.dumps({"data": None if served is None else [{"id": name} for name in served]})
    with pytest.raises(CacheError, match=message):
        run(url, tmp_path / "cache", model=model)
    assert not (tmp_path / "cache").exists()
    assert not replay.prompts


@pytest.mark.parametrize(("context", "fits"), [(7, True), (6, False)])
def test_a_window_must_fit_into_the_context(tmp_path, url, replay, context, fits):
    replay.models = replay.models.replace('"max_model_len": 64', f'"max_model_len": {context}')
    if fits:
        assert run(url, tmp_path).records == 5
    else:
        with pytest.raises(CacheError, match=r"a window of 5 tokens, .* takes a context of 7; .* max_model_len 6"):
            run(url, tmp_path)
        assert not replay.prompts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must lie between 1 and vocab_size 13, got 0"),
        ({"k": 14}, "got 14"),
        ({"teacher": ""}, "teacher must be a text"),
        ({"concurrency": 0}, "concurrency and timeout must be positive"),
        ({"timeout": 0}, "concurrency and timeout must be positive"),
        ({"retries": -1}, "retries not negative"),
        ({"vocab_size": 12}, r"window 2: ids from 0 to 12 are not of a vocabulary of 12"),
        ({"documents": ["a text"]}, "need a tokenizer"),
    ],
)
def test_bad_arguments(tmp_path, url, replay, options, message):
    with pytest.raises(ValueError, match=message):
        run(url, tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_another_teacher_s_cache(tmp_path, url, replay):
    run(url, tmp_path)
    with pytest.raises(CacheMismatchError, match="teacher='other'"):
        run(url, tmp_path, teacher="other")


def test_a_url_without_a_scheme(tmp_path):
    with pytest.raises(ValueError, match="url must begin with http:// or https://, got 'localhost:8000'"):
        run("localhost:8000", tmp_path)


def test_without_requests(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "requests", None)
    with pytest.raises(CacheError, match="needs the package requests"):
        run("http://127.0.0.1:1", tmp_path)


# ---- the command ----------------------------------------------------------------------------------------------------


def invoke(*arguments):
    from kdfast.cli.app import app

    return testing.CliRunner().invoke(app, ["cache", "capture-vllm", *map(str, arguments)])


def test_the_command_prints_the_bias(tmp_path, url, replay, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = [" ".join(f"w{token}" for token in ids) for ids in WINDOWS]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[:3]))
    for i, text in enumerate(texts[3:]):
        (tmp_path / f"{i}.txt").write_text(text)
    arguments = [url, tmp_path / "a.jsonl", tmp_path / "0.txt", tmp_path / "1.txt", "--out", tmp_path / "cache"]
    arguments += ["--tokenizer", tmp_path / "tokenizer", "--vocab-size", VOCAB, "--teacher", "toy", "--max-length", 5]
    result = invoke(*arguments, "--k", K, "--option", "block_rows=4")
    assert result.exit_code == 0, result.output
    for expected in ("* 5 records, 15 rows, 3.8 entries per row", "of the teacher's probability on average"):
        assert expected in result.output
    assert len(kdfast.cache.open(tmp_path / "cache")) == 5
    replay.failures = [(400, {}, WRAPPED)]
    result = invoke(*arguments, "--k", K, "--out", tmp_path / "other")
    assert result.exit_code == 1
    assert "Requested prompt logprobs of 13" in " ".join(result.output.split())
