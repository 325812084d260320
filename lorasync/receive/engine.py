"""The worker engine ``"lorasync"``: every vLLM worker keeps one, and it can be called.

``collective_rpc("weight_transfer_engine", (message, payload))`` reaches it in every worker by every route that vLLM has,
and brings back what it returns: an answer by value, never an exception. Nothing of vLLM is patched, and vLLM's own calls
for weight updates, which return nothing, are not used.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from vllm.distributed.weight_transfer.base import WeightTransferEngine

from lorasync.errors import LorasyncError, SyncError
from lorasync.receive.conversation import Conversation
from lorasync.receive.served import ServedModel
from lorasync.vllm_seam.config import in_context_of
from lorasync.vllm_seam.layout import rank_in_engine, workers_of
from lorasync.wire import (
    Answer,
    Introduction,
    Message,
    error_as_dict,
    message_from_dict,
)

if TYPE_CHECKING:
    import torch

_LOG = logging.getLogger(__name__)


class WorkerEngine(WeightTransferEngine):  # type: ignore[misc]
    """One per vLLM worker; made when the worker loads its model, idle until a trainer says hello."""

    init_info_cls = dict
    update_info_cls = dict
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self.served = ServedModel(vllm_config, model, device)
        self.conversation = Conversation(self.served)

    def __call__(self, message: Any, payload: Any = b"") -> dict[str, Any]:
        """Answer a message of a trainer's.

        Args:
            message: what `lorasync.wire` says that it is, as a dict.
            payload: what rides beside it: bytes, or the trainer's own tensors inside one process.

        Returns:
            An `Answer`, as a dict; also where something went wrong.
        """
        began = time.perf_counter()
        named = message.get("session") if isinstance(message, dict) else None
        session = named if isinstance(named, str) else ""
        try:
            read = message_from_dict(message)
            with in_context_of(self.vllm_config):
                return self._answer(session, began, **self._told(read, payload))
        except Exception as error:
            if not isinstance(error, LorasyncError):
                _LOG.exception("lorasync: a message of the trainer's failed")
            return self._answer(session, began, ok=False, error=error_as_dict(error))

    def _told(self, message: Message, payload: Any) -> dict[str, Any]:
        """What only this kind of message brings."""
        found = self.conversation.answer(message, payload)
        if isinstance(found, Introduction):
            return {"introduction": found}
        return {"pending": True} if found is None else {"digest": found}

    def _answer(self, session: Any, began: float, *, ok: bool = True, **more: Any) -> dict[str, Any]:
        state, parallel = self.conversation, self.vllm_config.parallel_config
        answer = Answer(
            ok=ok,
            rank=rank_in_engine(parallel),
            workers=workers_of(parallel),
            version=state.version,
            closed=state.closed,
            ours=bool(session) and session == state.session,
            replaced=session in state.replaced,
            seconds=time.perf_counter() - began,
            **more,
        )
        return answer.to_dict()

    def shutdown(self) -> None:
        """Forget the trainer; the served weights stay as they are."""
        self.conversation.shutdown()

    # ---------------------------------------------------------------------- vLLM's own calls, which return nothing

    def init_transfer_engine(self, init_info: Any) -> None:  # noqa: ARG002
        """Refuse."""
        raise _not_this_way("init_weight_transfer_engine")

    def start_weight_update(self) -> None:
        """Refuse."""
        raise _not_this_way("start_weight_update")

    def receive_weights(self, update_info: Any) -> None:  # noqa: ARG002
        """Refuse."""
        raise _not_this_way("update_weights")

    def finish_weight_update(self) -> None:
        """Refuse."""
        raise _not_this_way("finish_weight_update")

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:  # noqa: ARG004
        """Refuse; vLLM up to 0.27 wants the method to exist."""
        raise _not_this_way("trainer_send_weights")


def _not_this_way(call: str) -> SyncError:
    return SyncError(
        f"{call}: not used by the backend 'lorasync', as it brings no answer back. Push with "
        "lorasync.push.connect(source, engine). Nothing was touched."
    )
