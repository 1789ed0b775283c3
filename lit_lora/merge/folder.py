"""Merge base and update into a Hugging Face folder, which appears under its name only once it is proved."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_lora import log
from lit_lora.checkpoint.quantized import packed_tensors, quantization_config
from lit_lora.checkpoint.save import CheckpointWriter, copy_side_files
from lit_lora.data.trained import TRAINED_FILE
from lit_lora.errors import NumericalError
from lit_lora.files import atomic_folder, disk_errors, require_free_space, write_text
from lit_lora.merge.plan import BaseTensors, MergePlan
from lit_lora.merge.prove import Proof, prove
from lit_lora.merge.write import TensorProof, Totals, measure, merged_tensors, totals
from lit_lora.model import DTYPES
from lit_lora.model.config import KEEP_DTYPE
from lit_lora.peft.files.model_card import card_row, model_card
from lit_lora.quantize import Quantized
from lit_lora.tokenizer import Tokenizer, has_vocabulary

__all__ = ["Forecast", "MergeReport", "forecast", "merge"]

# A merge that loses more than this share of the adapter's effect to rounding is refused. It corresponds to about a
# twentieth of what training gained: see Proof.lost.
MAX_LOST = 0.15
# Any text will do: the blocks are compared on the embeddings of its tokens.
_TEXT = (
    "The parcel arrived on Tuesday, three days late and with a dented corner. She opened it at the kitchen table, "
    "counted the parts against the list (twelve screws, two hinges, one handle), and wrote back: 'Everything is here, "
    "thank you. But could you tell me how to mount the shelf on a plaster wall?'"
)
_MAX_TOKENS = 64


@dataclass(frozen=True)
class MergeReport:
    """What was merged, and the proof that it is right."""

    out: Path
    """The folder written."""
    tensors: list[TensorProof]
    """One per tensor with an update."""
    totals: Totals
    """Over all of them."""
    proof: Proof
    """Merged against base + adapter, block by block and end to end."""
    untied: bool
    """Head and embedding were one tensor and are now two."""
    onto: str = ""
    """What the update of a quantized base was added to."""
    lossy: bool = False
    """The merge was asked for although it changes the model's function."""

    def lines(self) -> list[str]:
        """The report in a few lines."""
        worst = max(self.tensors, key=lambda proof: proof.relative_error)
        block = max([*self.proof.blocks, *self.proof.ends], key=lambda proof: proof.error)
        logits = self.proof.logits
        verb = "compared" if self.lossy else "agree"
        lost = f"{self.proof.lost:.2%} of the adapter's effect is lost"
        if self.proof.lost > 1:
            lost = f"that is {self.proof.lost:.3g} times the adapter's effect"
        lines = [
            f"{len(self.tensors)} tensors updated: rounding error {self.totals.relative_error:.2%} of the update "
            f"(at most {worst.relative_error:.2%}, {worst.name}); {self.totals.kept:.1%} of its values survive",
            f"{len(self.proof.blocks)} blocks {verb} with base + adapter: outputs differ by at most {block.error:.1e} "
            f"({block.place}); {lost}",
            f"predictions: logits differ by at most {logits.worst:.2g}, KL {logits.kl:.1e} "
            f"(the adapter changed them by {logits.base_kl:.1e}), "
            f"same most likely token for {logits.agreement:.0%}",
        ]
        if self.onto:
            lines.insert(0, self.onto)
        if self.untied:
            lines.append("head and embedding now differ, so both are stored and tie_word_embeddings is false")
        return lines


@dataclass(frozen=True)
class Forecast:
    """What merging into a dtype would keep."""

    totals: Totals
    """Of the update itself."""
    proof: Proof
    """Of its effect on the model's outputs."""


def merge(plan: MergePlan, out: Path, *, allow_lossy: bool = False, replace: bool = False) -> MergeReport:
    """Write the merged model to ``out``, which appears only if the proof holds.

    Args:
        plan: The merge.
        out: The folder to create.
        allow_lossy: Write the merge even if rounding loses much of the adapter's effect.
        replace: Replace an existing ``out``.

    Raises:
        NumericalError: The update does not survive rounding, or merged and base + adapter differ.
        DiskError: ``out`` exists, or the disk has too little space.
    """
    require_free_space(out, plan.bytes() + (1 << 24), "the merged model")
    with atomic_folder(out, replace=replace) as temporary, disk_errors(out):
        proofs = _write_tensors(plan, temporary)
        _write_side_files(plan, temporary)

        # Proved on what is now in the files.
        coarsest = max((plan.target(name) for name in plan.names), key=lambda dtype: torch.finfo(dtype).eps)
        written = BaseTensors(temporary, exact=plan.into == "quantized")
        proof = prove(plan, _token_ids(plan, temporary), dtype=coarsest, merged=written)
        report = MergeReport(Path(out), proofs, totals(proofs), proof, plan.untied, _onto(plan), plan.lossy)
        # The zeros between unchanged codes are float32: nothing is lost, in whatever dtype the model then computes.
        exact = plan.into == "quantized" and plan.keeps_codes
        if not (proof.lost <= MAX_LOST or allow_lossy or plan.lossy or exact):
            raise _lossy(plan, report)
        write_text(temporary / "README.md", _card(plan, report))
    return report


