"""Checkpoints to the Hub: saved, with a model card where there is none, in one commit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any

from fmodels import hub
from fmodels.card import model_card
from fmodels.certificate import Certificate
from fmodels.checkpoint import open_checkpoint, plan, save
from fmodels.conversion import digest_of
from fmodels.models import Config
from fmodels.types import Params


def push_to_hub(
    params: Params,
    config: Config,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    format: str = "safetensors",
    dtype: Any = None,
    max_shard_size: int | str | None = None,
    variant: str | None = None,
    certificate: Certificate | None = None,
    tags: Sequence[str] = (),
) -> str:
    """Saves the checkpoint to a temporary folder and uploads it; the repository is made if it is not there.

    A repository without a model card gets one, with the hash of the tensors.

    Args:
        params: the tree.
        config: its config.
        repo_id: such as `"me/my-model"`.
        token: of the Hub; the stored one if None. It is never printed or saved.
        private: visibility of a new repository.
        revision: branch to commit to.
        create_pr: open a pull request.
        commit_message: of the commit.
        commit_description: of the commit, beside its message.
        format: as in `save`.
        dtype: as in `save`.
        max_shard_size: as in `save`.
        variant: as in `save`.
        certificate: what `fm.verify` found; it goes into the card.
        tags: more of them for the card.

    Returns:
        The address of the commit or pull request.

    Raises:
        OSError: the Hub cannot be reached or refuses.
    """
    with tempfile.TemporaryDirectory() as folder:
        save(params, config, folder, format=format, dtype=dtype, max_shard_size=max_shard_size, variant=variant)
        return push_folder(
            folder, repo_id, token=token, private=private, revision=revision, create_pr=create_pr,
            commit_message=commit_message, commit_description=commit_description, variant=variant, certificate=certificate,
            tags=tags,
        )  # fmt: skip


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    variant: str | None = None,
    certificate: Certificate | None = None,
    tags: Sequence[str] = (),
    **options: Any,
) -> str:
    """Uploads a checkpoint folder, with a model card if there is none; options as in `push_to_hub`.

    Raises:
        ValueError: the folder cannot be loaded again, so it is not worth a push.
        OSError: as in `push_to_hub`.
    """
    opened = open_checkpoint(folder, variant=variant)
    config, planned = plan(opened)
    tensors = {name: opened.tensors[name] for name in planned.tensors}
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + tensor.nbytes

    def card() -> str:
        return model_card(
            config, name=repo_id, parameters=sum(tensor.size for tensor in tensors.values()), bytes_by_dtype=sizes,
            sha256=digest_of(tensors, config), certificate=certificate, tags=tags,
        )  # fmt: skip

    return hub.push(folder, repo_id, card=card, variant=variant, **options)
