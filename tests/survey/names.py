"""Names, shapes and bits of a merged stream against `save_pretrained`, for one class of transformers after another."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

import lorasync as ls
from lorasync.errors import LorasyncError
from tests import served
from tests.survey.one import Outcome, _first_line, _targets
from tests.survey.shrink import shrunk
from tests.tiny import fill, same_bits


def check(architecture: str) -> Outcome:
    """Build one class tiny, merge both ways, compare."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            policy = _policy(architecture)
            copy.deepcopy(policy).merge_and_unload().save_pretrained(folder)
        except Exception as error:
            return Outcome("not built", _first_line(error))
        expected = served.checkpoint(folder)
        try:
            found = dict(ls.MergedSource(policy))
        except LorasyncError as error:
            return Outcome("refused", str(error))
        except Exception as error:
            return Outcome("wrong", f"raw {_first_line(error)}")
    other = sorted(found.keys() ^ expected.keys())
    if other:
        return Outcome("wrong", f"{len(other)} names on one side only: {', '.join(other[:4])}")
    wrong = [name for name in found if not same_bits(found[name], expected[name])]
    return Outcome("wrong", f"{len(wrong)} values: {', '.join(wrong[:4])}") if wrong else Outcome("right")


def _policy(architecture: str) -> Any:
    kind: Any = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = kind(shrunk(kind.config_class, architecture)).to(torch.bfloat16)
    return fill(get_peft_model(model.eval(), LoraConfig(r=4, **_targets(model, experts=True))))


def main(names: list[str]) -> None:
    """Print one line of JSON for each class, after one that says that it begins."""
    for name in names:
        print(json.dumps({"begin": name}), flush=True)
        outcome = check(name)
        print(json.dumps({"name": name, "ways": {"names": [outcome.verdict, outcome.why]}}), flush=True)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
