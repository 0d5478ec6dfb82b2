"""Serve the models of finished runs, and what an unfinished stream gives out so far, to enrolled nodes, on the fleet's listener."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from lichen.common.channel import models_pb2 as pb
from lichen.common.channel.archive import PLAN, pack
from lichen.common.channel.refusal import refuse
from lichen.common.errors import Code, LichenError
from lichen.common.records import PayloadRef
from lichen.coordinator.admission import admit, one_line
from lichen.coordinator.export import ARCHIVE, given_out, has_version
from lichen.coordinator.store import Run, Store

PROTOCOL = 1
PART = 32 << 10  # bytes: one that is not there whole is fetched again, and a slow link takes seconds for it

log = logging.getLogger(__name__)


class ModelService:
    """Answers nodes that fetch a model.

    Args:
        store: nodes and runs.
        runs: the directory that holds the run directories.
    """

    def __init__(self, store: Store, runs: Path) -> None:
        self._store = store
        self._runs = runs
        self._packed: dict[Path, PayloadRef] = {}
        self._packing = threading.Lock()

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """What a server needs to serve models; it must require client certificates."""
        fetch = grpc.unary_stream_rpc_method_handler(
            self._fetch, request_deserializer=pb.FetchRequest.FromString, response_serializer=pb.FetchPart.SerializeToString
        )
        return grpc.method_handlers_generic_handler("lichen.models.v1.Models", {"Fetch": fetch})

    async def _fetch(self, request: pb.FetchRequest, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[pb.FetchPart]:
        try:
            if request.protocol != PROTOCOL:
                raise LichenError(Code.PROTOCOL_VERSION, f"the agent speaks model protocol {request.protocol}, this coordinator {PROTOCOL}")
            node, _ = await asyncio.to_thread(admit, self._store, context.auth_context())
            run_id, path, ref = await asyncio.to_thread(self._find, request.run_id)
        except LichenError as error:
            log.warning("refused a model to %s: %s", context.peer(), one_line(error))
            await refuse(context, error)
        digest = bytes.fromhex(ref.digest)
        offset = request.offset if request.digest == digest and request.offset <= ref.length else 0
        log.info("node %s fetches the model of run %d from byte %d of %d", node.name, run_id, offset, ref.length)
        yield pb.FetchPart(about=pb.About(run_id=run_id, digest=digest, length=ref.length, offset=offset))
        with path.open("rb") as file:
            file.seek(offset)
            while data := await asyncio.to_thread(file.read, PART):
                yield pb.FetchPart(data=data)

    def _find(self, run_id: int) -> tuple[int, Path, PayloadRef]:
        """The run, its archive (made now if need be), and the archive's digest and length."""
        run = self._with_model(run_id)
        directory = self._runs / run.directory
        with self._packing, given_out(directory) as model:
            path = model.parent / ARCHIVE
            if (ref := self._packed.get(path)) is None or not path.exists():
                if path.exists():
                    with path.open("rb") as file:
                        ref = PayloadRef(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)
                else:
                    ref = pack(directory / PLAN, model, path)
                self._packed[path] = ref
        return run.run_id, path, ref

    def _with_model(self, run_id: int) -> Run:
        """The run of this number, or the newest that has a model: it is finished, or a version of it is given out already."""
        if run_id:
            run = self._store.run(run_id)
            if not self._has_model(run):
                raise LichenError(Code.NO_MODEL, f"run {run_id} is {run.status}: it has no model yet")
            return run
        if found := [run for run in self._store.runs() if self._has_model(run)]:
            return found[-1]
        raise LichenError(Code.NO_MODEL, "no run has a model yet")

    def _has_model(self, run: Run) -> bool:
        try:
            return run.status == "finished" or has_version(self._runs / run.directory)
        except LichenError as error:  # one run in disorder does not keep another's model from its nodes
            log.warning("run %d is passed over: %s", run.run_id, error)
            return False
