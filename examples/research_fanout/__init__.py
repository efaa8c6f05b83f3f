"""A planner that starts a run for each topic, suspends until all have ended, and writes one report."""
