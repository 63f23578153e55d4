"""The demo: the whole road once, on the checkpoint that comes with fmodels; every number is measured as it runs."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import fmodels
from fmodels import assets, schema, tree
from fmodels.bytewise import same_bytes
from fmodels.checkpoint import load, save
from fmodels.generate import generate
from fmodels.generation.config import GenerationConfig
from fmodels.models import Config
from fmodels.runs import read_with_transformers
from fmodels.text import TextLoss, read_tokenizer, size, table, text_importance, text_loss, windows
from fmodels.transforms.casting import cast
from fmodels.transforms.counting import num_parameters
from fmodels.transforms.embeddings import resize_embeddings
from fmodels.transforms.heads import mask_heads, prune_heads
from fmodels.transforms.importance import least_important_heads
from fmodels.types import Params
from fmodels.verify import verify

PROMPT = '"""Tools for reading files."""\n\nimport os\n\ndef read_lines(path):\n    """'
NEW_TOKENS = 72
NEW_WORDS = 10
HEADS = 4
WINDOW = 256
PARTS = {"scores": slice(0, 8), "measures": slice(8, 40)}
"""Which windows of the held-out text choose the heads, and which measure every loss."""


def main(*, out: Path | None = None) -> int:
    """Prints the demo.

    Args:
        out: folder for the checkpoint that is saved; a temporary one, which is removed, if None.

    Returns:
        0, or 1 if something that must be exact is not.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"demo: {str(out)!r} exists and is not an empty folder; give another")
    steps = _Steps()
    params, config = steps.run("load", _load)
    tokenizer = read_tokenizer(assets.TINY_LLAMA)
    single = cast(params, "float32")
    greedy = steps.run("generate", _generate, single, config, tokenizer)
    text = (assets.TINY_LLAMA.parent / "heldout.txt").read_text(encoding="utf-8")
    held = _Held(tokenizer, text, WINDOW)
    before = steps.run("held-out loss", _loss, single, config, held)
    good = steps.run("resize the vocabulary", _resize, params, config, held, before)
    good &= steps.run("prune the heads that matter least", _prune, single, config, held, before)
    exact, converted = steps.run("to PyTorch and TensorFlow, and back", _convert, params, config)
    good &= exact
    with tempfile.TemporaryDirectory(prefix="fmodels-demo-") as temporary:
        folder = Path(temporary) / "tiny-llama" if out is None else out
        good &= steps.run("save, and read by transformers", _save, converted, config, folder, greedy)
        good &= steps.run("certificate of what was saved", _certify, folder)
    print(
        f"\n{'everything that must be exact is exact' if good else 'FAILED: see above'}; {steps.seconds():.0f} s in all"
    )
    return 0 if good else 1


class _Steps:
    """Headings, and how long each step took."""

    def __init__(self) -> None:
        self.start, self.count = time.monotonic(), 0
        print(
            f"fmodels {fmodels.__version__}, jax {jax.__version__} "
            f"on {jax.devices()[0].platform}, {os.cpu_count()} cores"
        )

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def run(self, title: str, function: Any, *args: Any) -> Any:
        self.count += 1
        heading = f"{self.count}  {title}"
        print(f"\n{heading}\n{'-' * len(heading)}", flush=True)
        started = self.seconds()
        result = function(*args)
        print(f"({self.seconds() - started:.1f} s)", flush=True)
        return result


class _Held:
    """The held-out text in windows: some choose heads, the others measure."""

    def __init__(self, tokenizer: Any, text: str, length: int):
        rows = windows(tokenizer, text, length)
        self.scores, self.measures = rows[PARTS["scores"]], rows[PARTS["measures"]]
        # The bytes of the tokens that are predicted, in proportion: windows overlap in one token.
        tokens = sum(len(row) - 1 for row in rows)
        self.bytes = round(len(text.encode()) * sum(len(row) - 1 for row in self.measures) / tokens)

    def loss(self, params: Params, config: Config) -> TextLoss:
        return text_loss(params, config, self.measures, self.bytes)


def _load() -> tuple[Params, Config]:
    params, config = load(assets.TINY_LLAMA)
    rows = []
    for path, leaf in tree.flatten(params).items():
        rows.append([path, " ".join(schema.axes(path)), " × ".join(map(str, leaf.shape)), leaf.dtype.name])
    letters = dict.fromkeys("".join(letter for row in rows for letter in row[1].split()))
    print("params, config = fm.load(fm.assets.TINY_LLAMA)")
    print(f"{config.model_type}, {config.task}, {num_parameters(params):,} parameters, the head is the embedding\n")
    print(table(rows, ["leaf", "axes", "shape", "dtype"]))
    print("\n" + ", ".join(f"{letter} {schema.LETTERS[letter]}" for letter in letters))
    return params, config


def _generate(params: Params, config: Config, tokenizer: Any) -> list[int]:
    rows = {
        "greedy": GenerationConfig(do_sample=False),
        "sampled, temperature 0.8, top_p 0.95, key 0": GenerationConfig(do_sample=True, temperature=0.8, top_p=0.95),
    }
    tokens = [tokenizer.encode(PROMPT).ids] * len(rows)
    key, options = jax.random.key(0), list(rows.values())
    out = generate(params, config, tokens, max_new_tokens=NEW_TOKENS, key=key, options=options)
    count = len(tokens[0]) + np.asarray(out.lengths)
    ids = [row[:n].tolist() for row, n in zip(np.asarray(out.tokens), count, strict=True)]
    for name, row in zip(rows, ids, strict=True):
        print(f"{name}:\n" + "\n".join(f"    {line}" for line in tokenizer.decode(row).splitlines()))
    return ids[0]


def _loss(params: Params, config: Config, held: _Held) -> TextLoss:
    loss = held.loss(params, config)
    print(
        f"{loss.bits_per_byte:.4f} bits per byte, {loss.nats_per_token:.4f} nats per token\n"
        f"over {loss.tokens:,} tokens of heldout.txt, which training did not see, in windows of {WINDOW}"
    )
    return loss


def _resize(params: Params, config: Config, held: _Held, before: TextLoss) -> bool:
    wanted = config.vocab_size + NEW_WORDS
    larger, resized = resize_embeddings(params, config, wanted, pad_to_multiple_of=64, key=jax.random.key(0))
    kept = np.asarray(larger["embed"]["tokens"])[: config.vocab_size]
    same = same_bytes(kept, np.asarray(params["embed"]["tokens"]))
    loss = held.loss(cast(larger, "float32"), resized)
    print(
        f"{NEW_WORDS} more tokens, up to a multiple of 64: {config.vocab_size:,} -> {resized.vocab_size:,} rows; "
        f"old rows {'equal to the byte' if same else 'CHANGED'}\n"
        f"bits per byte {before.bits_per_byte:.4f} -> {loss.bits_per_byte:.4f} (new tokens take some probability)"
    )
    return same


def _prune(params: Params, config: Config, held: _Held, before: TextLoss) -> bool:
    importance = np.asarray(text_importance(params, config, held.scores))
    print(
        "importance: gradient of the loss with respect to a mask on the heads (Michel et al. 2019),\n"
        f"from {len(held.scores)} windows that the loss below is not measured on:\n"
    )
    rows = [[f"layer {layer}", *(f"{value:.4f}" for value in row)] for layer, row in enumerate(importance)]
    print(
        table(rows, ["", *(f"head {head}" for head in range(config.num_heads))], right=range(1, config.num_heads + 1))
    )
    heads = least_important_heads(importance, config, HEADS)
    pruned, smaller = prune_heads(params, config, heads)
    masked = mask_heads(params, config, heads)
    loss = held.loss(pruned, smaller)
    tokens = jnp.asarray(np.array(held.measures[0])[None, :-1])
    a, b = (np.asarray(fmodels.forward(p, c, tokens).logits) for p, c in ((masked, config), (pruned, smaller)))
    # Of the largest, as float32 itself departs by 2e-5 of single logits here: measured against PyTorch in float64.
    difference = float(np.abs(a - b).max() / np.abs(b).max())
    gone = "; ".join(f"layer {layer}: {', '.join(map(str, numbers))}" for layer, numbers in heads.items())
    group = config.num_heads // config.num_kv_heads
    print(
        f"\nremoved {HEADS} of {config.num_layers * config.num_heads} heads, in whole groups of {group}: {gone}\n"
        f"parameters {num_parameters(params):,} -> {num_parameters(pruned):,}\n"
        f"bits per byte {before.bits_per_byte:.4f} -> {loss.bits_per_byte:.4f}\n"
        f"masked twin (the same heads silenced, shapes kept): logits of the pruned within {difference:.1e} of the largest"
    )
    return difference <= 1e-5


def _convert(params: Params, config: Config) -> tuple[bool, Params]:
    good = True
    for name, package, label in (("torch", "torch", "PyTorch"), ("tensorflow", "tensorflow", "TensorFlow")):
        if importlib.util.find_spec(package) is None:
            print(f"{label}: not installed: pip install 'fmodels[{name}]'")
            continue
        there: dict[str, Any]
        if name == "torch":
            from interop.torch import from_torch, to_torch

            started = time.monotonic()
            there = to_torch(params, config)
            back = from_torch(there, config)
        else:
            from interop.tensorflow import from_tensorflow, to_tensorflow

            started = time.monotonic()
            there = dict(to_tensorflow(params, config))
            back = from_tensorflow(there, config)
        seconds = time.monotonic() - started
        old, new = tree.flatten(params), tree.flatten(back)
        same = old.keys() == new.keys() and all(same_bytes(np.asarray(old[p]), np.asarray(new[p])) for p in old)
        print(
            f"{label}: {len(there)} tensors there and back in {1000 * seconds:.0f} ms, "
            f"{'equal to the byte' if same else 'DIFFERENT'}"
        )
        good, params = good and same, back
    return good, params


def _save(params: Params, config: Config, folder: Path, greedy: list[int]) -> bool:
    save(params, config, folder)
    for path in assets.TINY_LLAMA.glob("tokenizer*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    print(table([[path.name, size(path.stat().st_size)] for path in files], [str(folder), ""], right=[1]))
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
        print("transformers: not installed: pip install transformers torch")
        return True
    import torch

    model, _ = read_with_transformers(params, config, folder)
    tokenizer = read_tokenizer(folder)
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    same = out[0].tolist() == greedy
    print(
        f"\n{type(model).__name__}.from_pretrained: its greedy continuation is "
        + ("ours, token by token" if same else "DIFFERENT from ours")
    )
    return same


def _certify(folder: Path) -> bool:
    certificate = verify(folder, assets.TINY_LLAMA)
    print(certificate.to_table())
    return certificate.ok
