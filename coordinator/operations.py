"""What an operator may ask of a coordinator: each a function from JSON to JSON, with or without a running service."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lichen.common.errors import Code, LichenError
from lichen.common.pki import csr_name, read_certificate
from lichen.common.plan import parse_plan
from lichen.common.result import write_atomically
from lichen.coordinator.backup import write_backup
from lichen.coordinator.enrolment import make_invite
from lichen.coordinator.home import Home, Runtime
from lichen.coordinator.store import Node, Run, Store, random_id
from lichen.coordinator.submission import check_base, keep_rows
from lichen.coordinator.watch import read_rounds

if TYPE_CHECKING:
    from lichen.coordinator.fleet import FleetServer
    from lichen.coordinator.runs import Runner


_ANYWHERE = ("status", "invite", "nodes", "revoke", "runs", "run", "stop")


class NotServedError(LichenError):
    """There is no service to ask: SERVICE_UNREACHABLE."""

    def __init__(self, home: Path) -> None:
        super().__init__(
            Code.SERVICE_UNREACHABLE,
            "no coordinator serves this home",
            where=str(home),
            fix=f"Start it: lichen coordinator serve --home {home}",
        )


class Live:
    """The parts of a running service that operations need."""

    def __init__(self, fleet: FleetServer, runner: Runner, runtime: Runtime) -> None:
        self.fleet = fleet
        self.runner = runner
        self.runtime = runtime
        self.since = time.time()


class Operations:
    """An operator's requests. Every value that goes in or comes out is JSON.

    Args:
        home: the coordinator's home.
        store: its store.
        live: the running service; None if there is none.
    """

    def __init__(self, home: Home, store: Store, live: Live | None) -> None:
        self._home = home
        self._store = store
        self._live = live

    def calls(self) -> Mapping[str, Callable[..., Any]]:
        """What may be asked, by name."""
        names = (*_ANYWHERE, "submit", "backup", "add_operator", "operators", "revoke_operator")
        return {name: getattr(self, name) for name in names}

    def remote_calls(self) -> Mapping[str, Callable[..., Any]]:
        """What may be asked from another machine: nothing that reads or writes a file of this one, or lets other operators in."""
        return {name: getattr(self, name) for name in _ANYWHERE} | {"submit": self._submit_plan}

    def status(self) -> dict[str, Any]:
        """How the running service is."""
        live = self._need_live()
        return {
            "pid": os.getpid(),
            "fleet": live.runtime.fleet,
            "enrolment": live.runtime.enrolment,
            "since": _iso(live.since),
            "connected": [node.name for node in live.fleet.connected()],
            "run_id": live.runner.current,
        }

    def invite(self, name: str, hours: float) -> dict[str, Any]:
        """Make an invite; this is the only copy.

        Raises:
            LichenError: as `make_invite`; SERVICE_UNREACHABLE if the addresses are not known yet.
        """
        at = self._live.runtime if self._live else self._home.advertised()
        text = make_invite(self._store, self._home.authority(), name, at.fleet, at.enrolment, hours=hours)
        return {"name": name, "invite": text, "expires_at": _iso(time.time() + hours * 3600)}

    def nodes(self) -> list[dict[str, Any]]:
        """All nodes ever enrolled; ``connected`` is null if no service runs, ``profile`` where a node tells nothing of its machine."""
        fleet = self._live.fleet if self._live else None
        connected = None if fleet is None else {node.node_id for node in fleet.connected()}
        found = []
        for node in self._store.nodes():
            profile = fleet.profile_of(node.node_id) if fleet else None
            known = {"profile": profile.model_dump(mode="json") if profile else None}
            found.append(_node(node, None if connected is None else node.node_id in connected) | known)
        return found

    def revoke(self, name: str) -> dict[str, Any]:
        """Shut a node out for good; its stream ends at once.

        Raises:
            LichenError: NODE_UNKNOWN.
        """
        node = self._live.fleet.revoke(name) if self._live else self._store.revoke_node(name, time.time())
        return _node(node, False)

    def submit(
        self, plan: dict[str, Any], validation: str | None = None, test: str | None = None, fields: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """Queue a plan.

        Args:
            plan: the plan's document.
            validation: a file of rows to watch the rounds by.
            test: a file of rows to score the final model on, once.
            fields: from the plan's field names to the files' columns.

        Raises:
            LichenError: SERVICE_UNREACHABLE without a service; the plan's errors (20 to 23); MODEL_NOT_FOUND; the data's (40 to 48).
        """
        live = self._need_live()
        found = parse_plan(plan, where="submitted plan")
        check_base(found)
        run_id = random_id()
        directory = self._home.runs / str(run_id)
        rows = {}
        try:
            directory.mkdir(parents=True)
            for split, file in (("validation", validation), ("test", test)):
                if file is not None:
                    rows[split] = keep_rows(Path(file), directory / "evaluation" / f"{split}.parquet", found, fields or {})
            write_atomically(directory / "plan.yaml", found.to_yaml())
            self._store.add_run(run_id, found.canonical_json(), directory.name)
        except OSError as error:
            shutil.rmtree(directory, ignore_errors=True)
            raise LichenError(Code.OUTPUT_UNUSABLE, f"can't write: {error}", where=str(directory)) from None
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        live.runner.wake()
        return {"run_id": str(run_id), "name": found.name, "directory": str(directory), "plan_sha256": found.sha256(), "rows": rows}

    def _submit_plan(self, plan: dict[str, Any]) -> dict[str, Any]:
        return self.submit(plan)

    def runs(self) -> list[dict[str, Any]]:
        """All runs, oldest first."""
        return [self._run(run) for run in self._store.runs()]

    def run(self, run: str) -> dict[str, Any]:
        """One run, by its id, a beginning of it that fits one run only, or ``latest``.

        Raises:
            LichenError: RUN_UNKNOWN.
        """
        return self._run(find_run(self._store, run))

    def stop(self, run: str) -> dict[str, Any]:
        """End a run as stopped; its checkpoints are kept.

        Raises:
            LichenError: RUN_UNKNOWN; SERVICE_UNREACHABLE without a service.
        """
        live = self._need_live()
        found = find_run(self._store, run)
        live.runner.stop(found.run_id)
        return self._run(self._store.run(found.run_id))

    def backup(self, file: str) -> dict[str, Any]:
        """Write a backup of the home to ``file``.

        Raises:
            LichenError: OUTPUT_EXISTS, OUTPUT_UNUSABLE.
        """
        return write_backup(self._home, self._store, Path(file))

    def add_operator(self, request: str) -> dict[str, Any]:
        """Sign a remote operator's certificate request (PEM); returns what the operator needs.

        Raises:
            LichenError: CERTIFICATE_INVALID.
        """
        authority = self._home.authority()
        certificate = authority.sign_csr(request.encode(), csr_name(request.encode()), "operator")
        info = read_certificate(certificate)
        self._store.add_operator(info.name, info.fingerprint, info.not_after, time.time())
        at = self._live.runtime if self._live else self._home.advertised()
        return {
            "format": 1,
            "name": info.name,
            "coordinator": at.fleet,
            "certificate": certificate.decode(),
            "authority": authority.ca_pem.decode(),
        }

    def operators(self) -> list[dict[str, Any]]:
        """All remote operators."""
        return [
            {
                "name": operator.name,
                "active": operator.revoked_at is None,
                "added_at": _iso(operator.added_at),
                "certificate_ends": _iso(operator.certificate_ends),
                "revoked_at": _iso(operator.revoked_at),
                "fingerprint": operator.fingerprint,
            }
            for operator in self._store.operators()
        ]

    def revoke_operator(self, name: str) -> dict[str, Any]:
        """Shut a remote operator out.

        Raises:
            LichenError: NODE_UNKNOWN.
        """
        if not (count := self._store.revoke_operator(name, time.time())):
            raise LichenError(
                Code.NODE_UNKNOWN, f"there is no active operator named {name!r}", fix="`lichen coordinator operator list` lists them."
            )
        return {"name": name, "certificates": count}

    def _run(self, run: Run) -> dict[str, Any]:
        plan = json.loads(run.plan)  # as it was sound then: a later lichen may refuse it
        return {
            "run_id": str(run.run_id),
            "name": plan["name"],
            "status": run.status,
            "rounds": plan["rounds"],
            "rounds_done": len(read_rounds(self._home.runs / run.directory)),
            "created_at": _iso(run.created_at),
            "error": run.error,
            "directory": str(self._home.runs / run.directory),
        }

    def _need_live(self) -> Live:
        if self._live is None:
            raise NotServedError(self._home.path)
        return self._live


def find_run(store: Store, text: str) -> Run:
    """A run by its id, a beginning of it that fits one run only, or ``latest``.

    Raises:
        LichenError: RUN_UNKNOWN.
    """
    runs = store.runs()
    if not runs:
        raise LichenError(Code.RUN_UNKNOWN, "no plan was submitted yet", fix="`lichen coordinator submit PLAN` queues one.")
    found = runs[-1:] if text == "latest" else [run for run in runs if text and str(run.run_id).startswith(text)]
    exact = [run for run in found if str(run.run_id) == text]
    if len(exact or found) != 1:
        what = f"{len(found)} runs begin with {text!r}" if found else f"there is no run {text!r}"
        raise LichenError(Code.RUN_UNKNOWN, what, fix="`lichen coordinator runs` lists them.")
    return (exact or found)[0]


def _node(node: Node, connected: bool | None) -> dict[str, Any]:
    return {
        "name": node.name,
        "node_id": str(node.node_id),
        "active": node.active,
        "connected": connected,
        "last_seen": _iso(time.time() if connected else node.last_seen),
        "enrolled_at": _iso(node.enrolled_at),
        "revoked_at": _iso(node.revoked_at),
        "certificate_ends": _iso(node.certificate_ends),
        "fingerprint": node.fingerprint,
    }


def _iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
