"""On one GPU, against transformers on the same card: parity of logits, greedy tokens, and decoding speed in bfloat16.

python -m tests.bench.gpu > tests/bench/gpu.json
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

import fmodels as fm
from fmodels.bench import bench_config
from tests import families

NAMES = ["gpt2/causal-lm", "llama/causal-lm", "bert/masked-lm", "t5/seq2seq-lm", "bart/seq2seq-lm"]


def seconds(function, repeats=5):
    function()
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def parity(folder):
    """Largest difference of float32 logits from transformers' on the CPU, tiny random models."""
    for name in NAMES:
        loaded = families.load(families.by_name(name), folder)
        mask = loaded.masks("left").get("mask")
        got = np.asarray(loaded.forward("left").logits)
        error = np.abs(got - loaded.reference("left")["logits"])
        yield {
            "what": f"float32 logits, {name}",
            "error": float(error[mask.astype(bool)].max() if mask is not None else error.max()),
        }


def decoding(name, batch, new_tokens=128, dtype="bfloat16"):
    """Tokens per second of greedy decoding from prompts of 128 tokens."""
    config = bench_config(name)
    params = fm.init(config, jax.random.key(0), dtype=dtype)
    tokens = np.random.default_rng(0).integers(1, 1000, (batch, 128))
    with tempfile.TemporaryDirectory() as place:
        fm.save(params, config, place)
        architecture = getattr(transformers, config.ARCHITECTURES[config.task])
        model = architecture.from_pretrained(place, dtype=getattr(torch, dtype)).eval().cuda()
    ids = torch.tensor(tokens).cuda()

    def theirs():
        with torch.no_grad():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
            )
        torch.cuda.synchronize()

    row = {"what": f"decode {name}, batch {batch}, {dtype}", "transformers": batch * new_tokens / seconds(theirs, 3)}
    size = fm.memory_footprint(params)
    for form, tree in (("stacked", params), ("list", fm.unstack_layers(params))):
        ours = lambda tree=tree: jax.block_until_ready(  # noqa: E731
            fm.generate(tree, config, tokens, max_new_tokens=new_tokens)
        )
        speed = batch * new_tokens / seconds(ours)
        row |= {form: speed, f"{form} ratio": speed / row["transformers"], f"{form} GB/s": speed / batch * size / 1e9}
    return row


def main():
    versions = {module.__name__: module.__version__ for module in (jax, torch, transformers, np)}
    report = {"device": jax.devices()[0].device_kind, "python": sys.version.split()[0], **versions, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        report["rows"] += parity(Path(folder))
    for name, batch in (("gpt2-small", 1), ("qwen2-0.5b-shaped", 1), ("qwen2-0.5b-shaped", 32)):
        report["rows"].append(decoding(name, batch))
        print(report["rows"][-1], file=sys.stderr, flush=True)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
