"""The worker process over its real pipes: a round, a death, a deadline, a memory limit, and what it prints."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Message, RecordDict

from lichen.client.data import add_source
from lichen.client.ledger import Ledger
from lichen.client.worker import Limits, Worker
from lichen.common import records
from lichen.common.codec.registry import uplink_codec
from lichen.common.errors import Code, LichenError
from lichen.common.plan import Plan, parse_plan
from lichen.common.tasks import workbench

Rows = Callable[..., list[dict[str, str]]]
PRIVATE = {"unit": "example", "epsilon": 8.0, "delta": 1e-5, "sample_rate": 0.2}


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in an event loop of its own."""

    @functools.wraps(test)
    def run(*arguments: Any, **more: Any) -> None:
        asyncio.run(test(*arguments, **more))

    return run


@pytest.fixture
def home(tmp_path: Path, tiny_rows: Rows) -> Path:
    home = tmp_path / "node"
    (home / "spool").mkdir(parents=True)
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in tiny_rows(40)))
    add_source(home, data, fields={"text": "text", "label": "label"}, declared_size=32)
    (home / "policy.yaml").write_text("unnoised_updates_to_coordinator: allow\n")
    return home


@pytest.fixture
def private_plan(tiny_plan: dict[str, Any]) -> Plan:
    return parse_plan({**tiny_plan, "privacy": PRIVATE})


def assign(home: Path, plan: Plan, round: int = 1, kind: str = records.TRAIN) -> Message:
    """What a coordinator sends: the assignment, and the starting tensors in the spool."""
    content = RecordDict(
        {"assignment": records.to_config(records.Assignment(plan=plan.canonical_json(), plan_sha256=plan.sha256(), round=round))}
    )
    records.put_tensors(content, workbench(plan)[1].state(), home / "spool")
    return records.build_message(
        content, run_id=7, message_id=f"{round:032x}", src_node_id=1, dst_node_id=2, message_type=kind, group_id=str(round)
    )


@asynccontextmanager
async def worker_of(home: Path) -> AsyncIterator[Worker]:
    worker = Worker(home, "clinic-a", home / "spool")
    try:
        yield worker
    finally:
        await worker.stop()


async def ask(worker: Worker, message: Message, limits: Limits = Limits(), seconds: float = 60.0) -> Message:  # noqa: B008 - frozen
    return records.message_from_bytes(await worker.ask(records.message_to_bytes(message), limits, seconds))


async def failure(code: Code, *arguments: Any, **more: Any) -> LichenError:
    with pytest.raises(LichenError) as caught:
        await ask(*arguments, **more)
    assert caught.value.code is code, str(caught.value)
    return caught.value


async def until_training(home: Path) -> None:
    """Wait until the worker has reserved steps, hence trains."""
    async with asyncio.timeout(60):
        while not (home / "ledger.sqlite").exists() or not _reserved(home):
            await asyncio.sleep(0.02)


def _reserved(home: Path) -> bool:
    with Ledger(home) as ledger:
        return bool(ledger.entries())


@in_loop
async def test_one_process_serves_rounds_and_prints_nothing_into_the_protocol(
    home: Path, private_plan: Plan, capfd: pytest.CaptureFixture[str]
) -> None:
    async with worker_of(home) as worker:
        assert worker.pid is None
        first = await ask(worker, assign(home, private_plan, 1))
        pid, began = worker.pid, time.monotonic()
        second = await ask(worker, assign(home, private_plan, 2))
        assert worker.pid == pid
        assert time.monotonic() - began < 2.0, "the second round imports nothing and loads no model"
        start = workbench(private_plan).start
        for number, message in enumerate((first, second), start=1):
            assert not message.has_error()
            report = records.from_config(records.TrainReport, message.content.config_records["report"])
            assert (report.client, report.round, report.declared_size) == ("clinic-a", number, 32)
            assert records.get_update(message.content, home / "spool", uplink_codec(private_plan.transfer.uplink), start).count
        probed = await ask(worker, assign(home, private_plan, 2, kind=records.PROBE))
        assert records.from_config(records.ProbeReport, probed.content.config_records["report"]).tokens_per_s > 0
        unknown = await ask(worker, assign(home, private_plan, 3, kind="query.other"))
        assert unknown.error.code == Code.INTERNAL
        assert not unknown.error.reason
        assert worker.pid == pid
    assert capfd.readouterr().out == ""
    assert pid is not None
    assert not psutil.pid_exists(pid)


@in_loop
async def test_limits_bind_the_process_and_too_much_memory_ends_it(home: Path, private_plan: Plan) -> None:
    async with worker_of(home) as worker:
        error = await failure(Code.WORKER_FAILED, worker, assign(home, private_plan), Limits(memory_mb=256))
        assert "256 MiB" in error.what
        assert worker.pid is None
        await ask(worker, assign(home, private_plan), Limits(threads=1))
        first = psutil.Process(worker.pid)
        environment = Path(f"/proc/{first.pid}/environ").read_bytes().split(b"\0")
        assert b"OMP_NUM_THREADS=1" in environment
        assert first.nice() >= min(10 + os.nice(0), 19)
        # other limits: another process
        await failure(Code.WORKER_DEADLINE, worker, assign(home, private_plan, 2), Limits(threads=2), seconds=1.0)
        assert not first.is_running()
        assert worker.pid is None


@in_loop
async def test_death_and_cancellation_leave_no_process_and_the_next_message_starts_one(
    home: Path, private_plan: Plan, tiny_plan: dict[str, Any]
) -> None:
    long = parse_plan({**tiny_plan, "privacy": {**PRIVATE, "sample_rate": 0.01}, "local": {**tiny_plan["local"], "steps": 20_000}})
    async with worker_of(home) as worker:
        asking = asyncio.create_task(ask(worker, assign(home, long)))
        await until_training(home)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(LichenError) as caught:
            await asking
        assert caught.value.code is Code.WORKER_FAILED
        assert "signal 9" in caught.value.what
        asking = asyncio.create_task(ask(worker, assign(home, private_plan, 2)))
        async with asyncio.timeout(10):
            while worker.pid is None:
                await asyncio.sleep(0.01)
        pid = worker.pid
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert not psutil.pid_exists(pid)


@in_loop
async def test_it_outlives_the_terminals_signals_and_ends_with_its_input(home: Path, tiny_plan: dict[str, Any]) -> None:
    long = parse_plan({**tiny_plan, "privacy": {**PRIVATE, "sample_rate": 0.01}, "local": {**tiny_plan["local"], "steps": 20_000}})
    async with worker_of(home) as worker:
        asking = asyncio.create_task(ask(worker, assign(home, long)))
        await until_training(home)
        process = psutil.Process(worker.pid)
        for number in (signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
        await asyncio.sleep(0.3)
        assert process.is_running()
        assert not asking.done()
        # as when the agent dies: nobody holds the other end of its pipe, and it trains at that moment
        worker._process.stdin.close()  # type: ignore[union-attr]
        with pytest.raises(LichenError) as caught:
            await asking
        assert caught.value.code is Code.WORKER_FAILED
        assert "status 0" in caught.value.what
