"""The command that writes programs: export."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from fmodels.cli.common import generation_options, new_folder, print_json, resolve

EXAMPLES = {
    "tokens": [[1, 2, 3]], "decoder_tokens": [[1, 2, 3]], "mask": [[1, 1, 1]], "decoder_mask": [[1, 1, 1]],
    "positions": [[0, 1, 2]], "token_types": [[0, 0, 0]], "seed": 0,
}  # fmt: skip
"""Inputs for the lines that show how a program is run."""
OF_GENERATE = "max_new_tokens do_sample temperature top_k top_p min_p repetition_penalty option per_call".split()


def run_export(args: argparse.Namespace) -> int:
    """`forward`, and `generate` if asked for, as programs beside their weights; shows how they are run."""
    _check(args)
    from fmodels import export
    from fmodels.checkpoint import load
    from fmodels.conversion import copy_others
    from fmodels.transforms.dequantizing import dequantize
    from fmodels.weights.quantized import dialects_of

    saved_model = _saved_model() if args.to == "tensorflow" else None
    inputs, per_call, platforms = map(_listed, (args.inputs, args.per_call, args.platforms))
    source = resolve(args)
    with new_folder(source, args.dest) as stage:
        params, config = load(source, task=args.task, dtype=args.dtype, layers=args.layers)
        if args.dequantize:
            params = dequantize(params)
        elif saved_model is not None and dialects_of(params):
            raise ValueError(
                "a SavedModel has no quantised weights; add --dequantize for the arrays that they stand for"
            )
        programs = {"forward": export.forward_program(params, config, inputs)}
        choice: dict[str, Any] = {}
        if args.generate:
            own = None if config.generation is None else config.generation.max_new_tokens
            choice = {
                "max_new_tokens": args.max_new_tokens or own or 20,
                "options": generation_options(args, config),
                "per_call": per_call,
            }
            programs["generate"] = export.generate_program(params, config, **choice)
        copied: list[str] = []
        if saved_model is not None:
            saved_model(params, config, stage, inputs=inputs, layers=args.layers, **choice)
        else:
            copied = copy_others(source, stage) if source.is_dir() else []
            platforms = platforms or export.PLATFORMS
            export.write(programs, params, config, stage, platforms=platforms, gradient=args.gradient)
        files = sorted(path for path in stage.rglob("*") if path.is_file())
        result: dict[str, Any] = {
            "source": str(source), "dest": str(args.dest), "to": args.to,
            "platforms": list(platforms or export.PLATFORMS),
            "programs": {
                name: {"inputs": program.inputs, "limits": program.limits, **program.info}
                for name, program in programs.items()
            },
            "bytes": sum(path.stat().st_size for path in files),
            "files": [path.relative_to(stage).as_posix() for path in files],
            "copied": copied,
            "run": _how_to_run(args, config, programs),
        }  # fmt: skip
    print_json(result) if args.json else _show(result)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises for what does not go together, before anything is read."""
    if args.to == "onnx":
        from interop import onnx

        onnx.export({}, None, args.dest)
    if args.to not in ("jax", "tensorflow"):
        raise ValueError(f"--to {args.to!r}: expected jax or tensorflow")
    if not args.generate and any(getattr(args, name) not in (None, []) for name in OF_GENERATE):
        raise ValueError("options of generation change nothing without it; add --generate")
    if args.to != "jax" and (args.platforms or args.gradient):
        raise ValueError(
            "--platforms and --gradient are for --to jax; a SavedModel is for cpu, cuda and tpu, without gradient"
        )


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _saved_model() -> Any:
    """`interop.saved_model.export` of a tree."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf
    except ImportError:
        raise ImportError("--to tensorflow needs the package tensorflow: pip install 'fmodels[tensorflow]'") from None
    from interop.saved_model import export
    from interop.tensorflow import TFModel

    tf.get_logger().setLevel("WARNING")
    return lambda params, config, folder, **given: export(TFModel(params, config), folder, **given)


def _how_to_run(args: argparse.Namespace, config: Any, programs: Mapping[str, Any]) -> list[str]:
    """The lines of Python that run each program once."""
    given = {
        name: {n: _example(n, axes, program.info) for n, (axes, _) in program.inputs.items()}
        for name, program in programs.items()
    }
    result = {"forward": "hidden" if config.task == "base" else "logits", "generate": "tokens"}
    folder = str(args.dest)
    if args.to == "jax":
        calls = {name: ", ".join(f"{n}={value!r}" for n, value in values.items()) for name, values in given.items()}
        return [
            "import fmodels as fm",
            f"exported = fm.load_exported({folder!r})",
            *(f"print(exported.{name}(exported.params, {call}).{result[name]})" for name, call in calls.items()),
        ]
    signatures = {"forward": "serving_default", "generate": "generate"}
    calls = {
        name: ", ".join(f"{n}=tf.constant({value!r})" for n, value in values.items()) for name, values in given.items()
    }
    return [
        "import tensorflow as tf",
        f"loaded = tf.saved_model.load({folder!r})",
        *(f"print(loaded.signatures[{signatures[n]!r}]({call})[{result[n]!r}])" for n, call in calls.items()),
    ]


def _example(name: str, axes: str, info: Mapping[str, Any]) -> Any:
    """A value for an input: what the export has as its default, else one that shows the form."""
    default = info.get("defaults", {}).get(name)
    if isinstance(default, float):
        return float(f"{default:.6g}")  # it was in float32
    value = EXAMPLES[name] if default is None else default
    return [value] if axes == "b n t" else value


def _show(result: Mapping[str, Any]) -> None:
    from fmodels.text import size, table

    kind = {"jax": "jax.export", "tensorflow": "SavedModel"}[result["to"]]
    print(f"{result['dest']}: {kind} for {', '.join(result['platforms'])}, {size(result['bytes'])}")
    rows = []
    for name, program in result["programs"].items():
        inputs = [f"{n} ({axes}) {dtype}" if axes else f"{n} {dtype}" for n, (axes, dtype) in program["inputs"].items()]
        most = [f"{letter} up to {limit}" for letter, limit in program["limits"].items()]
        most += [f"{program['max_new_tokens']} new tokens at most"] if "max_new_tokens" in program else []
        rows.append([name, ", ".join(inputs) + "".join(f"; {text}" for text in most)])
    print(table(rows))
    if result["copied"]:
        print(f"copied: {', '.join(result['copied'])}")
    print("to run it:")
    print("\n".join(f"    {line}" for line in result["run"]))
