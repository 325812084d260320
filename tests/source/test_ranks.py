"""Two real processes: ZeRO-2, ZeRO-3 and FSDP2, plain and 4-bit, against one process with the same values."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks_worker import llama

WORKER = Path(__file__).parents[1] / "ranks_worker.py"


KINDS = ["plain", "dora", "4bit", "4bit in bytes"]
"""The last one for FSDP2 alone, whose 4-bit weights are else held in the dtype of the other parameters."""


def _skip_absent(job: str, kind: str) -> None:
    if kind == "4bit in bytes" and job != "fsdp2":
        pytest.skip("4-bit weights are held in bytes there anyway")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module", params=["zero2", "zero3", "fsdp2"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    """Run one job on two ranks and return what each found."""
    job, out = request.param, tmp_path_factory.mktemp(request.param)
    llama().unload().save_pretrained(out / "base")
    port = str(_free_port())
    logs = [out / f"log-{rank}" for rank in range(2)]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    running = []
    for rank, log in enumerate(logs):
        env = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, str(WORKER), job, str(out)]
        with log.open("w") as sink:
            running.append(subprocess.Popen(command, env=env, stdout=sink, stderr=sink))
    try:
        codes = [process.wait(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-4000:] for log in logs)
    return job, [json.loads((out / f"{job}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_of_a_sharded_model_is_that_of_a_whole_one(
    ranks: tuple[str, list[Any]], kind: str
) -> None:
    job, found = ranks
    _skip_absent(job, kind)
    for result in (rank[kind] for rank in found):
        assert result["trained"] > 0
        assert (result["same"], result["names"], result["factors"], result["changed"]) == ([], [], [], [])
        assert result["metadata"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_is_gathered_at_a_time_and_for_factors_no_base_at_all(
    ranks: tuple[str, list[Any]], kind: str
) -> None:
    job, found = ranks
    _skip_absent(job, kind)
    for result in (rank[kind] for rank in found):
        assert result["sharded"] == (job != "zero2")
        if result["sharded"]:
            assert 0 < result["most"] <= result["layer"]
        assert result["base gathered for factors"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_never_taken_for_weights_and_all_ranks_refuse_a_nan(
    ranks: tuple[str, list[Any]], kind: str
) -> None:
    job, found = ranks
    _skip_absent(job, kind)
    if job == "zero2":
        return
    for result in (rank[kind] for rank in found):
        assert "gathered()" in result["refusals"]["ungathered"]
        assert "NaN or Inf" in result["refusals"]["nan"]
        assert "self_attn.q_proj.weight (default, B)" in result["refusals"]["nan"]


def test_what_fsdp2_has_gathered_is_not_taken_for_weights_and_shards_of_fsdp1_are_refused(
    ranks: tuple[str, list[Any]],
) -> None:
    job, found = ranks
    if job != "fsdp2":
        pytest.skip("looked at once")
    for result in (rank["fsdp"] for rank in found):
        assert result["same"] == {"merged": True, "factors": True}
        assert len(result["refusals"]) == 2
        assert all("summon_full_params" in refusal for refusal in result["refusals"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_lends_asks_no_other_rank_for_it(ranks: tuple[str, list[Any]], kind: str) -> None:
    """The others iterate: a collective of one rank alone would wait, or be taken for another."""
    job, found = ranks
    _skip_absent(job, kind)
    assert all(rank[kind]["lends alone"] for rank in found)
