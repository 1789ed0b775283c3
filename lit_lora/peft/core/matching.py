"""Modules chosen by name: which names a pattern means, and the shortest pattern for some names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lit_lora.config import did_you_mean
from lit_lora.errors import UsageError
from lit_lora.peft.core.modules import own_modules
from lit_lora.quantize import QuantizedLinear

__all__ = ["listed", "matches", "select", "short_names"]


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` names the module: its whole dotted name or whole last parts of it, ``*`` standing for any.

    ``q_proj``, ``self_attn.q_proj``, ``model.layers.*.q_proj`` and ``*_proj`` all match
    ``model.layers.0.self_attn.q_proj``; ``proj`` does not.
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def select(patterns: Iterable[str], names: Iterable[str], *, key: str) -> list[str]:
    """The names that any pattern matches, in their own order.

    Args:
        patterns: As in :func:`matches`.
        names: Dotted names to choose from.
        key: The settings key that the patterns come from, for the message.

    Raises:
        UsageError: A pattern matches nothing.
    """
    names, patterns = list(names), list(patterns)
    problems = [_no_match(pattern, names, key) for pattern in patterns if not any(matches(pattern, n) for n in names)]
    if problems:
        raise UsageError("\n".join(problems))
    return [name for name in names if any(matches(pattern, name) for pattern in patterns)]


def listed(names: Sequence[str], what: str = "tensor") -> str:
    """``1 tensor (a)`` or ``5 tensors (a, b, c, …)``, at most three names."""
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown})"


def short_names(model: nn.Module, names: list[str]) -> list[str]:
    """The last parts of the names of modules where they mean exactly these, else the names in full."""
    ends = dict.fromkeys(name.rpartition(".")[2] for name in names)
    own = own_modules(model)
    inside = tuple(f"{name}." for name in own)
    known = [n for n, m in model.named_modules() if n in own or (_has_own(m) and not n.startswith(inside))]
    meant = [name for name in known if name.rpartition(".")[2] in ends]
    return sorted(ends) if sorted(meant) == sorted(names) else sorted(names)


def _has_own(module: nn.Module) -> bool:
    """Whether a module has weights of its own, not only in its children."""
    return isinstance(module, QuantizedLinear) or any(True for _ in module.parameters(recurse=False))


def _no_match(pattern: str, names: Sequence[str], key: str) -> str:
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    there = ", ".join(ends[:20]) + (", …" if len(ends) > 20 else "")
    return f"{key}: {pattern!r} matches no module{did_you_mean(pattern, ends)}, there are: {there or 'none'}"
