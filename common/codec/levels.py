"""The best scalar quantisers of the standard normal distribution (Lloyd 1982, Max 1960), for 1 to 8 bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_HALVES = (
    "408",
    "232 773",
    "126 387 688 1102",
    "66 199 336 482 643 828 1059 1399",
    "34 101 170 239 310 382 458 537 620 710 807 915 1039 1187 1378 1670",
    "17 51 86 120 155 190 225 260 296 333 370 407 446 485 525 566 609 653 699 747 797 849 905 965 1029 1099 1177 1265 1368 1494 1659 1917",
    "9 26 43 60 78 95 112 130 147 165 182 200 218 235 253 271 289 308 326 344 363 382 401 420 440 459 479 499 519 540 561 582 604 626 "
    "648 670 694 717 742 766 792 818 844 872 900 930 960 992 1024 1059 1095 1132 1173 1215 1261 1310 1364 1423 1489 1565 1655 1765 "
    "1912 2145",
    "4 13 22 30 39 48 56 65 74 82 91 100 108 117 126 135 143 152 161 170 178 187 196 205 214 223 232 241 250 259 268 277 286 295 304 "
    "314 323 332 341 350 360 369 379 388 398 407 417 427 436 446 456 466 476 486 496 506 516 527 537 548 558 569 579 590 601 612 623 "
    "634 645 656 668 679 691 703 715 727 739 751 764 776 789 802 815 828 842 856 869 884 898 912 927 942 958 973 989 1006 1022 1039 "
    "1056 1074 1092 1111 1130 1150 1171 1192 1213 1236 1259 1283 1308 1334 1362 1391 1421 1453 1488 1524 1564 1606 1653 1705 1763 "
    "1831 1911 2010 2144 2357",
)
"""The positive levels of each width × `GRID`, written out so that both ends have the same to the last bit."""
GRID = 512
"""So coarse that sums over a block, which are integers below 2^24, are exact in 32-bit floats whatever their order."""
CELLS_PER_UNIT = 1024
MIDDLE = 6 * CELLS_PER_UNIT
"""The cell that begins at zero. Beyond ±6 all values have the outermost level."""


def levels(bits: int) -> NDArray[np.float32]:
    """The levels by code, ascending: shape (2^bits)."""
    half = np.array(_HALVES[bits - 1].split(), np.float32) / GRID
    return np.concatenate([-half[::-1], half])


def cells(bits: int) -> NDArray[np.uint8]:
    """The code of each cell of width 1/`CELLS_PER_UNIT`: quantising is one look-up, without a search for the nearest level."""
    found = levels(bits)
    middles = (np.arange(2 * MIDDLE) - MIDDLE + 0.5) / CELLS_PER_UNIT
    return np.searchsorted((found[1:] + found[:-1]) / 2, middles).astype(np.uint8)
