"""Recipes: the ways to distil that the literature has names for, as objectives for ``Distiller`` or loops around it."""

from kdfast.recipes.adapters import LoRALinear, add_lora, merge_lora
from kdfast.recipes.adaptive import AdaptiveKD
from kdfast.recipes.adversarial import Adversarial, discriminator
from kdfast.recipes.annealing import anneal, ramp_up
from kdfast.recipes.attention import ClassAttention, class_attention, confidence, disagreement, sample_attention
from kdfast.recipes.augmentation import crop_and_flip, noise_tokens, random_view
from kdfast.recipes.bootstrap import Bootstrap
from kdfast.recipes.chain import BornAgain, Chain, TeacherAssistants
from kdfast.recipes.cohort import Cohort, CohortOutput, EachStudent
from kdfast.recipes.combined import Combined
from kdfast.recipes.cross_domain import CrossDomain, Unlabelled, confident
from kdfast.recipes.detection import Detections, detection_kd
from kdfast.recipes.ema import EMATeacher, self_distillation
from kdfast.recipes.ensemble import LogitEnsemble, ProbabilityEnsemble, label_trust
from kdfast.recipes.graph import GraphAttention
from kdfast.recipes.growing import Growing
from kdfast.recipes.hard_examples import focal, hardest, row_losses
from kdfast.recipes.multi_task import MultiTask, TaskOutput
from kdfast.recipes.mutual import MutualLearning
from kdfast.recipes.net2net import deepen, widen
from kdfast.recipes.recommendation import listwise_kd, ranking_distillation
from kdfast.recipes.regression import gaussian_kd, regression_kd, teacher_bounded
from kdfast.recipes.segmentation import channel_wise_kd, segmentation_kd
from kdfast.recipes.sequence_level import pad_sequences, sequence_level, teacher_sequences
from kdfast.recipes.teacher_student import HardTargets, soft_targets
from kdfast.recipes.temperatures import entropy_temperature, focal_temperature, temperature_of_entropy
from kdfast.recipes.views import ViewedExamples, capture_views, view_span

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
    "entropy_temperature",
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
