"""The default keys: they cover all that the teacher is given, text alone is found by its ids, padding is no part."""

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import kdfast.cache
from kdfast import Distiller
from kdfast.cache import capture, record_keys
from kdfast.cache.capture.batches import Fields
from kdfast.cache.format.keys import make_key, make_keys
from kdfast.models import BatchFields, decoder_mask

VOCAB = 13


def text(size=3, length=5):
    ids = torch.arange(1, 1 + size * length).view(size, length) % VOCAB
    mask = (torch.arange(length) < torch.tensor([[length], [2], [3]])[:size]).long()
    return {"input_ids": ids, "attention_mask": mask}


def digests(batch, arguments=None):
    return make_keys(record_keys(batch, arguments))


def test_text_alone_is_keyed_by_its_ids():
    batch = text()
    plain = [make_key(ids[real.bool()]) for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    neutral = {
        "token_type_ids": torch.zeros_like(batch["input_ids"]),
        "position_ids": torch.arange(5).expand(3, 5),
        "use_cache": False,
        "labels": batch["input_ids"],
    }
    assert digests(batch) == plain
    assert digests({**batch, **neutral}) == plain
    assert digests({**batch, "position_ids": torch.arange(5)[None]}) == plain
    for arguments in (batch["input_ids"], (batch["input_ids"].clone(), batch["attention_mask"].bool()), batch):
        assert digests(batch, arguments) == plain
    left = {name: x.flip(1) for name, x in batch.items()}
    arrays = {name: x.numpy() for name, x in batch.items()} | {"token_type_ids": [[0] * 5] * 3}
    assert digests(arrays, arrays) == plain
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    flipped = {name: left[name] for name in batch}
    assert digests(left) == digests(flipped)


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [
        ("token_type_ids", torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[0, 1, 1, 1, 1]])),
        ("pixel_values", torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 1e-6)),
        ("decoder_input_ids", torch.tensor([[0, 7, 8]]), torch.tensor([[0, 7, 9]])),
        ("bbox", torch.zeros(1, 5, 4).long(), torch.ones(1, 5, 4).long()),
        ("inputs_embeds", torch.zeros(1, 5, 2), torch.ones(1, 5, 2)),
        ("attention_mask", torch.tensor([[1, 1, 2, 2, 2]]), torch.tensor([[1, 1, 1, 2, 2]])),
        ("attention_mask", torch.zeros(1, 1, 5, 5), torch.ones(1, 1, 5, 5)),
        ("labels", torch.tensor([[4, 5, -100]]), torch.tensor([[4, 6, -100]])),
        ("prompt", ["a"], ["b"]),
        ("task", 0, 1),
        ("task", torch.tensor(0), torch.tensor(1)),
    ],
)
def test_whatever_else_reaches_the_model_is_part_of_the_key(name, value, other):
    ids = {"input_ids": torch.arange(1, 6)[None]}
    made = [{**ids, name: x} for x in (value, other)]
    first, second = (digests(batch, batch)[0] for batch in made)
    assert len({first, second, digests(ids)[0]}) == 3
    assert "ids [1, 2, 3, 4] (5 in all), " + name in repr(record_keys(made[0], made[0])[0])


def test_labels_that_make_no_input_are_no_part_of_the_key():
    batch = text()
    plain, ids = digests(batch), batch["input_ids"]
    following = ids.roll(-1, 1)
    following[:, -1] = -100
    answers = ids.masked_fill(torch.arange(5) < 1, -100)
    for labels in (ids, answers, following, torch.tensor([4, 2, 0]), torch.full_like(ids, -100)):
        whole = {**batch, "labels": labels}
        assert digests(whole, whole) == plain


def test_a_key_does_not_depend_on_the_batch_around_a_record():
    segments = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    images = torch.arange(12.0).view(3, 4)
    for more in ({"token_type_ids": segments}, {"pixel_values": images}):
        batch = {**text(), **more}
        one = digests({name: x[1:2, : 2 if x.shape[1] == 5 else None] for name, x in batch.items()})
        assert one == digests(batch)[1:2]
    assert digests({**text(), "token_type_ids": segments})[2] == digests(text())[2]  # nothing but zeros
    halves = {**text(), "pixel_values": images.bfloat16(), "token_type_ids": segments.to(torch.uint8)}
    assert digests(halves) == digests({**text(), "pixel_values": images, "token_type_ids": segments})


def test_the_padding_of_a_decoder_is_no_part_of_the_key():
    ids = {"input_ids": torch.tensor([[5, 6]])}
    for said in ("labels", "decoder_attention_mask"):
        short = {**ids, "decoder_input_ids": torch.tensor([[0, 3]]), said: torch.tensor([[1, 1]])}
        end = -100 if said == "labels" else 0
        long = {**ids, "decoder_input_ids": torch.tensor([[0, 3, 1, 0]]), said: torch.tensor([[1, 1, end, end]])}
        assert digests(long) == digests(short)


