"""A model from a Hugging Face folder: built on the meta device, then filled tensor by tensor from mapped files."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_lora.checkpoint.parameters import StoredParameters
from lit_lora.checkpoint.tensors import check_tensors
from lit_lora.errors import UsageError
from lit_lora.hf import HostedConfig, HostedLM, build, choose, fill_buffers, read_config
from lit_lora.hf.experts import expert_stacks
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.quantize import QuantizeConfig, Quantized, QuantizedLinear, QuantizedStack, Quantizer, quantize_stack
from lit_lora.quantize import quantize as quantize_matrix

__all__ = ["AnyModel", "decoder_linears", "empty_model", "load_model", "open_checkpoint", "stored_shapes"]

AnyModel = CausalLM | HostedLM
"""Our own decoder, or one of transformers."""


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantize: QuantizeConfig | Quantizer | None = None,
) -> AnyModel:
    """Load a checkpoint for inference or finetuning.

    On the CPU, tensors that are stored in ``dtype`` stay pages of the mapped file until something writes to them, so
    loading takes no memory of its own; other tensors are copied one at a time. With ``quantize`` every linear layer of
    the decoder, and the experts of every mixture, are quantized as soon as they are read, so the whole model is never
    in memory in 16 bits. Layers that are stored quantized stay so, and experts beside them are as stored.

    Args:
        folder: A Hugging Face folder.
        dtype: Dtype of all weights; as stored when omitted.
        device: Device of the weights.
        quantize: How to quantize linear layers and experts, or a function that quantizes the linear layers; as stored
            when omitted.

    Raises:
        InputError: Files are missing or broken, or the tensors are not those that ``config.json`` describes.
        UsageError: The folder is quantized in another way than ``quantize``, or the block size does not fit.
    """
    folder = Path(folder)
    model, stored = open_checkpoint(folder, dtype)
    _check_quantization(folder, stored.configs(), quantize)
    to_quantize = set(decoder_linears(model)) if quantize is not None else set()
    stacks = expert_stacks(model) if isinstance(quantize, QuantizeConfig) and not stored.configs() else []
    expected = stored_shapes(model)
    check_tensors(folder, stored, expected, head=model.config.names.head)
    if isinstance(model, HostedLM):
        fill_buffers(model, device)

    names = _names(model)
    for name in expected:
        parent, _, last = name.rpartition(".")
        if stored.quantized(name):
            _put_quantized(model, parent, stored.packed(name).to(device), dtype or stored.dtype(name))
        elif last == "weight" and parent in to_quantize:
            tensor = stored.read_once(name).to(device)
            assert quantize is not None
            weight = _quantized(parent, tensor, quantize)
            for place in names[name]:  # several, where blocks share their weights
                _put_quantized(model, place.rpartition(".")[0], weight, dtype or tensor.dtype)
        elif name in stacks:
            assert isinstance(quantize, QuantizeConfig)
            tensor = stored.read_once(name).to(device)
            _put_stack(model, name, tensor, quantize, dtype or tensor.dtype)
        elif name in names:
            parameter = nn.Parameter(stored.read(name, _dtype(model, name, dtype)).to(device))
            for place in names[name]:
                _put(model, place, parameter)
        else:
            _put(model, name, stored.read(name).to(device))

    if isinstance(model, HostedLM):
        choose(model)
    return model.eval()


def open_checkpoint(folder: Path, dtype: torch.dtype | None = None) -> tuple[AnyModel, StoredParameters]:
    """An empty model for a checkpoint, and the parameters that the files have for it.

    Args:
        folder: A Hugging Face folder.
        dtype: Dtype of the model; as ``config.json`` says when omitted.

    Raises:
        InputError: Files are missing or broken, or no model can be built from ``config.json``.
    """
    config = read_config(folder)
    if dtype is not None:
        config = config.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    model = empty_model(config)
    stored = StoredParameters(folder, model)
    if config.tie_word_embeddings and _has_own_head(model, stored):
        model = empty_model(config.model_copy(update={"tie_word_embeddings": False}))
        stored = StoredParameters(folder, model)
    return model, stored


def _has_own_head(model: AnyModel, stored: StoredParameters) -> bool:
    """Whether the files of a model that is tied by its config hold a head that is not the embedding.

    Some models, mostly composite ones, do not say that they are not tied; transformers decides as here.
    """
    (tied,) = (
        names
        for names in _names(model).values()
        if model.get_parameter(names[0]) is model.get_output_embeddings().weight
    )
    if not all(name in stored.names() for name in tied):
        return False
    embedding, *others = map(stored.read, tied)
    return not all(torch.equal(embedding, other) for other in others)


def empty_model(config: ModelConfig, quantize: QuantizeConfig | Quantizer | None = None) -> AnyModel:
    """A model on the meta device: shapes and dtypes without memory.

    Args:
        config: Its sizes; with ``quantize``, ``config.dtype`` is the dtype of its parameters.
        quantize: How to quantize linear layers and experts, or a function that quantizes the linear layers.

    Raises:
        UsageError: The block size does not divide the row length of a layer.
    """
    model: AnyModel
    if isinstance(config, HostedConfig):
        model = build(config)
        choose(model)
    else:
        with torch.device("meta"):
            model = CausalLM(config)
    if quantize is not None:
        model.to(getattr(torch, config.dtype))
        for name in decoder_linears(model):
            linear = model.get_parameter(f"{name}.weight")
            _put_quantized(model, name, _quantized(name, linear, quantize), linear.dtype)
    if isinstance(quantize, QuantizeConfig):
        for name in expert_stacks(model):
            stack = model.get_parameter(name)
            _put_stack(model, name, stack, quantize, stack.dtype)
    return model


def stored_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape by name of what a checkpoint of ``model`` has: parameters, each once, and persistent buffers."""
    state = model.state_dict(keep_vars=True)
    buffers = {name: tensor for name, tensor in state.items() if not isinstance(tensor, nn.Parameter)}
    return {name: tuple(tensor.shape) for name, tensor in {**dict(model.named_parameters()), **buffers}.items()}


