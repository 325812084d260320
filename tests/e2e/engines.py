"""Real vLLM engines for the tests: started, asked, and ended together with their child processes."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

ADAPTER_SLOTS = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
PROMPTS = ("The capital of France is", "One, two, three,", "Water is made of")
Answers = list[tuple[tuple[int, ...], tuple[float, ...]]]


@contextlib.contextmanager
def running_llm(
    path: str, *, in_process: bool = False, backend: str | None = "lorasync", **settings: Any
) -> Iterator[Any]:
    """A `vllm.LLM` on the CPU; its engine core and workers end with the block."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = (
        "nobind" if settings.get("tensor_parallel_size", 1) == 1 else "0|1"
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    from vllm import LLM

    if backend is not None:
        settings["weight_transfer_config"] = {"backend": backend}
    llm = LLM(
        path, **{"max_model_len": 128, "enforce_eager": True, "max_num_seqs": 16, "seed": 0, **settings}
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        if in_process:
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
        gc.collect()


def async_llm(path: str, **settings: Any) -> Any:
    """An `AsyncLLM` on the CPU, made inside of the running loop that it will be driven by; `shutdown` ends it."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    settings = {"weight_transfer_config": {"backend": "lorasync"}, **settings}
    arguments = AsyncEngineArgs(
        model=path, dtype="float32", max_model_len=128, enforce_eager=True, max_num_seqs=8, seed=0, **settings
    )
    return AsyncLLM.from_engine_args(arguments)


def greedy(llm: Any, prompts: Sequence[str] = PROMPTS, *, tokens: int = 8, **request: Any) -> Answers:
    """Greedy token ids and their log-probabilities, exactly as the engine gives them.

    One prompt after another: how several are batched depends on when they arrive, and bf16 sums on the batch.
    """
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=0, ignore_eos=True)
    return answers_of(
        [o for prompt in prompts for o in llm.generate([prompt], wanted, use_tqdm=False, **request)]
    )


def answers_of(outputs: Sequence[Any]) -> Answers:
    return [
        (
            tuple(o.outputs[0].token_ids),
            tuple(lp[t].logprob for lp, t in zip(o.outputs[0].logprobs, o.outputs[0].token_ids, strict=True)),
        )
        for o in outputs
    ]


def check_alike(found: Answers, wanted: Answers) -> None:
    """The same tokens, and log-probabilities that differ by no more than other sums in fp32 make them."""
    for (ids, logprobs), (wanted_ids, wanted_logprobs) in zip(found, wanted, strict=True):
        assert ids == wanted_ids
        assert logprobs == pytest.approx(wanted_logprobs, abs=1e-3)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))
