"""Fast implementations: folded inference in strips, memory, compiled training."""
