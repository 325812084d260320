"""How vLLM is asked for tokens."""

from __future__ import annotations

from typing import Any


def greedy(*, max_tokens: int, logprobs: int) -> Any:
    """Return vLLM's `SamplingParams` for the likeliest tokens.

    Args:
        max_tokens: How many tokens to generate.
        logprobs: Of how many candidates to return the log-probability, besides that of the token itself.
    """
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=logprobs)
