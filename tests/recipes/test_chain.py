"""Students that become teachers."""

import pytest
import torch

from kdfast import Distiller
from kdfast.recipes import BornAgain, Chain, TeacherAssistants
from support.recipes import Counting, accuracy, batches, blobs, mlp, recorded, weights_of

SOFT = {"kd_weight": 1.0, "ce_weight": 0.0, "temperature": 1.0}


def test_each_link_learns_from_the_one_before():
    log = []
    teacher, first, second = (recorded(mlp(hidden=h), log, name) for h, name in ((12, "t"), (8, "a"), (4, "s")))
    histories = TeacherAssistants(teacher, [first, second]).fit(batches(*blobs()), epochs=1, progress=False)
    assert [len(history) for history in histories] == [1, 1]
    assert log == [("a", True), ("t", False)] * 3 + [("s", True), ("a", False)] * 3


def test_a_chain_hands_the_teachers_knowledge_down():
    torch.manual_seed(1)
    teacher, (inputs, labels) = mlp(hidden=16), blobs(96)
    Distiller(teacher, lr=0.02).fit(batches(inputs, labels), epochs=8, progress=False)
    assistant, student = mlp(hidden=10), mlp(hidden=6)
    unlabelled = [inputs[i : i + 16] for i in range(0, 96, 16)]
    TeacherAssistants(teacher, [assistant, student], lr=0.02, **SOFT).fit(unlabelled, epochs=12, progress=False)
    assert accuracy(student, inputs, teacher(inputs).argmax(1)) > 0.9


def test_the_first_generation_learns_from_labels_alone():
    torch.manual_seed(1)
    ours, alone = mlp(), mlp()
    alone.load_state_dict(ours.state_dict())
    born_again = BornAgain(None, [ours, mlp()], lr=0.01)
    born_again.fit(batches(*blobs()), epochs=2, progress=False)
    Distiller(alone, lr=0.01).fit(batches(*blobs()), epochs=2, progress=False)
    assert torch.equal(weights_of(ours), weights_of(alone))
    x = blobs()[0]
    mean = sum(model(x).softmax(-1) for model in born_again.students) / 2
    assert torch.allclose(born_again.ensemble(x).logits.exp(), mean, atol=1e-6)


def test_a_chain_resumes_where_it_was_stopped(tmp_path):
    def train(folder):
        torch.manual_seed(1)
        students = [Counting(mlp()) for _ in range(2)]
        BornAgain(None, students, folder=folder).fit(batches(*blobs()), epochs=2, progress=False)
        return students

    first, again = train(tmp_path), train(tmp_path)
    assert [student.calls for student in again] == [0, 0]
    assert torch.equal(weights_of(first[1]), weights_of(again[1]))


def test_chain_misuse():
    model = mlp()
    with pytest.raises(ValueError, match="each a model of its own, got 2"):
        Chain(None, [model, model])
    with pytest.raises(ValueError, match="each a model of its own, got 0"):
        Chain(None, [])
    with pytest.raises(ValueError, match=r"pass \[assistant, ..., student\], got one"):
        TeacherAssistants(mlp(hidden=12), [mlp()])
    with pytest.raises(ValueError, match=r"fewer parameters than the one before, got \[67, 99, 35\]"):
        TeacherAssistants(mlp(hidden=8), [mlp(hidden=12), mlp(hidden=4)])
    with pytest.raises(ValueError, match="generations are of one architecture"):
        BornAgain(None, [mlp(), mlp(hidden=4)])
    with pytest.raises(TypeError, match="must be a function that makes one of the parameters here"):
        Chain(None, [model], optimizer=torch.optim.SGD(model.parameters(), 0.1))
