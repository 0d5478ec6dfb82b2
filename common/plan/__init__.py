"""The plan: one document that describes a federation, the same for a simulation, a deployment and stock Flower."""

from lichen.common.plan.plan import Plan, schema
from lichen.common.plan.reading import find_plan, load_plan, parse_plan, plan_from_json
from lichen.common.plan.sections import Aggregation, Cohort, DataSource, Downlink, Local, Model, Number, Precision, Section, Uplink

__all__ = [
    "Aggregation",
    "Cohort",
    "DataSource",
    "Downlink",
    "Local",
    "Model",
    "Number",
    "Plan",
    "Precision",
    "Section",
    "Uplink",
    "find_plan",
    "load_plan",
    "parse_plan",
    "plan_from_json",
    "schema",
]
