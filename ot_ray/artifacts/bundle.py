"""Bundles: a folder that Transformers opens as the emulated model, with a manifest and a signature.

Writing its checkpoint files is left to checkpoint.py, moving it through a store to publication.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import AutoTokenizer, BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ot_ray.artifacts.checkpoint import (
    ADAPTER_WEIGHTS,
    EMULATOR_WEIGHTS,
    PROCESSOR,
    write_configs,
    write_processor,
    write_tokenizer,
    write_weights,
)
from ot_ray.artifacts.folder import check_files, describe_files, list_files, staged_folder
from ot_ray.artifacts.head import head_entries
from ot_ray.artifacts.manifest import (
    MANIFEST,
    SIGNATURE,
    BundleManifest,
    bundle_id,
    now,
    schema_version,
    to_text,
)
from ot_ray.artifacts.signature import key_id, sign_folder, verify_folder
from ot_ray.artifacts.strict_json import parse_object, read_json
from ot_ray.errors import ArtifactError, ConfigError, SignatureError
from ot_ray.model import METHODS, Method, SplitPlan, auto_class, check_supported, depth_of
from ot_ray.model.loading import processor_in
from ot_ray.model.packed import METHOD
from ot_ray.model.skeleton import settings_named

_INDEX = "model.safetensors.index.json"
_REQUIRED = frozenset({"config.json", _INDEX, ADAPTER_WEIGHTS, EMULATOR_WEIGHTS})


def write_bundle(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: SplitPlan,
    *,
    name: str,
    version: str,
    card: str,
    recommended: Mapping[str, bool | int | float | str],
    methods: Sequence[Method] = METHODS,
    expires: datetime | None = None,
    private_key: Path | None = None,
    processor: BaseImageProcessor | None = None,
) -> BundleManifest:
    """Write an emulated model as a bundle; the folder appears when it is complete.

    Args:
        model: the emulated model, `plan.depth` layers deep, of float32, float16 or bfloat16.
        tokenizer: None leaves it out, for models that are fed with token ids.
        name, version: the owner's names, `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`.
        card: the model card, Markdown; it becomes README.md.
        recommended: hyperparameters such as `learning_rate`.
        expires: with a time zone; None for never.
        private_key: a PEM file of `generate_key`; None leaves the bundle unsigned.
        processor: what prepares images for an image model.

    Raises:
        ArtifactError: the model is not of the plan's depth (the full model never goes into a bundle), or a
            name or value does not fit the manifest.
        SignatureError: the key cannot be used.
        AlreadyExistsError: the folder is there and not empty.
    """
    if depth_of(model) != plan.depth:
        raise ArtifactError(
            f"the model has {depth_of(model)} layers, but a bundle of plan {plan} has {plan.depth}; "
            "pass the emulated model, never the full one"
        )
    with staged_folder(Path(folder)) as staging:
        adapter = write_weights(staging, model, plan)
        write_configs(staging, model)
        if tokenizer is not None:
            write_tokenizer(staging, tokenizer)
        if processor is not None:
            write_processor(staging, processor)
        (staging / "README.md").write_text(card, encoding="utf-8")
        manifest = _manifest(
            staging,
            model=name,
            version=version,
            model_type=model.config.model_type,
            plan=plan,
            adapter=adapter,
            head=head_entries(model),
            methods=tuple(methods),
            recommended=dict(recommended),
            expires=expires,
            signing_key_id=key_id(private_key) if private_key else None,
        )
        (staging / MANIFEST).write_bytes(to_text(manifest))
        if private_key:
            sign_folder(staging, private_key)
    return manifest


@dataclass(frozen=True)
class Bundle:
    """A verified bundle in a local folder."""

    folder: Path
    """Where it lies."""
    manifest: BundleManifest
    """What it says of itself."""

    def load_model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The emulated model [A1 · E · A2], in evaluation mode.

        Raises:
            UnsupportedModelError: the architecture is not in the families' table.
        """
        check_supported(self.manifest.model_type)
        return auto_class(self.manifest.model_type).from_pretrained(
            self.folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, local_files_only=True
        )

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            ArtifactError: the bundle was written without one.
        """
        if "tokenizer_config.json" not in self.manifest.files:
            raise ArtifactError(f"{self.folder} has no tokenizer_config.json; pass a tokenizer to write_bundle")
        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True)

    def load_processor(self) -> BaseImageProcessor:
        """What prepares images for the model.

        Raises:
            ArtifactError: the bundle was written without one, or it cannot be used.
        """
        if PROCESSOR not in self.manifest.files:
            raise ArtifactError(f"{self.folder} has no {PROCESSOR}; pass a processor to write_bundle")
        try:
            return processor_in(self.folder, f"bundle {self.folder}", "fetch the bundle again")
        except ConfigError as error:
            raise ArtifactError(str(error)) from None


def open_bundle(folder: str | Path, public_key: Path | None = None) -> Bundle:
    """Verify a bundle, file by file, before any of it is loaded.

    Args:
        public_key: the owner's PEM file; without it a signature is not checked.

    Raises:
        NotFoundError: there is no such folder.
        ArtifactError: a file is missing, extra, a link, changed or no data, the manifest is malformed, or
            the bundle has expired; names each file.
        SignatureError: a key is given and the bundle is unsigned, or signed by another key.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    beside = {MANIFEST, SIGNATURE} if manifest.signing_key_id else {MANIFEST}
    problems = check_files(folder, manifest.files, beside) or _contradictions(folder, manifest)
    if problems:
        raise ArtifactError(f"{folder} is no valid bundle: " + "; ".join(problems))
    if public_key is not None:
        _check_signature(folder, manifest, public_key)
    return Bundle(folder, manifest)


