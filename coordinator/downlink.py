"""The model's way down: what is added to it in a round is encoded, and the coordinator adds what it sends, so that all hold the same.

A node that took part lately needs only what was added since; one that fell behind, or lost what it had, fetches the model whole. Which of
the two is the node's to decide: a message names both.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from flwr.app import ArrayRecord, RecordDict

from lichen.common import records
from lichen.common.codec.layout import Layout

if TYPE_CHECKING:
    from flwr.app import Message

    from lichen.common.codec.codec import Codec, Payload
    from lichen.common.model.adapter import State
    from lichen.coordinator.run_directory import ServerState

LONGEST = 10
"""Rounds that a node may be behind; then the model whole is not much more (32 bits against 8 for each)."""


class Downlink:
    """How one run's model travels to its nodes.

    Args:
        codec: of what is added in a round; None: the model travels whole, and what is added stays as it is.
        spool: where payloads lie beside their messages; None, where they travel inside: then the model is always whole.
    """

    def __init__(self, codec: Codec | None, spool: Path | None) -> None:
        self._codec = codec
        self._spool = spool
        self._sent: records.PayloadRef | None = None

    def arrays(self, state: ServerState) -> ArrayRecord:
        """The model as a message's payload. What is no longer there to fetch is taken out of the state's chain."""
        content = RecordDict()
        if self._spool is None:
            records.put_tensors(content, state.model, None)
            return content.array_records["payload"]
        if self._sent is None or not (self._spool / self._sent.digest).exists():
            self._sent = records.put_file(state.model, self._spool)
        kept = [(self._spool / link.added.digest).exists() for link in state.chain]
        state.chain = state.chain[len(kept) - kept[::-1].index(False) if False in kept else 0 :]
        return ArrayRecord({"payload": records.reference(self._sent)})

    def add(self, step: State, state: ServerState, room: torch.Tensor | None = None) -> State:
        """The model after a round: it is moved by the step as those decode it to whom it is sent.

        Args:
            step: what the server optimizer makes of the round; tensors that it has not stay as they are.
            state: its model is that before; its chain is made longer.
            room: 32-bit floats that may be overwritten, the step's own included: where they are as many as the model's, no second model
                is made.

        Returns:
            The model; where there is a spool, its tensors are mapped from there.
        """
        if self._codec is None:
            moved = state.model | {name: state.model[name] + tensor for name, tensor in step.items()}
        else:
            step = {name: step[name] if name in step else torch.zeros_like(tensor) for name, tensor in state.model.items()}
            layout = Layout.of(step)
            room = room if room is not None and len(room) == layout.count else None
            decoded = self._encoded(self._codec, step, layout, state).decoded(layout, into=room)
            moved = {name: decoded[name].add_(tensor) for name, tensor in state.model.items()}
        return self._sent_as(moved)

    def _sent_as(self, model: State) -> State:
        if self._spool is None:
            return model
        content = RecordDict()
        self._sent = records.put_tensors(content, model, self._spool)
        return records.get_tensors(content, self._spool)

    def add_exactly(self, step: State, state: ServerState) -> State:
        """The model after a change that must be exact, such as of what a continual method keeps: nodes fetch it whole."""
        state.chain = []
        return self._sent_as(state.model | {name: state.model[name] + tensor for name, tensor in step.items()})

    def _encoded(self, codec: Codec, step: State, layout: Layout, state: ServerState) -> Payload:
        if self._spool is None or self._sent is None:
            return codec.open(codec.encoded(step), layout)
        added = records.put_encoded(step, codec, 0, self._spool)
        state.chain = [*state.chain, records.ChainLink(self._sent.digest, added)][-LONGEST:]
        return codec.open(records.mapped(self._spool / added.digest), layout)

    def bytes_for(self, client: str, content: RecordDict, state: ServerState) -> int:
        """Bytes of what a client fetches for a message, if it has the model that it had last."""
        held = state.held.get(client)
        if self._sent is not None and held == self._sent.digest:
            return 0
        since = next((number for number, link in enumerate(state.chain) if link.before == held), None)
        if since is None:
            return records.payload_bytes(content)
        return sum(link.added.length for link in state.chain[since:])

    def close(self, state: ServerState) -> None:
        """Let go of what lies in the spool: nobody is asked again."""
        if self._spool is not None:
            for digest in self.needed(state):
                (self._spool / digest).unlink(missing_ok=True)

    def needed(self, state: ServerState) -> set[str]:
        """The digests of the payloads that messages to come will name."""
        return {link.added.digest for link in state.chain} | ({self._sent.digest} if self._sent else set())

    def arrived(self, client: str, state: ServerState, message: Message | None = None) -> None:
        """A client has answered a message, left out the last one: so it has the model of that."""
        sent = [self._sent] if message is None else records.payload_refs(message)
        for ref in sent:
            if ref is not None:
                state.held[client] = ref.digest
