"""Who serves an engine's versions: a connection learns, without asking the engine, that another one has taken over.

`Sync.request` is asked at each `generate`, also on the event loop that runs the engine, where nothing may be waited for.
All connections to an `LLM` or an `AsyncLLM` are in the process that holds it: they are told here.
"""

from __future__ import annotations

import weakref
from typing import Protocol


class Session(Protocol):
    """A connection's conversation with one engine.

    Attributes:
        replaced: whether another connection's versions are served instead of its own.
    """

    replaced: bool


def join(engine: object, session: Session) -> None:
    """Remember that this connection has shaken hands with the engine, which takes only its pushes from now on."""
    _sessions.setdefault(engine, weakref.WeakSet()).add(session)
    _last[engine] = weakref.ref(session)


def replace_others(engine: object, session: Session) -> list[Session]:
    """Mark all other connections to an engine as replaced, before the engine drops their versions.

    They refuse requests from then on: vLLM ends the whole engine when a request names an adapter that is gone. If the
    engine takes the pushes of another connection than this one, it will refuse, and nobody is marked.

    Returns:
        The connections that are marked now and were not before: the caller takes the mark back if the engine refuses.
    """
    last = _last.get(engine)
    if last is None or last() is not session:
        return []
    others = [other for other in _sessions.get(engine, ()) if other is not session and not other.replaced]
    for other in others:
        other.replaced = True
    return others


_sessions: weakref.WeakKeyDictionary[object, weakref.WeakSet[Session]] = weakref.WeakKeyDictionary()
_last: weakref.WeakKeyDictionary[object, weakref.ref[Session]] = weakref.WeakKeyDictionary()
