"""Recipes: the ways to distil that the literature has names for, as objectives for ``Distiller`` or loops around it."""

from kdfast.recipes.adapters import LoRALinear, add_lora, merge_lora
from kdfast.recipes.auxiliary import Adversarial, GraphAttention, discriminator
from kdfast.recipes.chain import BornAgain, Chain, TeacherAssistants
from kdfast.recipes.composite import Cohort, CohortOutput, Combined, EachStudent, MultiTask, MutualLearning, TaskOutput
from kdfast.recipes.cross_domain import CrossDomain, Unlabelled
from kdfast.recipes.dropping import drop_layers
from kdfast.recipes.ema import EMATeacher, self_distillation
from kdfast.recipes.ensemble import LogitEnsemble, ProbabilityEnsemble, label_trust
from kdfast.recipes.growing import Growing, deepen, widen
from kdfast.recipes.quantization import FakeQuantizedEmbedding, FakeQuantizedLinear, bake, fake_quantize
from kdfast.recipes.rounds import AdaptiveKD, Bootstrap
from kdfast.recipes.targets import HardTargets, pad_sequences, sequence_level, soft_targets, teacher_sequences
from kdfast.recipes.tasks import (
    Detections,
    channel_wise_kd,
    detection_kd,
    gaussian_kd,
    listwise_kd,
    ranking_distillation,
    regression_kd,
    segmentation_kd,
    teacher_bounded,
)
from kdfast.recipes.temperatures import anneal, entropy_temperature, focal_temperature, ramp_up, temperature_of_entropy
from kdfast.recipes.views import ViewedExamples, capture_views, crop_and_flip, noise_tokens, random_view, view_span
from kdfast.recipes.weighting import (
    ClassAttention,
    class_attention,
    confidence,
    confident,
    disagreement,
    focal,
    hardest,
    row_losses,
    sample_attention,
)

__all__ = [
    "AdaptiveKD",
    "Adversarial",
    "Bootstrap",
    "BornAgain",
    "Chain",
    "ClassAttention",
    "Cohort",
    "CohortOutput",
    "Combined",
    "CrossDomain",
    "Detections",
    "EMATeacher",
    "EachStudent",
    "FakeQuantizedEmbedding",
    "FakeQuantizedLinear",
    "GraphAttention",
    "Growing",
    "HardTargets",
    "LoRALinear",
    "LogitEnsemble",
    "MultiTask",
    "MutualLearning",
    "ProbabilityEnsemble",
    "TaskOutput",
    "TeacherAssistants",
    "Unlabelled",
    "ViewedExamples",
    "add_lora",
    "anneal",
    "bake",
    "capture_views",
    "channel_wise_kd",
    "class_attention",
    "confidence",
    "confident",
    "crop_and_flip",
    "deepen",
    "detection_kd",
    "disagreement",
    "discriminator",
    "drop_layers",
    "entropy_temperature",
    "fake_quantize",
    "focal",
    "focal_temperature",
    "gaussian_kd",
    "hardest",
    "label_trust",
    "listwise_kd",
    "merge_lora",
    "noise_tokens",
    "pad_sequences",
    "ramp_up",
    "random_view",
    "ranking_distillation",
    "regression_kd",
    "row_losses",
    "sample_attention",
    "segmentation_kd",
    "self_distillation",
    "sequence_level",
    "soft_targets",
    "teacher_bounded",
    "teacher_sequences",
    "temperature_of_entropy",
    "view_span",
    "widen",
]
