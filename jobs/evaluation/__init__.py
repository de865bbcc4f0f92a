"""What `jobs.evaluate` does on tasks: which models the five settings are, and their scores, side by side on Ray."""
