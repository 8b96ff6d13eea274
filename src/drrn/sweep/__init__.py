"""Sweeps: the plan, its cost, what became of each point, the machine shared out."""
