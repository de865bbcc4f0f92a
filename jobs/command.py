"""What every verb's command line shares: configuration in, typed errors out as one message."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_origin

from ot_ray.config import Config, load
from ot_ray.errors import OTRayError

C = TypeVar("C", bound=Config)


def run_command(
    verb: str,
    cls: type[C],
    run: Callable[[C], Any],
    arguments: Sequence[str] | None = None,
    default_config: str | None = None,
    options: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Parse the command line of one verb, run it, print its result as JSON.

    Exits with 2 for a user's error (one message, no stack trace), 130 after Ctrl-C. An error without a
    class of ours that names a file, such as a folder without permission, is the user's too.

    Args:
        cls: the verb's configuration; its fields are shown by `--help`.
        run: takes the configuration; a mapping that it returns is printed.
        default_config: a YAML file used where `--config` is not given.
        options: further options `--name VALUE`, each with the settings that it stands for; `{}` in them is the value.
            Settings that are given by themselves count more.
    """
    parser = _Parser(
        prog=f"python -m jobs.{verb}",
        description=(run.__doc__ or "").split("\n\n")[0],
        epilog=_fields(cls),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", default=default_config, help="YAML file (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings over the file's")
    switches = [name for name, field in cls.model_fields.items() if field.annotation is bool]
    for name in switches:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=f"the same as {name}=true")
    for name, settings in (options or {}).items():
        told = " ".join(setting.format("VALUE") for setting in settings)
        parser.add_argument(f"--{name}", dest=f"option_{name}", metavar="VALUE", help=f"the same as {told}")
    parsed = parser.parse_intermixed_args(arguments)
    given = {name: getattr(parsed, f"option_{name}") for name in options or {}}
    meant = [item.format(given[name]) for name, items in (options or {}).items() for item in items if given[name]]
    overrides = [*meant, *parsed.overrides, *(f"{name}=true" for name in switches if getattr(parsed, name))]
    quiet_libraries()
    try:
        result = run(load(cls, parsed.config, overrides))
    except OTRayError as error:
        _leave(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _leave(f"{error.filename}: {error.strerror}; check the path, its permissions and the disk")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    if result is not None:
        print(json.dumps(result, indent=2, default=str))


class _Parser(argparse.ArgumentParser):
    """Complains as the verbs themselves do."""

    def error(self, message: str) -> NoReturn:
        _leave(f"{message}; `{self.prog} --help` shows what it takes")


def _leave(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2) from None


def config_file(name: str) -> str:
    """Path of one of the YAML files beside the verbs."""
    return str(Path(__file__).parent / "configs" / name)


def quiet_libraries() -> None:
    """Keep other libraries' notices out of the way of our own messages; their errors still show."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import torch
    import transformers

    if not torch.cuda.is_available():
        # Unless it is told, DeepSpeed says on standard output what it found.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)


def _fields(cls: type[Config]) -> str:
    return "\n".join(["settings:", *_settings(cls, "", None, "required", {})])


def _settings(
    cls: type[Config], prefix: str, given: Config | None, required: str, listed: dict[type[Config], str]
) -> Iterator[str]:
    """Lines for each setting of a section.

    Args:
        given: where the section has a default, its values; unset, the class's own defaults count.
        required: what is said of a setting that has none.
        listed: where the settings of a list's sections stand already, by their class.
    """
    for name, field in cls.model_fields.items():
        key = prefix + name
        unset = given is None and field.is_required()
        value = None if unset else getattr(given, name) if given else field.get_default(call_default_factory=True)
        said = f"      {' '.join((field.description or '').split())}"
        section, is_list = _section(field.annotation)
        if section is None:
            yield f"  {key}  ({required if unset else f'default {value!r}'})\n{said}"
        elif is_list:
            known = listed.setdefault(section, f"{key}[i]")
            yield f"  {key}  (a list, {required if unset else f'default {list(value or ())!r}'})\n{said}"
            yield f"      Each of its items is a section with the settings of {known}."
            if known == f"{key}[i]":
                yield from _settings(section, f"{known}.", None, "required within it", listed)
        else:
            off = value is None and not unset
            about = _off(key, section) if off else f"a section, {required}" if unset else "a section"
            yield f"  {key}  ({about})\n{said}"
            inner = value if isinstance(value, section) else None
            yield from _settings(section, f"{key}.", inner, "required within it" if off else required, listed)


def _off(key: str, section: type[Config]) -> str:
    needs = any(field.is_required() for field in section.model_fields.values())
    return "off unless set" if needs else f"off unless set; {key}={{}} turns it on with defaults"


def _section(annotation: Any) -> tuple[type[Config] | None, bool]:
    """The section that a setting is, may be, or is a list of; and whether it is a list."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return (annotation if issubclass(annotation, Config) else None), False
    is_list = get_origin(annotation) in (list, tuple)
    for part in get_args(annotation):
        section, inner_list = _section(part)
        if section is not None:
            return section, is_list or inner_list
    return None, False
