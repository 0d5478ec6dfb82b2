"""The agent: stays connected, checks what arrives against the owner's policy, has the worker do it, and sends the reply back.

It imports no torch: what a plan needs is loaded in the worker, and only after the policy has permitted the plan. A plan that needs a
person's approval is held until it is decided, or until most of its deadline has passed; a paused node answers at once that it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lichen.client import connection, enrolment
from lichen.client.hardware import Hardware, is_kept_in
from lichen.client.locks import HomeLocks
from lichen.client.mailbox import Mailbox
from lichen.client.status import State, StatusFile, is_paused
from lichen.client.watching import Watcher
from lichen.client.witness import Witness
from lichen.client.worker import Limits, OutOfMemoryError, Worker, trim
from lichen.common import records
from lichen.common.channel.framing import Timing
from lichen.common.channel.spool import Spool
from lichen.common.errors import Code, LichenError
from lichen.common.hardware import rows_per_step, to_frame, work_of

if TYPE_CHECKING:
    from flwr.app import Message

    from lichen.client.policy import Policy
    from lichen.common.channel.fleet_pb2 import News
    from lichen.common.hardware import Profile
    from lichen.common.plan import Plan

log = logging.getLogger(__name__)

_RENEWAL_EVERY = 3600.0
_DECISION_EVERY = 0.5
_HELD = 0.9  # share of the deadline that a message waits for a person: an answer after the deadline would tell nobody anything
_MORE_MEMORY = "Raise memory_mb in policy.yaml (or --memory), or ask for shorter texts or a smaller adapter."
_LOADING = 3.0  # deadlines more, for a worker that may still be loading its model, and then is ready for later rounds
_WORK: dict[str, State] = {records.PREPARE: "preparing", records.TRAIN: "training", records.EVALUATE: "evaluating"}


class Agent:
    """One node's agent.

    Args:
        home: the node's home, enrolled by `lichen client join`.
        timing: heartbeats; tests shorten them.
        limits: of the worker, beside the policy's.

    Raises:
        LichenError: AGENT_HOME_MISSING, AGENT_IN_USE.
    """

    def __init__(self, home: Path, *, timing: Timing | None = None, limits: Limits | None = None) -> None:
        self.home = home.expanduser().resolve()
        self.name, address = enrolment.address_of(self.home)
        self._locks = HomeLocks(self.home)
        self._status = StatusFile(self.home, self.name, address)
        self._mailbox = Mailbox(self.home / "agent.sqlite")
        spool = Spool(self.home / "spool")
        self._worker = Worker(self.home, self.name, spool.directory)
        self._limits = limits or Limits()
        self._hardware = Hardware(self.home, self._limits)
        self._profile: Profile | None = None  # as told
        self._unknown: set[str] = set()  # trainings whose speed could not be measured
        self._rows: dict[tuple[str, int | None], int] = {}  # at once, by training and memory limit, where memory was not enough for more
        self._connected = False
        self._watcher = Watcher(self.home, self._tell_news, lambda cause: self._status.change(not_counted=cause))
        self._witness = Witness(self.home)
        self._connection = connection.Connection(
            address,
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
            LichenError: AGENT_IN_USE, if another home's agent uses this data; what the connection cannot mend by trying again, such as
                the certificate's errors (70 to 79).
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError, RuntimeError):  # not in the main thread: then whoever runs that stops us
                loop.add_signal_handler(number, self.stop)
        beside = [asyncio.create_task(self._renew()), asyncio.create_task(self._watcher.run())]
        try:
            await asyncio.to_thread(self._locks.hold_data)
            await self._tell_profile()
            trim()
            await self._connection.run(self.handle)
        except LichenError as error:
            self._note(error)
            raise
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
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
            plan, assignment = await asyncio.to_thread(_assignment, message)
            private, round = plan.private, assignment.round
            self._witness.due = private
            self._watcher.begin(message.metadata.run_id, plan, assignment.plan)  # whatever stands in the way now may be gone later
            if is_paused(self.home):
                raise LichenError(Code.AGENT_PAUSED, "the owner has paused this node", fix="lichen client pause --resume")
            self._status.change(run=run, round=round)
            reply = await self._do(message, plan, assignment)
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

    async def _do(self, message: Message, plan: Plan, assignment: records.Assignment) -> Message:
        loop = asyncio.get_running_loop()
        began = loop.time() - self._connection.waited(message)
        policy = await self._permission(plan, assignment.plan_sha256, until=began + _HELD * plan.cohort.deadline_s)
        await asyncio.to_thread(self._locks.hold_data)
        if plan.private:
            await asyncio.to_thread(self._witness.check)
        kind = message.metadata.message_type
        if kind == records.PREPARE:
            await self._watcher.look_twice()
        work = _WORK[kind]
        log.info("%s, round %d of %s", work, assignment.round, plan.name)
        self._status.change(state=work)
        limits, until = self._limits.tightened(policy), began + plan.cohort.deadline_s
        self._hardware.limits = limits
        longer = _LOADING * plan.cohort.deadline_s
        if kind == records.PREPARE:  # the round does not wait for it
            until += longer
        if kind != records.EVALUATE:
            await self._measure(message, plan, assignment, policy, until)
        if kind == records.TRAIN:
            self._keep_to_time(message, plan, assignment, until)
            if plan.local.partial:  # it ends in time by itself
                until += longer
        records.spend_time(message, loop.time() - began)
        if kind != records.TRAIN:
            return await self._have_done(message, plan, assignment, limits, until)
        async with self._watcher.reading():
            return await self._have_done(message, plan, assignment, limits, until)

    async def _have_done(self, message: Message, plan: Plan, assignment: records.Assignment, limits: Limits, until: float) -> Message:
        """The worker's reply. Where memory was not enough it begins anew with half the rows at once, in a new process.

        Nothing of what it had done has left the process, so the ledger's reservation is the same one.
        """
        key = work_of(plan), limits.memory_mb
        asked = min(plan.local.max_physical_batch_size, assignment.max_physical_batch_size or plan.local.max_physical_batch_size)
        while True:
            rows = self._rows.get(key)
            now = asyncio.get_running_loop().time()
            if until <= now:
                raise LichenError(Code.WORKER_DEADLINE, "the deadline has passed before the work was done", fix="Raise cohort.deadline_s.")
            try:
                data = await self._worker.ask(records.message_to_bytes(message), replace(limits, rows=rows), until - now)
                self._status.change(worker_pid=self._worker.pid)
                reply = records.message_from_bytes(data)
                if reply.metadata.reply_to_message_id != message.metadata.message_id:
                    raise LichenError(Code.WORKER_FAILED, "the worker answered another message")
                if not (reply.has_error() and reply.error.code == Code.WORKER_FAILED):  # which the app answers for want of memory alone
                    return reply
                raise OutOfMemoryError("memory ran out", _MORE_MEMORY)
            except OutOfMemoryError as error:
                before = min(asked, rows or asked)
                if before == 1:
                    raise
                self._rows[key] = before // 2
                log.warning("%s; it is done again with %d rows at once, not %d", error.what, before // 2, before)
                self._status.change(last_error=f"{error}", rows=before // 2)
                records.spend_time(message, asyncio.get_running_loop().time() - now)

    async def _permission(self, plan: Plan, plan_sha256: str, until: float) -> Policy:
        """The policy, once it permits the plan; while a person has yet to decide, wait for them."""
        from lichen.client.policy import enforce

        while True:
            try:
                return await asyncio.to_thread(enforce, self.home, plan, plan_sha256, datetime.now().astimezone())
            except LichenError as error:
                if error.code is not Code.POLICY_APPROVAL or asyncio.get_running_loop().time() >= until:
                    raise
                self._wait_for_a_person(plan, plan_sha256)
            await asyncio.sleep(_DECISION_EVERY)

    def _wait_for_a_person(self, plan: Plan, plan_sha256: str) -> None:
        if self._status.state != "waiting":
            log.warning("plan %s waits for your decision: lichen client approve %s, or reject", plan.name, plan_sha256[:12])
            self._status.change(state="waiting")

    # --- what this machine can do ---

    async def _measure(self, message: Message, plan: Plan, assignment: records.Assignment, policy: Policy, until: float) -> None:
        """Measure how fast this plan trains here, if that is not known yet, and tell the coordinator what is new."""
        work = work_of(plan)
        if policy.profile and work not in self._unknown and not self._hardware.knows_speed(work):
            self._unknown.add(work)
            log.info("probing how fast this plan trains here")
            reply = await self._have_done(_probe(message), plan, assignment, self._hardware.limits, until)
            if reply.has_error():
                log.warning("this plan's speed could not be measured: error %d", reply.error.code)
            else:
                report = records.from_config(records.ProbeReport, reply.content.config_records["report"])
                self._hardware.keep_speed(work, report.tokens_per_s)
        await self._tell_profile(plan)

    def _keep_to_time(self, message: Message, plan: Plan, assignment: records.Assignment, until: float) -> None:
        """Where the coordinator did not know this node's speed yet, the node itself lowers the steps, if the plan lets it."""
        from lichen.common.fitting import SHARE, on_the_way_s, step_seconds

        if self._profile is None or assignment.steps is not None or "steps" not in plan.cohort.assign:
            return
        if (step_s := step_seconds(plan, self._profile, assignment.max_length)) is None:
            return
        up = on_the_way_s(self._profile, (0, records.payload_bytes(message.content)))
        # under privacy the steps are told, and what is left of the deadline may follow from how long other rows took
        left = plan.cohort.deadline_s if plan.private else until - asyncio.get_running_loop().time()
        steps = max(1, int(SHARE * (left - up) / step_s))
        message.content["assignment"] = records.to_config(assignment.model_copy(update={"steps": steps}))

    async def _tell_profile(self, plan: Plan | None = None) -> None:
        """Tell the coordinator what this machine can do, and note what was told."""
        self._profile = await asyncio.to_thread(self._profile_now, plan)
        self._connection.tell(to_frame(self._profile))

    def _profile_now(self, plan: Plan | None) -> Profile | None:
        """What is told; None where the owner keeps it in."""
        if is_kept_in(self.home):
            profile = None
        elif plan is None:
            profile = self._hardware.profile(speeds=self._connection.speeds)
        else:
            from lichen.client.data import declared_size

            rows = rows_per_step(plan, declared_size(self.home))
            profile = self._hardware.profile(work_of(plan), rows, self._connection.speeds, self._worker.memory_mb)
        self._hardware.told(profile)
        return profile

    def _tell_news(self, news: News) -> None:
        self._connection.tell_news(news)
        self._status.change(new_rows=news.rows)

    # --- beside ---

    def _credentials(self) -> connection.Credentials:
        identity = enrolment.load_identity(self.home)
        return connection.Credentials(identity.ca_pem, identity.key_pem, identity.certificate_pem)

    def _connection_changed(self, status: connection.Status) -> None:
        self._connected = status.state == "connected"
        changes: dict[str, object] = {"connected": self._connected, "clock_off": round(status.clock_off)}
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
                now = time.time() - self._connection.status.clock_off  # it is the coordinator that must find the certificate valid
                if await asyncio.to_thread(enrolment.renew_if_due, self.home, now=now):
                    log.info("renewed this node's certificate")
            except LichenError as error:
                log.warning("the certificate was not renewed: %s", error)
            await asyncio.sleep(_RENEWAL_EVERY)


def _probe(message: Message) -> Message:
    """What asks this node's worker for the speed of a message's plan."""
    from flwr.app import RecordDict

    metadata = message.metadata
    content = RecordDict({"assignment": message.content.config_records["assignment"]})
    return records.build_message(
        content,
        run_id=metadata.run_id,
        message_id=metadata.message_id,
        src_node_id=metadata.src_node_id,
        dst_node_id=metadata.dst_node_id,
        message_type=records.PROBE,
        group_id=metadata.group_id,
    )


def _assignment(message: Message) -> tuple[Plan, records.Assignment]:
    """The plan and what of it a message asks for.

    Raises:
        LichenError: FRAME_INVALID, if it asks for nothing that an agent does; PLAN_…
    """
    kind = message.metadata.message_type
    config = message.content.config_records.get("assignment") if message.has_content() else None
    if kind not in _WORK or config is None:
        raise LichenError(Code.FRAME_INVALID, f"a message of type {kind!r} without an assignment, or of another type than training")
    assignment = records.from_config(records.Assignment, config)
    plan = assignment.read_plan()
    records.check_round(assignment.round, plan.rounds)
    return plan, assignment
