"""What trains in addition to a low-rank update: whole modules, biases, and the rows of single tokens.

Each is a float32 copy that the forward pass uses instead of the base's values; the base keeps its own, so removing the
adapter restores the base model bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lit_lora.errors import UsageError
from lit_lora.peft.core.matching import matches
from lit_lora.peft.core.module_names import names_of
from lit_lora.peft.core.modules import OwnModule, embed_scale, replace_module
from lit_lora.peft.core.updates import Replace, Rows, Update

__all__ = ["TokenEmbedding", "TokenHead", "TrainedCopy", "find_embedding", "find_head", "train_rows", "train_tokens"]


class TrainedCopy(OwnModule):
    """A module whose parameters, some or all, train in full as float32 copies.

    Args:
        base_layer: A module with parameters of its own (a linear layer, an embedding, a norm).
        names: The parameters to train; all if omitted.
    """

    def __init__(self, base_layer: nn.Module, names: Iterable[str] | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        parameters = dict(base_layer.named_parameters(recurse=False))
        copies = {
            name: nn.Parameter(parameters[name].detach().to(torch.float32, copy=True))
            for name in (parameters if names is None else names)
        }
        self.trained = nn.ParameterDict(copies)  # sorts them by name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward pass with the trained values, computed in the base's dtype."""
        base = dict(self.base_layer.named_parameters(recurse=False))
        values = {name: value.to(base[name].dtype) for name, value in self.trained.items()}
        return functional_call(self.base_layer, values, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """A parameter of the base layer with its trained values: some models read one instead of calling the layer."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            parts = self.__dict__.get("_modules", {})
            if "trained" not in parts or name not in parts["base_layer"]._parameters:
                raise
        value = parts["base_layer"]._parameters[name]
        return parts["trained"][name].to(value.dtype) if name in parts["trained"] else value

    def grow(self, rows: int) -> None:
        """Enlarge the weight to ``rows`` rows, such as for an embedding with more tokens than the base has.

        If it grows, all values are zero, to be filled in.
        """
        weight = self.trained["weight"]
        if rows > len(weight):
            self.trained["weight"] = nn.Parameter(weight.new_zeros(rows, *weight.shape[1:]))

    def updates(self) -> dict[str, Update]:
        """The trained values replace the base's."""
        return {name: Replace(value.detach()) for name, value in self.trained.items()}

    def file_tensors(self) -> dict[str, Tensor]:
        """The trained values under the base's names."""
        return dict(self.trained.items())


class TokenEmbedding(OwnModule):
    """An embedding that trains only the rows of some tokens, and may have more tokens than its base.

    Args:
        base_layer: The embedding (V, D); it stays unchanged and does not grow.
        ids: Token ids, ascending; those from V on are added.
        rows: (n, D) float32, one per id.
    """

    def __init__(self, base_layer: nn.Embedding, ids: Sequence[int], rows: nn.Parameter) -> None:
        super().__init__()
        self.base_layer: nn.Embedding = base_layer
        self.ids = tuple(ids)
        self.token_rows = rows
        # Token id -> its row in token_rows, or -1.
        vocabulary = max(base_layer.weight.shape[0], self.ids[-1] + 1)
        slots = torch.full((vocabulary,), -1, device=base_layer.weight.device)
        slots[list(self.ids)] = torch.arange(len(self.ids), device=slots.device)
        self.slots: Tensor
        self.register_buffer("slots", slots, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed (...,) int64 to (..., D)."""
        # Every token is looked up in both tables, clamped to a row that exists: one choice at the end costs less than
        # sorting the tokens, and its shapes do not depend on the ids, as a CUDA graph needs.
        slots = self.slots[input_ids]
        base: Tensor = self.base_layer(input_ids.clamp(max=self.base_layer.weight.shape[0] - 1))
        rows = nn.functional.embedding(slots.clamp(min=0), self.token_rows)
        trained = (rows * embed_scale(self.base_layer)).to(base.dtype)
        return torch.where((slots >= 0)[..., None], trained, base)

    def updates(self) -> dict[str, Update]:
        """The rows of the trained tokens."""
        return {"weight": Rows(self.ids, self.token_rows.detach())}

    def file_tensors(self) -> dict[str, Tensor]:
        """The rows; a tied head has the embedding's."""
        return {"token_adapter.trainable_tokens_delta": self.token_rows}


class TokenHead(OwnModule):
    """An output head that trains only the rows of some tokens, and may have more tokens than its base.

    Args:
        base_layer: The head (V, D) without bias; it stays unchanged and does not grow.
        ids: Token ids, ascending; those from V on are added.
        rows: (n, D) float32, one per id; the embedding's parameter if the two are tied.
    """

    def __init__(self, base_layer: nn.Linear, ids: Sequence[int], rows: nn.Parameter) -> None:
        super().__init__()
        self.base_layer: nn.Linear = base_layer
        self.ids = tuple(ids)
        self.token_rows = rows
        # Ids ascend, so those of the base's tokens come first.
        self.in_base = sum(token < base_layer.weight.shape[0] for token in self.ids)
        device = base_layer.weight.device
        self.columns: Tensor
        self.register_buffer("columns", torch.tensor(self.ids[: self.in_base], device=device), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., D) to logits (..., V + added tokens)."""
        logits: Tensor = self.base_layer(hidden)
        trained = nn.functional.linear(hidden, self.token_rows.to(hidden.dtype))  # (..., n)
        if self.in_base:
            logits = logits.index_copy(-1, self.columns, trained[..., : self.in_base])
        if self.in_base < len(self.ids):
            logits = torch.cat([logits, trained[..., self.in_base :]], dim=-1)
        return logits

    def updates(self) -> dict[str, Update]:
        """The rows of the trained tokens."""
        return {"weight": Rows(self.ids, self.token_rows.detach())}

    def file_tensors(self) -> dict[str, Tensor]:
        """The rows; a tied head has the embedding's."""
        return {"token_adapter.trainable_tokens_delta": self.token_rows}


def find_embedding(model: nn.Module) -> str | None:
    """Name of the token embedding, or ``None`` if the model has no plain ``nn.Embedding`` for it."""
    return _find(model, nn.Embedding, names_of(model).embedding, "get_input_embeddings")


def find_head(model: nn.Module) -> str | None:
    """Name of the output head with one row per token, or ``None`` if the model has no plain linear layer for it."""
    return _find(model, nn.Linear, names_of(model).head, "get_output_embeddings")


def train_tokens(model: nn.Module, ids: Iterable[int]) -> None:
    """Let the rows of single tokens train, in the embedding and in the head; if those are tied, one row for both.

    A token that is new to the model is added, initialized to the mean of all rows.

    Raises:
        UsageError: There is no embedding, it is already adapted, or the new ids leave a gap after the vocabulary.
    """
    ids = sorted(set(ids))
    embedding = find_embedding(model)
    head = find_head(model)
    if embedding is None:
        raise UsageError("peft.trainable_tokens: the model has no plain token embedding")
    tied = head is not None and model.get_submodule(head).weight is model.get_submodule(embedding).weight
    rows = train_rows(model, embedding, ids)
    if head is not None:
        train_rows(model, head, ids, rows if tied else None)


def train_rows(model: nn.Module, name: str, ids: Sequence[int], rows: nn.Parameter | None = None) -> nn.Parameter:
    """Let the rows of single tokens train in one module, in place.

    Args:
        model: The model with the module; changed in place.
        name: Name of an embedding or an output head.
        ids: Token ids, ascending; new ones follow the module's rows without a gap.
        rows: (n, D) float32, the rows of another module to share; copies of the base's if omitted.

    Returns:
        The rows.

    Raises:
        UsageError: The module is neither an embedding nor a head, or the ids do not fit it.
    """
    base = model.get_submodule(name)
    if not isinstance(base, nn.Embedding | nn.Linear):
        raise UsageError(f"peft.trainable_tokens: {name} is {type(base).__name__}, expected an embedding or a head")
    vocabulary = base.weight.shape[0]
    added = [token for token in ids if token >= vocabulary]
    if not ids or ids[0] < 0 or added != list(range(vocabulary, vocabulary + len(added))):
        raise UsageError(
            f"peft.trainable_tokens: expected ids >= 0, and new ones from {vocabulary} on without gaps, got {ids[:10]}"
        )
    if rows is None:
        rows = _initial_rows(base.weight, ids)
    wrapper = TokenEmbedding(base, ids, rows) if isinstance(base, nn.Embedding) else TokenHead(base, ids, rows)
    replace_module(model, name, wrapper)
    return rows


def _initial_rows(weight: Tensor, ids: Sequence[int]) -> nn.Parameter:
    """The base's rows, and their mean over the vocabulary for each new token, (n, D) float32."""
    weight = weight.detach()
    in_base = [token for token in ids if token < weight.shape[0]]
    rows = weight[in_base].float()
    if len(in_base) < len(ids):
        mean = weight.mean(0, keepdim=True, dtype=torch.float32)
        rows = torch.cat([rows, mean.expand(len(ids) - len(in_base), -1)])
    return nn.Parameter(rows.clone())


def _find(model: nn.Module, kind: type[nn.Module], pattern: str, getter: str) -> str | None:
    """Name of the first module of a kind that a pattern matches, else of the one that a method of the model returns."""
    candidates: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if isinstance(module, kind)
    }
    for name in candidates:
        if matches(pattern, name):
            return name
    if hasattr(model, getter):
        module = getattr(model, getter)()
        for name, candidate in candidates.items():
            if candidate is module:
                return name
    return None
