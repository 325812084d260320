"""Proof that what is served is what was trained."""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorasync.bnb import tensors_beside
from lorasync.errors import EngineNotReadyError, SyncTimeoutError, UngatheredError
from lorasync.targets.event_loop import run_on
from lorasync.vllm_seam.sampling import greedy
from lorasync.wire import as_bytes, digest_of_text
from lorasync.zero import is_sharded

if TYPE_CHECKING:
    from collections.abc import Sequence

_ANSWERED_WITHIN_S = 300.0


@dataclass(frozen=True)
class LogprobGap:
    """How far the engine's log-probabilities lie from the trainer's, over the same tokens, in nats.

    Attributes:
        mean: mean absolute difference.
        max: largest absolute difference.
        tokens: how many generated tokens were compared.
    """

    mean: float
    max: float
    tokens: int


def logprob_gap(
    model: torch.nn.Module,
    llm: Any,
    prompts: Sequence[str],
    *,
    max_tokens: int = 16,
    request: dict[str, Any] | None = None,
) -> LogprobGap:
    """Let the engine answer greedily, and compare the log-probability of each token with the trainer's.

    The end-to-end test of a sync: a stale, torn or wrong policy shows as a gap far above the rounding noise of the
    two implementations (below 0.05 nats in bf16, 0.001 in fp32; a policy one update behind is usually above).

    Args:
        model: the training model, or the DeepSpeed engine around it; only read, and left in the mode it was in.
        llm: a `vllm.LLM`, or an `AsyncLLM` whose event loop runs in another thread.
        prompts: texts; their tokens come from the engine.
        max_tokens: how many tokens to generate for each prompt.
        request: what `Sync.request()` returned.

    Returns:
        the gap over all generated tokens.

    Example:
        >>> gap = logprob_gap(model, llm, ["The capital of France is"])  # doctest: +SKIP
        >>> assert gap.mean < 0.05  # doctest: +SKIP
    """
    outputs = _generated(llm, prompts, greedy(max_tokens=max_tokens, logprobs=0), request or {})
    pairs = [(list(o.prompt_token_ids), list(o.outputs[0].token_ids)) for o in outputs]
    served = [
        torch.tensor([lp[token].logprob for lp, token in zip(o.outputs[0].logprobs, answer, strict=True)])
        for o, (_, answer) in zip(outputs, pairs, strict=True)
    ]
    gap = (torch.cat(served).double() - torch.cat(token_logprobs(model, pairs)).double()).abs()
    return LogprobGap(mean=float(gap.mean()), max=float(gap.max()), tokens=gap.numel())


class Canary:
    """A few tokens that every push is tried on: `connect(…, canary=Canary(model, llm, prompts))`.

    After each push `logprob_gap` is measured with these prompts; it stands in `SyncReport.canary`, and a gap above the
    limit is a warning there. It costs one short answer of the engine and one forward pass of the trainer.

    Args:
        model: the training model, whole on this rank.
        llm: the `vllm.LLM` or `AsyncLLM` that is pushed to (one of them, if there are several).
        prompts: texts; one or two will do.
        max_tokens: how many tokens to generate for each.
        limit: the mean gap, in nats, above which the push is warned of; 0.05 suits bf16.

    Raises:
        UngatheredError: if the model is sharded: its forward pass needs all ranks. Call `token_logprobs` on each of them.
        EngineNotReadyError: if the engine is neither.

    Example:
        >>> canary = Canary(model, llm, ["The capital of France is"])  # doctest: +SKIP
        >>> sync = connect(MergedSource(model), llm, canary=canary)  # doctest: +SKIP
        >>> sync.send_weights().canary.mean < 0.05  # doctest: +SKIP
        True
    """

    def __init__(
        self,
        model: torch.nn.Module,
        llm: Any,
        prompts: Sequence[str],
        *,
        max_tokens: int = 4,
        limit: float = 0.05,
    ) -> None:
        if any(map(is_sharded, model.parameters())):
            raise UngatheredError(
                "canary: got a sharded model, expected a whole one: its forward pass needs all ranks. Send the engine's "
                "answers to every rank, and compare lorasync.verify.token_logprobs there with their log-probabilities."
            )
        if not hasattr(llm, "llm_engine") and not hasattr(llm, "output_handler"):
            raise EngineNotReadyError(
                f"canary: got {type(llm).__name__}, expected a vllm.LLM or an AsyncLLM. With a server compare "
                "lorasync.verify.token_logprobs with the log-probabilities of its outputs."
            )
        self._model, self._llm, self._prompts = model, llm, list(prompts)
        self._max_tokens, self.limit = max_tokens, limit

    def __call__(self, request: dict[str, Any]) -> LogprobGap:
        """Measure the gap with what `Sync.request()` returned."""
        return logprob_gap(
            self._model, self._llm, self._prompts, max_tokens=self._max_tokens, request=request
        )


