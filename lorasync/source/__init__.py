"""Sources: what travels to the engine. `MergedSource` streams merged weights out of the training model."""

from lorasync.source.merged import MergedSource, ParamMeta
from lorasync.source.model import unwrap

__all__ = ["MergedSource", "ParamMeta", "unwrap"]
