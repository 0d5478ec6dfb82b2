"""Codecs by the names that plans give them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lichen.common.codec.blockwise import Blockwise
from lichen.common.codec.codec import Codec
from lichen.common.codec.eden import Eden
from lichen.common.codec.plain import Half
from lichen.common.codec.topk import TopK

if TYPE_CHECKING:
    from lichen.common.plan import Downlink, Plan, Uplink

CODECS: Mapping[str, Callable[..., Codec]] = {codec.name: codec for codec in (Eden, Blockwise, TopK, Half)}
"""`CODECS["eden"](bits=4)`: see each class for its parameters and their ranges, which a plan has checked."""


def uplink_codec(uplink: Uplink) -> Codec | None:
    """What updates are written with; None: as they are."""
    if uplink.codec == "none":
        return None
    if uplink.codec == "topk":
        return CODECS["topk"](share=uplink.share)
    if uplink.codec == "fp16" or uplink.bits is None:
        return CODECS[uplink.codec]()
    return CODECS[uplink.codec](bits=uplink.bits)


def downlink_codec(downlink: Downlink) -> Codec | None:
    """What is added to the model is written with; None: the model travels whole."""
    return None if downlink.codec == "none" else CODECS[downlink.codec]()


def update_seed(plan: Plan, client: str, round: int) -> int:
    """A seed for one client's update of one round: public, and the same when the round is done again."""
    return int.from_bytes(hashlib.sha256(f"{plan.seed}|update|{client}|{round}".encode()).digest()[:8], "big")
