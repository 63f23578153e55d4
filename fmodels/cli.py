"""The command `fmodels`: what one does with checkpoints without writing a program.

Exit codes: 0 all is well, 1 a check failed, 2 bad usage or bad input. Tables are for people; with `--json` the standard
output is one JSON value and nothing else. Progress bars and warnings go to the standard error, bars only on terminals.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

USER_ERRORS = (
    ValueError, KeyError, IndexError, TypeError, OSError, NotImplementedError, ImportError, pickle.UnpicklingError,
)  # fmt: skip
WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|onnx_data|ot|tflite|npz)(\.index(\.\w+)?\.json)?"
    r"|tf_model.*|flax_model.*"
)
"""Names of files of weights, of any format: a conversion copies the others."""
WRITTEN = ("config.json", "generation_config.json")
"""What `save` writes itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code.

    Args:
        argv: the arguments; those of the process if None.

    Example:
        >>> main(["info", "/no/such/folder"])
        2
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    try:
        return args.run(args)
    except BrokenPipeError:  # the reader, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"fmodels {args.command}: interrupted", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if args.traceback:
            raise
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        print(f"fmodels {args.command}: {text or type(error).__name__}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fmodels",
        description="Pretrained transformers: look at checkpoints, run, convert, check and change them.",
        epilog="`fmodels COMMAND --help` shows the options of a command and an example.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, run: Any, text: str, example: str, *, to_json: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.set_defaults(run=run)
        sub.add_argument("--traceback", action="store_true", help="show where in the program an error came from")
        if to_json:
            sub.add_argument("--json", action="store_true", help="print JSON and nothing else")
        return sub

    demo = command(
        "demo",
        _demo,
        "the whole road on the checkpoint that comes with fmodels",
        "fmodels demo --out /tmp/tiny",
        to_json=False,
    )
    demo.add_argument(
        "--out", type=Path, metavar="FOLDER", help="keep what is saved there (else in a folder that is removed)"
    )

    info = command(
        "info",
        _info,
        "what a checkpoint is: sizes, dtypes, options; reads headers, no weights",
        "fmodels info openai-community/gpt2 --tensors",
    )
    _source(info)
    info.add_argument("--tensors", action="store_true", help="list every tensor")

    generate = command(
        "generate",
        _generate,
        "continue prompts",
        'fmodels generate ./tiny-llama "def read(self" --max-new-tokens 40 --sample --seed 1',
    )
    _source(generate)
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="text; needs a tokenizer.json in the folder")
    generate.add_argument(
        "--tokens",
        action="append",
        default=[],
        metavar="1,2,3",
        help="a prompt of token ids, in place of text; may be repeated",
    )
    generate.add_argument("--max-new-tokens", type=int, metavar="N", help="default: the checkpoint's, else 20")
    how = generate.add_mutually_exclusive_group()
    how.add_argument("--sample", action="store_const", const=True, dest="do_sample", help="draw tokens at random")
    how.add_argument(
        "--greedy",
        action="store_const",
        const=False,
        dest="do_sample",
        help="take the likeliest token (default: as the checkpoint says)",
    )
    generate.add_argument("--temperature", type=float, metavar="X", help="when sampling; above 0")
    generate.add_argument(
        "--top-k", type=int, metavar="N", help="when sampling: of the N likeliest tokens; 0 for all, 50 by default"
    )
    generate.add_argument(
        "--top-p", type=float, metavar="X", help="when sampling: of the likeliest with probability X together"
    )
    generate.add_argument(
        "--min-p", type=float, metavar="X", help="when sampling: of those with X times the likeliest's probability"
    )
    generate.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="above 1 makes tokens that were there less likely"
    )
    generate.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")

    convert = command(
        "convert",
        _convert,
        "write a checkpoint in another format or dtype, and check every tensor",
        "fmodels convert ./gpt2 ./gpt2-bf16 --dtype bfloat16",
    )
    _source(convert)
    _dest(convert)
    convert.add_argument(
        "--dtype", metavar="NAME", help="cast floating weights, such as to bfloat16 (default: as they are)"
    )
    convert.add_argument("--task", help="keep the head of this task only (default: as config.json says)")

    verify = command(
        "verify",
        _verify,
        "the conversion certificate of a checkpoint, or of two that should be the same",
        "fmodels verify ./gpt2 ./gpt2-converted",
    )
    verify.add_argument("a", metavar="A", help="a folder, a file of weights beside its config.json, or a Hub id")
    verify.add_argument("b", metavar="B", nargs="?", help="another that should be the same model")
    verify.add_argument(
        "--outputs-only", action="store_true", help="tensors may differ, outputs may not (masked and pruned heads)"
    )
    verify.add_argument("--tensors", action="store_true", help="list every tensor")
    verify.add_argument(
        "--frameworks",
        default="torch,tensorflow,transformers",
        metavar="LIST",
        help="default: %(default)s; none for JAX alone",
    )
    verify.add_argument("--no-gradients", action="store_true", help="compare no gradients")
    verify.add_argument(
        "--tolerance", type=float, default=1e-5, metavar="X", help="bound of outputs (default: %(default)g)"
    )
    verify.add_argument(
        "--gradient-tolerance", type=float, default=1e-4, metavar="X", help="bound of gradients (default: %(default)g)"
    )
    verify.add_argument("--task", help="as for load")
    verify.add_argument("--seed", type=int, default=0, help="of the random input (default: 0)")

    resize = command(
        "resize",
        _resize,
        "change the number of tokens of the vocabulary",
        "fmodels resize ./gpt2 ./gpt2-padded --pad-to-multiple-of 64",
    )
    _source(resize)
    _dest(resize)
    resize.add_argument(
        "size",
        metavar="SIZE",
        type=int,
        nargs="?",
        help="the new number (default: the present one, for --pad-to-multiple-of)",
    )
    resize.add_argument("--pad-to-multiple-of", type=int, metavar="N", help="round the number up")
    resize.add_argument(
        "--init", choices=("mean", "normal", "zeros"), default="mean", help="of new rows (default: mean)"
    )
    resize.add_argument(
        "--seed", type=int, metavar="N", help="draw new rows at random around the mean (default: the mean itself)"
    )

    prune = command("prune", _prune, "remove attention heads", 'fmodels prune ./gpt2 ./gpt2-pruned --heads "0:1,3;2:0"')
    _source(prune)
    _dest(prune)
    prune.add_argument("--heads", metavar="LIST", help='layer:head,head;… by the original numbers, such as "0:1,3;2:0"')
    prune.add_argument("--count", type=int, metavar="N", help="remove the N heads that matter least for --text")
    prune.add_argument(
        "--text", type=Path, metavar="FILE", help="text for --count, and to measure the loss before and after"
    )
    prune.add_argument(
        "--length", type=int, default=256, metavar="N", help="tokens of a window of the text (default: 256)"
    )
    prune.add_argument(
        "--mask", action="store_true", help="silence the heads and keep the shapes, which every tool can read"
    )

    push = command(
        "push",
        _push,
        "upload a checkpoint folder to the Hub in one commit",
        "fmodels push ./gpt2-pruned me/gpt2-pruned --private",
    )
    push.add_argument("folder", metavar="FOLDER", type=Path, help="a checkpoint")
    push.add_argument("repo_id", metavar="REPO_ID", help="owner/name")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--revision", metavar="NAME", help="the branch (default: main)")
    push.add_argument("--create-pr", action="store_true", help="propose the commit in place of pushing it")
    push.add_argument("--message", metavar="TEXT", help="of the commit")
    push.add_argument("--token", help="default: HF_TOKEN, or that of `hf auth login`")

    bench = command(
        "bench", _bench, "speed and memory, against transformers where it is installed", "fmodels bench --json"
    )
    bench.add_argument("names", metavar="NAME", nargs="*", help="which measurements (default: all)")
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        import fmodels

        print(f"fmodels {fmodels.__version__}")
        parser.exit()


