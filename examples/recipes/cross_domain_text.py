"""Text classification across domains: which word is missing in docstrings, from a teacher that read the manual."""

from __future__ import annotations

import inspect
import pydoc_data.topics
import re
from importlib import import_module
from zlib import crc32

import torch
from torch import Tensor, nn

from kdfast import Distiller
from kdfast.recipes import CrossDomain

CLASSES = ("the", "a", "is", "to", "of", "and")
MODULES = (
    "argparse ast bdb calendar codecs collections contextlib copy csv dataclasses datetime decimal difflib dis doctest "
    "email.message enum fractions functools gettext heapq html.parser inspect ipaddress json logging mailbox mimetypes "
    "multiprocessing.pool optparse os pathlib pdb pickle pprint random re shutil smtplib socket statistics string "
    "subprocess tarfile tempfile textwrap threading traceback types unittest.mock urllib.request uuid warnings zipfile"
)


class Classifier(nn.Module):
    """A classifier of the mean embedding of hashed words and, with ``pairs``, of hashed pairs of words."""

    def __init__(self, buckets: int, width: int, pairs: bool) -> None:
        super().__init__()
        self.table, self.used = nn.EmbeddingBag(buckets, width), 7 if pairs else 4
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(width, len(CLASSES)))

    def forward(self, hashes: Tensor) -> Tensor:
        return self.head(self.table(hashes[:, : self.used] % self.table.num_embeddings))


def texts(source: str) -> tuple[Tensor, Tensor]:
    """Two words before the missing one and two after it, and their pairs, hashed; and which word is missing."""
    words = re.findall(r"[a-z]+", source.lower())
    places = [i for i in range(2, len(words) - 2) if words[i] in CLASSES]
    around = [(words[i - 2], words[i - 1], words[i + 1], words[i + 2]) for i in places]
    named = [
        [f"-2{a}", f"-1{b}", f"+1{c}", f"+2{d}", f"{a} {b} _", f"{b} _ {c}", f"_ {c} {d}"] for a, b, c, d in around
    ]
    hashes = torch.tensor([[crc32(name.encode()) for name in row] for row in named])
    order = torch.randperm(len(hashes))
    return hashes[order], torch.tensor([CLASSES.index(words[i]) for i in places])[order]


def docstrings(name: str) -> str:
    """The docstrings of a module, and of the classes and functions that it defines."""
    module = import_module(name)
    found = [x for x in vars(module).values() if inspect.isclass(x) or inspect.isfunction(x)]
    found = [x for x in found if x.__module__ == name]
    inner = [y for x in found if inspect.isclass(x) for y in vars(x).values() if inspect.isfunction(y)]
    return " ".join(inspect.getdoc(x) or "" for x in [module, *found, *inner])


def main() -> None:
    torch.manual_seed(0)
    source = texts(" ".join(pydoc_data.topics.topics.values()))
    target, truth = texts(" ".join(map(docstrings, MODULES.split())))
    lessons = list(zip(*(part.split(64) for part in source), strict=True))
    unlabelled, test = target[4000:].split(64), (target[:4000], truth[:4000])  # their labels are for the score alone
    teacher, alone, student = Classifier(2**14, 32, True), Classifier(2**10, 8, False), Classifier(2**10, 8, False)
    Distiller(alone, lr=1e-2).fit(lessons, epochs=4, progress=False)
    recipe = CrossDomain(teacher, student, temperature=1.0, lr=1e-2)
    recipe.fit(lessons, unlabelled, teacher_epochs=2, epochs=4, progress=False)
    with torch.no_grad():
        scores = [float((m.eval()(test[0]).argmax(1) == test[1]).float().mean()) for m in (teacher, alone, student)]
    print("accuracy in docstrings: teacher {:.3f}, student of the manual {:.3f}, distilled {:.3f}".format(*scores))


if __name__ == "__main__":
    main()
