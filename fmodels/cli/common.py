"""What several commands do: find the source, fill a new folder beside it, print JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|onnx_data|ot|tflite|npz)(\.index(\.\w+)?\.json)?"
    r"|tf_model.*|flax_model.*"
)
"""Names of files of weights, of any format: a conversion copies the others."""
WRITTEN = ("config.json", "generation_config.json")
"""What `save` writes itself."""


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
    folder = (source if source.is_dir() else source.parent).resolve()
    target = dest.expanduser().resolve()
    if target == folder or folder in target.parents or target in folder.parents:
        raise ValueError(
            f"DEST {str(dest)!r} and SOURCE {str(source)!r} must be different folders, neither inside of the other"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"DEST {str(dest)!r} exists and is not an empty folder; give another, or remove it first")
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

    copied = _copy_others(source, stage) if source.is_dir() else []
    save(params, config, stage, format=args.to, max_shard_size=args.max_shard_size)
    return copied


def _copy_others(source: Path, target: Path) -> list[str]:
    """Copies tokenizers, model cards and the like: all files but weights, hidden files, and what `save` writes itself.

    Weights of further modules of a sentence-transformers folder belong to it and are copied.
    """
    modules: set[str] = set()
    if (source / "modules.json").is_file():
        listed = json.loads((source / "modules.json").read_text(encoding="utf-8"))
        modules = {str(module.get("path")) for module in listed if module.get("path")}
    copied = []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if any(part.startswith(".") for part in name.parts) or not path.is_file():
            continue
        if name.as_posix() in WRITTEN or (WEIGHTS.fullmatch(path.name) and name.parts[0] not in modules):
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)
        copied.append(name.as_posix())
    return copied
