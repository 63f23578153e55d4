"""The commands that look at checkpoints and run them: demo, bench, info, generate, verify."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fmodels.cli.common import generation_options, print_json, resolve


def run_demo(args: argparse.Namespace) -> int:
    """The whole road on the checkpoint inside the package."""
    from fmodels import demo

    return demo.main(out=args.out)


def run_bench(args: argparse.Namespace) -> int:
    """Speed and memory."""
    from fmodels import bench

    return bench.main(args.names or None, as_json=args.json)


def run_info(args: argparse.Namespace) -> int:
    """Facts from the headers and the config; reads no weights."""
    import jax

    from fmodels import layout, schema, tree
    from fmodels.checkpoint import open_checkpoint
    from fmodels.text import size, table
    from fmodels.transforms.counting import num_parameters

    path, config, tensors, raw, metadata = open_checkpoint(resolve(args))
    planned = layout.plan({name: tensor.shape for name, tensor in tensors.items()}, config, what="info")
    leaves: dict[str, Any] = {}
    for name, place in planned.tensors.items():
        for leaf in place.leaves(stacked=False).values():
            leaves[leaf] = jax.ShapeDtypeStruct(schema.shape(leaf, config), tensors[name].dtype)
    params = tree.unflatten(leaves)
    dtypes: dict[str, int] = {}
    for tensor in tensors.values():
        dtypes[tensor.dtype.name] = dtypes.get(tensor.dtype.name, 0) + tensor.nbytes
    sizes = {field: getattr(config, field) for field in schema.SIZES.values() if hasattr(config, field)}
    hidden = {"num_labels"} if not hasattr(config, "num_labels") or "classifier" not in params else set()
    facts: dict[str, Any] = {
        "source": str(path),
        "model_type": config.model_type,
        "task": config.task,
        "architecture": config.ARCHITECTURES[config.task],
        **{name: value for name, value in sizes.items() if name not in hidden},
        "tie_word_embeddings": config.tie_word_embeddings,
        "pruned_heads": {layer: list(heads) for layer, heads in config.pruned_heads},
        "parameters": num_parameters(params),
        "parameters_without_embeddings": num_parameters(params, exclude_embeddings=True),
        "bytes": sum(dtypes.values()),
        "bytes_by_dtype": dtypes,
        "tensors": len(tensors),
        "quantization": None if config.quantization is None else _quantization(config, tensors),
        "files": sorted({t.file.path.name for t in raw.values() if t.file is not None}),
        "metadata": metadata,
        "generation": None if config.generation is None else config.generation.to_hf(),
        "pooling": config.pooling,
        "normalize": config.normalize,
    }
    rows = [
        {"name": t.name, "dtype": t.dtype.name, "shape": list(t.shape), "bytes": t.nbytes} for t in tensors.values()
    ]
    if args.json:
        print_json(facts | ({"tensor_table": rows} if args.tensors else {}))
        return 0
    shown = {name.replace("_", " "): value for name, value in facts.items() if value not in (None, {}, [])}
    shown["bytes"] = size(facts["bytes"])
    shown["bytes by dtype"] = ", ".join(f"{name} {size(count)}" for name, count in dtypes.items())
    print(table([[name, _cell(value)] for name, value in shown.items()]))
    if args.tensors:
        cells = [[row["name"], row["dtype"], row["shape"], size(row["bytes"])] for row in rows]
        print("\n" + table(cells, ["tensor", "dtype", "shape", "size"], right=[3]))
    return 0


def _quantization(config: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The method, the bits and the groups of a quantised checkpoint, and how many tensors are quantised."""
    import json

    from fmodels.weights.methods import Packed

    options = json.loads(config.quantization)
    shown = {name: options[name] for name in ("quant_method", "bits", "group_size", "format") if name in options}
    return {**shown, "tensors": sum(isinstance(tensor, Packed) for tensor in tensors.values())}


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def run_generate(args: argparse.Namespace) -> int:
    """New tokens after prompts, as they come where there is one prompt."""
    import jax
    import numpy as np

    from fmodels.checkpoint import load
    from fmodels.generate import generate, stream
    from fmodels.text import read_tokenizer

    if bool(args.prompts) == bool(args.tokens):
        raise ValueError("give prompts as text, or as token ids with --tokens 1,2,3; one of the two")
    rows = [_numbers(text, "--tokens") for text in args.tokens]
    folder = resolve(args)
    home = folder if folder.is_dir() else folder.parent
    tokenizer = None if rows else read_tokenizer(home)
    if tokenizer is not None:
        rows = [encoding.ids for encoding in tokenizer.encode_batch(args.prompts)]
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise ValueError(f"prompt {empty[0]} has no tokens; write at least one")
    params, config = load(folder, layers="list")
    options = generation_options(args, config)
    width = max(map(len, rows))
    pad = config.pad_token_id if config.pad_token_id is not None and config.pad_token_id >= 0 else 0
    tokens, mask = np.full((len(rows), width), pad, np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):  # on the left, so that new tokens follow at once
        tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, True
    call: dict[str, Any] = {
        "mask": mask, "max_new_tokens": args.max_new_tokens, "key": jax.random.key(args.seed),
        "options": options, "tokenizer": home / "tokenizer.json" if tokenizer else None,
        "constraint": _constraint(args),
    }  # fmt: skip
    if len(rows) == 1 and not args.json and not NOT_STREAMED & options.to_hf().keys():
        _stream(stream(params, config, tokens, **call), rows[0], tokenizer)
        return 0
    out = generate(params, config, tokens, **call)
    results = []
    each, width = len(out.lengths) // len(rows), out.tokens.shape[1] - out.logprobs.shape[1]
    for i, length in enumerate(np.asarray(out.lengths).tolist()):
        row = rows[i // each]
        new = np.asarray(out.tokens)[i, width : width + length].tolist()
        result: dict[str, Any] = {
            "prompt_tokens": list(row),
            "new_tokens": new,
            "logprobs": np.asarray(out.logprobs)[i, :length].tolist(),
        }
        if tokenizer is not None:
            result = {"prompt": args.prompts[i // each], "text": tokenizer.decode(new), **result}
        results.append(result)
    if args.json:
        print_json(results)
        return 0
    for i, result in enumerate(results):
        text = (
            f"{result['prompt']}{result['text']}"
            if tokenizer
            else ",".join(map(str, [*result["prompt_tokens"], *result["new_tokens"]]))
        )
        print(f"[{i}] {text}")
    return 0


NOT_STREAMED = frozenset(
    "num_beams num_return_sequences penalty_alpha prompt_lookup_num_tokens assistant_early_exit".split()
)
"""Options whose tokens are not known one by one."""


def _constraint(args: argparse.Namespace) -> Any:
    """What `--regex` or `--json-schema` asks for."""
    from pathlib import Path

    from fmodels.generation import constraints

    if args.regex is not None and args.json_schema is not None:
        raise ValueError("--regex and --json-schema exclude each other; give one of them")
    if args.regex is not None:
        return constraints.regex(args.regex)
    if args.json_schema is not None:
        return constraints.json_schema(Path(args.json_schema).read_text(encoding="utf-8"))
    return None


def _stream(steps: Iterator[Any], prompt: Sequence[int], tokenizer: Any) -> None:
    """Prints the prompt, then tokens as they come; characters of several tokens are held back until they are whole."""
    if tokenizer is None:
        print(",".join(map(str, prompt)), end="", flush=True)
        for step in steps:
            print(f",{int(step[0])}", end="", flush=True)
        print()
        return
    ids = list(prompt)
    written = tokenizer.decode(ids)
    print(written, end="", flush=True)
    text = written
    for step in steps:
        ids.append(int(step[0]))
        text = tokenizer.decode(ids)
        if not text.endswith("�") and text.startswith(written):
            print(text[len(written) :], end="", flush=True)
            written = text
    print(text[len(written) :])


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} takes integers between commas, such as 1,2,3; got {text!r}") from None


def run_verify(args: argparse.Namespace) -> int:
    """The conversion certificate; 1 if it does not pass."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from fmodels.verify import verify

    names = [name for name in args.frameworks.split(",") if name not in ("", "none")]
    certificate = verify(
        args.a, args.b, task=args.task, tolerance=args.tolerance, gradient_tolerance=args.gradient_tolerance,
        gradients=not args.no_gradients, outputs_only=args.outputs_only, frameworks=names, seed=args.seed,
    )  # fmt: skip
    print(certificate.to_json() if args.json else certificate.to_table(tensors=args.tensors))
    return 0 if certificate.ok else 1
