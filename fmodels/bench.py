"""Speed and memory against transformers on PyTorch, in one run on one machine: medians and ratios.

`fmodels bench` prints a table, or JSON.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

THREADS = 2
"""Threads of both sides, the number of cores that the targets were set for."""


class Result(NamedTuple):
    """One line of the table.

    Attributes:
        name: what was measured.
        ours, theirs: medians, in `unit`; theirs is the yardstick, mostly transformers.
        unit: of both.
        ratio: how much better ours is, or for sizes and times of ours alone, ours over the yardstick.
        target: what the ratio should reach (`>=`) or stay below (`<=`); empty for a row that only informs.
        note: anything else, such as the share of the memory bandwidth.
    """

    name: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    target: str
    note: str = ""

    @property
    def good(self) -> bool:
        if not self.target:
            return True
        sign, number = self.target.split()
        return self.ratio >= float(number) if sign == ">=" else self.ratio <= float(number)


def median_of(*functions: Callable[[], Any], repeats: int = 3, calls: int = 1) -> list[float]:
    """Median seconds of each function; they take turns, so that a busy moment of the machine hits all alike.

    Args:
        functions: what to time; each is called once before.
        repeats: turns of each.
        calls: how often each is called in its turn; each call is timed. Where a call is short, the threads of the one
            before would still spin in it.
    """
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repeats):
        for function, found in zip(functions, times, strict=True):
            for _ in range(calls):
                begin = time.perf_counter()
                function()
                found.append(time.perf_counter() - begin)
    return [statistics.median(found) for found in times]


def bandwidth() -> float:
    """Bytes per second that all threads together read from memory, by a sum over 800 MB."""
    import torch

    numbers = torch.ones(200_000_000)
    (seconds,) = median_of(lambda: numbers.sum(), repeats=5)
    return numbers.numel() * 4 / seconds


def bench_config(name: str) -> Any:
    """The config of a model that is measured, by its name in the table."""
    import fmodels as fm

    if name == "llama-50m":
        return fm.models.llama.Config(
            hidden_size=512, intermediate_size=1376, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64, task="causal-lm",
            eos_token_id=None,
        )  # fmt: skip
    if name == "qwen2-0.5b-shaped":
        return fm.models.llama.Config(
            vocab_size=151936, hidden_size=896, intermediate_size=4864, num_layers=24, num_heads=14, num_kv_heads=2, head_dim=64,
            tie_word_embeddings=True, task="causal-lm", eos_token_id=None,
        )  # fmt: skip
    if name == "minilm-shaped":
        return fm.models.bert.Config(
            hidden_size=384, intermediate_size=1536, num_layers=6, head_dim=32, pooling="mean", normalize=True
        )
    return fm.models.gpt2.Config(task="causal-lm", eos_token_id=None)


class Theirs:
    """transformers in a process of its own: beside jax in one process it runs at a fraction of its speed.

    Args:
        folder: the checkpoint; its model is `model` in the statements.
        setup: run once.
        body: what is timed.
    """

    def __init__(self, folder: str, setup: str, body: str) -> None:
        code = f"""
import json, sys, torch, transformers
torch.set_num_threads({THREADS})
torch.set_grad_enabled(False)
data = json.load(open({folder!r} + "/config.json"))
model = getattr(transformers, data["architectures"][0]).from_pretrained({folder!r}).eval()
{setup}
print("ready", flush=True)
for _ in sys.stdin:
    {body}
    print("done", flush=True)
