"""`merge_to_disk` of a model in memory: the folder loads by itself as the policy that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorasync.errors import ExportError, LoadError, LorasyncError, MismatchError
from lorasync.export import merge_to_disk, writer
from lorasync.source import MergedSource
from tests.export.test_export import stored
from tests.packed_bases import rewrite
from tests.source.test_source import quantized
from tests.tiny import adapt, build, same_bits


def written(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())


def loaded(out: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "mismatched_keys", "unexpected_keys")), info
    return model


@pytest.mark.parametrize("kind", ["nf4 nested", "fp4", "int8"])
def test_a_quantized_model_becomes_a_plain_one(kind: str, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "plain")
    model = adapt(quantized(tmp_path / "plain", kind))
    out = merge_to_disk(model, tmp_path / "out", progress=False)
    assert "quantization_config" not in (out / "config.json").read_text()
    state = loaded(out).state_dict()
    assert all(same_bits(state[name], tensor) for name, tensor in MergedSource(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_config_says_the_dtype_that_the_model_has_now(dtype: torch.dtype, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16).to(dtype)
    out = merge_to_disk(adapt(model), tmp_path / "out", progress=False)
    assert loaded(out).dtype == dtype


def test_nested_configs_say_the_dtype_too(tmp_path: Path) -> None:
    out = merge_to_disk(
        adapt(build("llava"), target_modules=["q_proj"]),
        tmp_path / "out",
        dtype=torch.float16,
        progress=False,
    )
    config = written(out)
    assert [config["dtype"], config["text_config"].get("dtype")] == ["float16", "float16"]


def test_a_vocabulary_that_was_resized(tmp_path: Path) -> None:
    base = build("llama")
    base.resize_token_embeddings(72)
    model = adapt(base, target_modules=["q_proj"])
    out = merge_to_disk(model, tmp_path / "out", progress=False)
    assert written(out)["vocab_size"] == 72
    assert loaded(out).get_input_embeddings().num_embeddings == 72


def test_a_generation_config_that_contradicts_itself_is_no_reason_to_fail(tmp_path: Path) -> None:
    base = build("llama")
    base.generation_config.do_sample = False
    base.generation_config.temperature = 0.3
    out = merge_to_disk(adapt(base), tmp_path / "out", progress=False)
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.3


def test_a_class_that_a_wrapper_made_is_written_as_the_models_own(tmp_path: Path) -> None:
    """As `fully_shard` does."""

    class FSDPModule:
        pass

    base = build("llama")
    base.__class__ = type("FSDPLlamaForCausalLM", (FSDPModule, type(base)), {})
    out = merge_to_disk(adapt(base), tmp_path / "out", progress=False)
    assert written(out)["architectures"] == ["LlamaForCausalLM"]


def test_a_tied_model_with_trained_tokens(tmp_path: Path) -> None:
    model = adapt(build("llama-tied"), target_modules=["v_proj"], trainable_token_indices=[1, 5])
    for untie, names in (
        (False, {"model.embed_tokens.weight"}),
        (True, {"model.embed_tokens.weight", "lm_head.weight"}),
    ):
        out = merge_to_disk(model, tmp_path / str(untie), untie=untie, progress=False)
        assert names <= stored(out).keys()
        assert written(out)["tie_word_embeddings"] is not untie
        ids = torch.arange(6).view(1, 6)
        assert torch.allclose(loaded(out)(input_ids=ids).logits, model(input_ids=ids).logits, atol=0.05)


def test_what_would_not_load_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = adapt(build("llama"))
    model.base_model.model.config.vocab_size = 65
    with pytest.raises(MismatchError, match=r"lm_head\.weight: got \(64, 32\), expected \(65, 32\)"):
        merge_to_disk(model, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


class _Foreign(torch.nn.Module):
    """A linear layer as HQQ's: what it computes with is packed in W_q."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("W_q", torch.zeros(8, 8, dtype=torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_weights_that_another_library_packed_are_refused(tmp_path: Path) -> None:
    base = build("llama")
    base.model.layers[0].mlp.up_proj = _Foreign()
    with pytest.raises(LorasyncError, match=r"layers\.0\.mlp\.up_proj"):
        merge_to_disk(adapt(base, target_modules=["q_proj"]), tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.float8_e4m3fn])
def test_a_dtype_that_no_weight_is_plain_in(dtype: Any, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="expected a dtype"):
        merge_to_disk(adapt(build("llama")), tmp_path / "out", dtype=dtype, progress=False)


def test_what_was_there_is_back_if_the_last_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    rename = Path.rename

    def once(self: Path, target: Any) -> Path:
        if self.name.startswith(".out.partial"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(ExportError):
        merge_to_disk(adapt(build("llama")), tmp_path / "out", overwrite=True, progress=False)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_an_interrupt_leaves_nothing_and_the_bar_shows_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    real, done = writer._write, []

    def interrupted(sink: Any, tensor: torch.Tensor) -> None:
        real(sink, tensor)
        done.append(tensor)
        if len(done) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_to_disk(adapt(build("llama")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert "Merging to out" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["gpt-neox", "llama", "llama-tied", "gpt2", "t5", "bart", "llava"])
def test_the_config_says_tied_if_and_only_if_the_head_is_not_written(
    architecture: str, tmp_path: Path
) -> None:
    """Also where the checkpoint calls the head something else than the model does."""
    base = build(architecture)
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    out = merge_to_disk(adapt(base), tmp_path / "out", progress=False)
    said = written(out)
    assert (
        said.get("tie_word_embeddings", said.get("text_config", {}).get("tie_word_embeddings", False)) is tied
    )


def test_a_head_that_was_loaded_apart_from_its_embedding_is_not_tied_by_the_config(tmp_path: Path) -> None:
    build("llama-tied").save_pretrained(tmp_path / "base")

    def apart(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    rewrite(tmp_path / "base", apart)
    model = adapt(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto"), target_modules=["q_proj"]
    )
    assert model.config.tie_word_embeddings is True
    out = merge_to_disk(model, tmp_path / "out", progress=False)
    assert written(out)["tie_word_embeddings"] is False
    assert not torch.equal(stored(out)["lm_head.weight"], stored(out)["model.embed_tokens.weight"])
