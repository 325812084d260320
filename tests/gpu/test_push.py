"""Pushes into a vLLM on a GPU, against fresh engines: captured graphs, sleep, fp8, two processes."""

from __future__ import annotations

import contextlib
import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorasync as ls
from lorasync.load import load_quantized
from lorasync.presets import NF4
from lorasync.push import MergeInWorker, ServeAdapter, connect
from tests import models

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BF16 = torch.bfloat16
PROMPTS = [{"prompt_token_ids": [3 + (5 * i + 7 * j) % 500 for j in range(12)]} for i in range(6)]


@contextlib.contextmanager
def running(path: str, *, in_process: bool = True, **settings: Any) -> Iterator[Any]:
    """An engine with captured CUDA graphs; it ends with the block.

    A process can have one in its life: a second one's graphs would want the memory pool that went with the first.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    from vllm import LLM

    defaults = {
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "gpu_memory_utilization": 0.02,  # what must be free; the key-value cache's size is given
        "kv_cache_memory_bytes": 64 << 20,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [8],
        },
        "enable_lora": True,
        "max_lora_rank": 16,
        "max_loras": 2,
        "max_cpu_loras": 4,
        "weight_transfer_config": {"backend": "lorasync"},
    }
    llm = LLM(path, **{**defaults, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def first_tokens(llm: Any, **request: Any) -> list[dict[int, float]]:
    """The log-probabilities of the twenty most likely second tokens: the first comes from the prompt's pass, the
    second from a captured graph."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0.0, max_tokens=2, logprobs=20, ignore_eos=True, detokenize=False)
    outputs = [o.outputs[0] for o in llm.generate(PROMPTS, wanted, use_tqdm=False, **request)]
    return [{token: lp.logprob for token, lp in step.items()} for o in outputs for step in o.logprobs]


def alike(left: list[dict[int, float]], right: list[dict[int, float]], *, within: float = 0.03) -> bool:
    """Whether the log-probabilities agree of every token that both name."""
    return all(
        len(a.keys() & b.keys()) >= 15 and all(abs(a[t] - b[t]) <= within for t in a.keys() & b.keys())
        for a, b in zip(left, right, strict=True)
    )


def served(llm: Any) -> dict[str, torch.Tensor]:
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    params = worker.model_runner.model.named_parameters()
    return {name.replace(".base_layer", ""): param.detach().clone() for name, param in params}