"""
        script = Path(folder) / "theirs.py"
        script.write_text(code, encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer()

    def _answer(self) -> None:
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise RuntimeError("bench: the process with transformers failed")

    def __call__(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self._answer()

    def __enter__(self) -> Theirs:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def decode(name: str, batch: int, target: float, *, new_tokens: int = 64, repeats: int = 9) -> Iterator[Result]:
    """Greedy decoding, tokens per second: prompts of 16 tokens, everything included but compilation."""
    import jax

    import fmodels as fm

    config = bench_config(name)
    params = fm.unstack_layers(fm.init(config, jax.random.key(0)))
    size = fm.memory_footprint(params)
    if "lm_head" in params:  # of a token table that is not also the head, a step reads one row
        size -= params["embed"]["tokens"].nbytes
    tokens = np.random.default_rng(0).integers(1, 1000, (batch, 16))
    with tempfile.TemporaryDirectory() as folder:
        fm.save(params, config, folder)
        setup = f"ids = torch.tensor({tokens.tolist()})"
        body = f"model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens={new_tokens}, do_sample=False, pad_token_id=0)"
        with Theirs(folder, setup, body) as theirs:
            run = lambda: jax.block_until_ready(fm.generate(params, config, tokens, max_new_tokens=new_tokens))  # noqa: E731
            ours_s, theirs_s = median_of(run, theirs, repeats=repeats)
    ours, reference = batch * new_tokens / ours_s, batch * new_tokens / theirs_s
    note = f"{ours / batch * size / bandwidth():.0%} of memory bandwidth"
    yield Result(f"decode {name}, batch {batch}", ours, reference, "tokens/s", ours / reference, f">= {target}", note)


_POOL = """
def pool(tokens, mask):
    hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    weights = mask[..., None].float()
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

def in_order(texts):
    for first in range(0, len(texts), 32):
        rows = texts[first : first + 32]
        width = max(map(len, rows))
        padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        pool(padded, (torch.arange(width)[None] < torch.tensor([len(row) for row in rows])[:, None]).long())
