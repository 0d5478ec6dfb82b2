"""Fetch the model of a run from the coordinator, going on where a broken transfer ended."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from lichen.client.enrolment import Identity
from lichen.common.channel import models_pb2 as pb
from lichen.common.channel.archive import PLAN, unpack
from lichen.common.channel.framing import LONGEST_ATTEMPT, MAX_CHUNK, Timing, client_options
from lichen.common.channel.refusal import explain, passing
from lichen.common.channel.retry import backoff
from lichen.common.errors import Code, LichenError

PROTOCOL = 1
ATTEMPTS = 5
TIMEOUT_SECONDS = 3600.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FetchedModel:
    """A model on this node.

    Attributes:
        run_id: the run that made it.
        directory: holds ``plan.yaml`` and ``model/``, which transformers and peft load.
    """

    run_id: int
    directory: Path

    @property
    def plan(self) -> Path:
        """The plan that it was trained by."""
        return self.directory / PLAN

    @property
    def model(self) -> Path:
        """The folder that transformers and peft load."""
        return self.directory / "model"


def fetch_model(
    identity: Identity,
    models: Path,
    run_id: int = 0,
    *,
    progress: Callable[[int, int], None] | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> FetchedModel:
    """Fetch a run's model into ``models/RUN_ID``; one that is there already is not fetched again.

    Args:
        identity: who this node is, and where its coordinator is.
        models: the node's folder of models, made if it is not there.
        run_id: which run; 0 is the newest that is finished, or of whose stream something is given out already.
        progress: told the bytes that are here and those there will be.
        timeout: seconds for one attempt.

    Raises:
        LichenError: RUN_UNKNOWN, NO_MODEL; CERTIFICATE_REVOKED, NODE_UNKNOWN; CONNECT_FAILED after some attempts that
            brought nothing; PAYLOAD_CORRUPT.
    """
    models.mkdir(parents=True, exist_ok=True)
    options = client_options(Timing(), identity.coordinator, LONGEST_ATTEMPT)
    failures, before = 0, _fetched(models)
    while True:
        try:
            with grpc.secure_channel(identity.coordinator, identity.credentials(), options=options) as channel:
                return _attempt(channel, models, run_id, progress or (lambda *_: None), timeout)
        except grpc.RpcError as error:
            came, before = _fetched(models) != before, _fetched(models)
            failures = 1 if came else failures + 1
            if failures == ATTEMPTS or not passing(error):
                raise explain(error, identity.coordinator) from error
            log.info("going on: %s", explain(error, identity.coordinator))
        time.sleep(backoff(failures))


def _fetched(models: Path) -> dict[str, int]:
    """The bytes that are here of what is not complete."""
    return {path.name: path.stat().st_size for path in models.glob("*.part")}


def _attempt(channel: grpc.Channel, models: Path, run_id: int, progress: Callable[[int, int], None], timeout: float) -> FetchedModel:
    # the name tells which archive its bytes belong to, so that the coordinator need only be asked once
    part = next(iter(sorted(models.glob("*.part"), key=lambda path: path.stat().st_mtime, reverse=True)), None)
    request = pb.FetchRequest(protocol=PROTOCOL, run_id=run_id)
    if part is not None:
        request.digest, request.offset = bytes.fromhex(part.stem), part.stat().st_size
    fetch = channel.unary_stream(
        "/lichen.models.v1.Models/Fetch",
        request_serializer=pb.FetchRequest.SerializeToString,
        response_deserializer=pb.FetchPart.FromString,
    )
    call = fetch(request, timeout=timeout)
    parts: Iterator[pb.FetchPart] = iter(call)
    about = next(parts, pb.FetchPart()).about
    digest = about.digest.hex()
    if len(about.digest) != hashlib.sha256().digest_size or about.run_id < 1:
        raise LichenError(Code.FRAME_INVALID, "the coordinator told nothing of the model that it sends")
    final = models / str(about.run_id)
    if (final / "digest").exists() and (final / "digest").read_text(encoding="ascii") == digest:
        call.cancel()  # type: ignore[no-untyped-call]
        return FetchedModel(about.run_id, final)
    file = models / f"{digest}.part"
    for other in models.glob("*.part"):
        if other != file:
            other.unlink()
    with file.open("ab") as out:
        out.truncate(about.offset)
        for part_ in parts:
            if len(part_.data) > MAX_CHUNK or out.tell() + len(part_.data) > about.length:
                raise LichenError(Code.FRAME_INVALID, "the coordinator sends more than it told")
            out.write(part_.data)
            progress(out.tell(), about.length)
    return _keep(file, digest, final, about.run_id)


def _keep(file: Path, digest: str, final: Path, run_id: int) -> FetchedModel:
    """Verify the archive and put its content in place."""
    temporary = final.with_name(f"{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with file.open("rb") as archive:
        if hashlib.file_digest(archive, "sha256").hexdigest() != digest:
            file.unlink()
            raise LichenError(Code.PAYLOAD_CORRUPT, "the model's bytes are not those of its digest", fix="Fetch it again.")
        archive.seek(0)
        unpack(archive, temporary)
    (temporary / "digest").write_text(digest, encoding="ascii")
    shutil.rmtree(final, ignore_errors=True)
    temporary.replace(final)
    file.unlink()
    return FetchedModel(run_id, final)
