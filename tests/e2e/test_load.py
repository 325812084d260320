"""A hundred pushes into an AsyncLLM that generates all the while: every request is answered, by the version it says."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

import lorasync as ls
from lorasync.push import MergeInWorker, ServeAdapter, Sync, connect
from lorasync.wire import ADAPTER_IDS
from tests import models
from tests.e2e.engines import ADAPTER_SLOTS, PROMPTS, async_llm
from tests.models import tiny

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]
PUSHES, USERS, TOKENS = 100, 4, 12
STRATEGIES: dict[str, Any] = {
    "merged": None,
    "factors": MergeInWorker(base="device"),
    "adapter": ServeAdapter("policy"),
}


@dataclass(frozen=True)
class Answer:
    """What was asked and answered; ``spans`` says which version gave which tokens: (version, start, end)."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    spans: tuple[tuple[int, int, int], ...]


@pytest.mark.parametrize(
    ("strategy", "pause"),
    [("merged", "wait"), ("factors", "wait"), ("merged", "keep"), ("factors", "keep"), ("adapter", "keep")],
)
def test_no_request_is_lost_and_every_output_is_of_the_version_it_names(base, strategy, pause):
    answers = asyncio.run(_session(base, strategy, pause))
    versions = [{version for version, _, _ in answer.spans} for answer in answers]
    assert len(answers) >= USERS
    assert len(set().union(*versions)) > PUSHES / 2
    if pause == "wait" or strategy == "adapter":
        assert all(len(found) == 1 for found in versions)
    else:
        assert any(len(found) > 1 for found in versions), "no request lived through a push"


class _Session:
    def __init__(self, engine: Any, sync: Sync) -> None:
        self.engine, self.sync = engine, sync
        self.asked = 0
        self.answers: list[Answer] = []

    async def ask(self, prompt: Any, tokens: int = TOKENS) -> Answer:
        from vllm import SamplingParams

        wanted = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        request = self.sync.request()
        self.asked += 1
        async for output in self.engine.generate(prompt, wanted, f"r{self.asked}", **request):
            last = output
        made = last.outputs[0]
        assert (last.finished, made.finish_reason, len(made.token_ids)) == (True, "length", tokens)
        if request:
            spans = [(request["lora_request"].lora_int_id - ADAPTER_IDS, 0, tokens)]
        else:
            spans = [(int(s.version), s.start, s.end) for s in made.weight_versions]
        return Answer(tuple(last.prompt_token_ids), tuple(made.token_ids), tuple(spans))

    async def use(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            self.answers.append(await self.ask(PROMPTS[self.asked % len(PROMPTS)]))

    async def check(self, seed: int, answers: Sequence[Answer], seeds: dict[int, int]) -> None:
        """Every span of this seed's versions, asked for once more of an engine that serves nothing else."""
        again: dict[tuple[int, ...], set[tuple[int, ...]]] = defaultdict(set)
        for answer in answers:
            for version, start, end in answer.spans:
                if seeds[version] == seed:
                    again[answer.prompt + answer.tokens[:start]].add(answer.tokens[start:end])
        assert again
        for prompt, continuations in again.items():
            found = (await self.ask({"prompt_token_ids": list(prompt)})).tokens
            assert all(found[: len(tokens)] == tokens for tokens in continuations), (
                prompt,
                continuations,
                found,
            )


async def _session(base: str, strategy: str, pause: Any) -> list[Answer]:
    engine = async_llm(base, **(ADAPTER_SLOTS if strategy == "adapter" else {}))
    policy, stop, seeds = tiny(base), asyncio.Event(), {}
    source = ls.MergedSource(policy) if strategy == "merged" else ls.FactorSource(policy)
    try:
        sync = await asyncio.to_thread(
            connect, source, engine, STRATEGIES[strategy], pause=pause, timeout=120
        )

        async def push(seed: int) -> None:
            models.move(policy, seed=seed)
            seeds[sync.version + 1] = seed
            await sync.send_weights_async()

        await push(0)
        session = _Session(engine, sync)
        users = [asyncio.create_task(session.use(stop)) for _ in range(USERS)]
        for step in range(1, PUSHES):
            await push(step % 2)
        stop.set()
        await asyncio.wait_for(asyncio.gather(*users), 60)
        for seed in (0, 1):
            await push(seed)
            await session.check(seed, session.answers, seeds)
        await asyncio.to_thread(sync.shutdown)
        return session.answers
    finally:
        engine.shutdown()
