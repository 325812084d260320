"""A refusal reaches the user as one message of ours: vLLM prints no failure of its engine before it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys

import lorasync as ls
from lorasync.errors import LorasyncError
from lorasync.push import MergeInWorker, ServeAdapter, connect
from tests import models
from tests.e2e.engines import greedy, running_llm
from tests.e2e.faults import from_the_middle, raising
from tests.models import tiny

path, ranks = sys.argv[1], int(sys.argv[2])
settings = {"enable_lora": True, "max_lora_rank": 8, "tensor_parallel_size": ranks}


def refused(what, call):
    try:
        call()
    except Exception as error:
        print("REFUSED", what, type(error).__name__, file=sys.stderr, flush=True)
        return
    raise AssertionError(what)


def main():
    with running_llm(path, in_process=sys.argv[3] == "here", dtype="float32", **settings) as llm:
        policy = tiny(path)
        before = greedy(llm)
        print("BEGIN", file=sys.stderr, flush=True)
        for apply in (MergeInWorker(base="checkpoint"), ServeAdapter("p")):
            refused("a larger rank", lambda: connect(ls.FactorSource(tiny(path, r=16)), llm, ServeAdapter("p")))
            weight = policy.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
            weight.data *= 1.5
            refused("another base", lambda: connect(ls.FactorSource(policy), llm, apply))
            weight.data /= 1.5
        other = models.with_adapter(models.tiny_llama(vocab_size=49152, num_hidden_layers=3))
        refused("another architecture", lambda: connect(ls.MergedSource(other), llm))
        with connect(ls.MergedSource(policy), llm, bucket_bytes=200_000, timeout=60) as sync:
            with connect(ls.MergedSource(policy), llm, bucket_bytes=200_000, timeout=60) as taker:
                refused("taken over", sync.send_weights)
                taker.source = from_the_middle(ls.MergedSource(policy), lambda n, t: [(n, t[:1])])
                refused("another shape", taker.send_weights)
                refused("closed", taker.request)
                taker.source = from_the_middle(ls.MergedSource(policy), raising(ConnectionError("the source")))
                refused("the source", taker.send_weights)
                taker.source = ls.MergedSource(policy)
                taker.send_weights()
                refused("merged weights do not go back", taker.rollback)
        print("END", file=sys.stderr, flush=True)
        assert greedy(llm) != before


if __name__ == "__main__":
    main()
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("ranks", "where"), [(1, "there"), (1, "here"), (2, "there")])
def test_nothing_is_printed_before_the_message(ranks, where, base, tmp_path):
    script = tmp_path / "refused.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), base, str(ranks), where],
        capture_output=True,
        text=True,
        timeout=380,
        env={**os.environ, "PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "WARNING"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    printed = done.stderr.partition("BEGIN")[2].partition("END")[0] + done.stdout
    assert printed.count("REFUSED") == 10
    assert "Traceback" not in printed
    assert "ERROR" not in printed
