"""The agent: stays connected, checks what arrives against the owner's policy, has the worker do it, and sends the reply back.

It imports no torch: what a plan needs is loaded in the worker, and only after the policy has permitted the plan. A plan that needs a
person's approval is held until it is decided, or until most of its deadline has passed; a paused node answers at once that it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lichen.client import connection, enrolment
from lichen.client.locks import HomeLocks
from lichen.client.mailbox import Mailbox
from lichen.client.status import State, StatusFile, is_paused
from lichen.client.witness import Witness
from lichen.client.worker import Limits, Worker, trim
from lichen.common import records
from lichen.common.channel.framing import Timing
from lichen.common.channel.spool import Spool
from lichen.common.errors import Code, LichenError

if TYPE_CHECKING:
    from flwr.app import Message

    from lichen.client.policy import Policy
    from lichen.common.plan import Plan

log = logging.getLogger(__name__)

_RENEWAL_EVERY = 3600.0
_DECISION_EVERY = 0.5
_HELD = 0.9  # share of the deadline that a message waits for a person: an answer after the deadline would tell nobody anything
_LOADING = 3.0  # deadlines more, after which a worker that should have stopped by itself is taken to hang
_WORK = {records.TRAIN: "training", records.EVALUATE: "evaluating"}


class Agent:
    """One node's agent.

    Args:
        home: the node's home, enrolled by `lichen client join`.
        timing: heartbeats; tests shorten them.

    Raises:
        LichenError: AGENT_HOME_MISSING, AGENT_IN_USE, and the certificate's errors (70 to 79).
    """

    def __init__(self, home: Path, *, timing: Timing | None = None) -> None:
        self.home = home.expanduser().resolve()
        identity = enrolment.load_identity(self.home)
        self.name = identity.name
        self._locks = HomeLocks(self.home)
        self._status = StatusFile(self.home, identity.name, identity.coordinator)
        self._mailbox = Mailbox(self.home / "agent.sqlite")
        spool = Spool(self.home / "spool")
        self._worker = Worker(self.home, self.name, spool.directory)
        self._connected = False
        self._witness = Witness(self.home)
        self._connection = connection.Connection(
            identity.coordinator,
            self._credentials,
            self._mailbox,
            spool,
            timing=timing,
            on_status=self._connection_changed,
            witness=self._witness,
            on_refused=self._refused,
        )

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT or `stop`.

        Raises:
            LichenError: AGENT_IN_USE, if another home's agent uses this data; what the connection cannot mend by trying again.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread: then whoever runs that stops us
                loop.add_signal_handler(number, self.stop)
        renewal = asyncio.create_task(self._renew())
        try:
            await asyncio.to_thread(self._locks.hold_data)
            trim()
            await self._connection.run(self.handle)
        except LichenError as error:
            self._note(error)
            raise
        finally:
            renewal.cancel()
            await asyncio.gather(renewal, return_exceptions=True)
            await self._worker.stop()
            self._status.change(state="stopped", connected=False, worker_pid=None)
            self._mailbox.close()
            self._locks.close()

    def stop(self) -> None:
        """Say goodbye and let `run` return; a message in work is done again after the next start, under the reservation it has."""
        log.info("stopping")
        self._connection.stop()

    # --- messages ---

    async def handle(self, message: Message) -> Message:
        """The reply to one message. Whatever fails becomes its number; a text goes with it only where the plan is not private."""
        private = True  # until the plan says otherwise
        run = str(message.metadata.run_id)
        try:
            if is_paused(self.home):
                raise LichenError(Code.AGENT_PAUSED, "the owner has paused this node", fix="lichen client pause --resume")
            plan, round = await asyncio.to_thread(_assignment, message)
            private = plan.private
            self._status.change(run=run, round=round)
            reply = await self._do(message, plan, round)
            if not reply.has_error():
                log.info("%s, round %d of %s: answered", _WORK[message.metadata.message_type], round, plan.name)
                return reply
            # The worker has logged the reason already.
            code, reason = reply.error.code, reply.error.reason or ""
            self._status.change(last_error=f"error {code} in round {round} of run {run}; the agent's log has the reason")
        except LichenError as error:
            self._note(error)
            code, reason = int(error.code), error.what
        finally:
            self._status.change(state=self._resting())
        return records.error_reply(message, code, "" if private else reason)

    async def _do(self, message: Message, plan: Plan, round: int) -> Message:
        loop = asyncio.get_running_loop()
        began = loop.time() - self._connection.waited(message)
        policy = await self._permission(plan, until=began + _HELD * plan.cohort.deadline_s)
        await asyncio.to_thread(self._locks.hold_data)
        if plan.private:
            await asyncio.to_thread(self._witness.check)
        work = _WORK[message.metadata.message_type]
        log.info("%s, round %d of %s", work, round, plan.name)
        self._status.change(state=work)
        records.spend_time(message, loop.time() - began)
        left = began + plan.cohort.deadline_s - loop.time()
        if plan.local.partial:  # it ends in time by itself; one that still loads its model gets to keep it for later rounds
            left += _LOADING * plan.cohort.deadline_s
        if left <= 0:
            raise LichenError(Code.WORKER_DEADLINE, "the deadline had passed before this message's turn", fix="Raise cohort.deadline_s.")
        data = await self._worker.ask(records.message_to_bytes(message), Limits(policy.threads, policy.memory_mb), left)
        self._status.change(worker_pid=self._worker.pid)
        reply = records.message_from_bytes(data)
        if reply.metadata.reply_to_message_id != message.metadata.message_id:
            raise LichenError(Code.WORKER_FAILED, "the worker answered another message")
        return reply

    async def _permission(self, plan: Plan, until: float) -> Policy:
        """The policy, once it permits the plan; while a person has yet to decide, wait for them."""
        from lichen.client.policy import enforce

        while True:
            try:
                return await asyncio.to_thread(enforce, self.home, plan, datetime.now().astimezone())
            except LichenError as error:
                if error.code is not Code.POLICY_APPROVAL or asyncio.get_running_loop().time() >= until:
                    raise
                self._wait_for_a_person(plan)
            await asyncio.sleep(_DECISION_EVERY)

    def _wait_for_a_person(self, plan: Plan) -> None:
        if self._status.state != "waiting":
            log.warning("plan %s waits for your decision: lichen client approve %s, or reject", plan.name, plan.sha256()[:12])
            self._status.change(state="waiting")

    # --- beside ---

    def _credentials(self) -> connection.Credentials:
        identity = enrolment.load_identity(self.home)
        return connection.Credentials(identity.ca_pem, identity.key_pem, identity.certificate_pem)

    def _connection_changed(self, status: connection.Status) -> None:
        self._connected = status.state == "connected"
        changes: dict[str, object] = {"connected": self._connected}
        if self._status.state in {"connecting", "idle"}:
            changes["state"] = self._resting()
        if status.error is not None:
            changes["last_error"] = str(status.error)
        self._status.change(**changes)

    def _refused(self, message: Message) -> None:
        """Tell the owner of an answer that the coordinator did not take."""
        run, group = message.metadata.run_id, message.metadata.group_id
        self._note(
            LichenError(
                Code.WORKER_DEADLINE,
                f"the answer to message {group} of run {run} was too late, and is not used; what the ledger has for it stays spent",
                fix="Where this comes often: ask the operator for fewer local.steps, local.partial, or cohort.mode: buffered.",
            )
        )

    def _resting(self) -> State:
        return "idle" if self._connected else "connecting"

    def _note(self, error: LichenError) -> None:
        log.error("%s", error)
        self._status.change(last_error=str(error), worker_pid=self._worker.pid)

    async def _renew(self) -> None:
        """Renew the certificate in time. A failure is tried again: there is a third of the validity for it."""
        while True:
            try:
                if await asyncio.to_thread(enrolment.renew_if_due, self.home):
                    log.info("renewed this node's certificate")
            except LichenError as error:
                log.warning("the certificate was not renewed: %s", error)
            await asyncio.sleep(_RENEWAL_EVERY)


def _assignment(message: Message) -> tuple[Plan, int]:
    """The plan and the round that a message asks for.

    Raises:
        LichenError: FRAME_INVALID, if it asks for nothing that an agent does; PLAN_…
    """
    from lichen.common.plan import plan_from_json  # here, because an agent without work can do without its schema

    kind = message.metadata.message_type
    config = message.content.config_records.get("assignment") if message.has_content() else None
    if kind not in _WORK or config is None:
        raise LichenError(Code.FRAME_INVALID, f"a message of type {kind!r} without an assignment, or of another type than training")
    assignment = records.from_config(records.Assignment, config)
    plan = plan_from_json(assignment.plan)
    if plan.sha256() != assignment.plan_sha256:
        raise LichenError(Code.POLICY_REFUSED, f"the plan's digest is {plan.sha256()}, not {assignment.plan_sha256}", where=plan.name)
    records.check_round(assignment.round, plan.rounds)
    return plan, assignment.round
