"""Aggregation rules: one file each, and one line in this registry."""

from __future__ import annotations

from lichen.coordinator.aggregation.fedavg import FedAvg

RULES = {"fedavg": FedAvg}
