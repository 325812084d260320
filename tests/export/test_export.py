"""`merge_to_disk`: equal to `merge_and_unload`, complete or nothing, in the memory of one tensor."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorasync.errors import ExportError, LoadError, MismatchError, NonFiniteError
from lorasync.export import merge_to_disk
from lorasync.export.checkpoint import Tensors
from lorasync.source import MergedSource
from tests.source.test_memory import VOCAB, WIDTH, Allocations, llama
from tests.source.test_source import quantized
from tests.tiny import adapt, build, fill, same_bits

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {}),
    "tied": ("llama-tied", {}),
    "dora": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "rslora": ("gemma2", {"use_rslora": True}),
    "bias": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    "saved": ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "tokens": ("llama", {"target_modules": ["v_proj"], "trainable_token_indices": [1, 5, 7]}),
    "transposed": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "moe": ("qwen3-moe", {"target_modules": ["q_proj"]}),
    "experts": (
        "qwen3-moe",
        {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
}


def folders(path: Path, architecture: str, **config: Any) -> tuple[Path, Path, Any]:
    """Save a base and a trained adapter, and return PEFT's model of both."""
    base = build(architecture)
    base.save_pretrained(path / "base")
    model = adapt(base, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path / "adapter")
    return path / "base", path / "adapter", model