def _source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a folder, or a Hub id such as openai-community/gpt2")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hub")
    parser.add_argument("--offline", action="store_true", help="use the Hub's cache and no network")


def _dest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dest", metavar="DEST", type=Path, help="a new or empty folder")
    parser.add_argument(
        "--to", choices=("safetensors", "torch"), default="safetensors", help="format (default: %(default)s)"
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file of weights (default: 5GB)")


def _resolve(args: argparse.Namespace) -> Path:
    from fmodels import hub

    return hub.resolve(args.source, revision=args.revision, local_files_only=args.offline)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


# --- looking and running ----------------------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> int:
    from fmodels import demo

    return demo.main(out=args.out)


def _bench(args: argparse.Namespace) -> int:
    from fmodels import bench

    return bench.main(args.names or None, as_json=args.json)


def _info(args: argparse.Namespace) -> int:
    import jax

    from fmodels import layout, schema, tree
    from fmodels.checkpoint import load_config
    from fmodels.text import size, table
    from fmodels.transforms.counting import num_parameters
    from fmodels.weights import read_file, read_folder, rules

    path = _resolve(args)
    config = load_config(path)
    tensors, metadata = read_folder(path) if path.is_dir() else read_file(path)
    planned = layout.plan({name: tensor.shape for name, tensor in tensors.items()}, config, what="info")
    leaves: dict[str, Any] = {}
    for name, (rule, layer) in planned.tensors.items():
        for leaf in rules.layer_leaves(rule, layer).values():
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
        "files": sorted({t.file.path.name for t in tensors.values() if t.file is not None}),
        "metadata": metadata,
        "generation": None if config.generation is None else config.generation.to_hf(),
        "pooling": config.pooling,
        "normalize": config.normalize,
    }
    rows = [
        {"name": t.name, "dtype": t.dtype.name, "shape": list(t.shape), "bytes": t.nbytes} for t in tensors.values()
    ]
    if args.json:
        _print_json(facts | ({"tensor_table": rows} if args.tensors else {}))
        return 0
    shown = {name.replace("_", " "): value for name, value in facts.items() if value not in (None, {}, [])}
    shown["bytes"] = size(facts["bytes"])
    shown["bytes by dtype"] = ", ".join(f"{name} {size(count)}" for name, count in dtypes.items())
    print(table([[name, _cell(value)] for name, value in shown.items()]))
    if args.tensors:
        cells = [[row["name"], row["dtype"], row["shape"], size(row["bytes"])] for row in rows]
        print("\n" + table(cells, ["tensor", "dtype", "shape", "size"], right=[3]))
    return 0


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _generate(args: argparse.Namespace) -> int:
    import jax
    import numpy as np

    from fmodels.checkpoint import load
    from fmodels.generate import generate, stream
    from fmodels.generation.config import GenerationConfig
    from fmodels.text import read_tokenizer

    if bool(args.prompts) == bool(args.tokens):
        raise ValueError("give prompts as text, or as token ids with --tokens 1,2,3; one of the two")
    rows = [_numbers(text, "--tokens") for text in args.tokens]
    folder = _resolve(args)
    home = folder if folder.is_dir() else folder.parent
    tokenizer = None if rows else read_tokenizer(home)
    if tokenizer is not None:
        rows = [encoding.ids for encoding in tokenizer.encode_batch(args.prompts)]
    if empty := [i for i, row in enumerate(rows) if not row]:
        raise ValueError(f"prompt {empty[0]} has no tokens; write at least one")
    params, config = load(folder, layers="list")
    names = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    own = config.generation.do_sample if config.generation is not None else None
    unused = [f"--{name.replace('_', '-')}" for name in ("temperature", "top_k", "top_p", "min_p") if name in options]
    if unused and not options.get("do_sample", own):
        raise ValueError(f"{', '.join(unused)} changes nothing without sampling; add --sample")
    width = max(map(len, rows))
    pad = config.pad_token_id if config.pad_token_id is not None and config.pad_token_id >= 0 else 0
    tokens, mask = np.full((len(rows), width), pad, np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):  # on the left, so that new tokens follow at once
        tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, True
    call: dict[str, Any] = {
        "mask": mask, "max_new_tokens": args.max_new_tokens, "key": jax.random.key(args.seed),
        "options": GenerationConfig(**options),
    }  # fmt: skip
    if len(rows) == 1 and not args.json:
        _stream(stream(params, config, tokens, **call), rows[0], tokenizer)
        return 0
    out = generate(params, config, tokens, **call)
    results = []
    for i, (row, length) in enumerate(zip(rows, np.asarray(out.lengths).tolist(), strict=True)):
        new = np.asarray(out.tokens)[i, width : width + length].tolist()
        result: dict[str, Any] = {
            "prompt_tokens": list(row),
            "new_tokens": new,
            "logprobs": np.asarray(out.logprobs)[i, :length].tolist(),
        }
        if tokenizer is not None:
            result = {"prompt": args.prompts[i], "text": tokenizer.decode(new), **result}
        results.append(result)
    if args.json:
        _print_json(results)
        return 0
    for i, result in enumerate(results):
        text = (
            f"{result['prompt']}{result['text']}"
            if tokenizer
            else ",".join(map(str, [*result["prompt_tokens"], *result["new_tokens"]]))
        )
        print(f"[{i}] {text}")
    return 0


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


