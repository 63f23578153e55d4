"""The README is true: its tables are generated, its Python runs, its commands work.

`python -m tests.test_readme` rewrites the tables.
"""

import inspect
import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import jax
import pytest

import fmodels as fm
from fmodels import cli, schema
from fmodels.models import FAMILIES
from fmodels.weights import FORMATS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


SHOWN = ("gpt2", "llama", "bert")
"""The families whose leaves the README shows."""


def used(name: str) -> set[str]:
    """The lines of the table of axes of a family's leaves."""
    weights = FAMILIES[name].weights
    return {schema.line(leaf) for rule in weights.rules for leaf in rule.leaves}


def tree_picture(paths: Iterable[str] | None = None) -> str:
    """The lines of the axes table, leaves with the same axes on one line; those of `SHOWN` if None."""
    shown = set().union(*map(used, SHOWN)) if paths is None else set(paths)
    groups: dict[tuple[str, str], list[str]] = {}
    for path, axes in schema.AXES.items():
        if path.endswith("bias") and path.removesuffix("bias").removesuffix("spare_") + "weight" in schema.AXES:
            continue  # a bias has the output axes of its weight
        if path not in shown:
            continue
        parent, _, leaf = path.rpartition(".")
        groups.setdefault((parent, axes), []).append(leaf)
    lines: dict[tuple[str, str, str], list[str]] = {}
    for (parent, axes), leaves in groups.items():
        grand, _, name = parent.rpartition(".")
        lines.setdefault((grand, " ".join(leaves), axes), []).append(name)
    text = []
    for (grand, leaves, axes), names in lines.items():
        head = f"{grand}." if grand else ""
        middle = names[0] if len(names) == 1 else "{" + ",".join(names) + "}"
        tail = leaves if " " not in leaves else "{" + leaves.replace(" ", ",") + "}"
        text.append(f"{head}{middle}.{tail}".ljust(54) + f"({axes})")
    half = (len(text) + 1) // 2  # in two columns
    pairs = zip(text[:half], [*text[half:], *[""] * (2 * half - len(text))], strict=True)
    return "\n".join(["```", *(f"{left:66}{right}".rstrip() for left, right in pairs), "```"])


def whole_tree() -> str:
    return tree_picture(schema.AXES)


def letters() -> str:
    return "; ".join(f"`{letter}` {name}" for letter, name in schema.LETTERS.items() if letter in schema.SIZES) + "."


def kind(name: str) -> str:
    """`"encoder-decoder"`, `"decoder"` or `"encoder"`."""
    tasks = FAMILIES[name].config.ARCHITECTURES
    if "seq2seq-lm" in tasks:
        return "encoder-decoder"
    return "encoder" if "masked-lm" in tasks else "decoder"


def families() -> str:
    """The names of all families, a line for each kind."""
    rows = []
    for one in ("decoder", "encoder", "encoder-decoder"):
        names = [f"`{name}`" for name in sorted(FAMILIES) if kind(name) == one]
        rows.append(f"- {len(names)} {one}s: {', '.join(names)}")
    return "\n".join(rows)


HEADS = {"mpnet": "masks only", "olmo2": "masks only"}
"""Families whose heads cannot go, see `tests/transforms/test_every_family.py`."""
GOLDENS = Path(__file__).parent / "goldens"


def verified(name: str) -> list[str]:
    """What a family is compared with: transformers 5, and 4.57.6's classes that have goldens or have read our files."""
    classes = set(FAMILIES[name].config.ARCHITECTURES.values())
    flax = {one["config"]["model_type"] for one in json.loads((GOLDENS / "flax" / "trees.json").read_text())}
    tensorflow = json.loads((GOLDENS / "tensorflow" / "read_back.json").read_text())
    names = ["transformers"] + ["Flax"] * (name in flax)
    return names + ["TensorFlow"] * bool(classes & tensorflow.keys())


