"""A coordinator's home as one file, taken while it runs: store, configuration, keys, run directories and the payloads under way.

The file holds private keys: it is made for its owner only. Every file in it has its digest in the manifest, which comes last.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp
from typing import Any, BinaryIO

from lichen.common.errors import Code, LichenError
from lichen.coordinator.export import ARCHIVE
from lichen.coordinator.home import Home
from lichen.coordinator.run_directory import RESTORED
from lichen.coordinator.store import Store

FORMAT = 1
MANIFEST = "manifest.json"
_BLOCK = 1 << 20


def write_backup(home: Home, store: Store, file: Path) -> dict[str, Any]:
    """Write a backup; the service may go on meanwhile. Returns ``file``, ``bytes`` and ``files``.

    Raises:
        LichenError: OUTPUT_EXISTS, OUTPUT_UNUSABLE.
    """
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise LichenError(Code.OUTPUT_EXISTS, "there is a file already", where=str(file), fix="Choose another name.") from None
    except OSError as error:
        raise LichenError(Code.OUTPUT_UNUSABLE, str(error), where=str(file)) from None
    try:
        with os.fdopen(descriptor, "wb") as out, _snapshot(home, store) as snapshot:
            files = _write(snapshot, out)
            out.flush()
            os.fsync(out.fileno())
            size = out.tell()
    except OSError as error:
        file.unlink(missing_ok=True)
        raise LichenError(Code.OUTPUT_UNUSABLE, f"can't write the backup: {error}", where=str(file)) from None
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    return {"file": str(file), "bytes": size, "files": files}


@contextmanager
def _snapshot(home: Home, store: Store) -> Iterator[Path]:
    """A directory of hard links to the home's files: they are replaced, never changed, so the links stay what they are now."""
    directory = Path(mkdtemp(prefix=".backup-", dir=home.path))
    try:
        # the store first: a checkpoint may be newer than the store knows, but not older, for then its replies would be gone
        store.backup(directory / "store.sqlite")
        for part in ("config.yaml", "pki", "runs", "spool"):
            top = home.path / part
            for source in [top] if top.is_file() else sorted(path for path in top.rglob("*") if path.is_file() and not path.is_symlink()):
                if source.suffix in {".tmp", ".part"} or source.name == ARCHIVE:
                    continue  # half of something, or made of what is here
                target = directory / source.relative_to(home.path)
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                try:
                    os.link(source, target)
                except FileNotFoundError:
                    continue  # replaced or let go of meanwhile
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _write(snapshot: Path, out: Any) -> int:
    told: dict[str, dict[str, Any]] = {}
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(path for path in snapshot.rglob("*") if path.is_file()):
            name = path.relative_to(snapshot).as_posix()
            entry = tarfile.TarInfo(name)
            with path.open("rb") as file:
                entry.size, entry.mode, entry.mtime = path.stat().st_size, 0o600, int(time.time())
                hashed = _Hashed(file)
                archive.addfile(entry, hashed)  # type: ignore[arg-type]  # it only reads
            told[name] = {"sha256": hashed.digest.hexdigest(), "bytes": entry.size}
        manifest = json.dumps({"format": FORMAT, "created_at": time.time(), "files": told}, indent=1).encode()
        entry = tarfile.TarInfo(MANIFEST)
        entry.size, entry.mode = len(manifest), 0o600
        archive.addfile(entry, io.BytesIO(manifest))
    return len(told)


class _Hashed:
    """A file that is hashed as it is read: what the manifest says is what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self.digest = hashlib.sha256()
        self._file = file

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        return data


def restore_backup(file: Path, home: Path) -> Home:
    """Make a new home from a backup, every file verified.

    Raises:
        LichenError: OUTPUT_EXISTS if there is something at ``home``; BACKUP_INVALID if the file is no backup, or was changed or cut;
            STORE_VERSION if a newer lichen wrote it.
    """
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise LichenError(Code.OUTPUT_EXISTS, "the home is not empty", where=str(home), fix="Choose another --home.")
    home.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(mkdtemp(prefix=f".{home.name}-", dir=home.parent))
    try:
        _extract(file, temporary)
        (temporary / "runs").mkdir(exist_ok=True)
        for checkpoints in (temporary / "runs").glob("*/checkpoints"):
            (checkpoints / RESTORED.name).touch()
        if home.exists():
            home.rmdir()
        temporary.replace(home)
    except (tarfile.TarError, EOFError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise _invalid(file, f"not a whole backup: {error}") from None
    except OSError as error:
        raise LichenError(Code.BACKUP_INVALID, str(error), where=str(file)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Home(home)


def _extract(file: Path, directory: Path) -> None:
    found: dict[str, dict[str, Any]] = {}
    manifest: dict[str, Any] | None = None
    with tarfile.open(file, mode="r:") as archive:
        for entry in archive:
            content = archive.extractfile(entry) if entry.isreg() else None
            if content is None or manifest is not None:
                raise _invalid(file, f"{entry.name!r} has no place in a backup")
            if entry.name == MANIFEST:
                manifest = json.loads(content.read())
                continue
            name = PurePosixPath(entry.name)
            if name.is_absolute() or ".." in name.parts:
                raise _invalid(file, f"{entry.name!r} lies outside of it")
            found[entry.name] = _keep(content, directory / name)
    if manifest is None:
        raise _invalid(file, "it is cut: there is no manifest")
    if manifest["format"] > FORMAT:
        raise LichenError(Code.STORE_VERSION, f"a backup of format {manifest['format']}", where=str(file), fix="Upgrade lichen.")
    if wrong := sorted(name for name in manifest["files"].keys() | found.keys() if manifest["files"].get(name) != found.get(name)):
        raise _invalid(file, f"{len(wrong)} files are missing or changed, the first is {wrong[0]!r}")


def _keep(content: Any, target: Path) -> dict[str, Any]:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        while block := content.read(_BLOCK):
            digest.update(block)
            size += len(block)
            out.write(block)
        out.flush()
        os.fsync(out.fileno())
    return {"sha256": digest.hexdigest(), "bytes": size}


def _invalid(file: Path, what: str) -> LichenError:
    return LichenError(Code.BACKUP_INVALID, what, where=str(file), fix="Use another backup.")
