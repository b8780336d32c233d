"""Checkpoints: damage is named, older files are read, and PyTorch alone reads them, too."""

import io
import random

import pytest
import torch

from kdfast import Distiller
from kdfast.distill import CheckpointError, load_best
from kdfast.distill.checkpoint import load, save
from support.distillers import data, states_equal, student

CONTENT = {"version": 1, "checked": True, "weights": torch.arange(12.0), "name": "run"}


def written(path, content=CONTENT):
    save(path, content)
    return bytearray(path.read_bytes())


def test_every_flipped_bit_is_damage(tmp_path):
    path = tmp_path / "last.pt"
    whole = written(path)
    assert load(path).keys() == {"version", "weights", "name"}
    bits = range(8 * len(whole))
    for bit in [*random.Random(0).sample(bits, 100), *bits[-8 * 80 :: 9]]:
        path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
        with pytest.raises(CheckpointError, match=r"last.pt is .*resume=False, or another folder"):
            load(path)


def test_every_cut_is_damage(tmp_path):
    path = tmp_path / "last.pt"
    whole = written(path)
    for length in [0, 1, 3, 4, 30, *range(64, len(whole), 211), len(whole) - 47, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"last.pt is"):
            load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match=r"last.pt is damaged"):
        load(path)


def test_an_older_checkpoint_is_read_and_its_parts_are_checked(tmp_path):
    path = tmp_path / "last.pt"
    buffer = io.BytesIO()
    torch.save({"version": 1, "weights": torch.arange(64.0)}, buffer)
    path.write_bytes(buffer.getvalue())
    assert torch.equal(load(path)["weights"], torch.arange(64.0))
    at = buffer.getvalue().index(torch.arange(64.0).numpy().tobytes()) + 100
    path.write_bytes(buffer.getvalue()[:at] + b"\x55" + buffer.getvalue()[at + 1 :])
    with pytest.raises(CheckpointError, match=r"damaged: .*data/0"):
        load(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"best.pt"):
        load_best(tmp_path / "best.pt")


def test_the_best_student_is_a_plain_state_dict(tmp_path):
    model, other = student(), student(3)
    options = {"eval_loader": [data(16)], "metrics": ["accuracy"], "progress": False}
    Distiller(model, folder=tmp_path).fit([data(8)], epochs=1, **options)
    other.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True))
    states_equal(other.state_dict(), model.state_dict())
    states_equal(load_best(tmp_path), model.state_dict())
    assert torch.load(tmp_path / "last.pt", weights_only=True)["student"].keys() == model.state_dict().keys()
    old = {"version": 1, "student": model.state_dict(), "record": {"epoch": 1}}
    torch.save(old, tmp_path / "best.pt")
    states_equal(load_best(tmp_path), model.state_dict())


def test_a_new_run_has_no_best_student_of_the_old_one(tmp_path):
    def fit(**options):
        Distiller(student(), folder=tmp_path).fit([data(8)], epochs=1, progress=False, **options)

    fit(eval_loader=[data(16)], metrics=["accuracy"])
    assert (tmp_path / "best.pt").exists()
    with pytest.raises(ValueError, match="another eval_loader"):
        fit()
    fit(eval_loader=[data(16)], metrics=["accuracy"])
    assert (tmp_path / "best.pt").exists()
    fit(resume=False)
    assert not (tmp_path / "best.pt").exists()


def test_a_damaged_last_checkpoint_stops_the_run_and_stays(tmp_path):
    def fit(**options):
        return Distiller(student(), folder=tmp_path).fit([data(8)], epochs=1, progress=False, **options)

    fit()
    whole = bytearray((tmp_path / "last.pt").read_bytes())
    whole[len(whole) // 2] ^= 1
    (tmp_path / "last.pt").write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"last.pt is damaged: its checksum does not fit"):
        fit()
    assert (tmp_path / "last.pt").read_bytes() == whole
    assert len(fit(resume=False)) == 1
