"""One architecture: two pushes into vLLM's own model of it, compared with vLLM's loader on PEFT's merged checkpoints."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorasync as ls
from lorasync.errors import LorasyncError
from lorasync.push import MergeInWorker, connect
from tests import served
from tests.survey.shrink import shrunk

WAYS = ("merged", "factors")


@dataclass(frozen=True)
class Outcome:
    """What a way came to: "right", "refused", "wrong", or "not built" where nobody could try; and why."""

    verdict: str
    why: str = ""


def survey(architecture: str, *, ways: tuple[str, ...] = WAYS, dtype: str = "bfloat16") -> dict[str, Outcome]:
    """Try one architecture, each way: merged pushes with adapters on experts too, factors on linear layers."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {way: _way(architecture, Path(folder) / way, way, dtype) for way in ways}


def _way(architecture: str, folder: Path, way: str, dtype: str) -> Outcome:
    try:
        policies = _Policies(architecture, folder, getattr(torch, dtype), experts=way == "merged")
    except Exception as error:
        return Outcome("not built", f"transformers or PEFT: {_first_line(error)}")
    try:
        expected = [_everything(policies.merged(number), dtype) for number in range(2)]
    except Exception as error:
        return Outcome("not built", f"vLLM: {_first_line(error)}")
    return _pushed(policies, expected, way, dtype)


class _Policies:
    """A base on disk, and a policy over it that takes either of two adapters' values."""

    def __init__(self, architecture: str, folder: Path, dtype: torch.dtype, *, experts: bool) -> None:
        kind: Any = getattr(transformers, architecture)
        torch.manual_seed(0)
        model = kind(shrunk(kind.config_class, architecture)).to(dtype)
        for param in model.parameters():  # norms and biases too
            param.data.add_((torch.randn(param.shape) * 0.05).to(param))
        self._folder = folder
        model.save_pretrained(folder / "base")
        self.base = str(folder / "base")
        self.policy = get_peft_model(
            model.eval(), LoraConfig(r=4, lora_alpha=8, **_targets(model, experts=experts))
        )
        for number in range(2):
            self.take(number)
            copy.deepcopy(self.policy).merge_and_unload().save_pretrained(folder / f"merged{number}")

    def take(self, number: int) -> None:
        """Give the adapter other values, as training does."""
        generator = torch.Generator().manual_seed(number)
        for name, param in self.policy.named_parameters():
            if "lora_" in name:
                param.data.copy_(torch.randn(param.shape, generator=generator) * 0.1)

    def merged(self, number: int) -> str:
        return str(self._folder / f"merged{number}")


def _targets(model: nn.Module, *, experts: bool) -> dict[str, Any]:
    """All linear layers that PEFT takes, and experts that are one parameter with three dimensions."""
    fused = sorted(
        {n for n, p in model.named_parameters() if p.ndim == 3 and ".experts." in n and n.endswith("_proj")}
    )
    left_out = _NOT_FOR_LORA if experts or not fused else _NOT_FOR_LORA | _NAMES_OF_EXPERTS
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    found: dict[str, Any] = {"target_modules": sorted({n for n in names if n.isidentifier()} - left_out)}
    if experts and fused:
        found["target_parameters"] = fused
    return found


_NOT_FOR_LORA = frozenset({"lm_head", "out_proj", "conv1d"})
"""Heads may be tied. PEFT refuses the others in models with a Mamba mixer; elsewhere they are left out too."""

_NAMES_OF_EXPERTS = frozenset({"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""PEFT adapts fused experts too where one of these names is asked for."""


def _everything(path: str, dtype: str) -> dict[str, torch.Tensor]:
    with served.loaded(path, dtype=dtype) as (model, _):
        return served.everything(model)


def _pushed(policies: _Policies, expected: list[dict[str, torch.Tensor]], way: str, dtype: str) -> Outcome:
    with served.loaded(policies.base, dtype=dtype) as (model, config):
        worker = served.Worker(model, config)
        try:
            with _connected(policies.policy, worker, way) as sync:
                for number in range(2):
                    policies.take(number)
                    sync.send_weights()
                    wrong = served.differences(model, expected[number])
                    if wrong:
                        return Outcome(
                            "wrong", f"push {number + 1}: {len(wrong)} differ: {', '.join(wrong[:6])}"
                        )
        except LorasyncError as error:
            return Outcome("refused", str(error))
        except Exception as error:
            return Outcome("wrong", f"raw {type(error).__name__}: {_first_line(error)}")
    return Outcome("right")


def _connected(policy: Any, worker: Any, way: str) -> Any:
    if way == "merged":
        return connect(ls.MergedSource(policy), worker)
    return connect(ls.FactorSource(policy), worker, MergeInWorker(base="checkpoint"))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def main(names: list[str]) -> None:
    """Print one line of JSON for each architecture, as soon as it is known; begin with its name, in case it never ends."""
    for name in names:
        print(json.dumps({"begin": name}), flush=True)
        found = survey(name)
        line = {"name": name, "ways": {way: [o.verdict, o.why] for way, o in found.items()}}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
