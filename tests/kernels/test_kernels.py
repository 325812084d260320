"""The merge kernels' bases and jobs, the fallback on a CPU, and the kernels in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorasync.bnb import dequantize_4bit, packed_base
from lorasync.errors import MismatchError
from lorasync.kernels import (
    GroupedMerge,
    Int8Base,
    MergeJob,
    PackedBase,
    PlainBase,
    merge_job,
)
from lorasync.kernels import tune as tuning
from lorasync.kernels.tune import Config
from lorasync.merge import lora_delta, merge_dora, merge_lora

BF16 = torch.bfloat16


def job(dtype: torch.dtype = torch.float32) -> MergeJob:
    base = PlainBase(torch.randn(24, 40).to(BF16))
    return MergeJob(
        torch.empty(24, 40, dtype=BF16), base, torch.randn(4, 40).to(dtype), torch.randn(24, 4).to(dtype), 0.5
    )


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_on_a_cpu_the_result_is_merge_loras(dtype: torch.dtype) -> None:
    one = job(dtype)
    merge_job(one)
    assert torch.equal(one.out, merge_lora(one.base.dequantize(), one.lora_a, one.lora_b, 0.5))


def test_fan_in_fan_out_and_dora_on_a_cpu() -> None:
    one = job()
    turned = replace(
        one, out=torch.empty(40, 24, dtype=BF16), base=PlainBase(one.base.weight.T), fan_in_fan_out=True
    )
    merge_job(one)
    merge_job(turned)
    assert torch.equal(turned.out, one.out.T)
    magnitude = torch.rand(24)
    merge_job(replace(one, magnitude=magnitude))
    delta = lora_delta(one.lora_a, one.lora_b, 0.5)
    assert torch.equal(one.out, merge_dora(one.base.weight, delta, magnitude).to(BF16))


def test_a_run_reads_what_the_factors_hold_now() -> None:
    one = job()
    merge = GroupedMerge([one])
    one.lora_b.zero_()
    merge.run()
    assert torch.equal(one.out, one.base.dequantize())


def test_planning_writes_nothing_and_a_run_only_its_slice() -> None:
    fused = torch.full((48, 40), 7.0, dtype=BF16)
    merge = GroupedMerge([replace(job(), out=fused[24:])])
    assert bool((fused == 7).all())
    merge.run()
    assert bool((fused[:24] == 7).all())
    assert not bool((fused[24:] == 7).all())


def test_all_mismatches_at_once() -> None:
    good = job()
    wrong = [
        replace(good, out=torch.empty(40, 24), name="turned"),
        good,
        replace(good, lora_b=torch.randn(24, 5), name="ranks"),
        replace(good, out=torch.empty(24, 40, dtype=torch.int8), name="integer"),
        replace(good, magnitude=torch.ones(3), name="short"),
    ]
    with pytest.raises(MismatchError) as caught:
        GroupedMerge(wrong)
    assert [m.name for m in caught.value.mismatches] == [
        "turned.out",
        "ranks",
        "integer.out",
        "short.magnitude",
    ]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, BF16])
def test_packed_bases_are_bitsandbytes(quant_type: str, nested: bool, storage: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(48, 128).to(BF16)
    data, state = functional.quantize_4bit(
        weight, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
    )
    base = packed_base(torch.nn.Parameter(data, requires_grad=False), state)
    assert torch.equal(base.dequantize(), functional.dequantize_4bit(data, state))
    shard = base.rectangle(rows=(16, 40), cols=(3, 90))
    assert torch.equal(shard.dequantize(), base.dequantize()[16:40, 3:90])
    assert torch.equal(shard.rectangle(rows=(1, 3), cols=(2, 5)).dequantize(), shard.dequantize()[1:3, 2:5])


@pytest.mark.parametrize("nested", [False, True])
def test_blocks_that_go_on_in_the_next_row_keep_their_scale(nested: bool) -> None:
    """On CPUs with AVX512 bitsandbytes 0.50.2 takes another block's."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = (torch.randn(48, 96) * torch.logspace(-2, 1, 48)[:, None]).to(BF16)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1, 64).long()
    scales = state.absmax
    if nested:
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    exact = (state.code[codes] * scales[:, None]).view(48, 96).to(BF16)
    assert torch.equal(dequantize_4bit(packed, state), exact)


def test_int8_bases_are_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    q = torch.randint(-127, 128, (48, 96), dtype=torch.int8)
    scales = torch.rand(48)
    assert torch.equal(Int8Base(q, scales).dequantize(), functional.int8_vectorwise_dequant(q, scales))


def test_traffic_counts_each_byte_once() -> None:
    one = job()
    assert GroupedMerge([one, one]).traffic == 2 * (24 * 40 * 2 + 24 * 40 * 2)
    code = torch.zeros(16)
    base = PackedBase(torch.zeros(480, dtype=torch.uint8), torch.zeros(15), code, 64, (24, 40))
    assert GroupedMerge([replace(one, base=base)]).traffic == 480 + 15 * 4 + 24 * 40 * 2


def test_measured_tiles_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASYNC_CACHE_DIR", str(tmp_path / "new"))
    choices = tuning.candidates(64, split=False, aligned=True)
    assert tuning.known("gpu") is None
    assert tuning.fastest("gpu", choices, lambda config: abs(config.bm - 128)) == choices[3]
    assert tuning.known("gpu") == choices[3]
    tuning.cache_path().write_text("{")
    assert tuning.known("gpu") is None
    tuning.remember("gpu", Config(64, 64, 4, 64))
    assert tuning.known("gpu") == Config(64, 64, 4, 64)
    assert [p.name for p in tuning.cache_path().parent.iterdir()] == ["kernels.json"]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORASYNC_CACHE_DIR", str(tmp_path / "file"))
    tuning.remember("gpu", Config(64, 64, 4, 64))
    assert tuning.known("gpu") is None


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("r_pad", [16, 64, 256, 1024])
def test_tile_shapes_fit_the_kernels(r_pad: int, split: bool) -> None:
    for config in tuning.candidates(r_pad, split=split, aligned=True):
        assert config.strip <= 31
        assert r_pad % config.rk == 0


def test_the_kernels_in_tritons_interpreter() -> None:
    pytest.importorskip("triton")
    script = Path(__file__).with_name("interpreted_kernels.py")
    environment = os.environ | {"PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