def table() -> str:
    """What each family can do."""
    rows = [
        "| model_type | kind | tasks | resize | generate | prune heads | quantised | formats | verified against | file | "
        "lines |",
        f"|{'---|' * 10}---:|",
    ]
    for name, family in sorted(FAMILIES.items()):
        tasks, weights = family.config.ARCHITECTURES, family.weights
        file = Path(inspect.getfile(family.config))
        own = ["gguf"] * (family.config.gguf is not None)
        own += ["tf-checkpoint"] * bool(weights.tensorflow and weights.tensorflow.original)
        heads = HEADS.get(name, "" if kind(name) == "encoder-decoder" else "yes")
        generates = "yes" if {"causal-lm", "seq2seq-lm"} & tasks.keys() else ""
        lines = f"{len(file.read_text().splitlines())}"
        cells = (
            name, kind(name), ", ".join(tasks), "yes", generates, heads, "yes",
            ", ".join(["all", *own]), ", ".join(verified(name)), f"[{file.name}](fmodels/models/{file.name})", lines,
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def formats() -> str:
    rows = ["| format | files | read | write |", "|---|---|---|---|"]
    for name, kind in FORMATS.items():
        single = f"`{kind.single()}`" if kind.others is None else f"`*.{kind.suffix}`"
        single += "/" if kind.directory else f", sharded with `{kind.index()}`" if kind.sharded and kind.indexed else ""
        rows.append(f"| {name} | {single} | yes | yes |")
    return "\n".join(rows)


def bench() -> str:
    """The committed output of `fmodels bench --json`, without what compares with nothing else."""
    data = json.loads((ROOT / "tests" / "bench" / "results.json").read_text())
    machine = data["machine"]
    rows = [
        f"| float32 on {machine['cores']} cores ({machine['processor']}) | fmodels | transformers {machine['transformers']} | ratio |"
    ]
    rows += ["|---|---:|---:|---:|"]
    for r in data["results"]:
        if r["unit"] in ("ms", "texts/s", "tokens/s", "prompts/s") and "(" not in r["name"]:
            rows.append(
                f"| {r['name']} | {r['ours']:.3g} {r['unit']} | {r['theirs']:.3g} {r['unit']} | {r['ratio']:.2f} |"
            )
    return "\n".join(rows)


GENERATED = {
    README: {"tree": tree_picture, "families": families, "formats": formats, "bench": bench},
    ROOT / "FAMILIES.md": {"table": table, "whole tree": whole_tree, "letters": letters},
}
"""File -> what is generated in it."""


def written(file: Path) -> str:
    text = file.read_text()
    for name, make in GENERATED[file].items():
        text = re.sub(
            rf"<!-- {name} -->\n.*?<!-- /{name} -->",
            lambda _, n=name, m=make: f"<!-- {n} -->\n{m()}\n<!-- /{n} -->",
            text,
            flags=re.S,
        )
    return text


def blocks(language: str) -> list[str]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), flags=re.S | re.M)
    return [text for name, text in fences if name == language]


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_small(name):
    own, *bases = FAMILIES[name].config.__mro__
    derives = any(base.__module__ in {family.config.__module__ for family in FAMILIES.values()} for base in bases)
    assert len(Path(inspect.getfile(own)).read_text().splitlines()) <= (60 if derives else 250)


@pytest.mark.parametrize("file", GENERATED, ids=lambda file: file.name)
def test_tables_are_those_of_the_code(file):
    text = file.read_text()
    assert all(f"<!-- {name} -->" in text for name in GENERATED[file])
    assert text == written(file), "run: python -m tests.test_readme"


def test_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_python_runs(tmp_path, monkeypatch):
    """All blocks in turn, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    found = blocks("python")
    assert len(found) >= 5
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # what a reader has
        for block in found:
            exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (
        fm.assets.TINY_LLAMA / "model.safetensors"
    ).read_bytes()
    assert names["vectors"].shape == (2, 768)


COMMANDS = [line for block in blocks("") for line in block.splitlines() if line.startswith("fmodels ")]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.split()[1])
def test_commands_work(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command.replace("MODEL", str(fm.assets.TINY_LLAMA)))[1:]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out


if __name__ == "__main__":
    for file in GENERATED:
        file.write_text(written(file))
