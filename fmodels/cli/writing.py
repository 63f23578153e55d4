"""The commands that make new checkpoints, and push: convert, resize, prune, push."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from fmodels.cli.common import new_folder, print_json, resolve, save_with_others


def run_convert(args: argparse.Namespace) -> int:
    """Another format or dtype, and every tensor compared in the files."""
    from fmodels.conversion import convert
    from fmodels.text import size

    done = convert(
        resolve(args), args.dest, format=args.to, from_format=args.from_format, dtype=args.dtype, task=args.task,
        dequantize=args.dequantize, max_shard_size=args.max_shard_size, variant=args.variant, verify=args.verify,
    )  # fmt: skip
    if args.json:
        print_json(done._asdict())
        return 0
    print(f"{args.dest}: {done.tensors} tensors, {size(done.bytes)}, {done.format}")
    if done.resumed:
        print(f"resumed: {done.resumed} files of weights were there already")
    if done.cast:
        print(f"cast to {args.dtype}: {done.cast} tensors")
    if done.sha256 is not None:
        print(f"read again, every tensor as it was: sha256 {done.sha256}")
    if done.left_out:
        print(f"left out: {', '.join(done.left_out)}")
    if done.copied:
        print(f"copied: {', '.join(done.copied)}")
    return 0


def run_resize(args: argparse.Namespace) -> int:
    """Another number of tokens."""
    import jax
    import numpy as np

    from fmodels.checkpoint import load
    from fmodels.transforms.embeddings import resize_embeddings

    if args.size is None and args.pad_to_multiple_of is None:
        raise ValueError("give the new SIZE, or --pad-to-multiple-of, or both")
    if args.init == "normal" and args.seed is None:
        args.seed = 0
    source = resolve(args)
    with new_folder(source, args.dest) as stage:
        before, config = load(source)
        key = None if args.seed is None else jax.random.key(args.seed)
        after, resized = resize_embeddings(
            before, config, args.size, key=key, pad_to_multiple_of=args.pad_to_multiple_of, init=args.init
        )
        kept = min(config.vocab_size, resized.vocab_size)
        old, new = (np.asarray(params["embed"]["tokens"])[:kept].view(np.uint8) for params in (before, after))
        if not np.array_equal(old, new):
            raise ValueError("resize: old rows have changed; nothing was written")
        copied = save_with_others(after, resized, source, stage, args)
    result = {
        "source": str(source), "dest": str(args.dest), "old_size": config.vocab_size, "new_size": resized.vocab_size,
        "rows_kept": kept, "copied": copied,
    }  # fmt: skip
    if args.json:
        print_json(result)
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


def run_prune(args: argparse.Namespace) -> int:
    """Fewer heads, or silent ones, by number or by importance."""
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
    source = resolve(args)
    with new_folder(source, args.dest) as stage:
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
        copied = save_with_others(pruned, after, source, stage, args)
    result = {
        "source": str(source), "dest": str(args.dest),
        "heads": {layer: sorted(gone) for layer, gone in sorted(heads.items())},
        "masked": args.mask, "parameters_before": num_parameters(params), "parameters_after": num_parameters(pruned),
        "bits_per_byte": losses, "copied": copied,
    }  # fmt: skip
    if args.json:
        print_json(result)
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


def run_push(args: argparse.Namespace) -> int:
    """One commit on the Hub, after a look whether the folder can be loaded."""
    from fmodels.pushing import push_folder
    from fmodels.verify import verify

    if not args.folder.is_dir():
        raise NotADirectoryError(f"push: expected a folder, {str(args.folder)!r} is none; save the checkpoint first")
    certificate = verify(args.folder) if args.certify else None
    if certificate is not None and not certificate.ok:
        raise ValueError("push: the certificate failed, nothing was pushed: " + "; ".join(certificate.failures[:20]))
    url = push_folder(
        args.folder, args.repo_id, token=args.token, private=args.private, revision=args.revision,
        create_pr=args.create_pr, commit_message=args.message, variant=args.variant, certificate=certificate,
    )  # fmt: skip
    print_json({"url": url}) if args.json else print(url)
    return 0
