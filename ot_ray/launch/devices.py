"""Which of a machine's GPUs a process of the cluster sees."""

from __future__ import annotations

from collections.abc import Mapping


def gpu_visibility(resources: Mapping[str, float]) -> dict[str, str]:
    """Variables for a process with these resources, as Ray counts them.

    Ray shows a process the GPUs that it was given, but leaves all in sight of one that asked for none; PyTorch
    would then put the work of every such process on the first.
    """
    return {} if resources.get("GPU") else {"CUDA_VISIBLE_DEVICES": ""}
