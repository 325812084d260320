"""A merged pass under real ZeRO-3: resident memory of both processes, 24 layers against 6."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.zero_cells import run_pair

WORKER = Path(__file__).with_name("zero_rss_worker.py")
NOISE = 6 << 20  # what the allocator rounds up


@pytest.mark.slow
def test_a_pass_costs_one_layer_whatever_the_number_of_layers(tmp_path: Path):
    codes = run_pair([str(tmp_path)], tmp_path, idle_timeout=150, worker=WORKER)
    assert codes == [0, 0], "\n".join((tmp_path / f"rank{r}.log").read_text()[-3000:] for r in range(2))
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        few, many = found["6"], found["24"]
        for measure in ("resident", "alive"):
            assert many[measure] <= few[measure] + NOISE
            assert 0 < many[measure] <= 2 * many["layer"] + NOISE  # gathered whole; a product, a result
        assert many["model"] > 5 * (
            2 * many["layer"] + NOISE
        )  # what gathering everything would cost is far above
