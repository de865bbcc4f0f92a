"""One short module a verb; each runs as `python -m jobs.<verb>` and under `ray job submit`."""
