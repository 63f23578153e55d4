"""The model card that is pushed with a checkpoint which has none: what it is, its hash, and its certificate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from fmodels.certificate import Certificate
from fmodels.models import Config
from fmodels.text import size

PIPELINES = {
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "seq2seq-lm": "text2text-generation",
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "multiple-choice": "multiple-choice",
    "base": "feature-extraction",
}
"""Task -> the Hub's name of what a model does; the others have none."""


def model_card(
    config: Config,
    *,
    name: str,
    parameters: int,
    bytes_by_dtype: Mapping[str, int],
    sha256: str,
    certificate: Certificate | None = None,
    tags: Sequence[str] = (),
) -> str:
    """A README.md for the Hub.

    Args:
        config: of the model.
        name: of the repository.
        parameters: how many it has.
        bytes_by_dtype: dtype -> bytes of its tensors.
        sha256: of all tensors, as `fm.convert` gives it.
        certificate: what `fm.verify` found.
        tags: more of them.

    Example:
        >>> import fmodels as fm
        >>> config = fm.models.gpt2.Config(task="causal-lm")
        >>> card = model_card(config, name="me/x", parameters=1, bytes_by_dtype={"float32": 4}, sha256="ab")
        >>> card.splitlines()[1:4]
        ['library_name: transformers', 'pipeline_tag: text-generation', 'tags: ["fmodels", "jax", "gpt2"]']
    """
    head = ["library_name: transformers"]
    if config.task in PIPELINES:
        head.append(f"pipeline_tag: {PIPELINES[config.task]}")
    head.append(f"tags: {json.dumps(list(dict.fromkeys(['fmodels', 'jax', config.model_type, *tags])))}")
    rows = {
        "model_type": config.model_type,
        "architecture": config.ARCHITECTURES[config.task],
        "parameters": f"{parameters:,}",
        "weights": ", ".join(f"{size(count)} of {dtype}" for dtype, count in bytes_by_dtype.items()),
        "sha256 of the tensors": f"`{sha256}`",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    text = (
        "---\n" + "\n".join(head) + f"\n---\n\n# {name.rpartition('/')[2]}\n\n| | |\n|---|---|\n{table}\n\n"
        f'```python\nimport fmodels as fm\nparams, config = fm.load("{name}")\n```\n'
    )
    if certificate is not None:
        text += f"\n## Certificate\n\n```text\n{certificate.to_table()}\n```\n"
    return text
