"""The model of a message, made from an older one that the node still has and from what was added to it since.

The coordinator names its model by digest, and adds to it what it sends: so whoever adds the same to the same bytes has the same file, and
anything else is found out and not used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lichen.common.errors import Code, LichenError
from lichen.common.records import ChainLink, chain_of, mapped, payload_refs

if TYPE_CHECKING:
    from flwr.app import Message

    from lichen.common.codec.codec import Codec

_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # as safetensors has it


def steps_from(spool: Path, message: Message) -> list[ChainLink]:
    """What leads from the newest model that lies in the spool to the message's; empty, if none does, or its payload is there.

    Raises:
        LichenError: FRAME_INVALID.
    """
    links = chain_of(message)
    if all((spool / ref.digest).exists() for ref in payload_refs(message)):
        return []
    newest = max((number for number, link in enumerate(links) if (spool / link.before).exists()), default=len(links))
    return links[newest:]


def bring_up(spool: Path, message: Message, codec: Codec | None) -> None:
    """Have the message's model in the spool, if it is not: made from an older one.

    Raises:
        LichenError: MODEL_BEHIND, if what the node has does not lead to it: then it must be fetched whole.
    """
    steps = steps_from(spool, message)
    if not steps:
        return
    target = payload_refs(message)[0].digest
    temporary = spool / f"{os.getpid()}.model.tmp"
    try:
        if codec is None:
            raise LichenError(Code.FRAME_INVALID, "a chain of models in a plan that sends them whole")
        shutil.copyfile(spool / steps[0].before, temporary)
        for step in steps:
            _add(temporary, spool / step.added.digest, codec)
        with temporary.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != target:
                raise LichenError(Code.PAYLOAD_CORRUPT, "what was added leads to another model")
        temporary.replace(spool / target)
    except (LichenError, OSError, ValueError, KeyError) as error:
        temporary.unlink(missing_ok=True)
        raise LichenError(Code.MODEL_BEHIND, f"{error}", where=f"model {target[:12]}") from None


def _add(model: Path, added: Path, codec: Codec) -> None:
    """Add an encoded step to the values in a safetensors file, in place.

    Raises:
        LichenError: PAYLOAD_CORRUPT, STATE_MISMATCH, CODEC_MISMATCH; FRAME_INVALID, if the file is not of 32-bit floats.
    """
    import numpy as np
    import torch

    from lichen.common.codec.codec import placed
    from lichen.common.codec.layout import Layout

    header, begin = _header(model)
    if any(about["dtype"] != "F32" for about in header.values()):
        raise LichenError(Code.FRAME_INVALID, "a chain of models is of 32-bit floats")
    layout = Layout(tuple((name, tuple(header[name]["shape"]), torch.float32) for name in sorted(header)))
    payload = codec.open(mapped(added), layout)
    flat = torch.empty(layout.count)
    for part in range(payload.parts):
        for view, values in placed(payload, flat, part, payload.values(part)):
            view.copy_(values)
    data = np.memmap(model, np.uint8, mode="r+", offset=begin)
    for name, tensor in layout.split(flat).items():
        first, last = header[name]["data_offsets"]
        data[first:last].view("<f4")[...] += tensor.reshape(-1).numpy()
    data.flush()


def _header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """The tensors that a safetensors file tells of, and where their bytes begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > _LONGEST_HEADER:
            raise LichenError(Code.PAYLOAD_CORRUPT, "the model is not a safetensors file")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, _LENGTH_BYTES + length