def _verify(args: argparse.Namespace) -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from fmodels.verify import verify

    names = [name for name in args.frameworks.split(",") if name not in ("", "none")]
    certificate = verify(
        args.a, args.b, task=args.task, tolerance=args.tolerance, gradient_tolerance=args.gradient_tolerance,
        gradients=not args.no_gradients, outputs_only=args.outputs_only, frameworks=names, seed=args.seed,
    )  # fmt: skip
    print(certificate.to_json() if args.json else certificate.to_table(tensors=args.tensors))
    return 0 if certificate.ok else 1


# --- new checkpoints --------------------------------------------------------------------------------------------------


def _convert(args: argparse.Namespace) -> int:
    import numpy as np

    from fmodels.bytewise import canonical_names, count_not_finite, same_bytes
    from fmodels.checkpoint import load
    from fmodels.text import size
    from fmodels.weights import read_file, read_folder

    source = _resolve(args)
    dtype = None if args.dtype is None else _dtype(args.dtype)
    with _new_folder(source, args.dest) as stage:
        params, config = load(source, task=args.task, dtype=dtype, layers="list")
        copied = _save(params, config, source, stage, args)
        # By what is in the two folders now, not by what was in memory.
        old, _ = read_folder(source) if source.is_dir() else read_file(source)
        new, _ = read_folder(stage)
        names = canonical_names(list(old), config)
        equal, cast, left, problems = 0, 0, [], []
        for name, tensor in old.items():
            kind, canonical = names[name]
            if kind != "tensor":
                left.append(f"{name} ({'repeats ' + canonical if kind == 'repeat' else kind})")
                continue
            array, written = tensor.array(), new[canonical].array()
            if same_bytes(array, written):
                equal += 1
                continue
            with np.errstate(over="ignore"):
                same = dtype is not None and same_bytes(array.astype(dtype), written)
            if not same:
                problems.append(f"{name!r} was not written as it is")
            elif count_not_finite(written) != count_not_finite(array):
                problems.append(f"{name!r} has values that {dtype} cannot hold; use bfloat16, or keep the dtype")
            cast += same
        if problems:
            raise ValueError("convert: nothing was written: " + "; ".join(problems[:20]))
        total = sum(tensor.nbytes for tensor in new.values())
    result = {
        "source": str(source), "dest": str(args.dest), "format": args.to, "tensors": len(new), "bytes": total,
        "equal_bytes": equal, "equal_to_cast": cast, "left_out": left, "copied": copied,
    }  # fmt: skip
    if args.json:
        _print_json(result)
        return 0
    print(f"{args.dest}: {len(new)} tensors, {size(total)}, {args.to}")
    print(
        f"read again from both folders: {equal} equal to the byte"
        + (f", {cast} equal to the cast to {dtype}" if dtype is not None else "")
    )
    if left:
        print(f"left out: {', '.join(left)}")
    if copied:
        print(f"copied: {', '.join(copied)}")
    return 0


