"""YAML that people write: plans, policies, manifests, settings."""

from __future__ import annotations

import io
from typing import Any

import yaml
from yaml.constructor import ConstructorError, SafeConstructor

try:  # where PyYAML has it: a manifest is read in each round
    from yaml import CSafeLoader as _Libyaml
except ImportError:  # pragma: no cover
    from yaml import SafeLoader as _Libyaml  # type: ignore[assignment]


def read_yaml(text: str) -> Any:
    """A document of plain values.

    Raises:
        yaml.YAMLError: for what is not YAML, holds anything else, or gives a key twice. Says where, and shows none of the text: an error
            may be told to others.
    """
    try:
        return yaml.load(text, _Fast)  # noqa: S506 - a safe one
    except yaml.YAMLError:
        return yaml.load(io.StringIO(text), _Exact)  # noqa: S506 - a safe one, which knows the line better


class _SingleKeys(SafeConstructor):
    """Refuses a key that is given twice, of which YAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ConstructorError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Fast(_SingleKeys, _Libyaml):
    pass


class _Exact(_SingleKeys, yaml.SafeLoader):
    pass
