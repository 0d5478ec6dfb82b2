"""A federation on one machine: Flower's Grid, over clients that run one after another on one model, or in several processes at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from lichen.common import records
from lichen.common.errors import Code, LichenError
from lichen.simulations.workers import Work, Workers

SERVER = 1
FIRST = 2

Progress = Callable[[str, int, int], None]
"""Called with a message's type, clients done and clients asked."""


class Homes(Protocol):
    """The clients' node homes, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Path: ...


class _Due(NamedTuple):
    """A reply, and when it comes, in virtual seconds."""

    at: float
    began: float
    reply: Message


class Together(NamedTuple):
    """Cohort batching (client/together.py)."""

    size: Callable[[], int]
    """How many clients should be trained at once."""
    train: Callable[[Sequence[Message], Sequence[Context]], list[Message]]
    """Trains them."""


class InProcessGrid(Grid):  # type: ignore[misc]
    """Runs each message's client when its reply is asked for.

    Node ids follow the order of the homes; of a client that is never asked nothing is kept. Message ids follow from the run, the round
    and the node, as on the channel, so a round that is done again after a crash is the same round.

    Args:
        client_app: what each client runs.
        homes: the clients' node homes; a home's folder name is the client's name.
        run_id: of the run.
        progress: told of each client that is done.
        fork: makes worker processes, before the first message is served; None to serve in this one.
        together: trains several clients at once.
        open_home: called with a client's number before it is first served, in the process that serves it.
        spool: a folder of its own, where payloads lie beside their messages until the next are sent: updates then take no memory before
            they are summed, however many there are. None where they travel inside.
        speeds: steps a second of virtual time, dealt to the clients in turn: replies then come when their steps are done. Empty: all at
            once, in the order of the messages.
    """

    def __init__(
        self,
        client_app: ClientApp,
        homes: Homes,
        run_id: int,
        progress: Progress | None = None,
        fork: Callable[[Work], Workers] | None = None,
        together: Together | None = None,
        open_home: Callable[[int], object] | None = None,
        spool: Path | None = None,
        speeds: Sequence[float] = (),
    ) -> None:
        self._app = client_app
        self._homes = homes
        self._run_id = run_id
        self._progress = progress
        self._fork = fork
        self._together = together
        self._workers: Workers | None = None
        self._open_home = open_home
        self._spool = spool
        self._contexts: dict[int, Context] = {}
        self._pushed: dict[str, Message] = {}
        self._speeds = speeds
        self._now = 0.0
        self._free: dict[int, float] = {}
        self._due: dict[str, _Due] = {}

    def set_run(self, run: Any) -> None:
        """Adopt a run's id."""
        self._run_id = run.run_id

    @property
    def run(self) -> Any:
        """Flower's description of the run, which this grid does not keep."""
        raise LichenError(Code.INTERNAL, "an in-process run has no Flower run record")

    @property
    def works_here(self) -> bool:
        """Whether clients train in this process, on the model that the coordinator scores with: it must then score between rounds."""
        return self._fork is None

    def name_of(self, node_id: int) -> str:
        """The client's name."""
        return self._homes[node_id - FIRST].name

    def get_node_ids(self) -> list[int]:
        """All clients: each is always there."""
        return list(range(FIRST, FIRST + len(self._homes)))

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:
        """A message to one client."""
        key = f"{self._run_id}|{message_type}|{group_id}|{dst_node_id}"
        return records.build_message(
            content,
            run_id=self._run_id,
            message_id=hashlib.sha256(key.encode()).hexdigest()[:32],
            src_node_id=SERVER,
            dst_node_id=dst_node_id,
            message_type=message_type,
            group_id=group_id,
        )

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Keep messages until their replies are pulled."""
        new = {message.metadata.message_id: message for message in messages}
        self._pushed |= new
        return list(new)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run the clients, and return their replies."""
        return [self._work([self._pushed.pop(message_id)])[0] for message_id in message_ids]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Run the clients. ``timeout`` is of virtual seconds, where clients have speeds: else none is ever late."""
        return self.until_enough(messages, timeout, lambda reply: False)

    def until_enough(self, messages: Iterable[Message], timeout: float | None, enough: Callable[[Message], bool]) -> list[Message]:
        """Run the clients, and return their replies up to the one with which ``enough`` is true; the others have worked for nothing."""
        asked = list(messages)
        if self._spool:
            _collect(self._spool, asked)
        ids = self.push_messages(asked)
        found = []
        for reply in self.replies(ids, timeout):
            found.append(reply)
            if enough(reply):
                break
        self.cancel(ids)
        return found

    def replies(self, message_ids: Iterable[str], timeout: float | None = None) -> Generator[Message, None, None]:
        """Replies to pushed messages, each when it is due; ends after ``timeout`` virtual seconds."""
        ids = list(message_ids)
        self._work_off([self._pushed.pop(message_id) for message_id in ids if message_id in self._pushed])
        until = None if timeout is None else self._now + timeout
        for message_id in sorted((message_id for message_id in ids if message_id in self._due), key=lambda one: self._due[one].at):
            if until is not None and self._due[message_id].at > until:
                self._now = until
                return
            due = self._due.pop(message_id)
            self._now = max(self._now, due.at)
            yield due.reply

    def cancel(self, message_ids: Iterable[str]) -> list[str]:
        """Withdraw messages that have no reply yet. A client that has begun goes on until it is done."""
        withdrawn = [message_id for message_id in message_ids if message_id in self._pushed or message_id in self._due]
        for message_id in withdrawn:
            self._pushed.pop(message_id, None)
            if (due := self._due.pop(message_id, None)) and due.began >= self._now:
                self._free[due.reply.metadata.src_node_id] = due.began
        return withdrawn

    def let_go(self, message_ids: Iterable[str], keep: Iterable[str]) -> None:
        """Free the payloads that were used: all but those of ``keep``, and of messages that are under way."""
        if self._spool:
            replies = [due.reply for due in self._due.values()]
            _collect(self._spool, [*self._pushed.values(), *replies], keep)

    def unreleased(self) -> list[Message]:
        """What was under way before a crash: nothing is kept of it, so clients are asked again."""
        return []

    def clock(self) -> float:
        """Virtual time, in seconds."""
        return self._now

    def _work_off(self, messages: list[Message]) -> None:
        """Run the clients of some messages, and note when they are done in virtual time."""
        began = {}
        for message in messages:
            node = message.metadata.dst_node_id
            began[node] = max(self._now, self._free.get(node, 0.0))
            if self._speeds:
                records.spend_time(message, began[node] - self._now)
        for done, (number, reply) in enumerate(self._replies(messages), 1):
            message = messages[number]
            start = began[message.metadata.dst_node_id]
            at = start + self._seconds(reply)
            self._free[message.metadata.dst_node_id] = at
            self._due[message.metadata.message_id] = _Due(at, start, reply)
            if self._progress:
                self._progress(message.metadata.message_type, done, len(messages))

    def _seconds(self, reply: Message) -> float:
        """Virtual time that the work behind a reply took: training's steps; all else takes none."""
        if not self._speeds or reply.has_error():
            return 0.0
        steps = float(reply.content.config_records.get("report", {}).get("steps", 0))
        return steps / self._speed(reply.metadata.src_node_id)

    def _speed(self, node: int) -> float:
        return self._speeds[(node - FIRST) % len(self._speeds)]

    def close(self) -> None:
        """End the worker processes."""
        if self._workers:
            self._workers.close()

    def _replies(self, messages: list[Message]) -> Iterator[tuple[int, Message]]:
        if not messages:
            return iter(())
        if self._fork and self._workers is None:
            self._workers = self._fork(self._work)
        size = self._together.size() if self._together and messages[0].metadata.message_type == records.TRAIN else 1
        if self._workers:
            size = min(size, -(-len(messages) // self._workers.count))  # work for each
        groups = [list(range(start, min(start + size, len(messages)))) for start in range(0, len(messages), size)]
        asked = ([messages[number] for number in group] for group in groups)
        answered = self._workers.replies(list(asked)) if self._workers else enumerate(map(self._work, asked))
        return ((number, reply) for place, replies in answered for number, reply in zip(groups[place], replies, strict=True))

    def _work(self, messages: Sequence[Message]) -> list[Message]:
        contexts = [self._context(message.metadata.dst_node_id) for message in messages]
        if self._together and len(messages) > 1:
            return self._together.train(messages, contexts)
        return [self._app(message, context) for message, context in zip(messages, contexts, strict=True)]

    def _context(self, node_id: int) -> Context:
        if node_id not in self._contexts:
            if self._open_home:
                self._open_home(node_id - FIRST)
            home = self._homes[node_id - FIRST]
            config: dict[str, Any] = {"home": str(home), "name": home.name, "simulated": True}
            if self._spool:
                config["spool"] = str(self._spool)
            if self._speeds:
                config["speed"] = self._speed(node_id)
            self._contexts[node_id] = Context(self._run_id, node_id, config, RecordDict(), {})
        return self._contexts[node_id]


def _collect(spool: Path, messages: list[Message], keep: Iterable[str] = ()) -> None:
    """Remove the payloads that no message refers to: who sends has read all that came before."""
    needed = {ref.digest for message in messages for ref in records.offered_refs(message)}.union(keep)
    for path in spool.iterdir():
        if path.name not in needed:
            path.unlink()
