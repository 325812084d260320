"""Train two real ZeRO-2 steps and write the most bytes alive at once: `python memory_worker.py JOB.json`."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from ds_worker import init_distributed

from lorasync.load import load_quantized
from lorasync.planning.memory import LiveBytes
from lorasync.presets import QLORA_ZERO2


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    init_distributed()
    import deepspeed
    from peft import get_peft_model

    preset = replace(QLORA_ZERO2, **job["preset"])
    with LiveBytes() as live:
        model = load_quantized(
            job["model"],
            preset.quantization,
            dtype=preset.dtype,
            gradient_checkpointing=preset.gradient_checkpointing,
            progress=False,
        )
        model = get_peft_model(model, preset.lora_config())
        params = [p for p in model.parameters() if p.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=model, config=preset.deepspeed_config(), model_parameters=params
        )
        live.peak = live.now
        for _ in range(2):
            ids = torch.randint(3, 1000, (preset.micro_batch, job["sequence_length"]))
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
    Path(job["out"]).write_text(json.dumps({"peak": live.peak}))


if __name__ == "__main__":
    main()
