"""A model as one file for the channel: an uncompressed tar of `plan.yaml` and the files of `model/`, the same bytes for the same files.

Who unpacks does not trust who packed: only plain files, plainly named, of kinds that hold data and no code.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from pathlib import Path
from typing import IO

from lichen.common.errors import Code, LichenError
from lichen.common.records import PayloadRef

PLAN = "plan.yaml"
_NAME = re.compile(r"plan\.yaml|model/[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.(?:safetensors|json|txt|md|jinja|model)")


def pack(plan: Path, model: Path, target: Path) -> PayloadRef:
    """Write the archive of a run's plan and a model of it; returns its digest and length.

    Raises:
        LichenError: NO_MODEL, if there is no model, or it is one of several folders.
    """
    files = {f"model/{path.name}": path for path in sorted(model.glob("*")) if _NAME.fullmatch(f"model/{path.name}")}
    if not files:
        raise LichenError(Code.NO_MODEL, "this run has no model")
    if next(model.glob("*/*.safetensors"), None):
        raise LichenError(
            Code.NO_MODEL,
            "this run's model is one for each task, in folders of their own, which are not sent",
            fix="Ask the operator for it: lichen coordinator export RUN --out FOLDER.",
        )
    temporary = target.with_name(target.name + ".tmp")
    with temporary.open("wb") as out, tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, path in {PLAN: plan, **files}.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = path.stat().st_size, 0o644
            with path.open("rb") as file:
                archive.addfile(entry, file)
    with temporary.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    temporary.replace(target)
    return PayloadRef(digest, target.stat().st_size)


def unpack(archive: IO[bytes], directory: Path) -> None:
    """Unpack an archive into a new directory.

    Raises:
        LichenError: PAYLOAD_CORRUPT, if it is no archive that `pack` makes.
    """
    directory.mkdir(parents=True)
    (directory / "model").mkdir()
    try:
        with tarfile.open(fileobj=archive, mode="r:") as entries:
            for entry in entries:
                content = entries.extractfile(entry) if entry.isreg() and _NAME.fullmatch(entry.name) else None
                if content is None:
                    raise LichenError(Code.PAYLOAD_CORRUPT, f"a model's archive holds {entry.name[:80]!r}, which is not part of a model")
                with (directory / entry.name).open("xb") as out:
                    while block := content.read(1 << 20):
                        out.write(block)
    except (tarfile.TarError, OSError) as error:
        raise LichenError(Code.PAYLOAD_CORRUPT, f"not an archive of a model: {error}") from None
    if not (directory / PLAN).exists():
        raise LichenError(Code.PAYLOAD_CORRUPT, "a model's archive without its plan")