def within_one_rounding(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Of the elements at most a few in 100,000 may differ, each by one step of bf16."""
    assert left.keys() == right.keys()
    differ = total = 0
    for name, a in left.items():
        gap = (a.float() - right[name].float()).abs()
        step = torch.maximum(a.float().abs(), right[name].float().abs()) * 2**-7
        assert bool((gap <= step).all()), name
        differ, total = differ + int((gap > 0).sum()), total + gap.numel()
    assert differ <= 3 + 3e-5 * total


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = models.tiny_llama(hidden_size=256, intermediate_size=512, num_attention_heads=4).to(BF16)
    return models.save(model, tmp_path_factory.mktemp("base"))


def a_policy(checkpoint: str, *, quantized: bool = False, scale: float = 0.05) -> Any:
    from transformers import AutoModelForCausalLM

    base = (
        load_quantized(checkpoint, NF4, device="cuda", progress=False)  # the tests' own default is the CPU
        if quantized
        else AutoModelForCausalLM.from_pretrained(checkpoint, dtype=BF16).cuda()
    )
    return models.with_adapter(base, r=16, scale=scale)


@torch.no_grad()
def merged_checkpoint(policy: Any, out: Path) -> str:
    """W + s·B·A in fp64, rounded once, with transformers alone."""
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import LoraLayer
    from transformers import LlamaForCausalLM

    plain = policy.get_base_model()
    merged = LlamaForCausalLM(plain.config).to(BF16)
    state = {n.replace(".base_layer", ""): p for n, p in plain.named_parameters() if ".lora_" not in n}
    for name, layer in plain.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight = layer.get_base_layer().weight
        if getattr(weight, "quant_state", None) is not None:
            weight = dequantize_4bit(weight.data, weight.quant_state)
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        state[f"{name}.weight"] = (weight.double() + layer.scaling["default"] * (b @ a)).float().to(BF16)
    config = {k: v.cpu() for k, v in state.items()}
    merged.load_state_dict(config, strict=True)
    merged.config.quantization_config = None
    del merged.config.quantization_config
    merged.save_pretrained(out)
    return str(out)


def load(llm: Any, checkpoint: str) -> None:
    """Vllm's own loader, into the running engine: what a push is compared with."""
    weights = load_file(Path(checkpoint) / "model.safetensors")
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    wrapped = {name.removesuffix(".base_layer.weight") for name, _ in model.named_parameters()}
    renamed = {
        re.sub(r"\.weight$", ".base_layer.weight", n)
        if "_proj." in n or n.removesuffix(".weight") in wrapped
        else n: t
        for n, t in weights.items()
    }
    model.load_weights(iter((n, t.cuda()) for n, t in renamed.items()))
    llm.reset_prefix_cache()


STRATEGIES = {
    "merged": lambda p: (ls.MergedSource(p, dtype=BF16), None),
    "factors-device": lambda p: (ls.FactorSource(p), MergeInWorker(base="device")),
    "factors-cpu": lambda p: (ls.FactorSource(p), MergeInWorker(base="cpu")),
    "factors-checkpoint": lambda p: (ls.FactorSource(p), MergeInWorker(base="checkpoint")),
    "factors-nf4": lambda p: (ls.FactorSource(p), MergeInWorker(base="nf4")),
}


@pytest.fixture(scope="module")
def engine(checkpoint: str) -> Iterator[Any]:
    """Tests with it come before those with engines in other processes, whose end takes vLLM's groups along."""
    with running(checkpoint) as llm:
        yield llm


@pytest.mark.parametrize(
    ("strategy", "quantized"),
    [(name, False) for name in STRATEGIES if name != "factors-nf4"]
    + [("merged", True), ("factors-nf4", True)],
)
def test_captured_graphs_see_a_push(
    engine: Any, checkpoint: str, tmp_path: Path, strategy: str, quantized: bool
) -> None:
    policy = a_policy(checkpoint, quantized=quantized)
    load(engine, checkpoint)
    before = first_tokens(engine)
    source, apply = STRATEGIES[strategy](policy)
    with connect(source, engine, apply) as sync:
        for step in (1, 2, 3, 4):  # later ones use memory and plans again
            models.move(policy, seed=step, scale=0.05)
            sync.send_weights()
        pushed, answers = served(engine), first_tokens(engine)
    load(engine, merged_checkpoint(policy, tmp_path / "merged"))
    within_one_rounding(pushed, served(engine))
    assert alike(answers, first_tokens(engine))
    assert not alike(answers, before)


def test_an_adapter_from_memory_answers_as_one_from_disk(
    engine: Any, checkpoint: str, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    policy = a_policy(checkpoint)
    load(engine, checkpoint)
    policy.save_pretrained(tmp_path / "adapter")
    with connect(ls.FactorSource(policy), engine, ServeAdapter("policy")) as sync:
        sync.send_weights()
        from_memory = first_tokens(engine, **sync.request())
        from_disk = first_tokens(engine, lora_request=LoRARequest("disk", 7, str(tmp_path / "adapter")))
        assert from_memory == from_disk
        assert not alike(from_memory, first_tokens(engine))


@pytest.mark.parametrize("strategy", ["merged", "factors-device", "adapter"])
def test_a_thousand_pushes_take_no_gpu_memory(engine: Any, checkpoint: str, strategy: str) -> None:
    """Trainer and worker share the process here, so torch counts for both."""
    policy = a_policy(checkpoint)
    load(engine, checkpoint)
    every = {**STRATEGIES, "adapter": lambda p: (ls.FactorSource(p), ServeAdapter("policy"))}
    source, apply = every[strategy](policy)
    with connect(source, engine, apply) as sync:
        seen = []
        for push in range(1000):
            sync.send_weights()
            if strategy == "adapter":
                sync.request()  # or each push warns that nobody asks for the policy
            if push % 100 == 99:
                torch.cuda.synchronize()
                seen.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(set(seen[1:])) == 1, seen


@pytest.mark.parametrize("quantized", [False, True], ids=["bf16", "nf4"])
def test_both_strategies_leave_the_same_weights(engine: Any, checkpoint: str, quantized: bool) -> None:
    policy = a_policy(checkpoint, quantized=quantized)
    load(engine, checkpoint)
    left = {}
    for strategy in ("factors-nf4" if quantized else "factors-device", "merged"):
        source, apply = STRATEGIES[strategy](policy)
        with connect(source, engine, apply) as sync:
            sync.send_weights()
        left[strategy] = served(engine)
    one, other = left.values()
    differ = {name: int((one[name] != other[name]).sum()) for name in one}
    assert not any(differ.values()), {name: n for name, n in differ.items() if n}


@pytest.mark.parametrize("settings", [{}, {"enable_lora": False, "quantization": "fp8"}], ids=["bf16", "fp8"])
def test_another_process_on_the_same_gpu(checkpoint: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    policy = a_policy(checkpoint)
    with running(merged_checkpoint(policy, tmp_path / "merged"), in_process=False, **settings) as llm:
        fresh = first_tokens(llm)
    with running(checkpoint, in_process=False, **settings) as llm:
        before = first_tokens(llm)
        for strategy in ("factors-device", "merged") if not settings else ("merged",):
            source, apply = STRATEGIES[strategy](policy)
            with connect(source, llm, apply) as sync:
                for step in (1, 2, 0):  # the last one is what the fresh engine holds
                    models.move(policy, seed=step, scale=0.05)
                    report = sync.send_weights()
                assert (report.ranks, len(report.digest) > 0) == (1, True)
                assert alike(first_tokens(llm), fresh, within=0.03 if not settings else 0.3)
                assert not alike(first_tokens(llm), before, within=0.3)


def test_another_process_reads_a_4_bit_policy_where_it_lies(checkpoint: str, tmp_path: Path) -> None:
    policy = a_policy(checkpoint, quantized=True)
    with running(merged_checkpoint(policy, tmp_path / "merged"), in_process=False) as llm:
        fresh = first_tokens(llm)
    with running(checkpoint, in_process=False) as llm:
        digests = []
        for strategy in ("factors-nf4", "merged"):
            source, apply = STRATEGIES[strategy](policy)
            with connect(source, llm, apply) as sync:
                for step in (1, 2, 0):
                    models.move(policy, seed=step, scale=0.05)
                    sync.send_weights()
                digests.append(sync.digests())
            assert alike(first_tokens(llm), fresh)
        assert digests[0] == digests[1], digests


def test_a_merge_that_cannot_be_lent_is_copied(checkpoint: str, tmp_path: Path) -> None:
    """Factors that are no contiguous memory go through the buffer; so does everything in another form."""
    policy = a_policy(checkpoint)
    with running(merged_checkpoint(policy, tmp_path / "merged"), in_process=False) as llm:
        fresh = first_tokens(llm)
    for name, param in policy.named_parameters():
        if "up_proj.lora_A" in name:
            param.data = param.data.T.contiguous().T
    with running(checkpoint, in_process=False) as llm:
        for strategy in ("factors-device", "merged"):
            source, apply = STRATEGIES[strategy](policy)
            with connect(source, llm, apply, bucket_bytes=100_000) as sync:
                for step in (1, 0):
                    models.move(policy, seed=step, scale=0.05)
                    sync.send_weights()
                assert alike(first_tokens(llm), fresh)


def test_weights_survive_sleep_and_come_back_by_a_push(checkpoint: str, tmp_path: Path) -> None:
    policy = a_policy(checkpoint)
    source = ls.MergedSource(policy, dtype=BF16)
    with running(checkpoint, in_process=False, enable_sleep_mode=True) as llm, connect(source, llm) as sync:
        sync.send_weights()
        pushed = first_tokens(llm)
        llm.sleep(level=1)
        llm.wake_up()
        assert first_tokens(llm) == pushed
        llm.sleep(level=2)  # the weights are dropped
        llm.wake_up()
        sync.send_weights()
        assert first_tokens(llm) == pushed