"""


def encode(*, repeats: int = 7) -> Iterator[Result]:
    """A text encoder of MiniLM's shape: equal batches, single texts, and 512 texts of mixed length."""
    import jax

    import fmodels as fm

    config = bench_config("minilm-shaped")
    params = fm.unstack_layers(fm.init(config, jax.random.key(0)))
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        fm.save(params, config, folder)
        for batch, length, target in ((32, 128, 1.0), (1, 32, 1.5)):
            tokens = jax.numpy.asarray(random.integers(1, config.vocab_size, (batch, length)), "int32")
            setup = f"{_POOL}\nids = torch.tensor({tokens.tolist()})"
            with Theirs(folder, setup, "pool(ids, torch.ones_like(ids))") as theirs:
                run = lambda tokens=tokens: jax.block_until_ready(fm.embed(params, config, tokens))  # noqa: E731
                turns = {"repeats": 30, "calls": 5} if batch == 1 else {"repeats": repeats}
                ours_s, theirs_s = median_of(run, theirs, **turns)
            name = f"encode {batch} × {length} tokens"
            yield Result(name, batch / ours_s, batch / theirs_s, "texts/s", theirs_s / ours_s, f">= {target}")
        lengths = np.clip(random.lognormal(3.6, 0.7, 512), 4, 256).astype(int)
        texts = [random.integers(1, config.vocab_size, n).tolist() for n in lengths]
        with Theirs(folder, f"{_POOL}\ntexts = {texts}", "in_order(texts)") as theirs:
            ours_s, theirs_s = median_of(
                lambda: fm.embed_texts(params, config, texts), theirs, repeats=max(1, repeats // 2)
            )
    yield Result("encode 512 texts of mixed length", 512 / ours_s, 512 / theirs_s, "texts/s", theirs_s / ours_s, ">= 2")


_LOAD = """
import resource, sys, time
{imports}
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
with open("/proc/self/clear_refs", "w") as file:  # the peak so far was that of the imports
    file.write("5")
before = peak()
begin = time.perf_counter()
{body}
elapsed = time.perf_counter() - begin
{touch}
print(elapsed, peak() - before)
"""


def load(*, repeats: int = 7) -> Iterator[Result]:
    """Time of loading a 200 MB checkpoint, in fresh processes, after imports, files in the page cache.

    The peak memory is taken after every weight has been touched once: what is mapped is read only then.
    """
    import jax

    import fmodels as fm

    config = bench_config("llama-50m")
    with tempfile.TemporaryDirectory() as folder:
        params = fm.init(config, jax.random.key(0))
        fm.save(params, config, folder)
        size = (Path(folder) / "model.safetensors").stat().st_size
        warm = "import fmodels as fm, jax, numpy as np; jax.block_until_ready(jax.numpy.zeros(3))"  # the import, and the client of the CPU
        touch = "[np.asarray(x).sum() for x in jax.tree.leaves(params)]"
        theirs = str(Path(folder) / "theirs")
        _python(
            f"import transformers; transformers.LlamaForCausalLM.from_pretrained({folder!r}).save_pretrained({theirs!r}); print()"
        )

        def ours(form: str, source: str = folder) -> tuple[str, str, str]:
            return warm, f"params, _ = fm.load({source!r}, layers={form!r}); jax.block_until_ready(params)", touch

        foreign = "stacked, a file that transformers wrote"
        runs = {"stacked": ours("stacked"), "list": ours("list"), foreign: ours("stacked", theirs)}
        runs["transformers"] = (
            "import torch; from transformers import LlamaForCausalLM",
            f"model = LlamaForCausalLM.from_pretrained({folder!r})",
            "[p.sum() for p in model.parameters()]",
        )
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, (imports, body, touch) in runs.items():
                code = _LOAD.format(imports=imports, body=body, touch=touch)
                found[name].append(tuple(map(float, _python(code).split())))  # pyright: ignore[reportArgumentType]
    seconds = {name: statistics.median(s for s, _ in pairs) for name, pairs in found.items()}
    memory = {name: statistics.median(m for _, m in pairs) for name, pairs in found.items()}
    for form, limit in (("stacked", 1.2), ("list", 1.05), (foreign, 1.2)):
        yield Result(
            f"load, {form}",
            seconds[form] * 1e3,
            seconds["transformers"] * 1e3,
            "ms",
            seconds["transformers"] / seconds[form],
            "" if form == foreign else ">= 5",
            "its tensors lie on 8 bytes, XLA takes over 64: all are copied" if form == foreign else "",
        )
        yield Result(
            f"peak memory of load, {form}", memory[form] / 1e6, size / 1e6, "MB", memory[form] / size, f"<= {limit}"
        )


def import_time(*, repeats: int = 5) -> Iterator[Result]:
    """`import fmodels` against `import jax`, in fresh processes."""
    seconds = {}
    for module in ("jax", "fmodels"):
        code = f"import time; begin = time.perf_counter(); import {module}; print(time.perf_counter() - begin)"
        _python(code)
        seconds[module] = statistics.median(float(_python(code)) for _ in range(repeats))
    yield Result(
        "import fmodels (against import jax)",
        seconds["fmodels"] * 1e3,
        seconds["jax"] * 1e3,
        "ms",
        seconds["fmodels"] / seconds["jax"],
        "<= 1.3",
    )


def compile_time() -> Iterator[Result]:
    """Compile time of a gradient for 48 layers against 12, stacked; and compilations over prompt lengths of a bucket."""
    import jax

    import fmodels as fm

    def seconds(layers: int) -> float:
        config = fm.models.llama.Config(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=layers, num_heads=4, num_kv_heads=4, head_dim=16,
            task="causal-lm",
        )  # fmt: skip
        params = fm.abstract(config)
        loss = lambda p, t: fm.forward(p, config, t).logits.mean()  # noqa: E731  # pyright: ignore[reportOptionalMemberAccess]
        lowered = jax.jit(jax.grad(loss)).lower(params, jax.ShapeDtypeStruct((2, 32), np.int32))
        begin = time.perf_counter()
        lowered.compile()
        return time.perf_counter() - begin

    with _NoCompilationCache():
        seconds(3)
        shallow, deep = (statistics.median(seconds(layers) for _ in range(3)) for layers in (12, 48))
    yield Result("compile gradient, 48 layers (against 12)", deep * 1e3, shallow * 1e3, "ms", deep / shallow, "<= 1.3")

    config = fm.models.llama.Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16,
        task="causal-lm", eos_token_id=None,
    )  # fmt: skip
    params = fm.init(config, jax.random.key(0))
    before = fm.compile_count()
    lengths = range(33, 49)
    for length in lengths:
        fm.generate(params, config, np.ones((1, length), np.int32), max_new_tokens=4)
    compiles = fm.compile_count() - before
    yield Result(
        f"compilations over {len(lengths)} prompt lengths of a bucket", compiles, 1, "programs", compiles, "<= 1"
    )


