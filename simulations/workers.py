"""Worker processes of the in-process engine: forked when the model is loaded, so that all share its memory until they write to it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import cast

from flwr.app import ArrayRecord, Message, RecordDict

from lichen.common.errors import Code, LichenError

Work = Callable[[Sequence[Message]], list[Message]]


class Workers:
    """A few processes, one group of messages at a time each.

    A process is forked, not started afresh: the base model, its tokenizer and all modules are there, and take memory once. What it
    gets and gives passes through pipes of this program's own.

    Args:
        count: of processes.
        threads: of each, for torch.
        work: what is done with a group of messages that have one payload; of what it changes only the replies come back.
    """

    def __init__(self, count: int, threads: int, work: Work) -> None:
        self.count = count
        context = multiprocessing.get_context("fork")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, [*self._pipes, ours], threads, work), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._has: dict[Connection, ArrayRecord | None] = {}
        """The payload that each process was sent last: a round's is one object in all its messages, and is sent once."""

    def replies(self, groups: Sequence[Sequence[Message]]) -> Iterator[tuple[int, list[Message]]]:
        """Deal the groups out, and give each one's replies, with the group's number, when they come.

        Raises:
            LichenError: INTERNAL, if a process ends by itself; what the work raised.
        """
        left = iter(enumerate(groups))
        busy: dict[Connection, int] = {}
        for pipe in self._pipes:
            self._next(pipe, left, busy)
        while busy:
            for ready in wait(list(busy)):
                pipe = cast("Connection", ready)
                number = busy.pop(pipe)
                try:
                    reply = pipe.recv()
                except (EOFError, OSError):
                    raise self._ended(pipe) from None
                if isinstance(reply, LichenError):
                    raise reply
                self._next(pipe, left, busy)
                yield number, reply

    def _next(self, pipe: Connection, left: Iterator[tuple[int, Sequence[Message]]], busy: dict[Connection, int]) -> None:
        for number, group in left:
            payload = group[0].content.array_records["payload"]
            try:
                pipe.send((None if payload is self._has.get(pipe) else payload, [_without(payload, message) for message in group]))
            except OSError:
                raise self._ended(pipe) from None
            self._has[pipe] = payload
            busy[pipe] = number
            return

    def _ended(self, pipe: Connection) -> LichenError:
        process = self._processes[self._pipes.index(pipe)]
        process.join(timeout=10)
        return LichenError(
            Code.INTERNAL,
            f"a worker process ended (exit code {process.exitcode})",
            where="lichen simulate",
            fix="It may have been killed for memory: use fewer --workers. `--resume` goes on with the run.",
        )

    def close(self) -> None:
        """End the processes; work that is in flight is lost."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


def layout(cohort: int, workers: int | None = None) -> tuple[int, int]:
    """Processes, and threads of each: one process a core where there are clients for them.

    One thread each was faster than one process of several threads wherever it was measured on a CPU (docs/design.md), and sums do not
    change with the number of processes, so that a simulation repeats whatever runs it.

    Args:
        cohort: clients of a round.
        workers: how many processes, where the user has said so.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = workers or max(1, min(cores, cohort))
    return count, max(1, cores // count)


def _serve(pipe: Connection, others: list[Connection], threads: int, work: Work) -> None:
    import torch

    for other in others:  # else a process that ends would not be seen to have gone
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle: it ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    payload: ArrayRecord | None = None
    while True:
        try:
            new, group = pipe.recv()
        except (EOFError, OSError):
            return
        payload = payload if new is None else new
        for message in group:
            message.content["payload"] = payload
        try:
            pipe.send(work(group))
        except LichenError as error:
            pipe.send(error)


def _without(payload: ArrayRecord, message: Message) -> Message:
    rest = RecordDict({name: record for name, record in message.content.items() if record is not payload})
    return Message(rest, metadata=message.metadata)
