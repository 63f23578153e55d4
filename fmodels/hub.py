"""Checkpoints on the Hugging Face Hub: from an id to a local folder, and from a folder to the Hub."""

import glob
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fmodels.weights import FORMATS, find_weights, read_index

SMALL = (  # what belongs to a checkpoint besides its weights, as far as it has them
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
NO_REVISION = re.compile(r"^[-/]|//|[/.]$|\.\.|(^|/)\.|@\{|[\x00-\x20\x7f~^:?*\[\\]")
"""What Git allows in no name of a branch or tag; `..` would lead the Hub's client out of the folder of its cache."""
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def resolve(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    format: str | None = None,
) -> Path:
    """The local folder of a checkpoint, downloaded if `source` is not a path but the id of a repository.

    Fetches one form of the weights, the one that `read_folder` prefers, and the small files beside it, all from one
    commit. Without a connection (`local_files_only`, HF_HUB_OFFLINE, no network) the Hub's cache serves.

    Args:
        source: a folder, a file of weights, or "owner/name".
        revision: a branch, tag or commit.
        subfolder: of the folder or repository.
        cache_dir: in place of the Hub's own.
        token: for private repositories; False to send none.
        local_files_only: never connects.
        variant: of the weights, as in `model.<variant>.safetensors`.
        format: of the weights; the first of `fm.FORMATS` that is there if None.

    Returns:
        The folder (or the file, if `source` is one).

    Raises:
        ValueError: a revision or subfolder that cannot be one.
        FileNotFoundError: a path that does not exist, or a repository without weights.
        OSError: the Hub cannot serve it: no such repository or revision, no access, no connection and not cached.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> resolve(folder) == Path(folder)
        True
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if name and path.exists():
        if subfolder and not (path / subfolder).is_dir():
            raise FileNotFoundError(f"load: {name!r} has no folder {subfolder!r}; check subfolder=")
        return path / subfolder if subfolder else path
    if isinstance(source, os.PathLike) or not _is_id(name):
        raise FileNotFoundError(
            f"load: expected a folder, a file or a Hub id such as 'owner/name', {name!r} does not exist "
            f"(looked in {os.getcwd()!r}); check the path"
        )
    prefix = _prefix(subfolder)
    revision = _checked("load", revision) or "main"

    def cached() -> Path | None:
        return _cached(name, revision, prefix, cache_dir, variant, format)

    from huggingface_hub import constants

    if local_files_only or constants.HF_HUB_OFFLINE:
        if (folder := cached()) is not None:
            return folder
        raise OSError(
            f"load: {name!r} at revision {revision!r} is not complete in the cache and the network is off "
            "(local_files_only or HF_HUB_OFFLINE); load it once while connected, or give another cache_dir"
        )
    with _errors("load", name, revision, token):
        try:
            return _download(name, revision, prefix, cache_dir, token, variant, format)
        except Exception as error:
            # Only where the Hub did not answer: what it refuses (404, 401) must not be served from the cache.
            if _is_unreachable(error) and (folder := cached()) is not None:
                return folder
            raise


def resolve_adapter(source: str | os.PathLike[str], *, subfolder: str | None = None, **options: Any) -> Path:
    """As `resolve`, the local folder of an adapter of PEFT.

    Args:
        source: a folder or "owner/name".
        subfolder: of the folder or repository.
        options: `revision`, `cache_dir`, `token` and `local_files_only`, as of `resolve`.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if (name and path.exists()) or isinstance(source, os.PathLike) or not _is_id(name):
        return resolve(source, subfolder=subfolder)
    from huggingface_hub import snapshot_download

    prefix = _prefix(subfolder)
    revision = _checked("load", options.get("revision")) or "main"
    with _errors("load", name, revision, options.get("token")):
        wanted = [glob.escape(prefix + file) for file in ADAPTER]
        return Path(snapshot_download(name, allow_patterns=wanted, **options)) / prefix


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    variant: str | None = None,
    card: Callable[[], str] | None = None,
) -> str:
    """Uploads a folder to the Hub in one commit, making the repository and the branch if they are missing.

    Weights that lie there from an older push and would be read in place of the new ones are deleted in the same commit.

    Args:
        folder: a saved checkpoint.
        repo_id: "owner/name", or "name" for the owner of the token.
        token: with the right to write; the one of `hf auth login` if None.
        private: of a repository that is made.
        revision: the branch.
        create_pr: proposes the commit in place of pushing it.
        commit_message: "Upload model" if None.
        commit_description: what stands below the message.
        variant: of the weights that are pushed.
        card: gives a model card, for a repository that has none when the folder has none.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: a revision that cannot be one, or with `create_pr`.
        OSError: no such folder, or the Hub refuses or cannot be reached.
    """
    folder, revision = Path(folder), _checked("push", revision)
    if not folder.is_dir():
        raise NotADirectoryError(f"push: expected a folder, {str(folder)!r} is none; save the checkpoint first")
    if create_pr and revision not in (None, "main"):
        raise ValueError("push: a pull request is always against the default branch; leave revision= or create_pr= out")
    with _errors("push", repo_id, revision or "main", token):
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        found = find_weights(os.listdir(folder), variant)
        stale = [] if found is None else stale_patterns(found[0], variant)
        with tempfile.TemporaryDirectory() as place:
            if card is not None and not (folder / "README.md").exists() and not _has_card(api, repo_id, revision):
                for path in folder.iterdir():  # the folder itself is not ours to write to
                    os.symlink(path.resolve(), Path(place) / path.name)
                (Path(place) / "README.md").write_text(card(), encoding="utf-8")
                folder = Path(place)
            text = {"commit_message": commit_message or "Upload model", "commit_description": commit_description}
            return _upload(api, folder, repo_id, stale, revision, create_pr, text)


