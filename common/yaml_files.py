"""YAML that people write: plans, policies, manifests, settings."""

from __future__ import annotations

from typing import Any

import yaml

try:  # libyaml's, where PyYAML has it: a manifest is read in each round
    from yaml import CSafeLoader as _Loader
except ImportError:  # pragma: no cover
    from yaml import SafeLoader as _Loader  # type: ignore[assignment]


def read_yaml(text: str) -> Any:
    """A document of plain values.

    Raises:
        yaml.YAMLError: for what is not YAML, holds anything else, or gives a key twice.
    """
    return yaml.load(text, _SingleKeys)  # noqa: S506 - a safe one


class _SingleKeys(_Loader):
    """Refuses a key that is given twice, of which YAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)
