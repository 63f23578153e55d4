"""What several commands do: find the source, fill a new folder beside it, print JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def resolve(args: argparse.Namespace) -> Path:
    """The folder or file of SOURCE, downloaded if it is on the Hub."""
    from fmodels import hub

    return hub.resolve(args.source, revision=args.revision, local_files_only=args.offline)


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

    target = check_dest(source, dest)
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.writing-", dir=target.parent))
    try:
        stage.chmod(0o777 & ~_umask())
        yield stage
        os.replace(stage, target)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_with_others(params: Any, config: Any, source: Path, stage: Path, args: argparse.Namespace) -> list[str]:
    """Saves into `stage`, beside copies of the other files of the source; returns their names."""
    from fmodels.checkpoint import save
    from fmodels.conversion import copy_others

    copied = copy_others(source, stage) if source.is_dir() else []
    save(params, config, stage, format=args.to, max_shard_size=args.max_shard_size)
    return copied
