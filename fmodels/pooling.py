"""How a sentence-transformers folder turns hidden states into one vector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODES = {
    "cls": ("cls", "pooling_mode_cls_token"),
    "max": ("max", "pooling_mode_max_tokens"),
    "mean": ("mean", "pooling_mode_mean_tokens"),
    "mean_sqrt_len": ("mean_sqrt_len_tokens", "pooling_mode_mean_sqrt_len_tokens"),
    "weighted_mean": ("weightedmean", "pooling_mode_weightedmean_tokens"),
    "last": ("lasttoken", "pooling_mode_lasttoken"),
}
"""Name of a mode -> sentence-transformers' name of it, and the older key that switches it on, in their order."""

JOIN, THEN = "+", " > "
"""Between modes whose vectors lie side by side, and before what follows the pooling that `embed` does not compute."""


def read_pooling(folder: Path) -> dict[str, Any]:
    """`pooling` and `normalize` from modules.json and the pooling module's config; empty without modules.json.

    `pooling` is a key of `MODES`, or several with `+` between them. What `fmodels.embed` cannot compute is named behind a
    `>` (`"mean > Dense"`): the model loads, and `embed` refuses. A Transformer in a subfolder is understood when it is
    that subfolder that is loaded.

    Raises:
        ValueError: modules.json or the pooling's config.json is broken; the message names the file.

    Example:
        >>> read_pooling(Path("/there/is/no/modules.json/here"))
        {}
    """
    root = next((place for place in (folder, folder.parent) if (place / "modules.json").is_file()), None)
    modules = [] if root is None else _modules(root / "modules.json")
    if root is None or not modules or (root / modules[0][1]).resolve() != folder.resolve():
        return {}
    found: list[str] = []
    normalize = False
    for kind, path in modules[1:]:
        if kind == "Pooling" and not found:
            file = root / path / "config.json"
            found += _modes(file) if file.is_file() else ["Pooling without its config.json"]
        elif kind == "Normalize" and found and not normalize:
            normalize = True
        else:
            found.append(kind)
    return {"pooling": THEN.join(found), "normalize": normalize} if found else {}


def _modules(path: Path) -> list[tuple[str, str]]:
    """The class name and the folder of each module, in order."""
    data = _read(path, list)
    try:
        return [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in data]
    except (KeyError, TypeError):
        raise ValueError(f"load: each entry of {str(path)!r} must have 'type' and 'path'; got {data!r}") from None


def _modes(path: Path) -> list[str]:
    data = _read(path, dict)
    if "pooling_mode" in data:
        given = data["pooling_mode"]
        names = {theirs: ours for ours, (theirs, _) in MODES.items()}
        wanted = given if isinstance(given, list) else [given]
        unknown = [mode for mode in wanted if mode not in names]
        if unknown or not wanted:
            raise ValueError(f"load: {str(path)!r}: pooling_mode={given!r} is not supported, only {', '.join(names)}")
        modes = [names[mode] for mode in wanted]
    else:
        modes = [ours for ours, (_, key) in MODES.items() if data.get(key)] or ["mean"]
    prompt = data.get("include_prompt", True)
    return [JOIN.join(modes)] if prompt else [JOIN.join(modes), "Pooling with include_prompt=false"]


def _read(path: Path, kind: type) -> Any:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load: {str(path)!r} is not valid JSON: {error}; download it again") from None
    if not isinstance(data, kind):
        raise ValueError(f"load: {str(path)!r} must hold a JSON {kind.__name__}, got {type(data).__name__}")
    return data