def _checked(verb: str, revision: str | None) -> str | None:
    """A revision, None for none; raises for what cannot be one."""
    if revision and NO_REVISION.search(revision):
        raise ValueError(f"{verb}: revision {revision!r} can be no branch, tag or commit; check revision=")
    return revision or None


def _prefix(subfolder: str | None) -> str:
    """What the names of files in a folder of a repository begin with; raises for folders outside of it."""
    parts = [part for part in (subfolder or "").split("/") if part]
    if {".", ".."} & set(parts):
        raise ValueError(f"load: subfolder {subfolder!r} is no folder of a repository; check subfolder=")
    return "".join(f"{part}/" for part in parts)


def _has_card(api: Any, repo_id: str, revision: str | None) -> bool:
    return "README.md" in {file.rfilename for file in api.model_info(repo_id, revision=revision).siblings or []}


def _upload(
    api: Any, folder: Path, repo_id: str, stale: list[str], revision: str | None, create_pr: bool, text: dict[str, Any]
) -> str:
    """One commit; returns its address."""
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        create_pr=create_pr,
        delete_patterns=stale or None,
        ignore_patterns=[".*.saving-*", ".*.saving-*/*"],  # what a killed save left
        **text,
    )
    return str(commit.pr_url or commit.commit_url)


def stale_patterns(format: str, variant: str | None = None) -> list[str]:
    """Names, as patterns, of weights of an older push that would be read in place of those of `format`, or beside them.

    Example:
        >>> stale_patterns("safetensors")
        ['model.safetensors', 'model.safetensors.index.json', 'model-?????-of-?????.safetensors']
    """
    kinds = list(FORMATS.values())[: list(FORMATS).index(format) + 1]
    patterns: list[str] = []
    for kind in kinds:
        names = dict.fromkeys([*kind.files(variant), *kind.candidates(variant)])
        patterns += [f"{kind.single(variant)}/*"] if kind.directory else names
        patterns += [kind.shard(0, 0, variant).replace("0" * 5, "?" * 5)] if kind.sharded else []
    return patterns


def _download(
    name: str, revision: str, prefix: str, cache_dir: Any, token: Any, variant: str | None, format: str | None
) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    for _ in range(3):  # a push between the calls would mix two commits
        info = HfApi(token=token).model_info(name, revision=revision)
        files = {file.rfilename for file in info.siblings or []}
        here = {file.removeprefix(prefix).split("/")[0] for file in files if file.startswith(prefix)}
        found = find_weights(here, variant, format)
        if found is None:
            kind = "".join(f" of {k} {v!r}" for k, v in (("format", format), ("variant", variant)) if v)
            shown = ", ".join(sorted(files)[:20]) or "no file"
            raise FileNotFoundError(
                f"load: {name!r} at revision {revision!r} has no weights{kind} that can be read in "
                f"{prefix or 'its root'!r}, it has {shown}; convert it, or give another revision, subfolder or variant"
            )
        weights = found[1]
        wanted = FORMATS[found[0]].parts(weights)
        if FORMATS[found[0]].directory:
            wanted = [file.removeprefix(prefix) for file in files if file.startswith(f"{prefix}{weights}/")]
        elif weights.endswith(".json"):
            index = hf_hub_download(name, prefix + weights, revision=info.sha, cache_dir=cache_dir, token=token)
            wanted += sorted(set(read_index(index).values()))
        elif weights.endswith(".index"):  # of a TensorFlow checkpoint, whose data lie beside it
            wanted += [
                f.removeprefix(prefix) for f in files if f.startswith(f"{prefix}{weights.removesuffix('index')}data-")
            ]
        wanted = [prefix + file for file in (*SMALL, *wanted) if prefix + file in files]
        # By revision, not by commit: so the cache learns which commit the branch is at, for later without network.
        snapshot = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[glob.escape(file) for file in wanted],
            cache_dir=cache_dir,
            token=token,
        )
        if Path(snapshot).name == info.sha:
            return Path(snapshot) / prefix
    raise OSError(f"load: {name!r} changes faster than it can be read; give a commit as revision=")