def stored(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("kind", list(KINDS))
def test_two_folders_give_what_merge_and_unload_saves(kind: str, tmp_path: Path) -> None:
    architecture, config = KINDS[kind]
    base, adapter, model = folders(tmp_path, architecture, **config)
    out = merge_to_disk(base, tmp_path / "out", adapter=adapter, progress=False, shard_bytes=20_000)
    assert len(list(out.glob("*.safetensors"))) > 1
    ours = stored(out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    theirs = stored(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not same_bits(ours[name], theirs[name])] == []
    ids = torch.arange(6).view(1, 6)
    loaded = [
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.bfloat16) for p in (out, tmp_path / "theirs")
    ]
    assert same_bits(*[m(input_ids=ids).logits for m in loaded])


@pytest.mark.parametrize("kind", ["nf4 nested", "fp4", "int8"])
def test_a_bitsandbytes_checkpoint_is_dequantized(kind: str, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "plain")
    packed = quantized(tmp_path / "plain", kind)
    packed.save_pretrained(tmp_path / "base")
    model = adapt(packed, target_modules=["q_proj", "down_proj"])
    model.save_pretrained(tmp_path / "adapter")
    out = merge_to_disk(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", progress=False)
    ours = stored(out)
    for name, tensor in MergedSource(model):
        assert same_bits(ours[name], tensor), name
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_a_model_in_memory_with_its_configs(tmp_path: Path) -> None:
    model = adapt(build("llama"), "policy")
    out = merge_to_disk(model, tmp_path / "out", adapter="policy", dtype=torch.float32, progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert loaded.dtype == torch.float32
    state = loaded.state_dict()
    assert all(same_bits(state[name], t) for name, t in MergedSource(model, dtype=torch.float32))
    assert (out / "generation_config.json").exists()


def test_tokenizer_and_generation_config_come_along_and_the_adapters_tokenizer_wins(tmp_path: Path) -> None:
    base, adapter, _ = folders(tmp_path, "llama")
    (base / "tokenizer.json").write_text("base")
    (base / "chat_template.jinja").write_text("template")
    (adapter / "tokenizer.json").write_text("adapter")
    out = merge_to_disk(base, tmp_path / "out", adapter=adapter, progress=False)
    assert (out / "tokenizer.json").read_text() == "adapter"
    assert (out / "chat_template.jinja").read_text() == "template"
    assert (out / "generation_config.json").exists()
    assert not list(out.glob("adapter*"))


def test_another_method_than_lora_goes_through_memory(tmp_path: Path) -> None:
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    model = fill(get_peft_model(base, LoHaConfig(target_modules=["q_proj"], r=4)))
    model.save_pretrained(tmp_path / "adapter")
    out = merge_to_disk(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", progress=False)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    theirs = again.merge_and_unload().state_dict()
    assert all(same_bits(theirs[name], t) for name, t in stored(out).items())


def test_tied_weights_that_differ_are_refused_or_written_apart(tmp_path: Path) -> None:
    base, adapter, model = folders(tmp_path, "llama-tied", target_modules=["embed_tokens"])
    with pytest.raises(MismatchError, match="untie=True"):
        merge_to_disk(base, tmp_path / "out", adapter=adapter, progress=False)
    out = merge_to_disk(base, tmp_path / "out", adapter=adapter, untie=True, progress=False)
    ours = stored(out)
    assert all(same_bits(ours[name], t) for name, t in MergedSource(model, untie=True))
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    ids = torch.arange(6).view(1, 6)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)(input_ids=ids).logits
    assert torch.allclose(merged, model(input_ids=ids).logits, atol=0.1)


def test_an_adapter_for_another_base_is_refused_with_every_mismatch(tmp_path: Path) -> None:
    base, _, _ = folders(tmp_path / "one", "llama")
    _, adapter, _ = folders(tmp_path / "two", "qwen2", target_modules=["q_proj", "gate_proj"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(MismatchError, match=r"layers\.0\.mlp\.gate_proj") as caught:
        merge_to_disk(base, tmp_path / "out", adapter=adapter, progress=False)
    assert len(caught.value.mismatches) >= 2
    assert not (tmp_path / "out").exists()


def test_missing_folders_and_files(tmp_path: Path) -> None:
    base, adapter, _ = folders(tmp_path, "llama")
    with pytest.raises(LoadError, match="adapter"):
        merge_to_disk(base, tmp_path / "out", progress=False)
    with pytest.raises(LoadError, match="nowhere"):
        merge_to_disk(base, tmp_path / "out", adapter=tmp_path / "nowhere", progress=False)
    (base / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"model\.safetensors"):
        merge_to_disk(base, tmp_path / "out", adapter=adapter, progress=False)


def test_nan_leaves_nothing(tmp_path: Path) -> None:
    model = adapt(build("llama"))
    with torch.no_grad():
        model.base_model.model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        merge_to_disk(model, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays_unless_overwritten(tmp_path: Path) -> None:
    model = adapt(build("llama"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(ExportError, match="overwrite=True"):
        merge_to_disk(model, tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "precious").exists()
    out = merge_to_disk(model, tmp_path / "out", progress=False, overwrite=True)
    assert not (out / "precious").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_too_small_or_gets_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from lorasync.export import writer

    model = adapt(build("llama"))
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 900, 100))
        with pytest.raises(ExportError, match="GB free"):
            merge_to_disk(model, tmp_path / "out", progress=False)
    real, written = writer._write, []

    def full(sink: Any, tensor: torch.Tensor) -> None:
        written.append(tensor)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(sink, tensor)

    monkeypatch.setattr(writer, "_write", full)
    with pytest.raises(ExportError, match="disk is full"):
        merge_to_disk(model, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


def _python(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", script, *args]
    env = {**os.environ, "PYTHONPATH": root}
    return subprocess.run(
        command, cwd=root, env=env, timeout=120, check=False, capture_output=True, text=True
    )


def test_a_killed_run_leaves_nothing_that_loads(tmp_path: Path) -> None:
    script = (
        "import os, sys; from lorasync.export import merge_to_disk, writer\n"
        "from tests.tiny import adapt, build\n"
        "real, n = writer._write, []\n"
        "def die(sink, tensor):\n"
        "    n.append(1); real(sink, tensor)\n"
        "    if len(n) == 9: sink.flush(); os.kill(os.getpid(), 9)\n"
        "writer._write = die\n"
        "merge_to_disk(adapt(build('llama')), sys.argv[1], progress=False)\n"
    )
    assert _python(script, str(tmp_path / "out")).returncode == -9
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial")
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(left)
    other = tmp_path / left.name.replace(".partial-", ".partial-elsewhere-")
    alive = left.with_name(f"{left.name.rpartition('-')[0]}-{os.getppid()}")
    other.mkdir(), alive.mkdir()
    merge_to_disk(adapt(build("llama")), tmp_path / "out", progress=False)
    assert set(tmp_path.iterdir()) == {tmp_path / "out", other, alive}  # another's work is nobody's to remove


def _peak_of_merging(path: Path, layers: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """The most bytes alive at once, read from the files or computed, while two folders are merged."""
    llama(layers).save_pretrained(path / "base")
    adapt(llama(layers)).save_pretrained(path / "adapter")
    allocations, read = Allocations(), Tensors.__getitem__

    def counted(self: Tensors, name: str) -> torch.Tensor:
        tensor = read(self, name)
        allocations.count(tensor)
        return tensor

    with monkeypatch.context() as patched, allocations:
        patched.setattr(Tensors, "__getitem__", counted)
        merge_to_disk(path / "base", path / "out", adapter=path / "adapter", progress=False)
    return allocations.peak


def test_two_folders_merge_in_the_memory_of_one_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = {n: _peak_of_merging(tmp_path / str(n), n, monkeypatch) for n in (6, 24)}
    # What was read, the fp32 delta, the rounded result; never a second tensor's, nor the whole adapter.
    assert 0 < peaks[24] <= peaks[6] + 1000
    assert peaks[24] <= VOCAB * WIDTH * (2 + 4 + 2) + 8192


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_a_folder_is_refused_and_leaves_nothing(bad: float, tmp_path: Path) -> None:
    base = build("llama")
    with torch.no_grad():
        base.model.norm.weight[3] = bad
    base.save_pretrained(tmp_path / "base")
    adapt(build("llama")).save_pretrained(tmp_path / "adapter")
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        merge_to_disk(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", progress=False)
    model = adapt(build("llama"))
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.lora_B["default"].weight[0, 0] = bad
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.lora_B"):
        merge_to_disk(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
