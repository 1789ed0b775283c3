"""Which tensors of a checkpoint become which parameters of a model, by transformers' own list of conversions.

Importing this module imports transformers, which takes seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from lit_lora.checkpoint.conversion import Conversion

__all__ = ["find_conversions"]

# Buffers that old versions stored and that are computed today, beside those that a model lists itself: rotation
# frequencies, position ids, causal masks.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"(^|\.)attn\.(attention\.)?(masked_)?bias$")


def find_conversions(
    shapes: Mapping[str, tuple[int, ...]], model: Any, network: Any
) -> tuple[list[Conversion], list[str]]:
    """Work out how stored tensors become parameters.

    Args:
        shapes: Shape of every stored tensor by name, in the order of the files.
        model: The model; of one of transformers, what hosts it.
        network: The model of transformers, or ``model`` again if it is our own.

    Returns:
        The conversions in the order of the files, and the tensors that lie among the model's but are none of its own.
    """
    mapping = _Mapping(model, network)
    return mapping.conversions(mapping.text_names(shapes))


@dataclass(frozen=True)
class _Source:
    """A stored tensor on its way to a parameter."""

    stored: str
    """Its name in the files."""
    renamed: str
    """Its name after transformers' renamings, by which its converters know it."""
    pattern: str | None
    """The pattern of the converter that takes it; ``None`` if it only has another name."""


class _Mapping:
    """The conversions that transformers has for a model; arguments as of :func:`find_conversions`."""

    def __init__(self, model: Any, network: Any) -> None:
        self.state = model.state_dict(keep_vars=True)
        self.embedding = network.get_input_embeddings().weight
        # GPT-2's linear layers, which the model holds the other way round.
        self.transposed = {f"{layer}.weight" for layer in getattr(model, "transposed", ())}
        source_type = getattr(model.config, "source", {}).get("model_type", model.config.model_type)
        self.composite = source_type != model.config.model_type
        self.ignored = list(_COMPUTED)
        if isinstance(network, PreTrainedModel):
            transforms = get_model_conversion_mapping(network)
            self.base = f"{network.base_model_prefix}."
            self.ignored += network._keys_to_ignore_on_load_unexpected or ()
        else:
            transforms = get_checkpoint_conversion_mapping(model.config.model_type) or []  # type: ignore[no-untyped-call]
            self.base = f"{model.config.names.decoder}."
        self.converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self.renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]

    def text_names(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Stored tensors of the text model, and what they are called in a checkpoint of the text model alone.

        Those of a composite model lie under a prefix that is not the text model's own, and that has changed: version 4
        of transformers wrote ``language_model.model.layers`` and ``language_model.lm_head``, version 5 ``lm_head`` and
        ``model.language_model.layers``. The embedding shows where they are.
        """
        embedding = next(name for name, tensor in self.state.items() if tensor is self.embedding)
        end = embedding.removeprefix(self.base)
        prefixes = [
            name.removesuffix(end)
            for name, shape in shapes.items()
            if name.endswith(f".{end}") and shape[1:] == self.embedding.shape[1:]
        ]
        if not prefixes or (self.base in prefixes and not self.composite):
            return {name: name for name in shapes}

        prefix = self.base if self.base in prefixes else min(prefixes, key=len)
        # What the text model has beside its decoder, such as the head, is beside the decoder in the files, too, or at
        # their top.
        beside = {name for name in self.state if not name.startswith(self.base)}
        outer = prefix.removesuffix(self.base)
        names = {}
        for name in shapes:
            if name.startswith(prefix):
                names[name] = self.base + name.removeprefix(prefix)
            elif name.removeprefix(outer) in beside:
                names[name] = name.removeprefix(outer)
        return names

    def conversions(self, text_names: Mapping[str, str]) -> tuple[list[Conversion], list[str]]:
        """Those of the text model's tensors, and the ones among them that the model has no place for."""
        parts: dict[str, list[_Source]] = {}  # by the first of their parameters
        unexpected = []
        # In transformers' order, which experts are stacked in: by number, not by letter.
        for stored in sorted(text_names, key=dot_natural_key):
            parameter, source = self._target(stored, text_names[stored])
            is_second = source.pattern is None and parameter in parts
            if parameter in self.state and not is_second:
                parts.setdefault(parameter, []).append(source)
            elif not any(re.search(pattern, name) for pattern in self.ignored for name in (source.renamed, parameter)):
                unexpected.append(stored)

        conversions = [self._conversion(parameter, sources) for parameter, sources in parts.items()]
        position = {name: index for index, name in enumerate(text_names)}
        conversions.sort(key=lambda conversion: min(position[name] for name in conversion.stored))
        return conversions, unexpected

    def _target(self, stored: str, name: str) -> tuple[str, _Source]:
        """The parameter that a tensor becomes (the first of several); ``name`` is that of the text model alone."""
        renamed, _ = rename_source_key(name, self.renamings, [])
        base = self.base.removesuffix(".")
        parameter, pattern = rename_source_key(name, self.renamings, self.converters, base, self.state)
        if parameter not in self.state and name in self.state:  # a renaming for older files has spoiled its final name
            renamed, parameter, pattern = name, name, None
        return parameter, _Source(stored, renamed, pattern)

    def _conversion(self, parameter: str, sources: list[_Source]) -> Conversion:
        stored = tuple(source.stored for source in sources)
        patterns = tuple(source.pattern for source in sources if source.pattern is not None)
        if not patterns:
            return Conversion(stored, (parameter,), transposed=parameter in self.transposed)
        converter = next(converter for converter in self.converters if patterns[0] in converter.source_patterns)
        first, *others = converter.target_patterns
        parameters = (parameter, *(parameter.replace(first, other) for other in others))
        converter_names = tuple(source.renamed for source in sources)
        return Conversion(stored, parameters, False, converter, patterns, converter_names)
