"""How the bytes of a bucket travel: one file a way, each with a sender and a receiver."""
