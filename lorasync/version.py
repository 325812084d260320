"""The version of this package, for both sides of the wire; nothing else, so that anything may import it."""

__version__ = "0.1.0"
