"""Rotary settings, from and to config.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fmodels.nn.positions import Rope

ROPE_KEYS = {
    "rope_type": "type",
    "rope_theta": "theta",
    "original_max_position_embeddings": "original_max_positions",
    **{
        name: name
        for name in (
            "factor attention_factor beta_fast beta_slow mscale mscale_all_dim truncate short_factor long_factor "
            "low_freq_factor high_freq_factor partial_rotary_factor"
        ).split()
    },
}
"""transformers' key -> field of `Rope`."""

ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}
"""Type -> the keys that it cannot do without."""

OWN_KEYS = frozenset(
    "rope_parameters rope_scaling rope_theta partial_rotary_factor original_max_position_embeddings".split()
)
"""The keys of config.json that `read_rope` reads."""


def read_rope(
    data: Mapping[str, Any],
    problems: list[str],
    *,
    head_dim: int,
    max_positions: int,
    default: Rope = Rope(),
    partial: bool = False,
) -> Rope:
    """Rotary settings from a config.json of transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`).

    Args:
        data: the config.json, or what stands in its place for some of the layers.
        problems: what is wrong is added here.
        head_dim: size of a head.
        max_positions: the config's maximum of positions.
        default: whose base and part of the head hold where none is given.
        partial: whether the family can rotate a part of each head.
    """
    given = data.get("rope_scaling") or data.get("rope_parameters") or {}
    found = {key: value for key, value in given.items() if key != "type" and value is not None}
    kind = given.get("rope_type") or given.get("type") or "default"
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in ROPE_NEEDS:
        problems.append(f"rope_type={kind!r} is not supported, only {', '.join(ROPE_NEEDS)}")
        return default
    for key, otherwise in (("rope_theta", default.theta), ("partial_rotary_factor", default.partial_rotary_factor)):
        found.setdefault(key, otherwise if data.get(key) is None else data[key])
    original = data.get("original_max_position_embeddings")
    if kind in ("yarn", "longrope", "llama3"):
        found.setdefault("original_max_position_embeddings", max_positions)
        found["original_max_position_embeddings"] = original or found["original_max_position_embeddings"]
    problems += [
        f"rope parameter {key!r} (value {value!r}) is not understood"
        for key, value in found.items()
        if key not in ROPE_KEYS
    ]
    problems += [f"rope_type={kind!r} needs {key!r}" for key in ROPE_NEEDS[kind] if key not in found]
    share = found["partial_rotary_factor"]
    if share != 1.0 and kind != "proportional" and not partial:
        problems.append(f"partial_rotary_factor={share!r} with rope_type={kind!r} is not supported")
    size = (rotated(head_dim, Rope(type=kind, partial_rotary_factor=share)) + 1) // 2
    for key in ("short_factor", "long_factor"):
        if key in found and len(found[key]) != size:
            problems.append(
                f"rope parameter {key!r} has {len(found[key])} numbers, expected {size}, half of what is rotated of a head"
            )
    values: dict[str, Any] = {field: found[key] for key, field in ROPE_KEYS.items() if key in found}
    values = {field: tuple(value) if isinstance(value, list) else value for field, value in values.items()}
    return Rope(**{**values, "type": kind})


TYPES: tuple[str, str] = ("full_attention", "sliding_attention")
"""The types of layers in families whose layers with a window have rotary settings of their own."""


def read_ropes(
    data: Mapping[str, Any],
    problems: list[str],
    bases: tuple[float, float],
    *,
    scaled: Collection[str],
    head_dim: int,
    max_positions: int,
) -> tuple[Rope, Rope]:
    """The rotary settings of both `TYPES`, from a config.json whose `rope_parameters` have them by type.

    Args:
        data: the config.json.
        problems: what is wrong is added here.
        bases: of both types, where `rope_parameters` do not give them.
        scaled: the types that `rope_scaling` of transformers 4 is for.
        head_dim: size of a head.
        max_positions: the config's maximum of positions.
    """
    given, scaling = data.get("rope_parameters") or {}, data.get("rope_scaling") or {}
    problems += [
        f"rope_parameters has {name!r}, known are {' and '.join(TYPES)}" for name in given if name not in TYPES
    ]
    if "type" in scaling and "rope_type" not in scaling:
        problems.append(
            f"rope_scaling has 'type' (value {scaling['type']!r}) and no 'rope_type': transformers 4 scales by it, "
            "transformers 5 does not. Write 'rope_type'"
        )

    def of(name: str, base: float) -> Rope:
        own = {**(given.get(name) or {}), **(scaling if name in scaled else {})}
        own.pop("truncate", None)  # which transformers looks for beside the types, where it cannot be
        return read_rope(
            {"rope_parameters": own}, problems, head_dim=head_dim, max_positions=max_positions, default=Rope(theta=base)
        )

    full, local = map(of, TYPES, bases)
    return full, local


def rotated(head_dim: int, rope: Rope) -> int:
    """How many numbers of each head are rotated; `proportional` rotates some of the pairs by nothing instead."""
    return head_dim if rope.type == "proportional" else int(head_dim * rope.partial_rotary_factor)


def rope_parameters(rope: Rope, *, partial: bool = False) -> dict[str, Any]:
    """`rope_parameters` of transformers 5; with `partial`, those of a family whose default of that part is its own."""
    values = {key: getattr(rope, field) for key, field in ROPE_KEYS.items()}
    always = {"rope_type", "rope_theta", *(("partial_rotary_factor",) if partial else ())}
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
        if key in always or value != getattr(Rope(), ROPE_KEYS[key])
    }


def write_ropes(*ropes: Rope) -> dict[str, Any]:
    """`rope_parameters` of both `TYPES`."""
    return {"rope_parameters": {name: rope_parameters(rope) for name, rope in zip(TYPES, ropes, strict=True)}}


def write_rope(rope: Rope, *, partial: bool = False) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, and beside it what transformers 4 reads."""
    parameters = rope_parameters(rope, partial=partial)
    scaling = (
        None if rope.type == "default" else {key: value for key, value in parameters.items() if key != "rope_theta"}
    )
    share = {"partial_rotary_factor": rope.partial_rotary_factor} if partial else {}
    return {"rope_parameters": parameters, "rope_theta": rope.theta, "rope_scaling": scaling, **share}
