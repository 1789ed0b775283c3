"""What trains beside a low-rank update: whole modules, biases, and the rows of single tokens.

Each is a copy in float32 that the forward pass uses in the place of the base's values; the base keeps its own, so
taking the adapter out gives the base model back bit for bit.
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
from lit_lora.peft.core.modules import OwnModule, replace_module
from lit_lora.peft.core.updates import Replace, Rows, Update

__all__ = ["TokenEmbedding", "TokenHead", "TrainedCopy", "find_embedding", "find_head", "train_rows", "train_tokens"]


class TrainedCopy(OwnModule):
    """A module of which some or all parameters train in full, as float32 copies.

    Args:
        base_layer: A module with parameters of its own (a linear layer, an embedding, a norm).
        names: Which of its parameters train; all when omitted.
    """

    def __init__(self, base_layer: nn.Module, names: Iterable[str] | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        parameters = dict(base_layer.named_parameters(recurse=False))
        chosen = parameters if names is None else {name: parameters[name] for name in names}
        self.trained = nn.ParameterDict(
            {name: nn.Parameter(value.detach().to(torch.float32, copy=True)) for name, value in chosen.items()}
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's forward pass with the trained values, computed in the base's dtype."""
        base = dict(self.base_layer.named_parameters(recurse=False))
        values = {name: value.to(base[name].dtype) for name, value in self.trained.items()}
        return functional_call(self.base_layer, values, args, kwargs)

    def grow(self, rows: int) -> None:
        """Make room for a weight of ``rows`` rows, as of an embedding with more tokens than the base has.

        The values are to be filled in.
        """
        weight = self.trained["weight"]
        if rows > len(weight):
            self.trained["weight"] = nn.Parameter(weight.new_zeros(rows, *weight.shape[1:]))

    def updates(self) -> dict[str, Update]:
        """The trained values take the place of the base's."""
        return {name: Replace(value.detach()) for name, value in self.trained.items()}

    def file_tensors(self) -> dict[str, Tensor]:
        """The trained values under the base's names."""
        return dict(self.trained.items())


