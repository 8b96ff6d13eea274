"""What makes it fast: folded inference in strips, memory, compiled training."""
