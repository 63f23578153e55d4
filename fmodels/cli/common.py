"""What several commands do: find the source, fill a new folder beside it, print JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def resolve(args: argparse.Namespace) -> Path:
    """The folder or file of SOURCE, downloaded if it is on the Hub."""
    from fmodels import hub

    return hub.resolve(
        args.source,
        revision=args.revision,
        subfolder=args.subfolder,
        token=args.token,
        local_files_only=args.offline,
    )


def print_json(value: Any) -> None:
    """The one JSON value of `--json`."""
    print(json.dumps(value, indent=2))


@contextlib.contextmanager
def new_folder(source: Path, dest: Path) -> Iterator[Path]:
    """A folder that becomes `dest` if the block ends well; else nothing is left.

    Raises:
        ValueError: `dest` is the source, lies in it, or holds it.
        FileExistsError: `dest` has something in it already.
    """
    from fmodels.conversion import check_dest
    from fmodels.weights.folder import staging, sweep

    target = check_dest(source, dest)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    with staging(target.parent, target.name) as place:
        made = place / target.name  # inside: what a `save` leaves beside it is swept, too, if the process is killed
        made.mkdir()
        yield made
        os.replace(made, target)


def save_with_others(params: Any, config: Any, source: Path, stage: Path, args: argparse.Namespace) -> list[str]:
    """Saves into `stage`, beside copies of the other files of the source; returns their names."""
    from fmodels.checkpoint import save
    from fmodels.conversion import copy_others

    copied = copy_others(source, stage) if source.is_dir() else []
    save(params, config, stage, format=args.to, max_shard_size=args.max_shard_size)
    return copied


def generation_options(args: argparse.Namespace, config: Any) -> Any:
    """The `GenerationConfig` that the command line asks for.

    Raises:
        ValueError: an option that changes nothing without sampling, or that `GenerationConfig` refuses.
    """
    from fmodels.generation.config import GenerationConfig

    names = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options |= dict(_option(text) for text in args.option)
    own = config.generation.do_sample if config.generation is not None else None
    unused = [f"--{name.replace('_', '-')}" for name in ("temperature", "top_k", "top_p", "min_p") if name in options]
    if unused and not options.get("do_sample", own) and "penalty_alpha" not in options:
        raise ValueError(f"{', '.join(unused)} changes nothing without sampling; add --sample")
    return GenerationConfig(**options)


def _option(text: str) -> tuple[str, Any]:
    """`name=value`, the value as JSON if it is."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--option {text!r}: expected NAME=VALUE, such as num_beams=4")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), value
