"""What `python -m jobs.benchmark` measures, one module a benchmark."""
