"""The worker engine ``"lorasync"``: runs in every vLLM worker, takes what the trainer pushes and applies it.

vLLM calls it through its weight-transfer seam (`init_transfer_engine`, `start_weight_update`, `receive_weights`,
`finish_weight_update`); nothing of vLLM is patched. The first of these doubles as the control channel (`Control`).
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from vllm.distributed.weight_transfer.base import WeightTransferEngine

from lorasync.errors import (
    EngineClosedError,
    EngineNotReadyError,
    LorasyncError,
    Mismatch,
    MismatchError,
    PayloadError,
    StaleVersionError,
    SyncError,
)
from lorasync.kernels import PendingMerge
from lorasync.receive.apply import Applier, applier_for
from lorasync.receive.device import beside_the_engine, wait_for, wait_for_stream
from lorasync.receive.load import LoadApplier
from lorasync.receive.served import ServedModel, notes_of
from lorasync.transport.cuda_ipc import Openings, gpu_of
from lorasync.version import __version__
from lorasync.vllm_seam.layout import check_layout
from lorasync.wire import (
    PROTOCOL,
    Control,
    Mailbox,
    Update,
    digest_of_parts,
    dtype_name,
    error_as_dict,
    message,
    read_safetensors,
    unpack,
)
from lorasync.wire import digest as digest_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from lorasync.receive.adapter import AdapterApplier


_LOG = logging.getLogger(__name__)


class WorkerEngine(WeightTransferEngine):  # type: ignore[misc]
    """One per vLLM worker; made when the worker loads its model, idle until a trainer says hello."""

    init_info_cls = Control
    update_info_cls = Update
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self._applier: Applier | None = None
        self._before = -1  # the version that a rollback leads to
        self._mailboxes: dict[str, Mailbox] = {}  # by session, as an `Update` names only that
        self._session = ""
        self.version = 0
        self.closed = ""
        self.served = ServedModel(vllm_config, model, device)
        self._gpu = Openings(device)
        self._here = False  # the trainer is in this process, and waits for the device itself
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="lorasync-stage")
        self._staging: Future[None] | None = None
        self._digests: list[str] = []  # of the buckets that have come of the next version

    # ------------------------------------------------------------------------- vLLM's four calls

    def init_transfer_engine(self, init_info: Control) -> None:
        """Handshake, staging, commit, rollback or status: whatever is asked outside of an update of vLLM's."""
        self._wait_for_staging()
        operations: dict[str, Callable[[Control], dict[str, Any]]] = {
            "hello": self._hello,
            "stage": lambda control: self._bucket(self.parse_update_info(control.bucket)),
            "commit": self._commit,
            "rollback": self._rollback,
            "status": lambda control: {"ours": control.session == self._session},
            "digest": lambda _: self._digest(),
            "goodbye": self._goodbye,
        }
        if init_info.background:
            self._staging = self._beside.submit(self._stage_beside, init_info)
            return
        # A trainer that is not, or no more, the one that pushes is answered in its own mailbox too.
        box = Mailbox.open(init_info.mailbox)
        if init_info.op == "hello" and box is None:
            raise EngineNotReadyError(
                f"worker rank {self.rank} on {socket.gethostname()} can't reach the trainer's folder {init_info.mailbox}, "
                "through which it would answer: another host, container or user. What can't be known to have arrived is not "
                "pushed. Run the engine and the trainer on one host, as one user, with one /dev/shm. Nothing was touched."
            )
        self._answering(init_info.call, lambda: operations[init_info.op](init_info), box)

    def start_weight_update(self) -> None:
        """Nothing is touched before the first bucket."""

    def receive_weights(self, update_info: Update) -> None:
        """Check one bucket and stage or load it."""
        box = self._mailboxes.get(update_info.session)
        self._answering(update_info.call, lambda: self._bucket(update_info), box)

    def finish_weight_update(self) -> None:
        """Commit nothing yet: vLLM drops its LoRA adapters after this call, so the commit comes in a call of its own."""

    def shutdown(self) -> None:
        """Forget the trainer; the served weights stay as they are."""
        self._wait_for_staging()
        if self._applier is not None:
            self._applier.close(())
        self._applier = None

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:  # noqa: ARG004
        """Not this way: vLLM up to 0.27 wants the method to exist."""
        raise SyncError("trainer_send_weights: not used here. Push with lorasync.connect(source, engine).")

    # -------------------------------------------------------------------------------- operations

    def _hello(self, control: Control) -> dict[str, Any]:
        self._check_protocol(control)
        check_layout(self.vllm_config.parallel_config)
        if control.bucket is not None:
            message(Update, control.bucket)  # whether bytes come through as they are
        before = self._applier
        if before is not None:
            self._abort(before)  # of a trainer that died, or was not told that another one took over
        self._applier = self._applier_for(control)
        if before is not None:  # not earlier: a handshake that is refused leaves the old version serving
            if not before.changes_weights and not self._applier.changes_weights:
                cast(
                    "AdapterApplier", before
                ).hand_over()  # all its versions stay until the next push: it has no word yet of this trainer
            else:
                if not before.changes_weights:
                    self._outdate_others(control.session)
                before.close(control.in_flight)
            self._gpu.close()
        self._session = control.session
        # Trainers that were taken over from may still call: each is answered in its own mailbox while that exists.
        self._mailboxes = {s: box for s, box in self._mailboxes.items() if box.exists}
        box = Mailbox.open(control.mailbox)
        if box is not None:
            self._mailboxes[control.session] = box
        described = self._applier.describe()
        return {
            **asdict(described),
            "notes": [*notes_of(self.vllm_config), *described.notes],
            "gpu": gpu_of(self.device),
            "dtypes": self._dtypes(),
            "multimodal": bool(self.model_config.is_multimodal_model),
        }

    def _dtypes(self) -> dict[str, str]:
        """What weights and LoRA slots are served in."""
        lora = self.vllm_config.lora_config
        weights = dtype_name(self.model_config.dtype)
        return {"weights": weights, "slots": weights if lora is None else dtype_name(lora.lora_dtype)}

    def _applier_for(self, control: Control) -> Applier:
        try:
            return applier_for(control.apply, control.manifest, self.served, self.version)
        except LorasyncError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise PayloadError(
                f"handshake: the worker can't make sense of it ({type(error).__name__}: {error}). Nothing was touched."
            ) from error

    def _bucket(self, update: Update) -> dict[str, Any]:
        applier = self._applier_of(update.session)
        if update.op == "abort":
            self._abort(applier)
            raise SyncError("The trainer gave up the update.")
        try:
            bucket, found_digest = self._bucket_of(update)
            if isinstance(applier, LoadApplier) and update.op == "bucket":
                applier.receive(bucket)
            elif update.op == "base":
                applier.receive_base(_without_merges(bucket))
            else:
                applier.receive(_without_merges(bucket))
            if update.gpu:  # once it has its answer the trainer writes there again
                wait_for_stream(self.device)
            if update.op == "bucket":
                self._digests.append(found_digest)
            return {"digest": found_digest}
        except BaseException:
            self._abort(applier)
            raise

    def _abort(self, applier: Applier) -> None:
        self._digests = []
        if applier.undo():
            self.closed = (
                f"The push of version {self.version + 1} died half-way: part of the engine's weights is new, part is "
                f"of version {self.version}. Call send_weights() again; a push that completes opens the engine."
            )

    def _stage_beside(self, control: Control) -> None:
        """Stage a bucket while the engine generates; the answer in the mailbox is all that comes of it."""
        with contextlib.suppress(Exception), beside_the_engine(self.device):
            box = Mailbox.open(control.mailbox)
            self._answering(control.call, lambda: self._bucket(self.parse_update_info(control.bucket)), box)

    def _wait_for_staging(self) -> None:
        if self._staging is not None:
            self._staging.result()
        self._staging = None

    def _commit(self, control: Control) -> dict[str, Any]:
        applier = self._applier_of(control.session)
        if control.expected != self.version:
            self._abort(applier)
            raise StaleVersionError(
                f"version: the engine serves {self.version}, expected {control.expected}: somebody else has pushed "
                f"meanwhile. Version {control.version} was not applied. connect() again to go on from what is served."
            )
        if self.closed and not applier.changes_weights:
            self._abort(applier)
            raise EngineClosedError(self.closed)
        digest = digest_of_parts(self._digests)
        if control.digest != digest:
            self._abort(applier)
            raise PayloadError(
                f"version {control.version}: its buckets have digest {digest or 'none'} here, expected "
                f"{control.digest or 'none'}: one is missing, or came twice. It is not served."
            )
        try:
            self._outdate_others(control.session)
            applier.commit(control.version, control.in_flight)
            if not self._here:
                wait_for(self.device)  # what fails on a GPU fails here, not in the first request
        except BaseException:
            self._abort(applier)
            raise
        self._before, self.version = self.version, control.version
        self.closed = ""
        self._digests = []
        return {"digest": digest}

    def _rollback(self, control: Control) -> dict[str, Any]:
        applier = self._applier_of(control.session)
        if (control.expected, control.version) != (self.version, self._before):
            raise SyncError(
                f"rollback: the engine serves {self.version} and can go to {self._before}, expected {control.expected} and "
                f"{control.version}. Nothing was touched."
            )
        try:
            applier.rollback(control.in_flight)
        except BaseException:
            self._abort(applier)
            raise
        wait_for(self.device)
        self._before, self.version = self.version, control.version
        return {}

    def _goodbye(self, control: Control) -> dict[str, Any]:
        if control.session == self._session and self._applier is not None:
            if not self._applier.changes_weights:
                self._outdate_others(control.session)
            self._applier.close(control.in_flight)
            self._applier = None
            self._gpu.close()
        return {}

    def _outdate_others(self, session: str) -> None:
        """Before what earlier trainers have pushed goes: VLLM ends the whole engine when a request names a lost adapter."""
        for name, box in self._mailboxes.items():
            if name != session and box.exists:
                box.outdate()

    def _digest(self) -> dict[str, Any]:
        """Over the live parameters, in the names and the order that vLLM gives them.

        Raises:
            SyncError: if one is empty because vLLM keeps it packed elsewhere.
        """
        live = dict(self.model.named_parameters())
        packed = sorted(name for name, param in live.items() if param.numel() == 0)
        if packed:
            raise SyncError(
                f"digest: {len(packed)} weights can't be read back, vLLM keeps them packed for this CPU: {packed[0]}"
            )
        return {"digest": digest_of({name: param.detach() for name, param in live.items()})}

    # ----------------------------------------------------------------------------------- helpers

    def parse_init_info(self, init_dict: dict[str, Any]) -> Control:
        return message(Control, init_dict)

    def parse_update_info(self, update_dict: dict[str, Any]) -> Update:
        try:
            return message(Update, update_dict)
        except PayloadError:
            # VLLM ends the update here, so that no word of the trainer's comes any more.
            if self._applier is not None:
                self._abort(self._applier)
            raise

    def _applier_of(self, session: str) -> Applier:
        if self._applier is None or session != self._session:
            raise SyncError(
                f"session: got {session or 'none'}, expected {self._session or 'a handshake first'}. The engine was "
                "restarted or another trainer took it over: connect() again."
            )
        return self._applier

    def _bucket_of(self, update: Update) -> tuple[dict[str, torch.Tensor | PendingMerge], str]:
        """The bucket, and the digest of what has come.

        Raises:
            PayloadError: if it is not what the trainer has sent.
        """
        self._here = update.tensors is not None
        if self._here:
            given: dict[str, torch.Tensor | PendingMerge] = (
                update.tensors
            )  # itself: it may be one that comes again
            return given, ""
        if update.gpu:
            return self._gpu.read(update.gpu, update.layout, update.digest), update.digest
        if update.path:
            if update.session not in self._mailboxes:
                raise PayloadError(
                    "The payload lies in shared memory that this worker can't reach: other host or user."
                )
            tensors = read_safetensors(self._mailboxes[update.session].payload(update.path))
        else:
            tensors = unpack(update.payload)
        found = digest_of(tensors)
        if found != update.digest:
            raise PayloadError(
                f"bucket: the digest differs from {update.digest or 'none'}: bytes were altered. Not applied."
            )
        return dict(tensors), found

    def _check_protocol(self, control: Control) -> None:
        if control.protocol != PROTOCOL:
            raise MismatchError(
                "Trainer and engine run versions of lorasync that don't understand each other; nothing was touched.",
                [
                    Mismatch(
                        "lorasync",
                        f"{control.lorasync} (protocol {control.protocol}) in the trainer",
                        f"{__version__} (protocol {PROTOCOL}) as in the engine",
                        "Install the same version on both sides.",
                    )
                ],
            )

    def _answering(self, call: int, operation: Callable[[], dict[str, Any]], mailbox: Mailbox | None) -> None:
        """Run it, and put the outcome into the mailbox: vLLM's calls carry no answer back."""
        before = time.perf_counter()
        try:
            body = operation()
        except BaseException as error:
            replied = self._reply(call, {"ok": False, "error": error_as_dict(error)}, before, mailbox)
            # Raised through vLLM it would be printed as a failure of the engine, once a rank; and vLLM gives a call up at
            # the first rank that fails, and takes what others answered for the next call's.
            if not replied or not isinstance(error, Exception):
                raise
            if not isinstance(error, LorasyncError):
                _LOG.exception("lorasync: a message of the trainer's failed")
            return
        self._reply(call, {"ok": True, **body}, before, mailbox)

    def _reply(self, call: int, body: dict[str, Any], before: float, mailbox: Mailbox | None) -> bool:
        if mailbox is None or not mailbox.exists:
            return False
        state = {
            "version": self.version,
            "closed": self.closed,
            "world_size": self._ranks,
            "seconds": time.perf_counter() - before,
        }
        mailbox.reply(call, self.rank, {**state, **body})
        return True

    @property
    def _ranks(self) -> int:
        return int(self.vllm_config.parallel_config.world_size)

    @property
    def rank(self) -> int:
        parallel = self.vllm_config.parallel_config
        return int(parallel.rank)


def _without_merges(bucket: dict[str, torch.Tensor | PendingMerge]) -> dict[str, torch.Tensor]:
    if any(isinstance(item, PendingMerge) for item in bucket.values()):
        raise PayloadError(
            "bucket: got merges, expected factors: these are for a merged push. Nothing was touched."
        )
    return cast("dict[str, torch.Tensor]", bucket)
