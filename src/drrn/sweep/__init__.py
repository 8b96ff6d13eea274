"""Sweeps: the plan, its cost, the outcome of each job, the machine shared among jobs."""