def decoder_linears(model: AnyModel) -> list[str]:
    """Names of the layers to quantize: every linear layer that the model calls, except the head."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name not in model.not_wrappable
    ]


def _names(model: nn.Module) -> dict[str, list[str]]:
    """All names of every parameter, of which a tied one has several, by the first."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {of_one[0]: of_one for of_one in names.values()}


def _dtype(model: AnyModel, name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """``dtype``, or float32 for what transformers never computes in less, such as the rates of a recurrence."""
    if dtype is None or isinstance(model, CausalLM):
        return dtype
    plan = model.net._get_dtype_plan(dtype)
    return next((kept for pattern, kept in plan.items() if re.search(pattern.replace("*", ".*"), name)), dtype)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace the parameter or buffer called ``name``."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, tensor)


def _quantized(layer: str, weight: Tensor, quantize: QuantizeConfig | Quantizer) -> Quantized:
    if isinstance(quantize, QuantizeConfig):
        return quantize_matrix(weight, quantize, name=f"{layer}.weight")
    return quantize(layer, weight)


def _put_quantized(model: nn.Module, name: str, weight: Quantized, dtype: torch.dtype) -> None:
    """Replace the layer called ``name`` with a quantized one that keeps its bias."""
    parent, _, last = name.rpartition(".")
    bias = model.get_submodule(name).bias
    layer = QuantizedLinear(weight, bias if isinstance(bias, torch.Tensor) else None, dtype)
    setattr(model.get_submodule(parent), last, layer)


def _put_stack(model: nn.Module, name: str, weight: Tensor, config: QuantizeConfig, dtype: torch.dtype) -> None:
    """Replace the parameter called ``name`` with the quantized ``weight``."""
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(parent)
    delattr(module, last)
    setattr(module, last, QuantizedStack(quantize_stack(weight, config, name=name), len(weight), dtype))


def _check_quantization(folder: Path, stored: list[QuantizeConfig], wanted: QuantizeConfig | Quantizer | None) -> None:
    """Refuse to quantize a second time.

    Raises:
        UsageError: The folder is quantized in another way than wanted.
    """
    if stored and wanted is not None and stored != [wanted]:
        present = ", ".join(map(str, stored))
        refused = f", cannot become {wanted}" if isinstance(wanted, QuantizeConfig) else ""
        raise UsageError(
            f"{folder}: already quantized ({present}){refused}",
            hint=f"ask for {present}, or start from the original 16-bit checkpoint",
        )
