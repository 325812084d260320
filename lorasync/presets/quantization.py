"""Presets of quantization: `NF4`, `FP4` and `INT8`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lorasync.presets.checks import parameters, refuse_unknown, refuse_values

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig


@dataclass(frozen=True)
class QuantPreset:
    """How bitsandbytes stores the frozen base: code book, bits a weight, double quantization of scales."""

    name: str
    quant_type: Literal["nf4", "fp4", "int8"]
    double_quant: bool = False

    def __post_init__(self) -> None:
        refuse_values(self)

    @property
    def bits(self) -> int:
        """Bits of one packed weight, without its share of the scales."""
        return 8 if self.quant_type == "int8" else 4

    def bnb_config(
        self,
        *,
        compute_dtype: torch.dtype | None = None,
        storage_dtype: torch.dtype | None = None,
        **overrides: Any,
    ) -> BitsAndBytesConfig:
        """Build the `transformers.BitsAndBytesConfig` of this preset.

        Args:
            compute_dtype: dtype that 4-bit weights are dequantized to in the forward pass; bf16 if None.
            storage_dtype: dtype of the tensor that holds packed 4-bit weights; uint8 if None. Under DeepSpeed
                it must be uint8 or the engine's dtype, under FSDP1 the dtype of the other parameters.
            **overrides: entries of `BitsAndBytesConfig`, for example ``llm_int8_skip_modules=["lm_head"]``.

        Raises:
            MismatchError: An entry that `BitsAndBytesConfig` doesn't have, which it would ignore.

        Example:
            >>> NF4.bnb_config().bnb_4bit_quant_type
            'nf4'
        """
        import torch
        from transformers import BitsAndBytesConfig

        known = parameters(BitsAndBytesConfig)
        other = "bnb_4bit_" if self.bits == 8 else "load_in_8bit"
        refuse_unknown(
            "BitsAndBytesConfig", overrides, [name for name in known if not name.startswith(other)]
        )
        if self.bits == 8:
            return BitsAndBytesConfig(**{"load_in_8bit": True, **overrides})
        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": torch.bfloat16 if compute_dtype is None else compute_dtype,
            "bnb_4bit_quant_storage": torch.uint8 if storage_dtype is None else storage_dtype,
        }
        return BitsAndBytesConfig(**{**settings, **overrides})


NF4 = QuantPreset("NF4", "nf4", double_quant=True)
"""4-bit NormalFloat with doubly quantized scales, the format of the QLoRA paper (arXiv:2305.14314)."""

FP4 = QuantPreset("FP4", "fp4", double_quant=True)
"""4-bit floats with doubly quantized scales."""

INT8 = QuantPreset("INT8", "int8")
"""8-bit integers with outlier columns in 16 bits, LLM.int8() (arXiv:2208.07339)."""