def _cached(
    name: str, revision: str, prefix: str, cache_dir: Any, variant: str | None, format: str | None
) -> Path | None:
    """The folder in the cache, if it holds all of the weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = (
            Path(
                snapshot_download(
                    name, revision=revision, cache_dir=cache_dir, local_files_only=True, allow_patterns=[]
                )
            )
            / prefix
        )
    except LocalEntryNotFoundError:
        return None
    if not folder.is_dir():
        return None
    found = find_weights([path.name for path in folder.iterdir() if path.exists()], variant, format)
    if found is None:
        return None
    path = folder / found[1]
    shards = set(read_index(path).values()) if path.name.endswith(".json") else FORMATS[found[0]].parts(path.name)
    return folder if all((folder / shard).exists() for shard in shards) else None


def _is_id(name: str) -> bool:
    """Whether a name that is no existing path may be an id: "name" or "owner/name"."""
    if name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1 or not name.strip("/"):
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _is_unreachable(error: BaseException) -> bool:
    from huggingface_hub import errors

    if isinstance(error, errors.HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    names = _kinds(error)
    return isinstance(error, errors.LocalEntryNotFoundError | ConnectionError) or (
        bool(names & {"TransportError", "ConnectError", "TimeoutException", "ConnectionError", "Timeout"})
        and not names & BAD_HEADER
    )


BAD_HEADER = {"LocalProtocolError", "InvalidHeader"}
"""What the client's HTTP library raises of a token that no header can hold."""


def _kinds(error: BaseException) -> set[str]:
    """By name: which HTTP library raises them changes with the version of huggingface_hub."""
    return {kind.__name__ for kind in type(error).__mro__}


@contextmanager
def _errors(verb: str, name: str, revision: str, token: str | bool | None) -> Iterator[None]:
    """Turns what the client raises into an OSError that says what to do, and keeps tokens out of it."""
    try:
        yield
    except Exception as error:  # the client raises OSError, ValueError and those of its HTTP library
        if type(error) is ValueError or (type(error) in (OSError, FileNotFoundError) and f"{verb}:" in str(error)):
            raise  # already ours
        message = f"{verb}: {name!r} at revision {revision!r}: {_advice(error)}"
        raise OSError(message) from (None if _tells_token(error, token) else error)


def _advice(error: Exception) -> str:
    from huggingface_hub import errors

    table: list[tuple[Callable[[Exception], bool], str]] = [
        (
            lambda e: isinstance(e, errors.GatedRepoError),
            "the repository is gated; accept its conditions on the Hub, then give token= or run `hf auth login`",
        ),
        (lambda e: isinstance(e, errors.RevisionNotFoundError), "no such revision; check revision="),
        (
            lambda e: isinstance(e, errors.RepositoryNotFoundError),
            "no such repository and no such local folder, or it is private and the token (token=, `hf auth login`) "
            "has no access; check the name",
        ),
        (
            lambda e: (
                isinstance(e, errors.HfHubHTTPError) and e.response is not None and e.response.status_code in (401, 403)
            ),
            "access refused; give token= with the right to do this, or run `hf auth login`",
        ),
        (
            lambda e: isinstance(e, errors.HfHubHTTPError) and e.response is not None and e.response.status_code == 429,
            "the Hub has had too many requests from here; wait some minutes, or give token=, which allows more",
        ),
        (lambda e: isinstance(e, errors.OfflineModeIsEnabled), "the network is off (HF_HUB_OFFLINE); unset it"),
        (
            _is_unreachable,
            "the Hub cannot be reached and the cache does not have it; check the network and HF_ENDPOINT",
        ),
        (
            lambda e: isinstance(e, errors.LocalTokenNotFoundError),
            "token=True is the stored token, and none is; run `hf auth login`, or set HF_TOKEN",
        ),
        (lambda e: isinstance(e, errors.HFValidationError), "no valid id; write 'owner/name'"),
        (lambda e: bool(_kinds(e) & BAD_HEADER), "the token is empty or no token; check token="),
    ]
    status = f" with status {error.response.status_code}" if getattr(error, "response", None) is not None else ""  # type: ignore[attr-defined]
    default = f"failed ({type(error).__name__}{status}); the cause is above, try again or check the arguments"
    return next((advice for matches, advice in table if matches(error)), default)


def _tells_token(error: BaseException | None, token: str | bool | None) -> bool:
    """Whether the text of an error, or of what caused it, has the token in it (as an illegal HTTP header would)."""
    from huggingface_hub import get_token

    secrets = [secret.strip() for secret in (token, get_token()) if isinstance(secret, str) and secret.strip()]
    while error is not None:
        if any(secret in f"{error} {error!r}" for secret in secrets):
            return True
        error = error.__cause__ or error.__context__
    return False
