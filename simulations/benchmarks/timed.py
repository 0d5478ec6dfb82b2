"""`lichen …` whose parts note when they ran, and on how much CPU. Run by `lichen bench round`; what is timed is the code that is deployed.

python -m lichen.simulations.benchmarks.timed FOLDER client run …
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

MODULE = "lichen.simulations.benchmarks.timed"
COORDINATOR = {
    "round": "coordinator.strategy:FederatedStrategy._round",
    "choose the cohort": "coordinator.strategy:FederatedStrategy.configure_train",
    "write the model": "coordinator.downlink:Downlink.arrays",
    "keep the messages": "coordinator.runs:RunGrid.push_messages",
    "let go of the last round": "coordinator.runs:RunGrid._let_go",
    "ask": "coordinator.runs:RunGrid.send_and_receive",
    "aggregate": "coordinator.strategy:FederatedStrategy.aggregate_train",
    "wait for the score": "coordinator.scoring:Beside.settle",
    "account": "coordinator.telling:Teller.tell_privacy",
    "write the result": "coordinator.run_directory:RunDirectory.save_result",
    "checkpoint": "coordinator.run_directory:RunDirectory.save_state",
    "evaluate": "coordinator.app:OwnData.validation",
}
AGENT = {
    "take": "client.connection:Connection._take",
    "load the payload": "client.connection:Connection._load",
    "handle": "client.agent:Agent.handle",
    "policy": "client.agent:Agent._permission",
    "locks": "client.locks:HomeLocks.hold_data",
    "compare the ledger": "client.witness:Witness.check",
    "worker": "client.worker:Worker.ask",
    "sign the ledger": "client.witness:Witness.sign",
    "keep the reply": "client.mailbox:Mailbox.put_reply",
}
WORKER = {
    "answer": "client.worker:_answer",
    "policy": "client.app:enforce",
    "read the payload": "common.records:get_tensors",
    "load the model": "client.app:trainer_of",
    "rows": "client.app:_rows",
    "read the rows": "client.app:load",
    "tokenise": "common.tasks.text_classification:TextClassification.encode",
    "open the ledger": "client.app:open_ledger",
    "reserve": "client.ledger:Ledger.reserve",
    "train": "client.trainer:Trainer.run_together",
    "draw": "client.trainer:poisson_sample",
    "frozen layers": "common.batches:_CollateKnown.prepare",
    "read kept layers": "common.model.prefix:PrefixStore.get",
    "batch": "common.batches:Collate.__call__",
    "forward": "common.tasks.text_classification:TextClassification.losses",
    "backward": "torch.autograd:backward",
    "clip": "common.privacy.single_backward.book:Book.clipped_sum",
    "noise": "common.privacy.per_unit:NoisyOptimizer.add_noise",
    "optimizer": "torch.optim:SGD.step",
    "release": "client.ledger:Ledger.released",
    "encode": "common.records:put_update",
    "trim": "client.worker:trim",
}


class Span(NamedTuple):
    """One time that a part ran."""

    process: str
    part: str
    began: float
    """In seconds of the monotonic clock, which all processes of a machine share."""
    ended: float
    cpu: float | None
    """Seconds of its own thread; None for a coroutine, between whose waits others run."""
    process_cpu: float
    """Seconds of all threads of its process, when it began."""


def read(folder: Path) -> Iterator[Span]:
    """What all processes noted."""
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            yield Span(*json.loads(line))


def time_parts(folder: Path, role: str, parts: Mapping[str, str]) -> None:
    """Have parts of this process noted in a file of its own.

    Args:
        folder: where.
        role: of the process.
        parts: by name ``module:attribute`` of lichen or torch, functions or methods.
    """
    note = functools.partial(_note, folder / f"{os.getpid()}.jsonl", f"{role} {os.getpid()}")
    for part, place in parts.items():
        module, _, path = place.partition(":")
        holder: Any = importlib.import_module(module if module.startswith("torch") else f"lichen.{module}")
        *owners, name = path.split(".")
        for owner in owners:
            holder = getattr(holder, owner)
        setattr(holder, name, _timed(getattr(holder, name), functools.partial(note, part)))


@contextmanager
def _note(file: Path, process: str, part: str, *, sole: bool) -> Iterator[None]:
    before, began, cpu = time.process_time(), time.monotonic(), time.thread_time()
    try:
        yield
    finally:
        span = Span(process, part, began, time.monotonic(), time.thread_time() - cpu if sole else None, before)
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(span) + "\n")


def _timed(function: Callable[..., Any], note: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def later(*given: Any, **named: Any) -> Any:
            with note(sole=False):
                return await function(*given, **named)

        return later

    @functools.wraps(function)
    def now(*given: Any, **named: Any) -> Any:
        with note(sole=True):
            return function(*given, **named)

    return now


def main(folder: Path, role: str, *rest: str) -> None:
    """Be one of a federation's processes."""
    if role == "worker":
        from lichen.client.worker import main as work

        time_parts(folder, role, WORKER)
        work(*rest)
        return
    if role == "client":
        from lichen.client import worker

        worker._STARTED_BY_AGENT = ("-P", "-m", MODULE, str(folder), "worker")  # type: ignore[assignment]
        time_parts(folder, "agent", AGENT)
    else:
        time_parts(folder, role, COORDINATOR)
    from lichen.common.cli import main as run

    sys.argv = ["lichen", role, *rest]
    run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
