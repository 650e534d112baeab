"""Who else computes the operations: one module a backend."""
