"""The model of each setting: what identifies its weights, and how it is put together.

Where the settings are scored is scores.py's."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_model, save_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jobs.evaluation.config import EMULATED, TUNED, WITH_BUNDLE, EvaluateConfig, Setting
from jobs.limits import require_same_model
from ot_ray.artifacts import (
    Bundle,
    InspectedAdapter,
    ModelSource,
    inspect_adapter,
    load_full,
    open_model_source,
    plain_state,
)
from ot_ray.data import DataConfig, load_sequences, source_digest
from ot_ray.evaluation.harness.cache import identity_key
from ot_ray.model import adapter_state, plug_in
from ot_ray.model.loading import DTYPES
from ot_ray.progress import Progress
from ot_ray.store import Store, download_folder, open_store
from ot_ray.training import fit
from ot_ray.training.text_source import files_of

# Of an adapter's manifest, what was measured and when decides no weight.
_NOTES = {"steps", "learning_rate", "validation_loss", "created"}


class Models:
    """The models of one configuration.

    Args:
        folder: an empty folder for what is downloaded.
    """

    def __init__(self, config: EvaluateConfig, folder: Path) -> None:
        self._config, self._folder = config, folder
        self.source: ModelSource = open_model_source(config.model)
        self._opened: Bundle | None = None
        self._digests: dict[str, str] = {}

    def identity(self, setting: Setting, task: str) -> dict[str, Any]:
        """Plain values that are equal for equal weights.

        Raises:
            OTRayError: a bundle, adapter or training text is not there or not sound.
        """
        found: dict[str, Any] = {"setting": setting, "dtype": self._config.model.dtype}
        if setting not in EMULATED:
            found["model"] = self.source.version
        if setting in WITH_BUNDLE:
            found["bundle"] = self._bundle().manifest.bundle_id
        if setting in TUNED:
            found["adapter"] = self._adapter_digest(adapter_of(self._config, task))
        if setting == "full_fine_tuned":
            found |= self._training_identity(task)
        return found

    def load(self, setting: Setting, task: str, identity: dict[str, Any], kept: Store) -> PreTrainedModel:
        """Put a model together, on the CPU and in evaluation mode.

        Args:
            identity: as the method of this name gives it.
            kept: where `fine_tune` has put the weights of full fine-tuning.

        Raises:
            OTRayError: something is not there or not sound.
        """
        emulated = setting in EMULATED
        model = self._bundle().load_model(DTYPES[self._config.model.dtype]) if emulated else self._full()
        if setting in TUNED:
            plan = self._bundle().manifest.plan
            adapter = self._inspected(adapter_of(self._config, task))
            model = plug_in(model, plan, plain_state(adapter, adapter_state(model, plan)))
        if setting == "full_fine_tuned":
            with tempfile.TemporaryDirectory() as temporary:
                file = Path(temporary) / "weights.safetensors"
                kept.download(_weights_key(identity), file)
                load_model(model, file)
        return model.eval()

    def tokenizer(self, setting: Setting) -> PreTrainedTokenizerBase:
        """What the model of a setting reads text with: the bundle's own for the emulator, so that nothing decides a
        score that its identity does not name. Raises ArtifactError: the bundle has none."""
        return self._bundle().load_tokenizer() if setting in EMULATED else self.source.tokenizer()

    def fine_tune(self, task: str, identity: dict[str, Any], kept: Store) -> None:
        """Train the reference of a task, full fine-tuning, and keep its weights; where they are kept, do nothing.

        Raises:
            DataError: its training text is not sound.
            TrainingError: the loss is not finite.
        """
        key = _weights_key(identity)
        if kept.exists(key):
            return
        config = self._config
        text = training_data(config, task)
        data = load_sequences(text, self.source.tokenizer(), config.sequence_length, files_of(text))
        model = self._full().requires_grad_(True)
        torch.manual_seed(config.training.seed)
        with Progress(f"full fine-tuning, {task}", config.training.steps) as bar:
            fit(
                model,
                data.sequences,
                config.training,
                report=lambda figures: bar.at(int(figures["step"]), loss=figures["loss"]),
            )
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / "weights.safetensors"
            save_model(model, str(file))
            kept.upload(file, key)

    def _full(self) -> PreTrainedModel:
        return load_full(self._config.model, source=self.source)

    def _bundle(self) -> Bundle:
        if self._opened is None:
            assert self._config.bundle is not None
            self._opened = self._config.bundle.open(self._folder / "bundle")
            require_same_model(self._opened.manifest.model, self._config.model.name)
        return self._opened

    def _inspected(self, address: str) -> InspectedAdapter:
        with tempfile.TemporaryDirectory(dir=self._folder) as temporary:
            folder = Path(temporary) / "adapter"
            download_folder(open_store(address), "", folder)
            return inspect_adapter(folder, self._bundle().manifest)

    def _adapter_digest(self, address: str) -> str:
        if address not in self._digests:
            manifest = self._inspected(address).manifest
            self._digests[address] = identity_key(manifest.model_dump(mode="json", exclude=_NOTES))
        return self._digests[address]

    def _training_identity(self, task: str) -> dict[str, Any]:
        data = training_data(self._config, task)
        key = data.model_dump_json()
        if key not in self._digests:
            self._digests[key] = source_digest(data, files_of(data))
        return {
            "data": self._digests[key],
            "sequence_length": self._config.sequence_length,
            "training": self._config.training.decisive(),
        }


def adapter_of(config: EvaluateConfig, task: str) -> str:
    """Where the adapter lies with which a task is scored."""
    assert config.harness is not None
    return config.harness.adapters.get(task) or cast(str, config.adapter)


def training_data(config: EvaluateConfig, task: str) -> DataConfig:
    """What the reference of a task is trained on."""
    assert config.harness is not None
    return config.train or DataConfig(source=f"task:{task}", tasks_folder=config.harness.tasks_folder)


def _weights_key(identity: dict[str, Any]) -> str:
    """Under which key the weights of full fine-tuning are kept."""
    return f"weights/{identity_key(identity)}.safetensors"
