"""`lichen …` that notes when its first client begins to train. Run by `lichen bench simulate`.

python watched.py FIRST.txt simulate PLAN.yaml …
"""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lichen.client.trainer import Trainer
from lichen.common.cli import main

FIRST = sys.argv.pop(1)


def noted(train: Callable[..., Any]) -> Callable[..., Any]:
    """A training that first says when the first of all began."""

    def begin(*given: Any, **named: Any) -> Any:
        with suppress(FileExistsError), open(FIRST, "x", encoding="ascii") as file:
            file.write(str(time.time()))
        return train(*given, **named)

    return begin


for name in ("run", "run_together"):  # before the workers are forked
    setattr(Trainer, name, noted(getattr(Trainer, name)))
main()
