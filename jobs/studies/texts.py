"""The texts of a study: read, packed, and named by content.

Where the quickstart's come from, and how text is read, is the data room's."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

from jobs.studies.config import StudyConfig, StudyData, Style
from jobs.studies.parts import Contents
from jobs.studies.work import Texts
from ot_ray.artifacts import ModelSource
from ot_ray.data import DataConfig, load_sequences, write_quickstart_data
from ot_ray.training.text_source import files_of


def read_texts(config: StudyConfig, source: ModelSource) -> tuple[Texts, Contents]:
    """Read the three texts of a study and pack them for its model.

    Raises:
        ConfigError: the model's tokenizer does not fit, or takes no sequences of that length.
        DataError: a text is missing or malformed, or leaves nothing to learn.
    """
    tokenizer = source.tokenizer()
    with tempfile.TemporaryDirectory() as temporary:
        data = config.data or _quickstart_data(Path(temporary), config.style)
        read = [
            load_sequences(part, tokenizer, config.sequence_length, files_of(part))
            for part in (data.public, data.train, data.test)
        ]
    digests = [f"{part.digest}/{config.limit}" for part in read]
    public, train, test = (part.sequences[: config.limit] for part in read)
    return Texts(public, train, test), Contents(source.version, *digests)


def set_apart(text: str) -> str:
    """Text in the style of WikiText (Merity et al., 2017): hyphens and separators within words and numbers between
    @ signs, other punctuation as words of its own, every line between blanks."""
    text = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", text)
    text = re.sub(r"(?<=\d)([,.])(?=\d)", r" @\1@ ", text)
    text = re.sub(r"(?<!@)([^\w\s@])(?!@)", r" \1 ", text)
    # Contracted words keep their apostrophe: it 's, they 're.
    text = re.sub(r"(?<=[A-Za-z]) ' (?=(?:s|t|re|ve|ll|d)\b)", " '", text)
    return "\n".join(f" {' '.join(line.split())} " for line in text.split("\n"))


def _quickstart_data(folder: Path, style: Style) -> StudyData:
    write_quickstart_data(folder)
    names = {"public": "public/train", "train": "customer/train", "test": "customer/test"}
    paths = {field: folder / f"{name}.jsonl" for field, name in names.items()}
    if style == "wikitext":
        for field in ("train", "test"):
            _rewrite(paths[field])
    return StudyData(**{field: DataConfig(source=str(path)) for field, path in paths.items()})


def _rewrite(path: Path) -> None:
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    path.write_text("".join(json.dumps({"text": set_apart(row["text"])}) + "\n" for row in rows), encoding="utf-8")
