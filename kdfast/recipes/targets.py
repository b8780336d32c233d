"""What a student learns of its teacher: the distribution, the likeliest class, or the sequences that it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.distill.counting import without_padding
from kdfast.distill.objective import KD, teacher_of
from kdfast.distill.step import Step
from kdfast.models import call, device_of, evaluating, move
from kdfast.objectives.teacher_argmax import teacher_argmax_ce
from kdfast.recipes._inputs import IGNORE, answers_of

__all__ = ["HardTargets", "pad_sequences", "sequence_level", "soft_targets", "teacher_sequences"]

# ---- sequences ------------------------------------------------------------------------------------------------------


def sequence_level(*, word_weight: float = 0.0, temperature: float = 1.0) -> KD:
    """The loss on sequences that the teacher wrote (Kim & Rush 2016)::

        -log q(y)  +  word_weight * T^2 KL(p || q) of every position,   y written by the teacher

    averaged over the positions of y. Where y are samples of p, the first term is the sequences' KL(p || q), but for a
    constant; where y is the best of a beam, it is the KL to the mode. The second term, word-level KD on the same
    sequences, needs a teacher or a cache; the first one none: ``Distiller(student, objective=sequence_level())``.

    Raises ``ValueError`` for a negative weight.
    """
    if not word_weight >= 0.0:
        raise ValueError(f"word_weight must not be negative, got {word_weight}")
    return KD(shift=True, temperature=temperature, kd_weight=word_weight, ce_weight=1.0)


def teacher_sequences(
    teacher: nn.Module | Callable[..., Tensor], prompts: Iterable[Mapping[str, Any]], *, eos: int, **options: Any
) -> list[dict[str, Tensor]]:
    """What the teacher writes after each prompt, as examples for the student.

        examples = teacher_sequences(model, prompts, eos=tokenizer.eos_token_id, num_beams=4, max_new_tokens=64)
        loader = DataLoader(examples, 32, shuffle=True, collate_fn=pad_sequences)
        Distiller(student, objective=sequence_level()).fit(loader, epochs=3)

    Args:
        teacher: a module with ``generate``, as those of transformers, which runs in evaluation mode; or a function. It
            takes a batch of prompts, and ``options``, and returns (n * rows, length) ids that begin with the prompt,
            n of each prompt side by side.
        prompts: batches with (rows, length) ``input_ids`` and, where they are padded (on the left), ``attention_mask``.
        eos: the id that ends a sequence. It belongs to the sequence, what follows it does not.
        options: of the generation: ``num_beams``, ``do_sample``, ``max_new_tokens``, ``num_return_sequences``.

    Returns:
        Per sequence its ``input_ids``, (tokens,) without padding, and ``labels``: the same, prompt ignored.

    Raises:
        ValueError: the teacher returns something else, or writes nothing.
        TypeError: a module that cannot generate.
    """
    if isinstance(teacher, nn.Module) and not hasattr(teacher, "generate"):
        raise TypeError(f"{type(teacher).__name__} has no generate: pass a function of input_ids that continues them")
    generate: Any = teacher.generate if isinstance(teacher, nn.Module) else teacher
    examples: list[dict[str, Tensor]] = []
    with evaluating(teacher):
        for batch in prompts:
            arguments = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
            written = call(generate, {**move(arguments, device_of(teacher)), **options}).cpu()
            examples += _examples(arguments, written, eos)
    return examples


def pad_sequences(examples: Sequence[Mapping[str, Tensor]], pad: int = 0) -> dict[str, Tensor]:
    """A batch of examples, padded on the right: (rows, length) ``input_ids``, ``attention_mask`` and ``labels``.

    ``DataLoader``'s ``collate_fn``. Padding is masked and ignored, so the id ``pad`` may be any.
    """
    real = [torch.ones_like(example["input_ids"]) for example in examples]
    fill = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": fill([example["input_ids"] for example in examples], True, pad),
        "attention_mask": fill(real, True, 0),
        "labels": fill([example["labels"] for example in examples], True, IGNORE),
    }


def _examples(prompts: dict[str, Tensor], written: Tensor, eos: int) -> Iterator[dict[str, Tensor]]:
    ids = prompts["input_ids"].cpu()
    rows, length = ids.shape
    if written.dim() != 2 or len(written) % max(rows, 1) or written.shape[1] <= length:
        raise ValueError(
            f"of {rows} prompts of {length} ids the teacher must return (n * {rows}, > {length}), got "
            f"{tuple(written.shape)}"
        )
    times = len(written) // rows
    if not torch.equal(written[:, :length], ids.repeat_interleave(times, 0)):
        raise ValueError("the teacher must return each prompt with what follows it: these begin otherwise")
    real = prompts.get("attention_mask", torch.ones_like(ids)).cpu().bool().repeat_interleave(times, 0)
    for row, kept in zip(written, real, strict=True):
        prompt, answer = row[:length][kept], row[length:]
        ends = (answer == eos).nonzero()
        answer = answer[: int(ends[0]) + 1] if len(ends) else answer
        ignored = torch.full_like(prompt, IGNORE)
        yield {"input_ids": torch.cat([prompt, answer]), "labels": torch.cat([ignored, answer])}


# ---- distribution and class -----------------------------------------------------------------------------------------


def soft_targets(*, temperature: float = 4.0, **options: Any) -> KD:
    """``KD`` without labels: ``T^2 KL(softmax(z_t / T) || softmax(z_s / T))`` (Hinton et al. 2015).

    One article has the sign of KL turned round, so that training drives the student away; another divides it by the
    number of classes; none has the T^2, without which the gradient shrinks as 1 / T^2. ``options`` are ``KD``'s.
    """
    return KD(**{"temperature": temperature, "kd_weight": 1.0, "ce_weight": 0.0, **options})


class HardTargets:
    """``-log q_c`` at the teacher's likeliest class c: pseudo-labels, for data that have no others.

    The articles have ``-sum t log max(q)`` and ``-sum max(q) log p`` here: the first rewards any sure student, the
    second has student and teacher swapped.

    Args:
        options: ``kd_loss``'s, such as ``row_weight`` and ``ignore_index``, or functions of the step. Padding does not
            count, as in ``KD``.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def __call__(self, step: Step) -> Tensor:
        answers_of(step)
        options = {name: option(step) if callable(option) else option for name, option in self.options.items()}
        options = without_padding(step, options)
        return teacher_argmax_ce(step.logits, teacher_of(step), step.labels, **options)  # type: ignore[no-any-return]
