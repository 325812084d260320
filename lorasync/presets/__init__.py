"""Frozen, proven settings to quantize (`NF4`, `FP4`, `INT8`) and to train (`QLORA_ZERO2`, `LORA_ZERO3`).

A preset is data. `dataclasses.replace(QLORA_ZERO2, micro_batch=8)` gives a changed one, and the methods turn
it into the objects that transformers, PEFT and DeepSpeed take; their keywords override single entries.
"""

from lorasync.presets.quantization import FP4, INT8, NF4, QuantPreset
from lorasync.presets.training import LORA_ZERO3, QLORA_ZERO2, TrainPreset

__all__ = ["FP4", "INT8", "LORA_ZERO3", "NF4", "QLORA_ZERO2", "QuantPreset", "TrainPreset"]
