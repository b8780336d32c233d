"""A capture that several processes share holds what one process's does, however often their number changes."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import kdfast.cache
from kdfast.cache.capture.ranks import Ranks, capture_share
from support import ROOT

VOCAB = 300
EXAMPLE = ROOT / "examples" / "capture_torchrun.sh"
CORPUS = [torch.randint(0, VOCAB, (n,), dtype=torch.int32) for n in [7, 3, 9, 9, 1, 5, 8, 8, 8, 2, 6]]


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


def run(teacher, path, ranks, corpus=CORPUS):
    options = {"codec": "topk", "k": 4, "max_length": 9, "batch_size": 2, "progress": False, "teacher": "t"}
    return capture_share(teacher, None, corpus, path, ranks, **options)


def labels(path):
    cache = kdfast.cache.open(path)
    assert len(cache) == len(CORPUS)
    return cache.gather(CORPUS)


class Killed(BaseException):
    pass


@pytest.fixture
def alone(monkeypatch):
    """Processes one after another, who need not wait."""
    module = importlib.import_module("kdfast.cache.capture.ranks")
    monkeypatch.setattr(module.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(module.dist, "barrier", lambda: None)
    monkeypatch.setattr(module.dist, "destroy_process_group", lambda: None)


def test_shares_make_up_the_corpus(teacher, tmp_path, alone):
    expected = run(teacher, tmp_path / "one", Ranks())
    reports = [run(teacher, tmp_path / "three", Ranks(rank, 3)) for rank in range(3)]
    assert expected.records == len(CORPUS)
    assert kdfast.cache.open(tmp_path / "three").info.duplicates == 0
    assert sum(report.skipped for report in reports) >= 0
    assert [sum(report.records for report in reports), *(report.known for report in reports)] == [len(CORPUS), 0, 0, 0]
    one, three = labels(tmp_path / "one"), labels(tmp_path / "three")
    assert torch.equal(one.ids, three.ids)
    assert torch.allclose(one.values.float(), three.values.float(), atol=1e-2)


def test_another_number_of_processes_resumes(teacher, tmp_path, alone, monkeypatch):
    """What the first ones have left unsealed is sealed, and nobody runs the teacher over it again."""
    calls = 0
    forward = type(teacher).forward

    def killed(self, *arguments, **options):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Killed
        return forward(self, *arguments, **options)

    monkeypatch.setattr(type(teacher), "forward", killed)
    with pytest.raises(Killed):
        run(teacher, tmp_path, Ranks(0, 2), CORPUS + CORPUS)
    assert list(tmp_path.glob("*.journal"))
    for rank in range(3):
        run(teacher, tmp_path, Ranks(rank, 3))
    assert not list(tmp_path.glob("*.journal"))
    assert kdfast.cache.open(tmp_path).info.duplicates == 0
    labels(tmp_path)
    before = calls
    assert [run(teacher, tmp_path, Ranks(rank, 3)).records for rank in range(3)] == [0, 0, 0]
    assert calls == before


def test_salvage_leaves_alone_who_resumes(teacher, tmp_path):
    writer = kdfast.cache.Writer(tmp_path, vocab_size=4, codec="topk", k=2, writer="0of2")
    writer.__enter__()
    writer.add("a", torch.randn(2, 4))
    writer.__exit__(Killed, Killed(), None)
    assert kdfast.cache.salvage(tmp_path, keep=["0of2"]) == 0
    assert kdfast.cache.salvage(tmp_path, keep=["1of2"]) == 1


def test_torchrun(teacher, tmp_path):
    """The example, from a model's folder and files of text to a cache; started again it has nothing to do."""
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")
    teacher.save_pretrained(tmp_path / "model")
    fast.save_pretrained(tmp_path / "model")
    texts = [" ".join(f"w{int(i)}" for i in ids) for ids in CORPUS]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[1:]))
    (tmp_path / "one.txt").write_text(texts[0])
    folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PROCESSES": "2"}
    assert shutil.which("torchrun", path=environment["PATH"])
    for added in (len(CORPUS), 0):
        files = [tmp_path / name for name in ("model", "cache", "some.jsonl", "one.txt")]
        done = subprocess.run(
            [EXAMPLE, *files], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        counts = [int(line.split(":")[1].split()[0]) for line in done.stdout.splitlines() if line.startswith("process")]
        assert len(counts) == 2
        if added == 0:
            assert sum(counts) == 0
        labels(tmp_path / "cache")
