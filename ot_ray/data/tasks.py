"""Tasks of the lm-evaluation-harness: finding one by its name, and its documents as training examples in the
very text that the harness scores. Scoring models on them is left to the evaluation room."""

from __future__ import annotations

import difflib
import importlib
import itertools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ot_ray.data.race import HARNESS_DATASET, training_documents
from ot_ray.data.readers import BEGINNING, Place, Record
from ot_ray.errors import ConfigError, DataError, MissingDependencyError, OTRayError

TEXT = "text"
_NAMED = re.compile(rb"^task: *[\"']?([A-Za-z0-9_.+-]+)", re.MULTILINE)
_SPLITS = {"train": "training", "validation": "validation", "test": "test"}


def load_task(name: str, folder: str | Path | None = None) -> Any:
    """The harness's own object for a task, its data set loaded.

    Args:
        name: of one task, such as `openbookqa`; not of a group of tasks.
        folder: the operator's own tasks, YAML files of the harness, which win over the harness's. Such a file may
            name Python functions beside it, and they run: never a folder that came from somebody else.

    Returns:
        A `lm_eval.api.task.Task`.

    Raises:
        ConfigError: there is no such task (the nearest names are given) or folder, it is a group, or it runs code
            that a model writes.
        DataError: its data set cannot be loaded, or its YAML file is not sound.
        MissingDependencyError: the harness is not installed.
    """
    with quiet_harness():
        manager = _manager_with(name, folder)
        try:
            task = manager.load([name])["tasks"][name]
        except OSError as error:
            raise DataError(_unreachable(manager, name, error)) from None
        except Exception as error:
            # Functions that a task names raise whatever they like.
            if "Couldn't find" in str(error) or "offline" in str(error).lower():
                raise DataError(_unreachable(manager, name, error)) from None
            raise DataError(f"task {name}: it cannot be loaded: {_first_line(error)}; check its YAML file") from None
    if task.config.unsafe_code:
        raise ConfigError(f"task {name!r} runs code that a model writes, which is not done here; choose another")
    return task


def read_task(name: str, split: str, folder: str | Path | None = None, start: Place = BEGINNING) -> Iterator[Record]:
    """The documents of one split of a task as rows, `{"prompt", "completion"}` or, of tasks that score whole texts,
    `{"text"}`.

    Prompt and completion together are the text of the request that the harness makes for the right answer, cut
    where the harness starts to score: so their joint tokens are the request's context and continuation. Of several
    right answers the first is taken.

    Args:
        split: `train`, `validation` or `test`, whatever the data set calls it.
        folder: as for `load_task`.

    Raises:
        ConfigError, DataError, MissingDependencyError: as `load_task`; DataError also where the task has no such
            split, or a document no answer.
    """
    task = load_task(name, folder)
    for number, document in enumerate(_documents(task, name, split), 1):
        if number >= start.number:
            try:
                yield Record(Place(number), _row(task, document))
            except OTRayError:
                raise
            except Exception as error:
                where = f"task:{name}, split {split}, row {number}"
                raise DataError(f"{where}: the task makes no request of it: {_first_line(error)}") from None


def harness(module: str = "lm_eval") -> Any:
    """A module of the harness. Raises MissingDependencyError."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingDependencyError(
            "tasks need the lm-evaluation-harness, which is not installed: pip install 'ot_ray[lm-eval]'"
        ) from None


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep the notices and bars of the harness and its data sets to themselves for a while; errors still show.

    Raises:
        MissingDependencyError: the harness is not installed.
    """
    bars = harness("datasets.utils")
    logger = logging.getLogger("lm_eval")
    level, shown = logger.level, not bars.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    bars.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown:
            bars.enable_progress_bars()