def adapter_effect(llm: Any, prompts: Sequence[str], request: dict[str, Any]) -> LogprobGap:
    """How far the answers with an adapter lie from those of the bare engine: the first token's likeliest candidates.

    A gap of 0 means that the adapter does nothing: it is zero, or it is not applied (names that match nothing).

    Args:
        llm: a `vllm.LLM`, or an `AsyncLLM` whose event loop runs in another thread.
        prompts: texts.
        request: what `Sync.request()` returned, for `ServeAdapter`.

    Returns:
        the gap over the candidates that both name; infinite where there is none.

    Example:
        >>> assert adapter_effect(llm, ["The capital of France is"], sync.request()).max > 0  # doctest: +SKIP
    """
    on, off = _candidates(llm, prompts, request), _candidates(llm, prompts, {})
    gaps = [abs(a[token] - b[token]) for a, b in zip(on, off, strict=True) for token in a.keys() & b.keys()]
    if not gaps:
        return LogprobGap(mean=math.inf, max=math.inf, tokens=0)
    return LogprobGap(mean=sum(gaps) / len(gaps), max=max(gaps), tokens=len(gaps))


def _candidates(llm: Any, prompts: Sequence[str], request: dict[str, Any]) -> list[dict[int, float]]:
    """The likeliest tokens after each prompt, with their log-probabilities."""
    # Not prompt_logprobs: with an adapter they end a vLLM 0.32 on a CPU.
    outputs = _generated(llm, prompts, greedy(max_tokens=1, logprobs=10), request)
    return [{token: at.logprob for token, at in o.outputs[0].logprobs[0].items()} for o in outputs]


def _generated(llm: Any, prompts: Sequence[str], wanted: Any, request: dict[str, Any]) -> list[Any]:
    """The engine's final outputs, in the order of the prompts.

    Raises:
        SyncError: on the thread of an `AsyncLLM`'s event loop, where waiting would stop the engine that is waited for.
        SyncTimeoutError: if an `AsyncLLM` does not answer.
    """
    if hasattr(llm, "llm_engine"):
        return list(llm.generate(list(prompts), wanted, use_tqdm=False, **request))

    async def last(prompt: str) -> Any:
        outputs = llm.generate(prompt, wanted, f"lorasync-{secrets.token_hex(8)}", **request)
        return [output async for output in outputs][-1]

    async def everything() -> list[Any]:
        return await asyncio.gather(*map(last, prompts))

    try:
        return run_on(
            llm.output_handler.get_loop(),
            everything,
            lambda result: result(_ANSWERED_WITHIN_S),
            instead="await asyncio.to_thread(…)",
        )
    except TimeoutError:
        raise SyncTimeoutError(
            f"The AsyncLLM did not answer {len(prompts)} prompts within {_ANSWERED_WITHIN_S:g} s. Is it busy or dead?"
        ) from None


def base_fingerprint(model: torch.nn.Module) -> str:
    """One line that says which base an adapter is trained on: xxh3-128 over 32 elements of every base weight.

    The same elements that the handshake compares with the engine's. Two runs with equal fingerprints train on the same
    base; one in 4 bits has another than one in 16. Every rank of a sharded model calls it.

    Raises:
        AdapterError: if there is no adapter to be on a base.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> policy = get_peft_model(model, LoraConfig(target_modules=["0"]))
        >>> len(base_fingerprint(policy))
        32
    """
    from lorasync.base_check import to_json
    from lorasync.source import FactorSource, base_samples

    return digest_of_text(to_json(base_samples(FactorSource(model))))


def token_logprobs(
    model: torch.nn.Module, pairs: Sequence[tuple[list[int], list[int]]], *, batch_size: int = 16
) -> list[torch.Tensor]:
    """The trainer's log-probabilities of each answer after its prompt.

    Args:
        model: a causal language model; only read, and left in the mode it was in.
        pairs: token ids of prompts and answers; none of them empty.
        batch_size: how many pairs go through the model at a time.

    Returns:
        for each pair a CPU tensor of shape ``(len(answer),)``, fp32, in nats.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            batches = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
            return [logprobs for batch in batches for logprobs in _batch_logprobs(model, batch)]
    finally:
        model.train(was_training)


def _batch_logprobs(
    model: torch.nn.Module, pairs: Sequence[tuple[list[int], list[int]]]
) -> list[torch.Tensor]:
    # Padded on the right: under causal attention no token sees the padding behind it.
    rows = [torch.tensor(prompt + answer) for prompt, answer in pairs]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits
    found = []
    for row, (prompt, answer) in zip(logits, pairs, strict=True):
        span = row[len(prompt) - 1 : len(prompt) + len(answer) - 1].float()
        chosen = torch.tensor(answer, device=span.device)
        found.append(torch.log_softmax(span, dim=-1).gather(1, chosen[:, None])[:, 0].cpu())
    return found


def model_digest(model: torch.nn.Module) -> str:
    """xxh3-128 over every parameter and buffer of the training model as it lies in memory.

    Packed 4-bit weights, scales, adapters and buffers alike: the digest changes if any bit of them does, so
    two equal digests around a sync show that the sync left the model alone.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> before = model_digest(layer)
        >>> layer.weight.data += 1
        >>> model_digest(layer) == before
        False
    """
    import xxhash

    state = xxhash.xxh3_128()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        state.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        state.update(as_bytes(tensor).cpu().numpy().data)
        for scale in tensors_beside(tensor):
            state.update(as_bytes(scale).cpu().numpy().data)
    return str(state.hexdigest())