class _NoCompilationCache:
    """Compilations inside are real, whatever persistent cache is set."""

    def __enter__(self) -> None:
        import jax
        from jax.experimental.compilation_cache.compilation_cache import reset_cache

        self.before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_enable_compilation_cache", False)
        reset_cache()  # whether there is one is decided once, at the first compilation

    def __exit__(self, *_: object) -> None:
        import jax
        from jax.experimental.compilation_cache.compilation_cache import reset_cache

        jax.config.update("jax_enable_compilation_cache", self.before)
        reset_cache()


def _python(code: str) -> str:
    # Byte code is kept, as that of an installed package is: else an import would time the compiler of Python.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise RuntimeError(f"bench: a measurement failed:\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()[-1]


BENCHES: dict[str, Callable[[], Iterator[Result]]] = {
    "import": import_time,
    "load": load,
    "compile": compile_time,
    "encode": encode,
    "decode": lambda: decode("llama-50m", 1, 2.5),
    "decode-batch": lambda: decode("llama-50m", 16, 1.3, repeats=5),
    "decode-gpt2": lambda: decode("gpt2-small", 1, 2.0),
    "decode-0.5b": lambda: decode("qwen2-0.5b-shaped", 1, 2.0, repeats=3),
}
"""Name -> benchmark."""


def machine() -> dict[str, Any]:
    """What ran: the processor, the number of cores, and versions."""
    from importlib.metadata import version

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            (
                line.split(":", 1)[1].strip()
                for line in cpuinfo.read_text().splitlines()
                if line.startswith("model name")
            ),
            model,
        )
    versions = {name: version(name) for name in ("jax", "torch", "transformers", "numpy")}
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": THREADS,
        "python": platform.python_version(),
        **versions,
    }


def run(names: list[str] | None = None) -> Iterator[Result]:
    """Runs the named benchmarks, all if None.

    Raises:
        ValueError: an unknown name.
    """
    import torch
    from tqdm import tqdm

    from fmodels import bench_exchange, bench_generation

    benches = {**BENCHES, **bench_generation.BENCHES, **bench_exchange.BENCHES}
    if unknown := [name for name in names or [] if name not in benches]:
        raise ValueError(f"bench: unknown {', '.join(unknown)}; one of {', '.join(benches)}")
    torch.set_num_threads(THREADS)
    for name in tqdm(names or list(benches), desc="bench", disable=None, leave=False):
        yield from benches[name]()


def table(results: list[Result]) -> str:
    """The results as a Markdown table."""
    lines = ["| measured | fmodels | yardstick | unit | ratio | target | |", "|---|---:|---:|---|---:|---|---|"]
    for r in results:
        notes = "; ".join(filter(None, ["" if r.good else "missed", r.note]))
        numbers = f"{r.ours:.4g} | {r.theirs:.4g} | {r.unit} | {r.ratio:.2f} | {r.target}"
        lines.append(f"| {r.name} | {numbers} | {notes} |")
    return "\n".join(lines)


def main(names: list[str] | None = None, *, as_json: bool = False, out: str | None = None) -> int:
    """Runs, prints, and with `out` also writes the JSON; returns 1 if a target was missed."""
    info = machine()
    results = list(run(names))
    data = {"machine": info, "results": [{**r._asdict(), "good": r.good} for r in results]}
    text = json.dumps(data, indent=2)
    if out:
        Path(out).write_text(text + "\n", encoding="utf-8")
    print(text if as_json else "\n".join(f"{k}: {v}" for k, v in info.items()) + "\n\n" + table(results))
    return 0 if all(r.good for r in results) else 1
