"""What was agreed on in the handshake, and whether the trainer's model is still what was described there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lorasync.errors import Mismatch, MismatchError
from lorasync.push.strategies import ServeAdapter, is_factor_source
from lorasync.push.trainer_ranks import agreed_by_all_ranks, largest_of_all_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lorasync.push.strategies import Strategy

_PARTS = ("modules", "biases", "rows", "saved")
_SHOWN = 8
_FIX = "connect() again."


class Handshake:
    """What the workers were told of the factors and of the base below them.

    Args:
        source: what travels.
        strategy: what the workers do with it.
        message: what the strategy made of them.
    """

    def __init__(self, source: Any, strategy: Strategy, message: str) -> None:
        self._strategy, self._message = strategy, message
        self._scalings = scalings(source)
        self._state = _state(source)

    def check(self, source: Any) -> None:
        """Refuse a push whose factors would be applied as the handshake said, and not as the model is now.

        Cheap where nothing was replaced or written to. Otherwise the model is described anew; every rank calls it, as a
        base may have to be gathered for that.

        Raises:
            MismatchError: naming what is different, of the factors or of the base.
        """
        if not self._strategy.stages_beside:
            return  # a merged push sends every weight as it is
        with agreed_by_all_ranks():
            state = _state(source)
        if not largest_of_all_ranks(int(state is not None and state != self._state)):
            return  # or a source of the user's own, of which nothing but its names is known
        self.check_scalings(source)
        before, now = json.loads(self._message), json.loads(self._strategy.handshake(source))
        wrong = list(_of_the_spec(before, now)) + list(self._of_the_base(before, now))
        if wrong:
            raise MismatchError("The model is not what it was at connect(); nothing was sent.", _first(wrong))
        self._state = state

    def check_scalings(self, source: Any) -> None:
        """Refuse factors that the workers would scale in another way than the trainer.

        Raises:
            MismatchError: naming every module whose scaling is another.
        """
        now = scalings(source)
        if now == self._scalings:
            return
        wrong = [
            Mismatch(f"{n} (scaling)", str(now[n]), f"{self._scalings.get(n)}, as in the handshake", _FIX)
            for n in sorted(now)
            if self._scalings.get(n) != now[n]
        ]
        if wrong:
            raise MismatchError("The adapter's scaling has changed since connect(); nothing was sent.", wrong)

    def _of_the_base(self, before: dict[str, Any], now: dict[str, Any]) -> Iterator[Mismatch]:
        if isinstance(self._strategy, ServeAdapter) and self._strategy.other_base:
            return  # they were never compared
        old, new = (json.loads(message.get("samples", "{}")) for message in (before, now))
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                yield Mismatch(
                    name, "another base weight", "the one of the handshake", f"If that is meant: {_FIX}"
                )


def _state(source: Any) -> Any:
    asked = getattr(source, "base_state", None)
    return None if asked is None else asked()


def _of_the_spec(before: dict[str, Any], now: dict[str, Any]) -> Iterator[Mismatch]:
    old, new = (json.loads(message.get("spec", "{}")) for message in (before, now))
    for part in _PARTS:
        was, found = ({each["weight"]: each for each in spec.get(part, ())} for spec in (old, new))
        for name in sorted(was.keys() | found.keys()):
            if was.get(name) != found.get(name):
                yield Mismatch(
                    name, _told(found.get(name)), f"{_told(was.get(name))}, as in the handshake", _FIX
                )
    for key in ("ties", "conflicts"):
        if old.get(key) != new.get(key):
            yield Mismatch(key, str(new.get(key)), f"{old.get(key)}, as in the handshake", _FIX)


def _told(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "nothing"
    return ", ".join(
        f"{key} {value}" for key, value in entry.items() if key in ("r", "rows", "how", "scaling", "tensor")
    )


def _first(wrong: list[Mismatch]) -> list[Mismatch]:
    more = len(wrong) - _SHOWN
    if more <= 0:
        return wrong
    return [*wrong[:_SHOWN], Mismatch(f"{more} more", "other ones", "those of the handshake", _FIX)]


def scalings(source: Any) -> dict[str, float]:
    """Each module's scaling, where factors travel: the workers know it from the handshake, a push brings A and B only."""
    return source.scalings() if is_factor_source(source) else {}
