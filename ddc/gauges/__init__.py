"""What the symmetries of a network are: actions, discovery from a model, check and audit."""

from ddc.gauges.actions import Axis, Chain, Rescale, RotatedAxis, Rotation, Shift
from ddc.gauges.affine import General
from ddc.gauges.base import (
    KINDS,
    Gauge,
    Kind,
    Refusal,
    add_kind,
    approximate_kinds,
    complete_kinds,
    is_fake,
    is_split,
    named_parameters,
    paper_kinds,
    plain_name,
    plain_names,
    whole,
)
from ddc.gauges.canonical import (
    align_,
    balance_,
    canonicalise_,
    nearest_turn,
    orbit_distance,
)
from ddc.gauges.certificate import Certificate, certify
from ddc.gauges.discovery import find_gauges, read_gauges
from ddc.gauges.gauge_set import GaugeSet, audit, check
from ddc.gauges.granularity import in_blocks
from ddc.gauges.roles import HiddenMatrix, hidden_matrices
from ddc.gauges.routing import ROLES, ParameterRole, Roles, param_groups, parameter_roles
from ddc.gauges.scales import Scale, Scaled
from ddc.gauges.traced import Finding, NotProved, rule

__all__ = [
    "KINDS",
    "ROLES",
    "Axis",
    "Certificate",
    "Chain",
    "Finding",
    "Gauge",
    "GaugeSet",
    "General",
    "HiddenMatrix",
    "Kind",
    "NotProved",
    "ParameterRole",
    "Refusal",
    "Rescale",
    "Roles",
    "RotatedAxis",
    "Rotation",
    "Scale",
    "Scaled",
    "Shift",
    "add_kind",
    "align_",
    "approximate_kinds",
    "audit",
    "balance_",
    "canonicalise_",
    "certify",
    "check",
    "complete_kinds",
    "find_gauges",
    "hidden_matrices",
    "in_blocks",
    "is_fake",
    "is_split",
    "named_parameters",
    "nearest_turn",
    "orbit_distance",
    "paper_kinds",
    "param_groups",
    "parameter_roles",
    "plain_name",
    "plain_names",
    "read_gauges",
    "rule",
    "whole",
]
