"""Presets of training: `QLORA_ZERO2` and `LORA_ZERO3`."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from lorasync.errors import ZeroIncompatibilityError
from lorasync.presets.checks import parameters, refuse_unknown, refuse_values
from lorasync.presets.quantization import NF4, QuantPreset

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from peft import LoraConfig

# Elements. DeepSpeed allocates a whole bucket however few gradients there are; its default, 500 M, is 1 GB
# in bf16.
REDUCE_BUCKET = 50_000_000

Precision = Literal["bf16", "fp16", "fp32"]
Offload = Literal["none", "cpu"]


@dataclass(frozen=True)
class TrainPreset:
    """A way to train that is known to work: ZeRO stage, precision, LoRA shape, batch, checkpointing, offload.

    The four levers of practice are fields: ``micro_batch`` and ``global_batch`` (sequences per rank and
    forward pass; per optimizer step over all ranks, None: micro_batch x ranks), ``precision``,
    ``gradient_checkpointing`` (DeepSpeed has no key for it: hand it to `load_quantized`) and
    ``optimizer_offload``.
    """

    name: str
    stage: Literal[0, 1, 2, 3]
    quantization: QuantPreset | None
    r: int = 64
    alpha: int = 64
    precision: Precision = "bf16"
    micro_batch: int = 1
    global_batch: int | None = None
    gradient_checkpointing: bool = True
    optimizer_offload: Offload = "none"
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        refuse_values(self)

    @property
    def dtype(self) -> torch.dtype:
        """The engine's dtype: what parameters that are not quantized are cast to."""
        import torch

        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.precision]

    def lora_config(self, **overrides: Any) -> LoraConfig:
        """Build the `peft.LoraConfig`: all linear layers, no dropout (logprobs must be reproducible).

        Args:
            **overrides: entries of `LoraConfig`.

        Raises:
            MismatchError: An entry that this release's `LoraConfig` doesn't have.

        Example:
            >>> QLORA_ZERO2.lora_config(r=8).r
            8
        """
        from peft import LoraConfig

        refuse_unknown("LoraConfig", overrides, parameters(LoraConfig))
        settings = {
            "task_type": "CAUSAL_LM",
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
        }
        return LoraConfig(**{**settings, **overrides})

    def deepspeed_config(self, **overrides: Any) -> dict[str, Any]:
        """Build the DeepSpeed config as a new dict.

        Args:
            **overrides: top-level keys of the DeepSpeed config. Dicts are merged key by key, other values
                replace, None removes the key.

        Raises:
            ZeroIncompatibilityError: A key, at any level, that DeepSpeed doesn't know, or a value that it refuses.

        Example:
            >>> config = QLORA_ZERO2.deepspeed_config(train_micro_batch_size_per_gpu=8, gradient_clipping=0.5)
            >>> config["zero_optimization"]["stage"], config["train_micro_batch_size_per_gpu"]
            (2, 8)
        """
        config: dict[str, Any] = {
            **self._batch(),
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": self._adam()},
            "zero_optimization": self._zero(),
            "zero_allow_untested_optimizer": True,
        }
        if self.precision != "fp32":
            config[self.precision] = {"enabled": True}
        if "gradient_accumulation_steps" in overrides and "train_batch_size" not in overrides:
            config.pop("train_batch_size", None)
        if not overrides:
            return config
        self._refuse_own(overrides)
        return _accepted(_merged(config, _by_names_in(config, overrides)))

    def _refuse_own(self, overrides: Mapping[str, Any]) -> None:
        """Refuse the preset's own fields where keys of DeepSpeed are meant."""
        own = {_squeezed(field.name): field.name for field in fields(self)}
        wrong = [key for key in overrides if _squeezed(key) in own]
        if wrong:
            changes = ", ".join(f"{own[_squeezed(key)]}={overrides[key]!r}" for key in wrong)
            raise ZeroIncompatibilityError(
                f"deepspeed_config(): got {', '.join(wrong)}, expected keys of a DeepSpeed config. Did you mean "
                f"dataclasses.replace({self.name}, {changes}).deepspeed_config()?"
            )

    def _batch(self) -> dict[str, int]:
        batch = {"train_micro_batch_size_per_gpu": self.micro_batch}
        if self.global_batch is None:
            return {**batch, "gradient_accumulation_steps": 1}
        return {**batch, "train_batch_size": self.global_batch}

    def _adam(self) -> dict[str, Any]:
        # DeepSpeed compiles its fused Adam at the first step, which needs a CUDA compiler that matches
        # torch, and adapters are too few to gain from it. Its CPU Adam is what makes offload bearable.
        settings = {"lr": self.learning_rate, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
        return {**settings, "torch_adam": self.optimizer_offload == "none"}

    def _zero(self) -> dict[str, Any]:
        zero: dict[str, Any] = {
            "stage": self.stage,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "reduce_bucket_size": REDUCE_BUCKET,
            "allgather_bucket_size": REDUCE_BUCKET,
        }
        if self.stage == 3:
            zero["stage3_gather_16bit_weights_on_model_save"] = True
        if self.optimizer_offload != "none":
            zero["offload_optimizer"] = {"device": self.optimizer_offload, "pin_memory": True}
        return zero


def _accepted(config: dict[str, Any]) -> dict[str, Any]:
    """Have the guard read a config that somebody had a hand in; what DeepSpeed would ignore is refused here."""
    from lorasync.zero.settings import read_settings  # it needs torch

    ignored = read_settings(config).ignored
    if ignored:
        raise ZeroIncompatibilityError(
            "\n  ".join(["deepspeed_config(): got wrong keys:", *map(str, ignored)])
        )
    return config


def _by_names_in(config: Mapping[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Rename settings of ``zero_optimization`` that DeepSpeed takes under two names to the one that is there."""
    from lorasync.zero.section import aliases  # it needs torch

    zero = overrides.get("zero_optimization")
    if not isinstance(zero, dict):
        return overrides
    other = {name: alias for name, alias in aliases().items() if alias in config["zero_optimization"]}
    given = {other[key] if key in other and other[key] not in zero else key: v for key, v in zero.items()}
    return {**overrides, "zero_optimization": given}


def _squeezed(name: str) -> str:
    return name.replace("_", "").lower()


def _merged(config: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Merge ``overrides`` into a copy of ``config``: dicts key by key, None removes."""
    result = copy.deepcopy(config)
    for key, value in overrides.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


QLORA_ZERO2 = TrainPreset("QLORA_ZERO2", stage=2, quantization=NF4)
"""QLoRA on an NF4 base, the base replicated on every rank: the fastest where the 4-bit model fits one GPU."""

LORA_ZERO3 = TrainPreset("LORA_ZERO3", stage=3, quantization=None, optimizer_offload="cpu")
"""LoRA on an unquantized base that is sharded over the ranks, optimizer states in host memory."""
