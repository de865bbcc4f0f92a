"""The parts of `jobs.study`: its configuration, what one row computes, and running rows side by side."""
