"""Importing teacher labels that other tools have stored, and storing one kdfast cache as another.

    report = import_records(DistillKit(Path("capture")), "cache", vocab_size=128256, teacher="llama-3.1-70b")
    print(*report.lines(), sep="\\n")

One file per format. Every import says what its records leave out: top-k labels are biased, whatever stores them.
"""

from kdfast.cache.convert.distillkit import DistillKit
from kdfast.cache.convert.importing import TOLERANCE, import_records
from kdfast.cache.convert.limits import ExpansionError
from kdfast.cache.convert.logprobs import ALIGNMENTS, TopKLogProbs
from kdfast.cache.convert.megatron import Megatron
from kdfast.cache.convert.recompress import recompress
from kdfast.cache.convert.report import BiasReport
from kdfast.cache.convert.source import Record, Source

__all__ = [
    "ALIGNMENTS",
    "TOLERANCE",
    "BiasReport",
    "DistillKit",
    "ExpansionError",
    "Megatron",
    "Record",
    "Source",
    "TopKLogProbs",
    "import_records",
    "recompress",
]
