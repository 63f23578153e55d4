"""The arguments of every command, and `main`, which runs one.

Needs the standard library alone, so that `--help` is at once there; the commands import what they need as they run.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fmodels.cli.exporting import run_export
from fmodels.cli.reading import run_bench, run_demo, run_generate, run_info, run_verify
from fmodels.cli.writing import run_convert, run_prune, run_push, run_resize

USER_ERRORS = (
    ValueError, KeyError, IndexError, TypeError, OSError, NotImplementedError, ImportError, pickle.UnpicklingError,
)  # fmt: skip


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
    parser = _Parser(
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
        run_demo,
        "the whole road on the checkpoint that comes with fmodels",
        "fmodels demo --out /tmp/tiny",
        to_json=False,
    )
    demo.add_argument(
        "--out", type=Path, metavar="FOLDER", help="keep what is saved there (else in a folder that is removed)"
    )

    info = command(
        "info",
        run_info,
        "what a checkpoint is: sizes, dtypes, options; reads headers, no weights",
        "fmodels info openai-community/gpt2 --tensors",
    )
    _source(info)
    info.add_argument("--tensors", action="store_true", help="list every tensor")

    generate = command(
        "generate",
        run_generate,
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
    _generation(generate)
    generate.add_argument("--regex", metavar="PATTERN", help="what is generated matches this as a whole")
    generate.add_argument("--json-schema", metavar="FILE", help="what is generated is JSON that this schema describes")
    generate.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")

    convert = command(
        "convert",
        run_convert,
        "write a checkpoint in another format or dtype, and check every tensor",
        "fmodels convert ./gpt2 ./gpt2-bf16 --dtype bfloat16",
    )
    _source(convert)
    _dest(convert)
    convert.add_argument(
        "--dtype",
        metavar="NAME",
        help="cast floating weights, such as to bfloat16, or to q8_0 with --to gguf (default: as they are)",
    )
    convert.add_argument("--task", help="keep the head of this task only (default: as config.json says)")
    convert.add_argument("--dequantize", action="store_true", help="write the arrays that quantised weights stand for")
    convert.add_argument(
        "--from", dest="from_format", metavar="FORMAT", help="read this format, where SOURCE has several"
    )
    convert.add_argument("--variant", metavar="NAME", help="of the source, as in model.NAME.safetensors")
    convert.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=True,
        help="read the new files again and compare the hash of every tensor (default: yes)",
    )  # fmt: skip

    export = command(
        "export",
        run_export,
        "write a checkpoint as programs for other processes: jax.export, or a SavedModel of TensorFlow",
        "fmodels export ./tiny-llama ./served --to tensorflow --generate --max-new-tokens 40",
    )
    _source(export)
    export.add_argument("dest", metavar="FOLDER", type=Path, help="a new or empty folder")
    export.add_argument(
        "--to",
        default="jax",
        metavar="FORMAT",
        help="jax or tensorflow, which needs no jax to run (default: %(default)s)",
    )
    export.add_argument("--task", help="the head of this task (default: as config.json says)")
    export.add_argument(
        "--dtype", metavar="NAME", help="cast floating weights, such as to float32 (default: as they are)"
    )
    export.add_argument("--dequantize", action="store_true", help="take the arrays that quantised weights stand for")
    export.add_argument(
        "--layers", choices=("list", "stacked"), default="list",
        help="one after the other, which runs faster on CPU, or in a loop, which compiles faster (default: %(default)s)",
    )  # fmt: skip
    export.add_argument(
        "--inputs",
        metavar="LIST",
        help="of forward: tokens and any of mask, positions, token_types, decoder_tokens, decoder_mask (default: tokens and mask)",
    )
    export.add_argument("--gradient", action="store_true", help="with --to jax: forward can be differentiated")
    export.add_argument("--platforms", metavar="LIST", help="with --to jax (default: cpu,cuda,tpu)")
    export.add_argument("--generate", action="store_true", help="generation too, with the options below")
    _generation(export)
    export.add_argument(
        "--per-call",
        metavar="LIST",
        help="options that each call gives, such as seed,temperature (default: seed,temperature,top_k,top_p when sampling)",
    )

    verify = command(
        "verify",
        run_verify,
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
        run_resize,
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

    prune = command(
        "prune", run_prune, "remove attention heads", 'fmodels prune ./gpt2 ./gpt2-pruned --heads "0:1,3;2:0"'
    )
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
        run_push,
        "upload a checkpoint folder to the Hub in one commit",
        "fmodels push ./gpt2-pruned me/gpt2-pruned --private",
    )
    push.add_argument("folder", metavar="FOLDER", type=Path, help="a checkpoint")
    push.add_argument("repo_id", metavar="REPO_ID", help="owner/name")
    push.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    push.add_argument("--revision", metavar="NAME", help="the branch (default: main)")
    push.add_argument("--create-pr", action="store_true", help="propose the commit in place of pushing it")
    push.add_argument("--message", metavar="TEXT", help="of the commit")
    push.add_argument("--variant", metavar="NAME", help="of the weights, as in model.NAME.safetensors")
    push.add_argument(
        "--certify", action="store_true", help="verify first, and put the certificate into the model card"
    )
    _token(push)

    bench = command(
        "bench", run_bench, "speed and memory, against transformers where it is installed", "fmodels bench --json"
    )
    bench.add_argument("names", metavar="NAME", nargs="*", help="which measurements (default: all)")
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As argparse's, which quotes arguments, but no token of the Hub."""
        super().error(re.sub(r"hf_\w+", "hf_…", message))


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        import fmodels

        print(f"fmodels {fmodels.__version__}")
        parser.exit()


def _source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a folder, or a Hub id such as openai-community/gpt2")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hub")
    parser.add_argument("--subfolder", metavar="NAME", help="of the source")
    parser.add_argument("--offline", action="store_true", help="use the Hub's cache and no network")
    _token(parser)


def _token(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--token", help="default: HF_TOKEN, or that of `hf auth login`")


def _generation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: the checkpoint's, else 20")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--sample", action="store_const", const=True, dest="do_sample", help="draw tokens at random")
    how.add_argument(
        "--greedy",
        action="store_const",
        const=False,
        dest="do_sample",
        help="take the likeliest token (default: as the checkpoint says)",
    )
    parser.add_argument("--temperature", type=float, metavar="X", help="when sampling; above 0")
    parser.add_argument(
        "--top-k", type=int, metavar="N", help="when sampling: of the N likeliest tokens; 0 for all, 50 by default"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="X", help="when sampling: of the likeliest with probability X together"
    )
    parser.add_argument(
        "--min-p", type=float, metavar="X", help="when sampling: of those with X times the likeliest's probability"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="above 1 makes tokens that were there less likely"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any option by its name in transformers' GenerationConfig, such as num_beams=4; the value is JSON or text",
    )


def _dest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dest", metavar="DEST", type=Path, help="a new or empty folder")
    parser.add_argument(
        "--to",
        default="safetensors",
        metavar="FORMAT",
        help="safetensors, torch, flax, tf, tf-checkpoint, gguf, npz, orbax (default: %(default)s)",
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="of a file of weights, such as 5GB (the default, but for gguf)"
    )
