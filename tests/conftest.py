"""Settings for every test: no network, one thread where parity is exact, and Ray's mode said out loud."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

pytest_plugins = ["tests.fixtures.models", "tests.fixtures.s3", "tests.fixtures.postgres", "tests.fixtures.ray_cluster"]
