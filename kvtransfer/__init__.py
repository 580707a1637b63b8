"""The KV plane: arenas, transports and hand-offs."""