def _manager_with(name: str, folder: str | Path | None) -> Any:
    """A task manager that knows this task; indexing all of the harness's 14,000 takes many seconds, and is left for
    names that no file bears and some file says."""
    tasks = harness("lm_eval.tasks")
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"tasks_folder is {str(folder)!r}, which is no folder; name one with YAML files of tasks")
    own = [] if folder is None else [Path(folder)]
    # A folder's own tasks win, and need none of the harness's.
    manager = tasks.TaskManager(include_defaults=False, include_path=own)
    if name in manager.all_subtasks:
        return manager
    shipped = Path(tasks.__file__).parent
    beside = {path.parent for path in shipped.rglob("*.yaml") if path.stem == name}
    manager = tasks.TaskManager(include_defaults=False, include_path=[*sorted(beside), *own])
    if name not in manager.all_tasks and (known := _unless_said(name, shipped)) is not None:
        raise _unknown(name, known | set(manager.all_subtasks))
    if name not in manager.all_subtasks:
        manager = tasks.TaskManager(include_path=own)
    if name not in manager.all_tasks:
        raise _unknown(name, manager.all_subtasks)
    if name not in manager.all_subtasks:
        raise ConfigError(f"task {name!r} is a group of tasks; name the tasks themselves")
    return manager


def _unless_said(name: str, shipped: Path) -> set[str] | None:
    """The names of most of the harness's tasks; None where one of its files says this name, which may be a task's."""
    known: set[str] = set()
    for path in shipped.rglob("*.yaml"):
        content = path.read_bytes()
        if name.encode() in content:
            return None
        known.update(found.decode() for found in _NAMED.findall(content))
    return known


def _unknown(name: str, known: Iterable[str]) -> ConfigError:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
    return ConfigError(f"task {name!r} is no task of the lm-evaluation-harness; {hint}")


def _unreachable(manager: Any, name: str, error: BaseException) -> str:
    source = (manager.task_index[name].cfg or {}).get("dataset_path", "its data set")
    return (
        f"task {name}: its data set {source} cannot be loaded: {_first_line(error)}; load it once with a network, so "
        "that it lies in the cache (HF_HOME) of every machine, or write the task over files of yours in tasks_folder"
    )


def splits_of(task: Any) -> list[str]:
    """Which of `train`, `validation` and `test` a task of `load_task` has documents of."""
    there = {known for known, theirs in _SPLITS.items() if getattr(task, f"has_{theirs}_docs")()}
    if _is_race(task):
        there.add("train")
    return [known for known in _SPLITS if known in there]


def _documents(task: Any, name: str, split: str) -> Any:
    there = splits_of(task)
    if split not in there:
        # What a model is scored on is nothing to train it on.
        others = [known for known in there if (split, known) != ("train", "test")]
        way_out = f"use {' or '.join(others)}" if others else "name another source of text"
        raise DataError(f"task:{name} has no split {split!r}; {way_out}, or a task of your own over its data")
    if split == "train" and _is_race(task):
        with quiet_harness():
            return training_documents(task.config.dataset_name)
    return getattr(task, f"{_SPLITS[split]}_docs")()


def _is_race(task: Any) -> bool:
    return task.config.dataset_path == HARNESS_DATASET and not task.has_training_docs()


def _row(task: Any, document: Mapping[str, Any]) -> dict[str, str]:
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return {TEXT: task.doc_to_target(document)}
    context = task.fewshot_context(document, 0, gen_prefix=task.doc_to_prefix(document))
    context, continuation = _right_request(task, document, context)
    # The harness scores spaces at the end of the context with the continuation.
    prompt = context.rstrip()
    return {"prompt": prompt, "completion": context[len(prompt) :] + continuation}


def _right_request(task: Any, document: Mapping[str, Any], context: Any) -> tuple[str, str]:
    """Context and continuation of the request for the right answer."""
    if task.OUTPUT_TYPE == "generate_until":
        return context, f"{task.config.target_delimiter}{_right_text(task, document)}"
    made = task.construct_requests(document, context, metadata=(task.config.task, 0, 1))
    if task.OUTPUT_TYPE != "multiple_choice":
        return made.args[:2]
    right = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    choices = task.doc_to_choice(document)
    right = right[0] if isinstance(right, list) else right
    index = choices.index(right) if isinstance(right, str) else right
    if not 0 <= index < len(choices):
        raise DataError(
            f"task:{task.config.task}: the right answer is number {index} of {len(choices)}; a split without answers "
            "cannot be trained on"
        )
    return made[index].args[:2]


def _right_text(task: Any, document: Mapping[str, Any]) -> str:
    target = task.doc_to_target(document)
    target = target[0] if isinstance(target, list) else target
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        return task.doc_to_choice(document)[target]
    return str(target)


def _first_line(error: BaseException) -> str:
    lines = itertools.chain(str(error).strip().splitlines(), [type(error).__name__])
    return next(lines).rstrip(".")
