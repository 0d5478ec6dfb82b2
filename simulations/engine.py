"""A federation on one machine: Flower's Grid, over clients that run one after another on one model, or in several processes at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
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
        """Run the clients. A simulated one is never late: ``timeout`` is not used."""
        asked = list(messages)
        if self._spool:
            _collect(self._spool, asked)
        replies: dict[int, Message] = {}
        for done, (number, reply) in enumerate(self._replies(asked), 1):
            replies[number] = reply
            if self._progress:
                self._progress(asked[number].metadata.message_type, done, len(asked))
        return [replies[number] for number in range(len(asked))]

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
            self._contexts[node_id] = Context(self._run_id, node_id, config, RecordDict(), {})
        return self._contexts[node_id]


def _collect(spool: Path, asked: list[Message]) -> None:
    """Remove the payloads that no message refers to: who sends has read all that came before."""
    needed = {ref.digest for message in asked for ref in records.offered_refs(message)}
    for path in spool.iterdir():
        if path.name not in needed:
            path.unlink()