def test_labels_of_which_a_decoder_s_inputs_are_made_are_part_of_the_key():
    ids = {"input_ids": torch.tensor([[5, 6]] * 3)}
    labels = torch.tensor([[7, 8, -100], [7, 9, -100], [7, -100, -100]])
    keys = make_keys(record_keys({**ids, "labels": labels}, decodes_labels=True))
    assert len({*keys, make_key(ids["input_ids"][0])}) == 4
    cut = {**ids, "labels": labels[:, :2]}
    assert make_keys(record_keys(cut, decodes_labels=True)) == keys  # padded less
    assert digests(cut) == digests(ids)
    config = T5Config(vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    assert make_keys(BatchFields().keys(cut, T5ForConditionalGeneration(config))) == keys


def test_what_prompts_a_decoder_is_part_of_the_key_though_it_has_no_labels():
    ids = {"input_ids": torch.tensor([[5, 6]] * 2)}
    labels = torch.tensor([[-100, -100, 9, 2]] * 2)
    batch = {**ids, "decoder_input_ids": torch.tensor([[0, 3, 8, 9], [0, 4, 8, 9]]), "labels": labels}
    assert len(set(digests(batch))) == 2
    padded = {name: nn.functional.pad(x, (0, 2), value=-100 if name == "labels" else 0) for name, x in batch.items()}
    padded["input_ids"] = ids["input_ids"]
    assert digests(padded) == digests(batch)


def test_a_decoder_sees_labels_that_are_the_encoders_ids():
    ids = torch.tensor([[5, 6, 7]] * 3)
    labels = torch.tensor([[5, 6, 7], [6, 7, 5], [-100, 6, 7]])
    assert len(set(make_keys(record_keys({"input_ids": ids, "labels": labels}, decodes_labels=True)))) == 3


def test_a_mask_with_zeros_between_tokens_is_part_of_the_key():
    """The tokens after them lie elsewhere: the model's answers are not those of the ids without a gap."""
    ids, mask = torch.tensor([[5, 6, 9, 7, 0]]), torch.tensor([[1, 1, 0, 1, 0]])
    apart = {"input_ids": ids, "attention_mask": mask}
    together = {"input_ids": torch.tensor([[5, 6, 7]])}
    farther = {"input_ids": torch.tensor([[0, 5, 6, 9, 9, 7]]), "attention_mask": torch.tensor([[0, 1, 1, 0, 0, 1]])}
    assert len({*digests(apart), *digests(together), *digests(farther)}) == 3
    less = {name: x[:, :4] for name, x in apart.items()}
    assert digests(less) == digests(apart)  # padded less
    said = {**apart, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    assert digests(said, said) == digests(together)


def test_what_cannot_be_told_apart_by_record_asks_for_a_key():
    batch = {**text(), "pixel_values": torch.zeros(40, 8)}
    with pytest.raises(ValueError, match=r"given pixel_values, a Tensor with 40 entries, for 3 records.*key=\(lambda"):
        record_keys(batch)
    with pytest.raises(ValueError, match=r"given input 0, a dict with 2 entries, for 3 records"):
        record_keys(text(), ({"a": 1, "b": 2},))


class Sees(nn.Module):
    """A model of ids and an image: one answer a token."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.look, self.head = nn.Embedding(VOCAB, 6), nn.Linear(4, 6), nn.Linear(6, VOCAB)

    def forward(self, input_ids, attention_mask, pixel_values):
        return self.head(self.embed(input_ids).cumsum(1) + self.look(pixel_values)[:, None])


def test_one_question_about_eight_images_is_eight_records(tmp_path):
    torch.manual_seed(1)
    question = {"input_ids": torch.tensor([[3, 4, 5]]).expand(8, 3), "attention_mask": torch.ones(8, 3).long()}
    loader = [{**question, "pixel_values": torch.randn(8, 4)}]
    teacher, student = Sees(), Sees()
    nn.init.normal_(student.head.weight)
    report = capture(teacher, loader, tmp_path, vocab_size=VOCAB, codec="topk", k=VOCAB, progress=False,
                     value_dtype="float32")  # fmt: skip
    assert (report.records, report.duplicates) == (8, 0)
    cache = kdfast.cache.open(tmp_path)
    options = {"temperature": 1.0, "kd_weight": 1.0, "ce_weight": 0.0}
    batch = {name: x.flip(0) for name, x in loader[0].items()}
    cached, live = (Distiller(student, t, **options).step(batch) for t in (cache, teacher))
    torch.testing.assert_close(cached, live, rtol=1e-5, atol=1e-6)
    with pytest.raises(KeyError, match=r"the record of ids \[3, 4, 5\] \(3 in all\), pixel_values is not in"):
        Distiller(student, cache, **options).step({**batch, "pixel_values": batch["pixel_values"] + 1})


def test_one_source_with_two_targets_is_two_records_of_a_t5(tmp_path):
    torch.manual_seed(2)
    config = T5Config(vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    teacher = T5ForConditionalGeneration(config)
    batch = {
        "input_ids": torch.tensor([[3, 4, 5]] * 2),
        "decoder_input_ids": torch.tensor([[0, 7, 8, 2], [0, 9, 7, 6]]),
    }
    report = capture(teacher, [batch], tmp_path, vocab_size=VOCAB, codec="dense", progress=False)
    assert (report.records, report.rows) == (2, 8)
    cache = kdfast.cache.open(tmp_path)
    with torch.no_grad():
        want = teacher.eval()(**batch).logits.log_softmax(-1)
    for key, rows in zip(record_keys(batch), want, strict=True):
        torch.testing.assert_close(cache[key].values, rows, rtol=0.05, atol=0.05)


def test_labels_mark_the_rows_that_are_stored():
    """Collators pad with -100 alone: a record with another negative label is stored with it, and known again by it."""
    labels = torch.tensor([[5, -1, 7, -100]])
    batch = {"input_ids": torch.tensor([[1, 2]]), "labels": labels}
    (stored,) = decoder_mask(batch)
    (marks,) = Fields(targets=lambda batch: batch["labels"]).marks(batch, ["a"])
    assert any(mark.rows == 3 and torch.equal(mark.targets, labels[0, stored]) for mark in marks)
