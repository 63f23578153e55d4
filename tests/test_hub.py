"""Hub ids: against a server on loopback, through the real client."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fmodels as fm
from fmodels import hub
from fmodels.cli import main
from fmodels.weights import Tensor, read_folder, write_folder
from tests.loopback_hub import LoopbackHub, Repo

SECRET = "hf_SecretSecretSecret"


@pytest.fixture(scope="module")
def server():
    with LoopbackHub() as running:
        yield running


@pytest.fixture
def site(server, monkeypatch, tmp_path):
    server.repos.clear()
    server.requests.clear()
    server.lfs_from = 10**9
    server.before = lambda method, path: None
    server.patch(monkeypatch, tmp_path / "cache")
    return server


def weights(tmp_path, value=1, **options):
    folder = tmp_path / f"made{len(list(tmp_path.iterdir()))}"
    one = Tensor.lazy("x", np.float32, (4,), lambda: np.full(4, value, np.float32))
    write_folder(folder, {"a": one, "b": one}, files={"config.json": b"{}"}, **options)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_local(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "w.bin").write_bytes(b"")
    assert hub.resolve(tmp_path) == tmp_path
    assert hub.resolve(str(tmp_path), subfolder="sub") == tmp_path / "sub"
    assert hub.resolve(tmp_path / "w.bin") == tmp_path / "w.bin"
    with pytest.raises(FileNotFoundError, match="nope"):
        hub.resolve(tmp_path, subfolder="nope")


@pytest.mark.parametrize("name", ["./x", "/no/such", "a/b/c", "../x", "~/nothing-here", "a\\b", "", "a b/c", "x/"])
def test_missing_path(site, name):
    with pytest.raises(OSError, match="load: "):
        hub.resolve(name)
    assert not site.requests


def test_missing_path_object(site):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        hub.resolve(Path("owner/name"))


def test_fetches_one_form_of_the_weights(site, tmp_path):
    files = weights(tmp_path) | weights(tmp_path, 2, format="torch") | {"README.md": b"r", "tokenizer.json": b"{}"}
    files |= {"1_Pooling/config.json": b"{}", "modules.json": b"[]", "flax_model.msgpack": b"f"}
    site.repos["me/model"] = Repo(files)
    folder = hub.resolve("me/model")
    assert names(folder) == [
        "1_Pooling/config.json",
        "config.json",
        "model.safetensors",
        "modules.json",
        "tokenizer.json",
    ]
    assert read_folder(folder)[0]["a"].array()[0] == 1
    before = len(site.requests)
    assert hub.resolve("me/model", local_files_only=True) == folder
    assert len(site.requests) == before


def test_sharded_subfolder_variant_and_revision(site, tmp_path):
    old, new = weights(tmp_path, 1, max_shard_size=16, variant="fp16"), weights(tmp_path, 2)
    repo = site.repos["me/model"] = Repo({f"sub/{name}": content for name, content in old.items()})
    first = repo.refs["main"]
    repo.commit({f"sub/{name}": content for name, content in new.items()}, "main")
    folder = hub.resolve("me/model", subfolder="sub", variant="fp16", revision=first)
    assert folder.name == "sub"
    assert folder.parent.name == first
    assert len(read_folder(folder, variant="fp16")[0]) == 2
    assert read_folder(hub.resolve("me/model", subfolder="sub"))[0]["a"].array()[0] == 2
    with pytest.raises(FileNotFoundError, match=r"no weights of variant 'fp16'.*model\.safetensors"):
        hub.resolve("me/model", subfolder="sub", variant="fp16")


def test_one_commit_although_a_push_comes_between(site, tmp_path):
    repo = site.repos["me/model"] = Repo(weights(tmp_path, 1, max_shard_size=16))
    newer = weights(tmp_path, 2)

    def push_once(method, path):
        if path.endswith("index.json") and len(repo.commits) == 1:
            repo.commit(newer, "main")

    site.before = push_once
    folder = hub.resolve("me/model")
    assert folder.name == repo.refs["main"]
    assert {t.array()[0] for t in read_folder(folder)[0].values()} == {2}


def test_incomplete_cache(site, tmp_path):
    site.repos["me/model"] = Repo(weights(tmp_path, max_shard_size=16))
    folder = hub.resolve("me/model")
    os.unlink(folder / "model-00002-of-00002.safetensors")
    with pytest.raises(OSError, match=r"me/model.*not complete in the cache"):
        hub.resolve("me/model", local_files_only=True)


def test_parts_of_gguf_are_fetched_together(site, tmp_path):
    """And are asked for again where one is not in the cache."""
    one = Tensor.lazy("x", np.float32, (4,), lambda: np.ones(4, np.float32))
    write_folder(tmp_path / "made", {"a": one, "b": one, "c": one}, format="gguf", max_shard_size=16)
    parts = {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    other = {"model-Q8_0-00001-of-00001.gguf": b"", "model-00001-of-00002.gguf.txt": b""}
    site.repos["me/model"] = Repo(parts | other)
    folder = hub.resolve("me/model")
    assert names(folder) == sorted(parts) == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert list(read_folder(folder)[0]) == ["a", "b", "c"]
    before = len(site.requests)
    assert hub.resolve("me/model", local_files_only=True) == folder
    assert len(site.requests) == before
    os.unlink(folder / "model-00002-of-00003.gguf")
    with pytest.raises(OSError, match=r"me/model.*not complete in the cache"):
        hub.resolve("me/model", local_files_only=True)
    assert hub.stale_patterns("gguf")[-2:] == ["model.gguf", "model-?????-of-?????.gguf"]


def refusal(function, *args, **options):
    with pytest.raises(OSError, match="me/") as caught:
        function(*args, **options)
    error = caught.value
    while error is not None:
        assert SECRET not in f"{error} {error!r}"
        error = error.__cause__
    return str(caught.value), caught.value.__cause__


def test_refusals(site, tmp_path):
    site.repos["me/gated"] = Repo(weights(tmp_path), gated=True, token="right")
    site.repos["me/private"] = Repo(weights(tmp_path), token="right")
    site.repos["me/empty"] = Repo({"config.json": b"{}", "weights.pth": b""})
    message, cause = refusal(hub.resolve, "me/gated", token=SECRET)
    assert "gated" in message
    assert type(cause).__name__ == "GatedRepoError"
    message, cause = refusal(hub.resolve, "me/private", token=SECRET)
    assert "private" in message
    assert cause is not None
    assert "no such repository" in refusal(hub.resolve, "me/absent")[0]
    assert "revision 'v9'" in refusal(hub.resolve, "me/private", token="right", revision="v9")[0]
    assert "weights.pth" in refusal(hub.resolve, "me/empty")[0]
    assert "not complete" in refusal(hub.resolve, "me/private", local_files_only=True)[0]
    assert "run `hf auth login`" in refusal(hub.resolve, "me/gated", token=True)[0]
    for token in (SECRET + "\n", ""):  # illegal headers, which the HTTP library quotes
        assert "check token=" in refusal(hub.resolve, "me/private", token=token)[0]
    assert hub.resolve("me/private", token="right").is_dir()


@pytest.mark.parametrize("name", ["..", "../x", "a/../b", "a..b", "/a", "-x", "a b", "a:b"])
def test_revisions_that_cannot_be(site, tmp_path, name):
    site.repos["me/model"] = Repo(weights(tmp_path))
    asked = len(site.requests)
    for call in (hub.resolve, hub.resolve_adapter):
        with pytest.raises(ValueError, match="can be no branch"):
            call("me/model", revision=name)
    with pytest.raises(ValueError, match="can be no branch"):
        hub.push(tmp_path, "me/model", revision=name)
    with pytest.raises(ValueError, match="no folder of a repository"):
        hub.resolve("me/model", subfolder="../x")
    assert len(site.requests) == asked


def test_unreachable(site, monkeypatch, tmp_path):
    from huggingface_hub import constants

    site.repos["me/model"] = Repo(weights(tmp_path))
    folder = hub.resolve("me/model")
    with LoopbackHub() as gone:
        pass
    gone.patch(monkeypatch, tmp_path / "cache")
    assert hub.resolve("me/model") == folder
    assert "cannot be reached" in refusal(hub.resolve, "me/other")[0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.resolve("me/model") == folder
    assert "HF_HUB_OFFLINE" in refusal(hub.resolve, "me/other")[0]


def test_push(site, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    for name, content in weights(tmp_path, max_shard_size=16).items():
        (folder / name).write_bytes(content)
    (folder / ".out.saving-0").mkdir()
    (folder / ".out.saving-0" / "model.safetensors").write_bytes(b"dead")
    url = hub.push(folder, "me/new", private=True, token=SECRET)
    assert url.startswith(site.url)
    assert site.private[-1] is True
    repo = site.repos["me/new"]
    assert repo.messages[-1] == "Upload model"
    assert read_folder(hub.resolve("me/new"))[0].keys() == {"a", "b"}
    # A later push as one file takes the shards away, and leaves the rest.
    single = tmp_path / "single"
    one = Tensor.lazy("c", np.int8, (), lambda: np.array(3, np.int8))
    write_folder(single, {"c": one})
    hub.push(single, "me/new", commit_message="again")
    assert sorted(repo.find("main")[1]) == ["config.json", "model.safetensors"]
    assert repo.messages[-1] == "again"
    hub.push(single, "me/new", revision="try")
    assert repo.refs["try"]
    site.repos["me/locked"] = Repo({}, token="right")
    assert "access" in refusal(hub.push, folder, "me/locked", token=SECRET)[0]
    with pytest.raises(NotADirectoryError, match="save"):
        hub.push(tmp_path / "none", "me/new")


def test_push_as_a_pull_request(site, tmp_path):
    write_folder(tmp_path / "out", {"a": Tensor.lazy("a", np.int8, (), lambda: np.array(3, np.int8))})
    site.repos["me/theirs"] = repo = Repo({"README.md": b"theirs"})
    url = hub.push(tmp_path / "out", "me/theirs", create_pr=True, commit_message="Add weights")
    assert url == f"{site.url}/me/theirs/discussions/1"
    assert sorted(repo.find("main")[1]) == ["README.md"]
    assert sorted(repo.find("refs/pr/1")[1]) == ["README.md", "model.safetensors"]
    with pytest.raises(
        ValueError, match="against the default branch"
    ):  # as huggingface_hub says after it has made the branch
        hub.push(tmp_path / "out", "me/theirs", create_pr=True, revision="dev")
    assert sorted(repo.refs) == ["main", "refs/pr/1"]


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own call of httpx
def test_push_of_large_files(site, tmp_path):
    big = np.arange(5000, dtype=np.int32)
    write_folder(tmp_path / "out", {"a": Tensor.lazy("a", big.dtype, big.shape, lambda: big)})
    (tmp_path / "out" / "config.json").write_text("{}")
    site.lfs_from = 1000
    hub.push(tmp_path / "out", "me/large", token=SECRET)
    assert [path for method, path in site.requests if method == "PUT"]
    assert np.array_equal(read_folder(hub.resolve("me/large"))[0]["a"].array(), big)
    assert len(site.large) == 1  # config.json is a file of the commit


def test_commands_take_a_token_and_never_print_it(site, capsys):
    files = {f"sub/{path.name}": path.read_bytes() for path in Path(fm.assets.TINY_LLAMA).iterdir() if path.is_file()}
    site.repos["me/private"] = Repo(files, token="hf_right")
    assert main(["info", "me/private", "--subfolder", "sub", "--token", "hf_right"]) == 0
    assert "llama" in capsys.readouterr().out
    assert main(["generate", "me/private", "hello", "--token", SECRET]) == 2
    with pytest.raises(SystemExit):
        main(["verify", "me/private", "--token", SECRET])
    text = capsys.readouterr()
    assert SECRET not in text.out + text.err
    assert "unrecognized arguments: --token hf_" in text.err


def test_environment_of_another_process(site, tmp_path):
    site.repos["me/model"] = Repo(weights(tmp_path))
    code = "import sys; from fmodels import hub; print(hub.resolve('me/model'))"
    env = os.environ | site.env(tmp_path / "elsewhere")
    options = {"env": env, "capture_output": True, "text": True, "cwd": Path(__file__).parents[1], "check": True}
    folder = Path(subprocess.run([sys.executable, "-c", code], **options).stdout.strip())
    assert json.loads((folder / "config.json").read_text()) == {}
    options["env"] = env | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert Path(subprocess.run([sys.executable, "-c", code], **options).stdout.strip()) == folder


def test_import_is_light():
    code = "import fmodels.hub, sys; print([m for m in ('torch', 'jax', 'huggingface_hub') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.stdout.strip().endswith("]")
    assert "torch" not in result.stdout
    assert "huggingface_hub" not in result.stdout


def test_model_card(site, case, tmp_path):
    """A repository without a card gets one, which says the hash of the tensors; one that has a card keeps it."""
    loaded = case("llama/causal-lm")
    fm.push_to_hub(loaded.params, loaded.config, "me/new", token=SECRET)
    card = site.repos["me/new"].find("main")[1]["README.md"].decode()
    assert fm.convert("me/new", tmp_path / "copy").sha256 in card
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert 'fm.load("me/new")' in card
    assert SECRET not in card
    site.repos["me/theirs"] = Repo({"README.md": b"theirs"})
    fm.push_to_hub(loaded.params, loaded.config, "me/theirs", variant="fp16", max_shard_size="20kB", commit_message="m")
    files = site.repos["me/theirs"].find("main")[1]
    assert files["README.md"] == b"theirs"
    assert "model.fp16-00001-of-00006.safetensors" in files
    certificate = fm.verify(loaded.folder, frameworks=(), gradients=False)
    fm.push_to_hub(loaded.params, loaded.config, "me/sure", certificate=certificate)
    assert "conversion certificate  PASS" in site.repos["me/sure"].find("main")[1]["README.md"].decode()
