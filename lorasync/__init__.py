"""Keep a live vLLM engine in step with a policy trained by LoRA or QLoRA under DeepSpeed ZeRO.

Names that need an optional dependency live in submodules of their own: `lorasync.load` (bitsandbytes),
`lorasync.push` and `lorasync.verify` (vLLM, when they are used).
"""

__version__ = "0.1.0"

from lorasync.errors import LorasyncError
from lorasync.merge import merge_lora
from lorasync.names import checkpoint_name
from lorasync.presets import FP4, INT8, LORA_ZERO3, NF4, QLORA_ZERO2
from lorasync.push.plan import plan
from lorasync.source import FactorSource, MergedSource, ParamMeta
from lorasync.zero import check_zero, gathered, inspect_zero

__all__ = [
    "FP4",
    "INT8",
    "LORA_ZERO3",
    "NF4",
    "QLORA_ZERO2",
    "FactorSource",
    "LorasyncError",
    "MergedSource",
    "ParamMeta",
    "check_zero",
    "checkpoint_name",
    "gathered",
    "inspect_zero",
    "merge_lora",
    "plan",
]
