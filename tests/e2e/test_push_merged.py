"""Merged weights into a live vLLM, compared with a fresh engine that loads the merged checkpoint from disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

import lorasync as ls
from lorasync.errors import (
    AdapterError,
    EngineClosedError,
    EngineNotReadyError,
    MismatchError,
    NonFiniteError,
)
from lorasync.push import connect
from lorasync.verify import Canary, logprob_gap, model_digest
from tests import models
from tests.e2e.conftest import nf4_policy
from tests.e2e.engines import PROMPTS, greedy, running_llm
from tests.e2e.faults import Fixed
from tests.e2e.oracle import merged_checkpoint

pytestmark = pytest.mark.timeout(420)


@pytest.fixture(scope="module", params=["engine in another process, bf16", "engine in this process, fp32"])
def served(request, smollm2, tmp_path_factory):
    """A 4-bit policy, a live engine that still serves the hub's weights, and the oracle's answers."""
    in_process = "this process" in request.param
    dtype = torch.float32 if "fp32" in request.param else torch.bfloat16
    policy = nf4_policy(smollm2, dtype)
    merged = merged_checkpoint(policy, smollm2, tmp_path_factory.mktemp("oracle"))
    name = str(dtype).removeprefix("torch.")
    with running_llm(merged, backend=None, dtype=name) as oracle:
        expected = greedy(oracle)
    with running_llm(smollm2, in_process=in_process, dtype=name) as llm:
        yield policy, llm, expected


def test_a_push_serves_exactly_the_merged_checkpoint(served):
    policy, llm, expected = served
    before = greedy(llm)
    assert before != expected  # the hub's weights are another policy
    digest = model_digest(policy)
    with connect(ls.MergedSource(policy), llm) as sync:
        report = sync.send_weights()
        assert greedy(llm, **sync.request()) == expected
    assert model_digest(policy) == digest
    assert report.version == 1
    assert report.tensors == 272
    assert report.bytes == sum(m.dtype.itemsize * torch.Size(m.shape).numel() for m in sync.source.metadata())
    assert report.ranks == 1


def test_each_push_serves_what_was_trained_last(served):
    policy, llm, expected = served
    with connect(ls.MergedSource(policy), llm) as sync:
        models.move(policy, seed=1, scale=0.02)
        sync.send_weights()
        assert greedy(llm) != expected
        assert logprob_gap(policy, llm, PROMPTS).mean < 0.05
        models.move(policy, seed=0, scale=0.01)
        sync.send_weights()
        assert greedy(llm) == expected  # the prefix cache of the version before is not used either


def test_a_canary_tells_the_policy_from_another(served, caplog):
    policy, llm, expected = served
    canary = Canary(policy, llm, PROMPTS[:1])
    with connect(ls.MergedSource(policy), llm, canary=canary) as sync, caplog.at_level("INFO", "lorasync"):
        report = sync.send_weights()
        assert report.canary.mean < 0.05
        assert not report.warnings
        assert f"version {report.version} · merged" in caplog.text
        assert "answers within" in caplog.text
    stale = ls.MergedSource(policy)
    tensors = [(name, tensor.clone()) for name, tensor in stale]
    models.move(policy, seed=1, scale=0.2)  # the trainer went a long way, but the old weights are sent
    with (
        connect(Fixed(dict(tensors)), llm, canary=canary) as sync,
        pytest.warns(UserWarning, match="nats from the trainer's, expected at most 0.05"),
    ):
        report = sync.send_weights()
    assert report.canary.mean > 0.05
    assert "canary" in report.warnings[0]
    models.move(policy, seed=0, scale=0.01)
    assert greedy(llm) == expected


def test_a_source_that_raises_half_way_leaves_trainer_whole_and_the_engine_closed_until_a_push_completes(
    served,
):
    policy, llm, expected = served
    source = ls.MergedSource(policy)
    digest = model_digest(policy)
    with connect(source, llm, bucket_bytes=8 << 20) as sync:
        sync.send_weights()
        sync.source = _Breaking(source, after=120)
        with pytest.raises(ConnectionError, match="the trainer died here"):
            sync.send_weights()
        assert model_digest(policy) == digest
        with pytest.raises(EngineClosedError, match=r"Call send_weights\(\) again"):
            sync.request()
        sync.source = source
        sync.send_weights()
        assert greedy(llm, **sync.request()) == expected


def test_an_update_that_vanishes_in_rounding_is_reported_and_warned_of(served):
    policy, llm, expected = served
    dtype = next(p.dtype for n, p in policy.named_parameters() if "norm" in n)
    with connect(ls.MergedSource(policy), llm, measure_survival=True) as sync:
        assert sync.send_weights().delta_survival > 0.9
        if dtype == torch.bfloat16:  # fp32 has room for any update
            models.move(policy, seed=0, scale=1e-5)
            with pytest.warns(UserWarning, match="survives rounding"):
                report = sync.send_weights()
            assert report.delta_survival < 0.2
            assert "ServeAdapter" in report.warnings[0]
            models.move(policy, seed=0, scale=0.01)
            sync.send_weights()
        assert greedy(llm) == expected


def test_nan_is_refused_before_anything_is_sent(served):
    policy, llm, expected = served
    factor = next(p for n, p in policy.named_parameters() if "layers.7." in n and "lora_B" in n)
    with connect(ls.MergedSource(policy), llm) as sync:
        sync.send_weights()
        kept = factor.data.clone()
        factor.data[0, 0] = float("nan")
        with pytest.raises(NonFiniteError, match=r"layers\.7\."):
            sync.send_weights()
        factor.data.copy_(kept)
        assert greedy(llm, **sync.request()) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda name, t: {f"base_model.model.{name}": t},
            r"no module or parameter named 'base_model'.*checkpoint_name",
        ),
        (
            lambda name, t: {} if "layers.3.self_attn.k_proj" in name else {name: t},
            r"layers\.3\.self_attn\.qkv_proj",
        ),
        (
            lambda name, t: {} if "layers.5.input_layernorm" in name else {name: t},
            r"layers\.5\.input_layernorm",
        ),
        (
            lambda name, t: {name: t[:, :9] if "layers.3.self_attn.k" in name else t},
            r"layers\.3\.self_attn\.k_proj",
        ),
        (lambda name, t: {name: torch.cat([t, t]) if "layers.3.self_attn.k" in name else t}, "takes whole"),
        (lambda name, t: {name: t.double()}, r"dtype=torch\."),
        (
            lambda name, t: {name: t, "model.layers.99.mlp.up_proj.weight": torch.zeros(2, 2, dtype=t.dtype)},
            "99",
        ),
    ],
    ids=[
        "PEFT's names",
        "child of a fused layer missing",
        "layer missing",
        "too small",
        "too large",
        "wider",
        "unknown",
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_touched(served, change, message):
    policy, llm, _ = served
    before = greedy(llm)
    wrong = {k: v for name, tensor in ls.MergedSource(policy) for k, v in change(name, tensor).items()}
    with pytest.raises(MismatchError, match=message):
        connect(_Fixed(wrong), llm)
    assert greedy(llm) == before


def test_a_model_of_another_architecture_is_refused_with_all_that_differs(served):
    _, llm, _ = served
    other = models.with_adapter(models.tiny_llama())
    with pytest.raises(MismatchError) as caught:
        connect(ls.MergedSource(other, dtype=torch.bfloat16), llm)
    assert {m.name for m in caught.value.mismatches} >= {
        "model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight",
    }


def test_no_adapter_and_unknown_adapter(served, smollm2):
    policy, _, _ = served
    with pytest.raises(AdapterError, match="adapter"):
        ls.MergedSource(policy.get_base_model().model.embed_tokens)
    with pytest.raises(AdapterError, match=r"nobody.*default"):
        ls.MergedSource(policy, adapter="nobody")


def test_an_engine_without_the_backend_shows_the_flag_and_is_otherwise_unaffected(smollm2, tmp_path):
    plain = models.save(models.tiny_llama(vocab_size=49152), tmp_path / "tiny", tokenizer=smollm2)
    with running_llm(plain, backend=None, dtype="float32") as llm:
        policy = models.with_adapter(models.tiny_llama(vocab_size=49152))
        with pytest.raises(EngineNotReadyError, match=r'--weight-transfer-config .*"backend": "lorasync"'):
            connect(ls.MergedSource(policy), llm)
        assert len(greedy(llm)) == len(PROMPTS)


def test_peft_merging_into_4_bit_is_measurably_worse_than_ours(smollm2):
    policy = nf4_policy(smollm2, torch.float32)
    models.move(policy, seed=0, scale=0.2)  # large enough to leave the 4-bit grid
    name = "model.layers.4.mlp.down_proj"
    layer = policy.get_base_model().get_submodule(name)
    exact = _dequantized(layer.base_layer).double() + layer.get_delta_weight("default").double()
    ours = dict(ls.MergedSource(policy, dtype=torch.bfloat16))[name + ".weight"]
    layer.merge()
    theirs = _dequantized(layer.base_layer)
    layer.unmerge()
    assert _error(ours, exact) < 0.003
    assert _error(theirs, exact) > 0.05


@dataclasses.dataclass
class _Fixed:
    """A source over given tensors."""

    tensors: dict[str, torch.Tensor]

    def metadata(self):
        return [ls.ParamMeta(n, t.dtype, tuple(t.shape)) for n, t in self.tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.tensors.items())


@dataclasses.dataclass
class _Breaking:
    """A source whose trainer dies in the middle of the stream."""

    source: ls.MergedSource
    after: int

    def metadata(self):
        return self.source.metadata()

    def __iter__(self):
        for index, item in enumerate(self.source):
            if index == self.after:
                raise ConnectionError("the trainer died here")
            yield item


def _dequantized(base) -> torch.Tensor:
    import bitsandbytes as bnb

    return bnb.functional.dequantize_4bit(base.weight.data, base.weight.quant_state)


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.detach().double() - exact.detach()).norm() / exact.detach().norm())
