"""What can be refused before the work starts: data of the wrong kind, another model's bundle, used outputs."""

from __future__ import annotations

from pathlib import Path

from ot_ray.errors import AlreadyExistsError, ConfigError
from ot_ray.model import FAMILIES
from ot_ray.store import LocalStore, open_store


def require_kind(model_type: str, text: str, *, images: bool) -> None:
    """Refuse images for a language model, and text for an image model.

    Args:
        model_type: of a supported architecture.
        text: the name of the setting that holds text.
        images: whether the settings name images.

    Raises:
        ConfigError: names the setting that the model wants.
    """
    takes_images = FAMILIES[model_type].task == "image"
    if takes_images and not images:
        raise ConfigError(f"{text} is set, but a model of type {model_type} takes images; set images.source instead")
    if images and not takes_images:
        raise ConfigError(f"images is set, but a model of type {model_type} takes text; set {text} instead")


def require_text(model_type: str, verb: str) -> None:
    """Refuse an image model where a verb has no images to give it. Raises ConfigError."""
    if FAMILIES[model_type].task == "image":
        raise ConfigError(
            f"the model is of type {model_type}, which takes images, and {verb} is for language models; name one in "
            "model.source"
        )


def require_same_model(bundle: str, model: str) -> None:
    """Refuse a bundle of another model than the one that is named. Raises ConfigError."""
    if bundle != model:
        raise ConfigError(
            f"the bundle is of model {bundle!r}, but model.name is {model!r}; name the owner's model under the name "
            "that its bundle has, or another bundle"
        )


def require_empty(field: str, address: str) -> None:
    """Refuse an output that holds something already, or that can be no folder.

    Raises:
        AlreadyExistsError: names the first thing in it.
        ConfigError: a part of the path is a file.
    """
    store = open_store(address)
    if isinstance(store, LocalStore):
        require_folder(field, str(store.root))
    held = next(iter(store.list()), None)
    if held is not None:
        raise AlreadyExistsError(f"{field} is {address!r}, which holds {held} already; name an empty one")


def require_folder(field: str, path: str) -> None:
    """Refuse a path that is a file or lies below one. Raises ConfigError."""
    nearest = next(place for place in (Path(path), *Path(path).absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise ConfigError(f"{field} is {path!r}, but {nearest} is a file; name a folder")
