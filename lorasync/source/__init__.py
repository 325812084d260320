"""Sources of weights: merged ones (`MergedSource`) or only what was trained (`FactorSource`)."""

from lorasync.source.factors import (
    FactorBias,
    FactorModule,
    FactorRows,
    FactorSaved,
    FactorSource,
    FactorSpec,
)
from lorasync.source.merged import MergedSource, ParamMeta
from lorasync.source.model import unwrap
from lorasync.source.samples import base_samples

__all__ = [
    "FactorBias",
    "FactorModule",
    "FactorRows",
    "FactorSaved",
    "FactorSource",
    "FactorSpec",
    "MergedSource",
    "ParamMeta",
    "base_samples",
    "unwrap",
]