def forecast(plan: MergePlan, dtype: torch.dtype) -> Forecast:
    """Measure what merging into ``dtype`` would keep, without writing anything.

    Raises:
        NumericalError: The result would differ by more than rounding explains, such as when values overflow.
    """
    folder = plan.adapter.folder if (plan.adapter.folder / "tokenizer.json").is_file() else plan.folder
    return Forecast(measure(plan, dtype), prove(plan, _token_ids(plan, folder), dtype=dtype))


def _write_tensors(plan: MergePlan, folder: Path) -> list[TensorProof]:
    """Write every tensor under the name and in the shape that the base's files have it."""
    reader = plan.base.reader
    proofs = []
    waiting: dict[str, Tensor] = {}  # parameters that the files store together with others still to come
    with CheckpointWriter(folder) as writer:
        for name, tensor, proof in log.progress(merged_tensors(plan), total=len(plan.names), what="merging"):
            conversion = reader.conversion(name)
            if isinstance(tensor, Quantized):
                parts = packed_tensors(conversion.stored[0].removesuffix(".weight"), tensor, plan.base.dtype(name))
                for part, values in parts.items():
                    writer.add(part, values)
            else:
                waiting[name] = tensor
                if len(waiting) == len(conversion.parameters):
                    for stored, values in reader.to_files(conversion, waiting).items():
                        writer.add(stored, values)
                    waiting.clear()
            if proof is not None:
                proofs.append(proof)
        for name in plan.copied:
            writer.add(name, reader.files.read_once(name))
    return proofs


def _onto(plan: MergePlan) -> str:
    """What the update was added to, in words; empty if the base is not quantized."""
    in_full = any(plan.base.quantized(name) and not plan.packs(name) for name in plan.names)
    experts = "; experts are dequantized" if plan.into == "quantized" and in_full else ""
    if plan.into == "quantized" and plan.keeps_codes:
        return (
            f"merged into the zeros of {plan.quantize}: the codes stay, and the model computes what was trained "
            f"(up to the rounding of weight + update in 16 bits){experts}"
        )
    return {
        None: "",
        "dequantized": f"merged into the dequantized base ({plan.quantize}): the model computes what was trained",
        "original": f"merged into the original base: training was over {plan.quantize}, so the results differ",
        "quantized": f"merged and quantized again to {plan.quantize}: its codes cannot hold all of a small update"
        f"{experts}",
    }[plan.into]


def _lossy(plan: MergePlan, report: MergeReport) -> NumericalError:
    """What is lost, and the dtypes that would keep it, smallest first."""
    used = {plan.target(name) for name in plan.updates}
    names = sorted(name for name, dtype in DTYPES.items() if dtype in used)
    remedies = []
    for name in ("fp16", "bf16", "fp32"):
        if DTYPES[name] in used:
            continue
        with contextlib.suppress(NumericalError):  # values overflow this dtype
            lost = forecast(plan, DTYPES[name]).proof.lost
            if lost <= MAX_LOST:
                remedies.append(f"--dtype {name} (loses {lost:.1%})")
    use = f"use {' or '.join(remedies)}, or " if remedies else ""
    lost = report.proof.lost
    # Rounding errors beyond the effect itself would be a share of many hundred percent.
    share = f"{lost:.0%}" if lost <= 1 else "all"
    return NumericalError(
        f"rounding to {'/'.join(names)} loses {share} of the adapter's effect, more than "
        f"{MAX_LOST:.0%} ({1 - report.totals.kept:.0%} of the update's values vanish); nothing was written",
        hint=f"{use}keep the adapter beside the base, or accept the loss with --allow-lossy",
    )


def _write_side_files(plan: MergePlan, folder: Path) -> None:
    """Config, tokenizer and templates; the adapter's tokenizer if it has one, else the base's."""
    config = {**plan.config.to_hf(), KEEP_DTYPE: True}
    if plan.into == "quantized" and plan.quantize is not None:
        configs = plan.base.reader.configs() or [plan.quantize]
        config["quantization_config"] = quantization_config(
            configs, getattr(torch, plan.config.dtype), head=plan.config.names.head
        )
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    trained = plan.adapter.folder / TRAINED_FILE
    if trained.is_file():  # before the base's own, which is of an earlier training
        shutil.copyfile(trained, folder / TRAINED_FILE)
    has_own = (plan.adapter.folder / "tokenizer.json").is_file()
    if has_own:
        copy_side_files(plan.adapter.folder, folder)
    copy_side_files(plan.folder, folder, templates=not has_own)


def _token_ids(plan: MergePlan, folder: Path) -> list[int]:
    """Token ids of a text; without a tokenizer, ids spread over the vocabulary."""
    vocabulary = plan.config.vocab_size
    if has_vocabulary(folder):
        ids = [token for token in Tokenizer.load(folder).encode(_TEXT) if token < vocabulary]
    else:
        ids = list(range(0, vocabulary, max(1, vocabulary // _MAX_TOKENS)))
    return ids[:_MAX_TOKENS]


def _card(plan: MergePlan, report: MergeReport) -> str:
    adapter = plan.adapter
    metrics = {
        "Rounding error of the update": f"{report.totals.relative_error:.2%}",
        "Adapter's effect lost to rounding": f"{report.proof.lost:.2%}",
        "Same most likely token as base + adapter": f"{report.proof.logits.agreement:.0%}",
    }
    method = f"{adapter.config.about}, merged ({plan.config.dtype})"
    title = f"{plan.folder.name} with {adapter.folder.parent.name}/{adapter.folder.name} merged"
    base, data = adapter.base or str(plan.folder), card_row(adapter.folder, "Data")
    return model_card(title, base=base, method=method, data=data, metrics=metrics, adapter=False)
