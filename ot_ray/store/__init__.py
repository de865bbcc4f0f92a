"""Bytes under keys, in a local folder or on S3, behind one small protocol with create-once writes.

What the bytes mean is left to the artifacts room."""

from __future__ import annotations

from ot_ray.store.base import ObjectInfo, Store
from ot_ray.store.local import LocalStore
from ot_ray.store.open import open_store
from ot_ray.store.patient import PatientStore
from ot_ray.store.s3 import S3Store
from ot_ray.store.s3_address import S3Address
from ot_ray.store.s3_renewal import renewed
from ot_ray.store.scoped import scoped
from ot_ray.store.transfer import download_folder, upload_folder

__all__ = [
    "LocalStore",
    "ObjectInfo",
    "PatientStore",
    "S3Address",
    "S3Store",
    "Store",
    "download_folder",
    "open_store",
    "renewed",
    "scoped",
    "upload_folder",
]
