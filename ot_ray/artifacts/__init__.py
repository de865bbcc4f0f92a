"""What travels between owner and tuner, as files: bundles out, adapters back, plug-ins promoted.

Everything that comes from outside is verified before it is opened. Training and serving are elsewhere."""

from ot_ray.artifacts.adapter import write_adapter
from ot_ray.artifacts.bundle import Bundle, open_bundle, write_bundle
from ot_ray.artifacts.inspection import InspectedAdapter, InspectionLimits, inspect_adapter, plain_state
from ot_ray.artifacts.manifest import AdapterManifest, BundleManifest, FileEntry, TensorEntry
from ot_ray.artifacts.publication import fetch_bundle, list_versions, publish_bundle
from ot_ray.artifacts.registry import ModelId, PlugInRecord, Registry, parse_model_id
from ot_ray.artifacts.signature import generate_key, key_id, sign_folder, verify_folder
from ot_ray.artifacts.source import BundleSource

__all__ = [
    "AdapterManifest",
    "Bundle",
    "BundleManifest",
    "BundleSource",
    "FileEntry",
    "InspectedAdapter",
    "InspectionLimits",
    "ModelId",
    "PlugInRecord",
    "Registry",
    "TensorEntry",
    "fetch_bundle",
    "generate_key",
    "inspect_adapter",
    "key_id",
    "list_versions",
    "open_bundle",
    "parse_model_id",
    "plain_state",
    "publish_bundle",
    "sign_folder",
    "verify_folder",
    "write_adapter",
    "write_bundle",
]
