"""Modules chosen by name: which names a pattern matches, and the shortest patterns for some names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lit_lora.config import did_you_mean
from lit_lora.errors import UsageError
from lit_lora.peft.core.modules import own_modules
from lit_lora.quantize import QuantizedLinear, quantized_stacks

__all__ = ["listed", "matches", "select", "short_names"]


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches the whole dotted name or its last parts; ``*`` stands for any characters.

    ``q_proj``, ``self_attn.q_proj``, ``model.layers.*.q_proj`` and ``*_proj`` all match
    ``model.layers.0.self_attn.q_proj``; ``proj`` does not.
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def select(patterns: Iterable[str], names: Iterable[str], *, key: str, what: str = "module") -> list[str]:
    """The names that any pattern matches, in their own order.

    Args:
        patterns: As in :func:`matches`.
        names: Dotted names to choose from.
        key: The settings key that the patterns come from, for the message.
        what: What the names are of, for the message.

    Raises:
        UsageError: A pattern matches nothing.
    """
    names = list(names)
    selected: set[str] = set()
    problems = []
    for pattern in patterns:
        matching = [name for name in names if matches(pattern, name)]
        selected.update(matching)
        if not matching:
            problems.append(_no_match(pattern, names, key, what))
    if problems:
        raise UsageError("\n".join(problems))
    return [name for name in names if name in selected]


def listed(names: Sequence[str], what: str = "tensor") -> str:
    """``1 tensor (a)`` or ``5 tensors (a, b, c, …)``, with three names at most."""
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown})"


def short_names(model: nn.Module, names: list[str]) -> list[str]:
    """The last parts of module names if they match these modules and no others in the base, else the full names."""
    last_parts = {_last_part(name) for name in names}
    own = own_modules(model)
    inside = tuple(f"{name}." for name in own)

    matching = []
    for name, module in model.named_modules():
        # A wrapper counts as the module it wraps; what is inside it is no module of the base.
        in_base = name in own or (_has_weights(module) and not name.startswith(inside))
        if in_base and _last_part(name) in last_parts:
            matching.append(name)
    return sorted(last_parts) if sorted(matching) == sorted(names) else sorted(names)


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _has_weights(module: nn.Module) -> bool:
    """Whether a module has weights itself, not only in its children."""
    is_quantized = isinstance(module, QuantizedLinear) or bool(quantized_stacks(module))
    return is_quantized or any(True for _ in module.parameters(recurse=False))


def _no_match(pattern: str, names: Sequence[str], key: str, what: str) -> str:
    last_parts = list(dict.fromkeys(_last_part(name) for name in names))
    available = ", ".join(last_parts[:20]) + (", …" if len(last_parts) > 20 else "")
    suggestion = did_you_mean(pattern, last_parts)
    return f"{key}: {pattern!r} matches no {what}{suggestion}, available: {available or 'none'}"
