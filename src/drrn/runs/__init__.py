"""A training from start to end: its steps, record, checkpoints, stop and processes."""