class TokenEmbedding(OwnModule):
    """An embedding of which only the rows of some tokens train; tokens beyond its rows are added.

    Args:
        base_layer: The embedding (V, D); it stays as it is and does not grow.
        ids: Token ids, ascending.
        rows: (n, D) float32, the row of each.
    """

    def __init__(self, base_layer: nn.Embedding, ids: Sequence[int], rows: nn.Parameter) -> None:
        super().__init__()
        self.base_layer: nn.Embedding = base_layer
        self.ids = tuple(ids)
        self.token_rows = rows
        vocabulary = base_layer.weight.shape[0]
        slots = torch.full((max(vocabulary, self.ids[-1] + 1),), -1, device=base_layer.weight.device)
        slots[list(self.ids)] = torch.arange(len(self.ids), device=slots.device)
        self.slots: Tensor
        self.register_buffer("slots", slots, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed (...,) int64 to (..., D)."""
        slots = self.slots[input_ids]
        base: Tensor = self.base_layer(input_ids.clamp(max=self.base_layer.weight.shape[0] - 1))
        trained = nn.functional.embedding(slots.clamp(min=0), self.token_rows).to(base.dtype)
        return torch.where((slots >= 0)[..., None], trained, base)

    def updates(self) -> dict[str, Update]:
        """The rows of the trained tokens."""
        return {"weight": Rows(self.ids, self.token_rows.detach())}

    def file_tensors(self) -> dict[str, Tensor]:
        """The rows; a tied head has the embedding's."""
        return {"token_adapter.trainable_tokens_delta": self.token_rows}


class TokenHead(OwnModule):
    """An output head of which only the rows of some tokens train; tokens beyond its rows are added.

    Args:
        base_layer: The head (V, D) without bias; it stays as it is and does not grow.
        ids: Token ids, ascending.
        rows: (n, D) float32, the row of each; the embedding's parameter where the two are tied.
    """

    def __init__(self, base_layer: nn.Linear, ids: Sequence[int], rows: nn.Parameter) -> None:
        super().__init__()
        self.base_layer: nn.Linear = base_layer
        self.ids = tuple(ids)
        self.token_rows = rows
        self.known = sum(token < base_layer.weight.shape[0] for token in self.ids)
        device = base_layer.weight.device
        self.columns: Tensor
        self.register_buffer("columns", torch.tensor(self.ids[: self.known], device=device), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., D) to logits (..., V + added tokens)."""
        logits: Tensor = self.base_layer(hidden)
        trained = nn.functional.linear(hidden, self.token_rows.to(hidden.dtype))  # (..., n)
        if self.known:
            logits = logits.index_copy(-1, self.columns, trained[..., : self.known])
        return torch.cat([logits, trained[..., self.known :]], dim=-1) if self.known < len(self.ids) else logits

    def updates(self) -> dict[str, Update]:
        """The rows of the trained tokens."""
        return {"weight": Rows(self.ids, self.token_rows.detach())}

    def file_tensors(self) -> dict[str, Tensor]:
        """The rows; a tied head has the embedding's."""
        return {"token_adapter.trainable_tokens_delta": self.token_rows}


def find_embedding(model: nn.Module) -> str | None:
    """Name of the token embedding, where it is a plain one."""
    return _find(model, nn.Embedding, names_of(model).embedding, "get_input_embeddings")


def find_head(model: nn.Module) -> str | None:
    """Name of the output head that has a row per token, where it is a plain linear layer."""
    return _find(model, nn.Linear, names_of(model).head, "get_output_embeddings")


def train_tokens(model: nn.Module, ids: Iterable[int]) -> None:
    """Let the rows of single tokens train, in the embedding and in the head; where those are tied, one row for both.

    A token that the model does not have yet is added, with the mean of all rows to start from.

    Raises:
        UsageError: There is no embedding, it is adapted already, or the new ids leave a gap after the vocabulary.
    """
    ids = sorted(set(ids))
    embedding, head = find_embedding(model), find_head(model)
    if embedding is None:
        raise UsageError("peft.trainable_tokens: the model has no plain token embedding")
    shared = head is not None and model.get_submodule(head).weight is model.get_submodule(embedding).weight
    rows = train_rows(model, embedding, ids)
    if head is not None:
        train_rows(model, head, ids, rows if shared else None)


def train_rows(model: nn.Module, name: str, ids: Sequence[int], rows: nn.Parameter | None = None) -> nn.Parameter:
    """Let the rows of single tokens train in one module, in place.

    Args:
        model: With the module.
        name: Of an embedding or an output head.
        ids: Token ids, ascending; those that the module does not have follow its rows without a gap.
        rows: (n, D) float32, where another module has the same ones; copies of the base's when omitted.

    Returns:
        The rows.

    Raises:
        UsageError: The module is neither, or the ids do not fit it.
    """
    base = model.get_submodule(name)
    if not isinstance(base, nn.Embedding | nn.Linear):
        raise UsageError(f"peft.trainable_tokens: {name} is {type(base).__name__}, expected an embedding or a head")
    vocabulary = base.weight.shape[0]
    added = [token for token in ids if token >= vocabulary]
    if not ids or ids[0] < 0 or added != list(range(vocabulary, vocabulary + len(added))):
        raise UsageError(
            f"peft.trainable_tokens: expected ids from 0, new ones from {vocabulary} without a gap, got {ids[:10]}"
        )
    rows = _start_rows(base.weight, ids) if rows is None else rows
    wrapper = TokenEmbedding(base, ids, rows) if isinstance(base, nn.Embedding) else TokenHead(base, ids, rows)
    replace_module(model, name, wrapper)
    return rows


def _start_rows(weight: Tensor, ids: Sequence[int]) -> nn.Parameter:
    """The base's rows, and the mean row for tokens that it does not have, (n, D) float32."""
    weight = weight.detach()
    known = [token for token in ids if token < weight.shape[0]]
    rows = weight[known].float()
    if len(known) < len(ids):
        mean = weight.mean(0, keepdim=True, dtype=torch.float32)
        rows = torch.cat([rows, mean.expand(len(ids) - len(known), -1)])
    return nn.Parameter(rows.clone())


def _find(model: nn.Module, kind: type[nn.Module], pattern: str, question: str) -> str | None:
    """The first module of a kind that a pattern matches; else, if it is of that kind, the answer to a question."""
    found = [name for name, module in model.named_modules() if isinstance(module, kind)]
    named = next((name for name in found if matches(pattern, name)), None)
    if named is not None or not hasattr(model, question):
        return named
    answer = getattr(model, question)()
    return next((name for name in found if model.get_submodule(name) is answer), None)