def _manifest(folder: Path, **fields: Any) -> BundleManifest:
    files = describe_files(folder, list_files(folder)[0])
    try:
        return BundleManifest(
            schema_version=schema_version(fields["methods"], fields["head"]),
            bundle_id=bundle_id(fields["model"], fields["version"], files),
            files=files,
            created=now(),
            **fields,
        )
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, item['loc']))} is {item['input']!r}: {item['msg']}" for item in error.errors())
        raise ArtifactError("the bundle's manifest cannot be written: " + "; ".join(lines)) from None


def _read_manifest(folder: Path) -> BundleManifest:
    names, problems = list_files(folder)
    if MANIFEST not in names:
        problems.append(f"{MANIFEST} is missing, so it is incomplete; fetch it again")
    if problems:
        raise ArtifactError(f"{folder} is no valid bundle: " + "; ".join(problems))
    return read_json(BundleManifest, folder / MANIFEST)


def _contradictions(folder: Path, manifest: BundleManifest) -> list[str]:
    """What is wrong with a bundle whose files are exactly those of its manifest."""
    problems = [f"{name} is not listed; write the bundle anew" for name in sorted(_REQUIRED - manifest.files.keys())]
    if problems:
        return problems
    wanted = bundle_id(manifest.model, manifest.version, manifest.files)
    if manifest.bundle_id != wanted:
        problems.append(f"{MANIFEST}: bundle_id is {manifest.bundle_id}, but its files make {wanted}; fetch it again")
    if manifest.expires and manifest.expires <= now():
        problems.append(f"{MANIFEST}: expires is {manifest.expires.isoformat()}, which is past; fetch a newer version")
    config = parse_object((folder / "config.json").read_bytes(), "config.json")
    if config.get("model_type") != manifest.model_type or any(settings_named("auto_map", config)):
        problems.append(
            f"config.json: model_type is {config.get('model_type')!r} or it names code of its own; the manifest "
            f"says {manifest.model_type!r}, and no code comes with a bundle; write it anew"
        )
    quantized, packed = list(settings_named("quantization_config", config)), config.get("quantization_config")
    if quantized and (quantized != ["quantization_config"] or _method_of(packed) != METHOD):
        problems.append(
            f"config.json: {quantized[-1]} names another method than {METHOD!r}, the only one in bundles, or stands "
            "in a part of it; write it anew"
        )
    shards = parse_object((folder / _INDEX).read_bytes(), _INDEX).get("weight_map")
    if not isinstance(shards, dict) or not set(map(str, shards.values())) <= {ADAPTER_WEIGHTS, EMULATOR_WEIGHTS}:
        problems.append(f"{_INDEX}: weight_map names other files than the two shards; write it anew")
    return problems


def _method_of(quantization: object) -> object:
    return quantization.get("quant_method") if isinstance(quantization, dict) else None


def _check_signature(folder: Path, manifest: BundleManifest, public_key: Path) -> None:
    given = key_id(public_key)
    if manifest.signing_key_id is None:
        raise SignatureError(f"{folder} is not signed: signing_key_id is null; ask the owner for a signed bundle")
    if manifest.signing_key_id != given:
        raise SignatureError(
            f"{folder} is signed with key {manifest.signing_key_id}, but {public_key} is key {given}; "
            "ask the owner which key is theirs"
        )
    verify_folder(folder, public_key)