def _dtype(name: str) -> Any:
    import jax.numpy as jnp
    import numpy as np

    try:
        dtype = np.dtype(name)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"--dtype {name!r} is not a floating dtype; use one such as bfloat16, float16, float32")
    return dtype


def _resize(args: argparse.Namespace) -> int:
    import jax
    import numpy as np

    from fmodels.checkpoint import load
    from fmodels.transforms.embeddings import resize_embeddings

    if args.size is None and args.pad_to_multiple_of is None:
        raise ValueError("give the new SIZE, or --pad-to-multiple-of, or both")
    if args.init == "normal" and args.seed is None:
        args.seed = 0
    source = _resolve(args)
    with _new_folder(source, args.dest) as stage:
        before, config = load(source)
        key = None if args.seed is None else jax.random.key(args.seed)
        after, resized = resize_embeddings(
            before, config, args.size, key=key, pad_to_multiple_of=args.pad_to_multiple_of, init=args.init
        )
        kept = min(config.vocab_size, resized.vocab_size)
        old, new = (np.asarray(params["embed"]["tokens"])[:kept].view(np.uint8) for params in (before, after))
        if not np.array_equal(old, new):
            raise ValueError("resize: old rows have changed; nothing was written")
        copied = _save(after, resized, source, stage, args)
    result = {
        "source": str(source), "dest": str(args.dest), "old_size": config.vocab_size, "new_size": resized.vocab_size,
        "rows_kept": kept, "copied": copied,
    }  # fmt: skip
    if args.json:
        _print_json(result)
    else:
        print(
            f"{args.dest}: vocabulary {config.vocab_size:,} -> {resized.vocab_size:,}, {kept:,} rows kept to the byte"
        )
    return 0


