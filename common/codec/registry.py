"""Codecs by the names that plans give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lichen.common.codec.blockwise import Blockwise
from lichen.common.codec.codec import Codec
from lichen.common.codec.eden import Eden
from lichen.common.codec.plain import Half, Plain
from lichen.common.codec.topk import TopK

CODECS: Mapping[str, Callable[..., Codec]] = {codec.name: codec for codec in (Eden, Blockwise, TopK, Half, Plain)}
"""`CODECS["eden"](bits=4)`: see each class for its parameters and their ranges, which a plan has checked."""
