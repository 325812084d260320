"""What one vLLM worker serves: the model, load plans for it, and its base."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from lorasync.errors import Mismatch, MismatchError
from lorasync.receive.bases import CheckpointBases, CopiedBases, has_checkpoint
from lorasync.receive.live import LiveModel
from lorasync.receive.planner import record_plan
from lorasync.receive.twin import build_twin
from lorasync.vllm_seam.config import loads_random_weights, quantization_of, speculation_of
from lorasync.vllm_seam.layers import is_quantized

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    import torch

    from lorasync.receive.load_plan import LoadPlan, ManifestEntry

_WITHOUT_WEIGHTS = ("ngram", "ngram_gpu", "suffix")
"""Ways of speculative decoding whose drafter has no weights."""


class ServedModel:
    """The model of one vLLM worker, and what the worker knows of it. It outlives every connection.

    Args:
        config: vLLM's `VllmConfig`.
        model: The model that the worker serves.
        device: Where the weights of the model are.
    """

    def __init__(self, config: Any, model: torch.nn.Module, device: torch.device) -> None:
        self.config = config
        self.model = model
        self.device = device
        self.changed: set[str] = changed_at_start(config, model)
        """Parameters that are, or may be, something else than the checkpoint's."""
        self.unseen: set[str] = set()
        """Those of them of which it is only not known what was done to them before the engine got ours."""
        self._copies: dict[str, CopiedBases] = {}

    def ran_before(self) -> None:
        """The engine ran without ours until now: any of its weights may be something else than the checkpoint's."""
        if has_checkpoint(self.model_config):
            self.unseen = _names_of(self.model)
            self.changed.update(self.unseen)

    @property
    def model_config(self) -> Any:
        return self.config.model_config

    @property
    def lora(self) -> Any:
        """VLLM's `LoRAConfig`; ``None`` where the engine was started without LoRA slots."""
        return self.config.lora_config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are served in."""
        dtype: torch.dtype = self.model_config.dtype
        return dtype

    @property
    def ranks(self) -> int:
        """How many tensor-parallel ranks share each weight."""
        return int(self.config.parallel_config.tensor_parallel_size)

    @cached_property
    def checkpoint(self) -> CheckpointBases:
        """The checkpoint that the engine was started from."""
        return CheckpointBases(self.model_config, self.dtype)

    def copies(self, kind: str) -> CopiedBases:
        """Return the worker's copies of the pristine base: on its device (``"device"``), or else in host memory."""
        if kind not in self._copies:
            self._copies[kind] = CopiedBases(self.device if kind == "device" else "cpu", self.checkpoint)
        return self._copies[kind]

    def twin(self) -> torch.nn.Module:
        """Build the model once more, on the meta device."""
        return build_twin(self.config)

    def plan_for(
        self, manifest: Sequence[ManifestEntry], *, what: str, may_ignore: Collection[str] = ()
    ) -> LoadPlan:
        """Plan how vLLM's loader puts these checkpoint tensors into the model.

        Args:
            manifest: Names, dtypes and shapes of the tensors.
            what: What the tensors are, for the refusal of an engine that serves quantized weights.
            may_ignore: Names that the engine may take nothing of.

        Raises:
            MismatchError: The engine serves quantized weights, or the tensors do not fit the model.
        """
        twin = self.twin()
        refuse_quantized(self.config, twin, what=what)
        return record_plan(twin, manifest, ranks=self.ranks, may_ignore=may_ignore)

    def live(self, plan: LoadPlan) -> LiveModel:
        """Return the served model, as a push that follows ``plan`` writes to it."""
        return LiveModel(self.model, self.model_config, plan)


def refuse_quantized(vllm_config: Any, twin: torch.nn.Module, *, what: str) -> None:
    """Refuse an engine whose checkpoint is quantized; one that quantizes 16-bit weights as it loads them takes them.

    Raises:
        MismatchError: naming the quantization and what works.
    """
    name = quantization_of(vllm_config)
    if not name or not any(map(is_quantized, twin.modules())):
        return
    raise MismatchError(
        f"The engine serves quantized weights; {what} are 16-bit ones. Nothing was touched.",
        [
            Mismatch(
                "quantization",
                f"{name!r}: packed weights, which nothing is merged into",
                'none, or one that quantizes what it loads (quantization="fp8" over a 16-bit checkpoint)',
                "Use ServeAdapter(name, other_base=True), which adds the adapter beside the quantized base, or start the "
                "engine from the 16-bit checkpoint.",
            )
        ],
    )


def changed_at_start(vllm_config: Any, model: torch.nn.Module) -> set[str]:
    """Return the parameters that do not hold the checkpoint's weights from the start: all, if they are random.

    Where there is no checkpoint either, what somebody has put into the engine is its base; the handshake compares it.
    """
    if not loads_random_weights(vllm_config) or not has_checkpoint(vllm_config.model_config):
        return set()
    return _names_of(model)


def _names_of(model: torch.nn.Module) -> set[str]:
    return {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()}


def notes_of(vllm_config: Any) -> list[str]:
    """Return what a trainer should know of this engine although nothing is wrong."""
    notes = []
    method = speculation_of(vllm_config)
    if method is not None and method not in _WITHOUT_WEIGHTS:
        notes.append(
            f"speculative decoding ({method}): the drafter keeps its own weights, a push does not reach them. What is "
            "generated is the policy's; drafts that fit it worse make it slower."
        )
    return notes
