"""Losses beyond ``kd_loss``'s divergences, as plain functions of tensors."""

from kdfast.objectives.attention import attention_transfer
from kdfast.objectives.class_weights import class_weighted_ce
from kdfast.objectives.dist import dist_loss
from kdfast.objectives.entropy import entropy_matching
from kdfast.objectives.features import Hint, Projector
from kdfast.objectives.margin import margin_ce, pairwise_hinge
from kdfast.objectives.relations import pkt, rkd_angle, rkd_distance, similarity_preserving
from kdfast.objectives.teacher_argmax import teacher_argmax, teacher_argmax_ce

__all__ = [
    "Hint",
    "Projector",
    "attention_transfer",
    "class_weighted_ce",
    "dist_loss",
    "entropy_matching",
    "margin_ce",
    "pairwise_hinge",
    "pkt",
    "rkd_angle",
    "rkd_distance",
    "similarity_preserving",
    "teacher_argmax",
    "teacher_argmax_ce",
]
