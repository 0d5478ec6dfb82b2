"""The plan: one document that describes a federation, the same for a simulation, a deployment and stock Flower."""

from lichen.common.plan.plan import Plan, digest_of, schema
from lichen.common.plan.reading import find_plan, load_plan, parse_plan, plan_from_json, text_of
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
    "digest_of",
    "find_plan",
    "load_plan",
    "parse_plan",
    "plan_from_json",
    "schema",
    "text_of",
]
