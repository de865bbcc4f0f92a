"""The parts of `jobs.cola`."""
