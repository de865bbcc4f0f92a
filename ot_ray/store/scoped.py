"""A store at a folder of another: what is handed to somebody who is to see that folder and nothing else.

Whether more could be reached with the same disk or the same credentials is left to whoever hands it out."""

from __future__ import annotations

from ot_ray.errors import StoreError
from ot_ray.store.base import Store, check_prefix, join_key
from ot_ray.store.local import LocalStore
from ot_ray.store.patient import PatientStore
from ot_ray.store.s3 import S3Store


def scoped(store: Store, prefix: str) -> Store:
    """The store whose keys are those of `store` under `prefix`, without it; as patient as `store` is.

    Its `url` opens the same store anywhere. The empty prefix gives `store` itself.

    Raises:
        StoreError: the prefix is none, or the store is of a kind that has no folders of its own.
    """
    prefix = check_prefix(prefix)
    if not prefix:
        return store
    if isinstance(store, PatientStore):
        return store.around(scoped(store.inner, prefix))
    if isinstance(store, LocalStore):
        return LocalStore(store.root / prefix)
    if isinstance(store, S3Store):
        return S3Store(store.address.model_copy(update={"prefix": join_key(store.address.prefix, prefix)}))
    raise StoreError(f"{store!r} cannot be narrowed to {prefix!r}; use a folder or an s3:// address")
