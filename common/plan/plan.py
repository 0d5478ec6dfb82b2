"""The plan as a whole: its sections, the text and the digest that name it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import Field

from lichen.common.plan.continual import Continual
from lichen.common.plan.sections import (
    Aggregation,
    Cohort,
    Evaluation,
    Local,
    Model,
    Precision,
    Privacy,
    Section,
    Simulation,
    Task,
    Transfer,
)


class Plan(Section):
    """A federation."""

    format: Literal[1] = 1
    """The version of this format."""
    name: str = Field(default="federation", pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    """A short name."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of all that is random but the noise of a deployment."""
    rounds: int = Field(ge=1)
    """Rounds of training."""
    task: Task
    model: Model
    cohort: Cohort = Cohort()
    local: Local
    privacy: Privacy = Privacy()
    aggregation: Aggregation = Aggregation()
    transfer: Transfer = Transfer()
    continual: Continual = Continual()
    evaluation: Evaluation = Evaluation()
    simulation: Simulation = Simulation()

    @property
    def private(self) -> bool:
        """Whether differential privacy is on."""
        return self.privacy.unit != "none"

    @property
    def central(self) -> bool:
        """Whether the unit is a client and the coordinator adds the noise: clients train without it."""
        return self.privacy.unit == "client"

    def at_precision(self, precision: Precision) -> Plan:
        """The plan as a machine works by it that keeps the base's weights so."""
        return self.model_copy(update={"model": self.model.model_copy(update={"base_precision": precision})})

    def __hash__(self) -> int:
        """Equal plans hash alike; the mappings inside have no hash of their own, and what is looked up often is not written out for it."""
        return hash((self.name, self.seed, self.rounds))

    def canonical_json(self) -> str:
        """The plan with all defaults, keys sorted: equal plans give equal text."""
        return canonical(self.model_dump(mode="json"))

    def sha256(self) -> str:
        """The hexadecimal digest of the canonical JSON, which names this plan to policies and people."""
        return digest_of(self.canonical_json())

    def to_yaml(self) -> str:
        """The plan with all defaults, as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def canonical(document: Mapping[str, Any]) -> str:
    """A document as JSON, keys sorted."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def digest_of(text: str) -> str:
    """The hexadecimal digest of a plan's text as it travels: a lichen with more keys finds the same, whatever their defaults."""
    return hashlib.sha256(text.encode()).hexdigest()


def schema() -> dict[str, Any]:
    """The plan's JSON schema."""
    return Plan.model_json_schema()
