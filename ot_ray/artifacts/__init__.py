"""What travels between owner and tuner, as files: bundles out, adapters back, plug-ins promoted.

Everything that comes from outside is verified before it is opened. Training and serving are elsewhere."""

from ot_ray.artifacts.adapter import write_adapter
from ot_ray.artifacts.bundle import Bundle, open_bundle, write_bundle
from ot_ray.artifacts.changes import Change, ChangeLimits, measure_changes, require_sane_changes
from ot_ray.artifacts.inspection import InspectedAdapter, InspectionLimits, inspect_adapter, plain_state
from ot_ray.artifacts.lease import Lease, hold_lease
from ot_ray.artifacts.manifest import AdapterManifest, BundleManifest, FileEntry, TensorEntry
from ot_ray.artifacts.model_id import ModelId, parse_model_id, parse_model_name
from ot_ray.artifacts.model_source import (
    ModelSource,
    load_emulated,
    load_full,
    load_shape,
    open_model_source,
)
from ot_ray.artifacts.publication import (
    fetch_bundle,
    list_versions,
    publish_bundle,
    published_adapter,
    published_manifest,
)
from ot_ray.artifacts.registry import PlugInRecord, Registry
from ot_ray.artifacts.releases import Releases
from ot_ray.artifacts.signature import generate_key, key_id, sign_folder, verify_folder
from ot_ray.artifacts.source import BundleSource
from ot_ray.artifacts.weights import TensorInfo, Weights

__all__ = [
    "AdapterManifest",
    "Bundle",
    "BundleManifest",
    "BundleSource",
    "Change",
    "ChangeLimits",
    "FileEntry",
    "InspectedAdapter",
    "InspectionLimits",
    "Lease",
    "ModelId",
    "ModelSource",
    "PlugInRecord",
    "Registry",
    "Releases",
    "TensorEntry",
    "TensorInfo",
    "Weights",
    "fetch_bundle",
    "generate_key",
    "hold_lease",
    "inspect_adapter",
    "key_id",
    "list_versions",
    "load_emulated",
    "load_full",
    "load_shape",
    "measure_changes",
    "open_bundle",
    "open_model_source",
    "parse_model_id",
    "parse_model_name",
    "plain_state",
    "publish_bundle",
    "published_adapter",
    "published_manifest",
    "require_sane_changes",
    "sign_folder",
    "verify_folder",
    "write_adapter",
    "write_bundle",
]
