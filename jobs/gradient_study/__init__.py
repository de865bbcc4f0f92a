"""The parts of `jobs.cola_study`: its configuration, the customers' texts, what one run computes, running, report."""
