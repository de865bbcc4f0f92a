"""Emulator layers with smaller maps, pruned or quantized: in memory, in a bundle, and while they learn."""

from ot_ray.model.packed.checkpoint import PackedConfig, compress
from ot_ray.model.packed.factored import with_smaller_layers, with_smaller_maps
from ot_ray.model.packed.format import METHOD, PackedFormat
from ot_ray.model.packed.learning import LearningLinear, learn_compressed
from ot_ray.model.packed.linear import PackedLinear
from ot_ray.model.packed.rounding import prune

__all__ = [
    "METHOD",
    "LearningLinear",
    "PackedConfig",
    "PackedFormat",
    "PackedLinear",
    "compress",
    "learn_compressed",
    "prune",
    "with_smaller_layers",
    "with_smaller_maps",
]
