"""The arithmetic of merging: W + s·B·A, and nothing else; pure functions of tensors."""

from lorasync.merge.arithmetic import (
    Scaling,
    Scratch,
    add_delta,
    conv_delta,
    embedding_delta,
    expert_delta,
    lora_delta,
    merge_dora,
    merge_lora,
    replace_rows,
)
from lorasync.merge.low_rank import LowRank, low_rank_delta, low_rank_shape, merge_and_round, merge_low_rank
from lorasync.merge.rounding import NEAREST, Nearest, Rounding, Stochastic
from lorasync.merge.survival import DeltaSurvival, delta_survival

__all__ = [
    "NEAREST",
    "DeltaSurvival",
    "LowRank",
    "Nearest",
    "Rounding",
    "Scaling",
    "Scratch",
    "Stochastic",
    "add_delta",
    "conv_delta",
    "delta_survival",
    "embedding_delta",
    "expert_delta",
    "lora_delta",
    "low_rank_delta",
    "low_rank_shape",
    "merge_and_round",
    "merge_dora",
    "merge_lora",
    "merge_low_rank",
    "replace_rows",
]
