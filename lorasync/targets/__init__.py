"""How an engine is reached: one file a kind of engine."""
