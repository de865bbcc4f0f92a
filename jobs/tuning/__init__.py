"""The parts of `jobs.tune`: settings, what a run works on, one tuning, and the learning-rate search."""
