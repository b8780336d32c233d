"""The examples of recipes run, and their students learn from their teachers."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from support import ROOT

FOLDER = ROOT / "examples" / "recipes"


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads that wait for each other at every small step take many times as long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(name, capsys):
    """The text that an example prints, and the numbers in its last lines."""
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    text = capsys.readouterr().out
    return text, [
        float(x) for line in text.splitlines() for x in re.findall(r"-?\d+\.\d+", line) if "refused" not in line
    ]


# Each margin is half of what the worst of four seeds left.
@pytest.mark.parametrize(
    ("name", "least", "gain"),
    [
        ("cross_domain_text", 0.45, 0.01),
        ("recommendation", 0.3, 0.01),
        ("segmentation", 0.6, 0.02),
        ("translation", 0.4, 0.05),
    ],
)
def test_a_distilled_student_is_better_than_one_alone(name, least, gain, capsys):
    _, (teacher, alone, distilled) = run(name, capsys)
    assert distilled > max(least, alone + gain)
    assert teacher > alone


def test_a_gaussian_teacher_is_worth_more_than_thirty_labels(capsys):
    _, (teacher, alone, distilled) = run("regression", capsys)
    assert distilled < min(alone - 0.1, teacher + 0.1)


def test_a_detector_finds_objects_and_their_boxes(capsys):
    text, (_, pixels) = run("detection", capsys)
    assert [int(x) > 80 for x in re.findall(r"(\d+)% of objects", text)] == [True, True]
    assert pixels < 0.6


def test_weights_find_the_rare_class(capsys):
    _, numbers = run("class_weights", capsys)
    plain, weighted = numbers[:3], numbers[3:]
    assert weighted[2] > plain[2] + 0.4
    assert min(weighted[:2]) > 0.7


def test_adapters_learn_and_merge(capsys):
    text, (_, before, adapted, merged, share) = run("lora", capsys)
    assert adapted > before + 0.4
    assert merged == adapted
    assert share < 10, text


def test_noise_that_the_teacher_has_not_seen_is_refused(capsys):
    text, (teacher, student, nothing) = run("text_augmentation", capsys)
    assert re.search(r"^refused: .*ids \[.* is not in", text, re.MULTILINE)
    assert teacher < student < nothing - 1


def test_cached_views_teach_and_others_are_refused(capsys):
    text, (_, alone, distilled) = run("image_views", capsys)
    assert text.startswith("refused: the teacher has not seen 'digit 0' under View(crop=None, flip=True, seed=0)")
    assert distilled > max(0.8, alone + 0.04)


def test_a_pruned_and_rounded_student_is_healed_from_draws(capsys):
    _, (before, healed, baked, size) = run("qad", capsys)
    assert healed < before / 2
    assert baked == healed
    assert size < 14


def test_no_example_is_left_out():
    named = set(re.findall(r"\"(\w+)\"", Path(__file__).read_text()))
    assert {path.stem for path in FOLDER.glob("*.py")} <= named
