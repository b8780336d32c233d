"""Sequences, classes and distributions of the teacher: what it wrote becomes examples, their likelihood the loss."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from kdfast import Distiller, SoftLabels
from kdfast.distill import KD, Step
from kdfast.recipes import (
    HardTargets,
    pad_sequences,
    sequence_level,
    soft_targets,
    teacher_sequences,
)
from support.recipes import make_step

VOCAB, EOS, PAD = 6, 5, 0


class Bigram(nn.Module):
    """Next-token logits by the last token."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCAB, VOCAB, dtype=dtype))

    def forward(self, input_ids, attention_mask=None):
        return self.table[input_ids]


def greedy(model, length=4):
    def generate(input_ids, attention_mask=None):
        ids = input_ids
        for _ in range(length):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
        return ids

    return generate


def test_examples_are_cut_after_the_end_and_prompts_are_ignored():
    written = torch.tensor([[0, 1, 2, 3, EOS, 0, 0], [1, 2, 3, 4, 4, 4, 4]])
    prompts = {"input_ids": written[:, :3], "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    first, second = teacher_sequences(lambda **_: written, [prompts], eos=EOS)
    assert first["input_ids"].tolist() == [1, 2, 3, EOS]
    assert first["labels"].tolist() == [-100, -100, 3, EOS]
    assert second["input_ids"].tolist() == [1, 2, 3, 4, 4, 4, 4]
    assert second["labels"].tolist() == [-100] * 3 + [4] * 4


def test_padding_is_masked_and_ignored():
    examples = [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in (2, 4)]
    batch = pad_sequences(examples, pad=9)
    assert batch["input_ids"].tolist() == [[0, 1, 9, 9], [0, 1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[0, 1, -100, -100], [0, 1, 2, 3]]


def test_several_sequences_of_a_prompt():
    prompts = {"input_ids": torch.tensor([[1], [2]])}
    written = torch.tensor([[1, 3], [1, 4], [2, 3], [2, EOS]])
    examples = teacher_sequences(lambda **_: written, [prompts], eos=EOS)
    assert [example["input_ids"].tolist() for example in examples] == written.tolist()


def test_the_loss_is_the_negative_log_likelihood_of_what_was_written():
    student = Bigram(torch.float64)
    examples = teacher_sequences(greedy(Bigram()), [{"input_ids": torch.tensor([[1, 2], [3, 4]])}], eos=EOS)
    batch = pad_sequences(examples, PAD)
    ours = sequence_level()(Step(student(batch["input_ids"]), None, batch["labels"], batch))
    log_q = [
        F.log_softmax(student.table[example["input_ids"][i]], -1)[example["input_ids"][i + 1]]
        for example in examples
        for i in range(1, len(example["input_ids"]) - 1)
    ]
    assert torch.allclose(ours, -torch.stack(log_q).mean())


def test_over_all_that_the_teacher_may_write_it_is_the_sequences_kl():
    """Every continuation of two tokens, weighted by its probability, against the sum over sequences of p log(p / q)."""
    teacher, student = (Bigram(torch.float64) for _ in range(2))
    pairs = torch.tensor(list(itertools.product(range(VOCAB), repeat=2)))
    ids = torch.cat([torch.full((len(pairs), 1), 2), pairs], 1)

    def log_likelihood(model):
        steps = model(ids)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
        return steps.sum((1, 2))

    log_p, log_q = log_likelihood(teacher).detach(), log_likelihood(student)
    expected = (log_p.exp() * (log_p - log_q)).sum()
    labels = torch.cat([torch.full((len(ids), 1), -100), ids[:, 1:]], 1)
    objective = KD(shift=True, kd_weight=0.0, ce_weight=1.0, row_weight=log_p.exp()[:, None].expand(ids.shape))
    step = Step(student(ids), teacher(ids).detach(), labels)
    counted = 2 * len(ids)
    ours = objective(step) * counted
    entropy = -(log_p.exp() * log_p).sum()
    assert torch.allclose(ours - entropy, expected)
    (a,), (b,) = (torch.autograd.grad(x, student.table, retain_graph=True) for x in (ours, expected))
    assert torch.allclose(a, b)


def test_word_level_kd_on_the_same_sequences():
    teacher, student = Bigram(torch.float64), Bigram(torch.float64)
    examples = teacher_sequences(greedy(teacher), [{"input_ids": torch.tensor([[1, 2], [3, 4]])}], eos=EOS)
    batch = pad_sequences(examples, PAD)
    ids, labels = batch["input_ids"], batch["labels"]
    step = Step(student(ids), teacher(ids).detach(), labels, batch)
    counted = labels[:, 1:] != -100
    log_q, log_p = ((x[:, :-1][counted] / 2.0).log_softmax(-1) for x in (step.student, step.teacher))
    word = 4.0 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    ours = sequence_level(word_weight=0.7, temperature=2.0)(step)
    assert torch.allclose(ours, sequence_level()(step) + 0.7 * word)


def test_a_student_writes_what_its_teacher_writes():
    torch.manual_seed(2)
    teacher, student = Bigram(), Bigram()
    prompts = [{"input_ids": torch.arange(VOCAB)[:, None]}]
    examples = teacher_sequences(greedy(teacher), prompts, eos=EOS)
    loader = DataLoader(examples, 3, collate_fn=pad_sequences)
    distiller = Distiller(student, objective=sequence_level(), lr=0.1, inputs=lambda batch: batch["input_ids"])
    distiller.fit(loader, epochs=40, progress=False)
    for example in teacher_sequences(greedy(student), prompts, eos=EOS):
        assert any(torch.equal(example["input_ids"], wanted["input_ids"]) for wanted in examples)


def test_transformers_generate_runs_in_evaluation_mode():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=EOS,
    )
    teacher = LlamaForCausalLM(config).train()
    modes = []
    teacher.model.register_forward_pre_hook(lambda module, arguments: modes.append(module.training))
    prompts = {
        "input_ids": torch.tensor([[0, 0, 7, 8], [9, 10, 11, 12]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    options = {"max_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2, "pad_token_id": 0}
    examples = teacher_sequences(teacher, [prompts], eos=EOS, **options)
    assert len(examples) == 4
    assert modes
    assert not any(modes)
    assert teacher.training
    assert [example["input_ids"][:2].tolist() for example in examples] == [[7, 8], [7, 8], [9, 10], [9, 10]]
    history = Distiller(LlamaForCausalLM(config), teacher, objective=sequence_level(word_weight=1.0), lr=0.01).fit(
        [pad_sequences(examples)], epochs=4, progress=False
    )
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ([[1, 2]], r"of 2 prompts of 1 ids the teacher must return \(n \* 2, > 1\), got \(1, 2\)"),
        ([[1], [2]], r"got \(2, 1\)"),
        ([[3, 3], [2, 3]], "these begin otherwise"),
    ],
)
def test_what_is_no_continuation(written, message):
    prompts = {"input_ids": torch.tensor([[1], [2]])}
    with pytest.raises(ValueError, match=message):
        teacher_sequences(lambda **_: torch.tensor(written), [prompts], eos=EOS)


def test_misuse():
    with pytest.raises(TypeError, match="Bigram has no generate"):
        teacher_sequences(Bigram(), [], eos=EOS)
    with pytest.raises(ValueError, match="word_weight must not be negative"):
        sequence_level(word_weight=-1.0)


@pytest.mark.parametrize("make", [lambda z: z, SoftLabels.dense])
def test_hard_targets_are_the_teachers_classes(make):
    step = make_step()
    ours = HardTargets()(replace(step, teacher=make(step.teacher)))
    assert torch.allclose(ours, F.cross_entropy(step.student, step.teacher.argmax(-1)), rtol=1e-6)
    with pytest.raises(ValueError, match="needs a teacher"):
        HardTargets()(replace(step, teacher=None))


def test_soft_targets_need_no_labels():
    step = make_step(labels=False)
    log_q, log_p = ((x / 4.0).log_softmax(-1) for x in (step.student, step.teacher))
    expected = 16.0 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert torch.allclose(soft_targets()(step), expected)
