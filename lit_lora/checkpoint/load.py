"""A model from a Hugging Face folder: built on the meta device, then filled tensor by tensor from mapped files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lit_lora.checkpoint.parameters import StoredParameters
from lit_lora.checkpoint.tensors import check_tensors
from lit_lora.errors import UsageError
from lit_lora.model import CausalLM, ModelConfig
from lit_lora.quantize import QuantizeConfig, Quantized, QuantizedLinear, Quantizer
from lit_lora.quantize import quantize as quantize_matrix

__all__ = ["decoder_linears", "empty_model", "load_model", "stored_shapes"]


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantize: QuantizeConfig | Quantizer | None = None,
) -> CausalLM:
    """Load a checkpoint for inference or finetuning.

    On the CPU, tensors that are stored in ``dtype`` stay pages of the mapped file until something writes to them, so
    loading takes no memory of its own; other tensors are copied one at a time. With ``quantize`` every linear layer of
    the decoder is quantized as soon as it is read, so the whole model is never in memory in 16 bits. Layers that are
    stored quantized stay so.

    Args:
        folder: A Hugging Face folder.
        dtype: Dtype of all weights; as stored when omitted.
        device: Device of the weights.
        quantize: How to quantize the linear layers of the decoder, or a function that does; as stored when omitted.

    Raises:
        InputError: Files are missing or broken, or the tensors are not those that ``config.json`` describes.
        UsageError: The folder is quantized in another way than ``quantize``, or the block size does not fit.
    """
    folder = Path(folder)
    config = ModelConfig.from_folder(folder)
    model = empty_model(config)
    stored = StoredParameters(folder, model)
    _check_quantization(folder, stored.configs(), quantize)
    to_quantize = set(decoder_linears(model)) if quantize is not None else set()
    expected = stored_shapes(model)
    check_tensors(folder, stored, expected, head=config.names.head)

    for name in expected:
        parent, _, last = name.rpartition(".")
        if stored.quantized(name):
            _put_quantized(model, parent, stored.packed(name).to(device), dtype or stored.dtype(name))
        elif last == "weight" and parent in to_quantize:
            tensor = stored.read_once(name).to(device)
            assert quantize is not None
            _put_quantized(model, parent, _quantized(parent, tensor, quantize), dtype or tensor.dtype)
        else:
            module = model.get_submodule(parent)
            tensor = stored.read(name, dtype).to(device)
            setattr(module, last, nn.Parameter(tensor) if last in module._parameters else tensor)

    if config.tie_word_embeddings:
        model.tie_weights()
    if dtype is not None:
        model.config = config.model_copy(update={"dtype": str(dtype).removeprefix("torch.")})
    return model.eval()


def empty_model(config: ModelConfig, quantize: QuantizeConfig | Quantizer | None = None) -> CausalLM:
    """A model on the meta device: shapes and dtypes without memory.

    Args:
        config: Its sizes; with ``quantize``, ``config.dtype`` is the dtype of its parameters.
        quantize: How to quantize the linear layers of the decoder, or a function that does.

    Raises:
        UsageError: The block size does not divide the row length of a layer.
    """
    with torch.device("meta"):
        model = CausalLM(config)
    if quantize is not None:
        model.to(getattr(torch, config.dtype))
        for name in decoder_linears(model):
            linear = model.get_parameter(f"{name}.weight")
            _put_quantized(model, name, _quantized(name, linear, quantize), linear.dtype)
    return model


def stored_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape by name of what a checkpoint of ``model`` has: parameters, each once, and persistent buffers."""
    parameters = dict(model.named_parameters())
    state = model.state_dict(keep_vars=True)
    buffers = {name: tensor for name, tensor in state.items() if not isinstance(tensor, nn.Parameter)}
    return {name: tuple(tensor.shape) for name, tensor in {**parameters, **buffers}.items()}


def decoder_linears(model: CausalLM) -> list[str]:
    """Names of the layers to quantize: every linear layer except the head."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def _quantized(layer: str, weight: torch.Tensor, quantize: QuantizeConfig | Quantizer) -> Quantized:
    if isinstance(quantize, QuantizeConfig):
        return quantize_matrix(weight, quantize, name=f"{layer}.weight")
    return quantize(layer, weight)


def _put_quantized(model: CausalLM, name: str, weight: Quantized, dtype: torch.dtype) -> None:
    """Replace the layer called ``name`` with a quantized one that keeps its bias."""
    parent, _, last = name.rpartition(".")
    bias = model.get_submodule(name).bias
    layer = QuantizedLinear(weight, bias if isinstance(bias, torch.Tensor) else None, dtype)
    setattr(model.get_submodule(parent), last, layer)


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
