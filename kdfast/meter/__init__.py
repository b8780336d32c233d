"""How far models are from a teacher: KL(teacher || model), measured from a cache of scored draws or a base file."""

from kdfast.meter.base_file import BaseFile
from kdfast.meter.estimate import Measurement, Rows, row_terms
from kdfast.meter.measure import compare, measure
from kdfast.meter.models import Loader, llama_cpp

__all__ = ["BaseFile", "Loader", "Measurement", "Rows", "compare", "llama_cpp", "measure", "row_terms"]
