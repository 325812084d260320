"""Layouts of an engine over processes: how many workers there are, which one each is, and what a push can't reach."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lorasync.errors import MismatchError
from lorasync.vllm_seam.layout import (
    check_layout,
    is_spread,
    rank_in_engine,
    replicas_of,
    workers_here,
    workers_of,
)


def parallel(**settings: Any) -> SimpleNamespace:
    """VLLM's `ParallelConfig`, as far as it is asked."""
    return SimpleNamespace(**settings)


TP2 = {"world_size": 2, "tensor_parallel_size": 2}
SPREAD = {**TP2, "distributed_executor_backend": "external_launcher"}

# settings: replicas, workers of the engine, workers that one LLM drives, whether it is spread over trainer processes
LAYOUTS = [
    ({"world_size": 1}, (1, 1, 1, False)),
    (TP2, (1, 2, 2, False)),
    ({**TP2, "distributed_executor_backend": "mp"}, (1, 2, 2, False)),
    (SPREAD, (1, 2, 1, True)),
    ({"world_size": 1, "distributed_executor_backend": "external_launcher"}, (1, 1, 1, False)),
    ({**TP2, "data_parallel_size": 3}, (3, 6, 2, False)),
    ({"world_size": 1, "data_parallel_size": 2}, (2, 2, 1, False)),
    (
        {"world_size": 4, "distributed_executor_backend": "external_launcher", "data_parallel_size": 2},
        (2, 4, 1, True),
    ),
    ({"world_size": 1, "enable_expert_parallel": True}, (1, 1, 1, False)),
    ({"world_size": 1, "data_parallel_external_lb": True}, (1, 1, 1, False)),
    ({"world_size": None, "data_parallel_size": False}, (1, 1, 1, False)),  # what is no number is 1
    ({}, (1, 1, 1, False)),
]


@pytest.mark.parametrize(("settings", "expected"), LAYOUTS)
def test_layouts_that_a_push_reaches(settings, expected):
    found = parallel(**settings)
    check_layout(found)
    assert (replicas_of(found), workers_of(found), workers_here(found), is_spread(found)) == expected


REFUSED = [
    ({"world_size": 2, "pipeline_parallel_size": 2}, {"pipeline_parallel_size": "2"}),
    ({"world_size": 16, "nnodes": 2}, {"nnodes": "2"}),
    ({**TP2, "enable_expert_parallel": True}, {"enable_expert_parallel": "True"}),
    (
        {"world_size": 1, "data_parallel_size": 2, "enable_expert_parallel": True},
        {"enable_expert_parallel": "True"},
    ),
    (
        {"world_size": 1, "data_parallel_size": 2, "data_parallel_external_lb": True},
        {"data_parallel_external_lb": "True, with 2 replicas"},
    ),
    (
        {"world_size": 1, "data_parallel_size": 4, "data_parallel_hybrid_lb": True},
        {"data_parallel_hybrid_lb": "True, with 4 replicas"},
    ),
    (
        {"world_size": 4, "pipeline_parallel_size": 2, "nnodes": 3, "enable_expert_parallel": True},
        {"pipeline_parallel_size": "2", "nnodes": "3", "enable_expert_parallel": "True"},
    ),
]


@pytest.mark.parametrize(("settings", "expected"), REFUSED)
def test_layouts_of_which_a_push_would_reach_a_part_are_refused_by_every_setting(settings, expected):
    with pytest.raises(MismatchError, match="nothing was touched") as caught:
        check_layout(parallel(**settings))
    assert {m.name: m.got for m in caught.value.mismatches} == expected
    assert all(m.fix for m in caught.value.mismatches)


@pytest.mark.parametrize(
    ("settings", "rank"),
    [
        ({"world_size": 1, "rank": 0}, 0),
        ({**TP2, "rank": 1}, 1),
        ({**TP2, "rank": 0, "data_parallel_size": 3, "data_parallel_index": 2}, 4),
        ({**TP2, "rank": 1, "data_parallel_size": 3, "data_parallel_index": 2}, 5),
        (
            {**TP2, "rank": 5, "data_parallel_size": 3, "data_parallel_index": 2},
            5,
        ),  # counted over all replicas
        ({**SPREAD, "rank": 1}, 1),
        ({**SPREAD, "rank": 1, "data_parallel_size": 2, "data_parallel_index": 1}, 1),  # one engine a replica
        ({}, 0),
    ],
)
def test_each_worker_knows_which_one_of_the_engine_it_is(settings, rank):
    assert rank_in_engine(parallel(**settings)) == rank


@pytest.mark.parametrize(("replicas", "size"), [(1, 1), (1, 4), (3, 1), (2, 3)])
def test_the_workers_of_all_replicas_are_counted_without_a_gap(replicas, size):
    ranks = [
        rank_in_engine(
            parallel(world_size=size, rank=rank, data_parallel_size=replicas, data_parallel_index=replica)
        )
        for replica in range(replicas)
        for rank in range(size)
    ]
    assert ranks == list(range(workers_of(parallel(world_size=size, data_parallel_size=replicas))))