def parse_heads(text: str) -> dict[int, list[int]]:
    """`"0:1,3;2:0"` as `{0: [1, 3], 2: [0]}`.

    Raises:
        ValueError: it is not written so.

    Example:
        >>> parse_heads("0:1,3;2:0")
        {0: [1, 3], 2: [0]}
    """
    found: dict[int, list[int]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        match = re.fullmatch(r"(\d+)\s*:\s*(\d+(?:\s*,\s*\d+)*)", part)
        if match is None or int(match[1]) in found:
            why = "layer is there twice" if match else "expected layer:head,head"
            raise ValueError(f'--heads {text!r}: {part!r}: {why}; write it as in "0:1,3;2:0"')
        found[int(match[1])] = [int(head) for head in match[2].split(",")]
    if not found:
        raise ValueError('--heads is empty; write it as in "0:1,3;2:0"')
    return found


def _prune(args: argparse.Namespace) -> int:
    from fmodels.checkpoint import load
    from fmodels.text import text_importance, text_loss
    from fmodels.transforms.casting import cast
    from fmodels.transforms.counting import num_parameters
    from fmodels.transforms.heads import mask_heads, prune_heads
    from fmodels.transforms.importance import least_important_heads

    if (args.heads is None) == (args.count is None):
        raise ValueError('give --heads "0:1,3;2:0", or --count N with --text FILE')
    if args.count is not None and args.text is None:
        raise ValueError("--count needs --text FILE, to see which heads matter")
    heads = {} if args.heads is None else parse_heads(args.heads)
    source = _resolve(args)
    with _new_folder(source, args.dest) as stage:
        params, config = load(source)
        losses: dict[str, float] = {}
        rows, count = ([], 0) if args.text is None else _read_text(args, source, config)
        if args.count is not None:
            heads = least_important_heads(text_importance(cast(params, "float32"), config, rows), config, args.count)
        pruned, after = (mask_heads(params, config, heads), config) if args.mask else prune_heads(params, config, heads)
        if rows:
            pairs = {"before": (params, config), "after": (pruned, after)}
            losses = {
                when: text_loss(cast(p, "float32"), c, rows, count).bits_per_byte for when, (p, c) in pairs.items()
            }
        copied = _save(pruned, after, source, stage, args)
    result = {
        "source": str(source), "dest": str(args.dest),
        "heads": {layer: sorted(gone) for layer, gone in sorted(heads.items())},
        "masked": args.mask, "parameters_before": num_parameters(params), "parameters_after": num_parameters(pruned),
        "bits_per_byte": losses, "copied": copied,
    }  # fmt: skip
    if args.json:
        _print_json(result)
        return 0
    verb = "silenced" if args.mask else "removed"
    print(
        f"{args.dest}: {verb} "
        + "; ".join(f"layer {layer}: {', '.join(map(str, gone))}" for layer, gone in result["heads"].items())
    )
    print(f"parameters {result['parameters_before']:,} -> {result['parameters_after']:,}")
    if losses:
        print(f"bits per byte of {args.text}: {losses['before']:.4f} -> {losses['after']:.4f}")
    return 0


def _read_text(args: argparse.Namespace, source: Path, config: Any) -> tuple[list[list[int]], int]:
    """The windows of `--text`, and its bytes."""
    from fmodels.text import read_tokenizer, windows

    if config.task != "causal-lm" or not getattr(config, "causal", True):
        raise NotImplementedError(
            f"the loss of a text needs a causal language model, this is {config.task!r}; give --heads alone"
        )
    if args.length < 1:
        raise ValueError(f"--length must be at least 1, got {args.length}")
    text = args.text.read_text(encoding="utf-8")
    tokenizer = read_tokenizer(source if source.is_dir() else source.parent)
    return windows(tokenizer, text, min(args.length, config.max_positions)), len(text.encode())


@contextlib.contextmanager
def _new_folder(source: Path, dest: Path) -> Iterator[Path]:
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


def _save(params: Any, config: Any, source: Path, stage: Path, args: argparse.Namespace) -> list[str]:
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


def _push(args: argparse.Namespace) -> int:
    from fmodels import hub, layout
    from fmodels.checkpoint import load_config
    from fmodels.weights import read_folder

    if not args.folder.is_dir():
        raise NotADirectoryError(f"push: expected a folder, {str(args.folder)!r} is none; save the checkpoint first")
    tensors, _ = read_folder(args.folder)  # what cannot be loaded again is not worth a push
    layout.plan({name: tensor.shape for name, tensor in tensors.items()}, load_config(args.folder), what="push")
    url = hub.push(
        args.folder, args.repo_id, token=args.token, private=args.private, revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.message,
    )  # fmt: skip
    _print_json({"url": url}) if args.json else print(url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
