"""lit-lora from Python: the steps of the command line for a notebook or a program.

``import lit_lora`` offers what is public here, and loads nothing heavy before it is used::

    import lit_lora

    model = lit_lora.load("checkpoints/SmolLM2-135M-Instruct")
    run = model.finetune("my_data.jsonl", peft={"rank": 16}, train={"epochs": 2}, out="out/mine")
    print(run.evaluate("heldout.jsonl"))
    print(run.generate("Where is my order 48213?"))
    merged = run.merge()

What the commands print is printed here too, on standard error. Whatever a user can get wrong raises a
:class:`lit_lora.errors.LitLoraError` with one clear line.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, overload

from lit_lora import log
from lit_lora.config import did_you_mean, find_config, read_yaml, validate
from lit_lora.data import DataConfig, Prepared
from lit_lora.data import prepare as prepare_rows
from lit_lora.data.trained import TrainedReading, read_reading
from lit_lora.errors import UsageError
from lit_lora.evaluate import Metric, Share, check_tasks
from lit_lora.evaluate.candidates import find_candidates
from lit_lora.evaluate.compare import Candidate, compare
from lit_lora.evaluate.read import default_config, find_run, read_dataset, read_held_out
from lit_lora.evaluate.tasks import EvaluateSettings, default_tasks
from lit_lora.files import cache_folder, write_text
from lit_lora.generate import Sampling, answer_all
from lit_lora.merge import find_places, merge, plan_merge
from lit_lora.model import DTYPES
from lit_lora.open.decoder import OpenedModel, open_model
from lit_lora.open.folders import find_folders
from lit_lora.recipe import RECIPES, Options, execute
from lit_lora.tokenizer import Message, Tokenizer, encode_prompt, encode_text, fold_system
from lit_lora.train.run_log import read_metrics

__all__ = ["Model", "Run", "load", "prepare", "run"]

Folder: TypeAlias = "str | os.PathLike[str]"
Data: TypeAlias = "Folder | Sequence[Mapping[str, Any]]"
"""A data set as a config names it (a file, a folder, ``hub:OWNER/NAME`` …), or the rows themselves as dicts."""
Prompt: TypeAlias = "str | Sequence[Message]"
"""A question, or a conversation to answer: ``[{"role": "user", "content": "…"}]``."""


class Model:
    """A checkpoint, run or adapter folder, and what one can do with it. Its weights are loaded when first needed.

    Args:
        folder: A checkpoint, run or adapter folder.
        adapter: An adapter or run folder to put onto a checkpoint.
        dtype: ``fp32``, ``bf16`` or ``fp16``; if omitted, the fastest on the device that keeps a merged update.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.
        quantize: Quantization of the base, such as ``nf4-dq`` or ``none``; if omitted, as in training.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        adapter: Folder | None = None,
        dtype: str | None = None,
        device: str = "auto",
        quantize: str | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._asked = None if adapter is None else Path(adapter)
        self._how: dict[str, Any] = {"dtype": dtype, "device": device, "quantize": quantize}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"

    @cached_property
    def _folders(self) -> tuple[Path, Path | None]:
        return find_folders(self.folder, adapter=self._asked)

    @property
    def base(self) -> Path:
        """The checkpoint folder.

        Raises:
            InputError: The folder holds no model.
            UsageError: The base of a run or adapter is not on this machine.
        """
        return self._folders[0]

    @property
    def adapter(self) -> Path | None:
        """The adapter folder, if there is one; raises as :attr:`base` does."""
        return self._folders[1]

    @cached_property
    def opened(self) -> OpenedModel:
        """The model and its tokenizer, loaded at first use and kept.

        Raises:
            InputError: The weights cannot be read, or the adapter does not fit the base.
            UsageError: There is no such device or dtype.
        """
        opened = open_model(self.base, adapter=self.adapter, **self._how)
        log.note(opened.description)
        return opened

    def evaluate(
        self,
        data: Data | None = None,
        *,
        tasks: Sequence[str] = (),
        limit: int | None = None,
        base: bool = True,
        max_new_tokens: int | None = None,
        batch_size: int = 50,
        **settings: Any,
    ) -> dict[str, dict[str, float]]:
        """Measure this model, and the base beside it, on held-out rows, as ``lit-lora evaluate`` does.

        Args:
            data: The rows; those that the run held out if omitted.
            tasks: ``loss``, ``exact_match``, ``json_fields``, ``options``; those that suit the rows if omitted.
            limit: The most rows.
            base: Measure the base too, quantized as in training.
            max_new_tokens: Maximum length of an answer, in tokens.
            batch_size: Prompts per batch.
            settings: Other keys of the config section ``data``; each is as in training if it is not given.

        Returns:
            Model to metric to value; shares of rows are 0 to 1.

        Raises:
            InputError: The rows cannot be read.
            UsageError: A setting is wrong, there are no rows, or a task does not suit them.
        """
        names = check_tasks(tasks)
        candidates = find_candidates([self.folder], self._asked, skip_base=not base)
        if data is not None:
            config, _ = default_config([self.folder], self._asked, _data_path(data), settings)
            dataset = read_dataset(config, names, limit, given=settings)
        elif (run := find_run([self.folder])) is not None:
            _, dataset = read_held_out(run, settings, limit)
        else:
            raise UsageError("no rows to evaluate on", hint="give held-out rows")
        results = compare(
            candidates,
            self._open_candidate,
            dataset,
            names or default_tasks(dataset),
            settings=EvaluateSettings(max_new_tokens=max_new_tokens, batch_size=batch_size),
        )
        return {result.candidate.label: _values(result.metrics) for result in results}

    def _open_candidate(self, candidate: Candidate) -> Any:
        """This model, or its base without the adapter."""
        if candidate.adapter == self.adapter:
            opened = self.opened
        else:
            how = {**self._how, "quantize": self._how["quantize"] or candidate.quantize}
            opened = open_model(candidate.model, adapter=candidate.adapter, **how)
        return opened.model, opened.tokenizer, opened.description

    @overload
    def generate(self, prompt: Prompt, **settings: Any) -> str: ...

    @overload
    def generate(self, prompt: list[Prompt], **settings: Any) -> list[str]: ...

    def generate(
        self,
        prompt: Prompt | list[Prompt],
        *,
        system: str | None = None,
        raw: bool = False,
        stop: Sequence[str] = (),
        batch_size: int = 32,
        **sampling: Any,
    ) -> str | list[str]:
        """Answer a prompt, or a list of prompts in batches, asked as the model was trained.

        Args:
            prompt: A text, a conversation (a list of messages), or a list of either.
            system: System message for prompts that have none; as in training if omitted, none if empty.
            raw: Continue texts as they are, without the chat template.
            stop: Texts that end an answer; they are not part of it.
            batch_size: Prompts per batch.
            sampling: ``max_new_tokens=256``, ``temperature=0.0`` (greedy), ``top_p``, ``top_k``, ``min_p``,
                ``repetition_penalty``, ``seed``.

        Returns:
            The answer; for a list of prompts, the answers in the same order.

        Raises:
            InputError: A prompt is empty or too long, or the template cannot render a conversation.
            UsageError: A setting is wrong.
        """
        settings = validate(sampling, Sampling, name="generate")
        several = isinstance(prompt, list) and not all(isinstance(message, Mapping) for message in prompt)
        prompts: list[Any] = list(prompt) if several else [prompt]
        tokenizer = self.opened.tokenizer
        given = {} if system is None else {"system": system}
        reading = read_reading(self.opened.base, self.opened.adapter, given)
        encoded = [_encode(tokenizer, each, reading, raw) for each in prompts]
        answers = answer_all(self.opened.model, tokenizer, encoded, settings, stop=list(stop), batch_size=batch_size)
        texts = [answer.text for answer in answers]
        return texts if several else texts[0]

    def finetune(
        self,
        data: Data | Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
        dry_run: bool = False,
        **sections: Any,
    ) -> Run:
        """Finetune this checkpoint, as ``lit-lora finetune`` does.

        Args:
            data: The rows to learn from, or the config section ``data``: ``{"path": …, "validation": 0.1}``.
            resume: Continue after the newest checkpoint of the run folder.
            overwrite: Replace a run that is already in the folder.
            dry_run: Stop before the first step, write nothing.
            sections: Other keys of the config: ``recipe="qlora"``, ``peft={"rank": 16}``, ``train={"epochs": 2}``,
                ``optimizer={"lr": 4e-4}``, ``out="out/mine"``, ``seed=1`` …

        Raises:
            UsageError: A key or value is wrong, all problems at once; or this is a run or adapter, not a checkpoint.
            InputError: The rows cannot be read.
            NumericalError: The loss is not finite.
            OutOfMemoryError: With the settings that would fit.
        """
        if self.adapter is not None:
            raise UsageError(
                f"{self.folder}: has an adapter, expected a checkpoint to finetune",
                hint=f"merge it first, or finetune its base {self.base}",
            )
        model = {"path": str(self.base), **sections.pop("model", {})}
        section = dict(data) if isinstance(data, Mapping) else {"path": _data_path(data)}
        return run(model=model, data=section, resume=resume, overwrite=overwrite, dry_run=dry_run, **sections)


class Run(Model):
    """A run folder: its numbers, and the model it made."""

    @property
    def result(self) -> dict[str, Any]:
        """``result.json``: steps, losses before and after, speed, peak memory.

        Raises:
            UsageError: The run is not finished, or was a dry run.
        """
        path = self.folder / "result.json"
        if not path.is_file():
            raise UsageError(f"{self.folder}: this run has no result yet", hint="resume=True continues it")
        return dict(json.loads(path.read_text(encoding="utf-8")))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of ``metrics.jsonl``, one per step and per validation, ready for a data frame."""
        return read_metrics(self.folder / "metrics.jsonl")

    def merge(self, out: Folder | None = None, *, dtype: str | None = None, allow_lossy: bool = False) -> Model:
        """Merge the adapter into its base and prove the result, as ``lit-lora merge`` does.

        Args:
            out: The folder to create; ``merged/`` in the run folder if omitted.
            dtype: ``fp32``, ``bf16`` or ``fp16`` of the merged weights; the base's if omitted.
            allow_lossy: Write the merge even if rounding loses the update.

        Raises:
            NumericalError: The update does not survive rounding; the message names the dtypes that keep it.
            InputError: The run trained a whole model.
            DiskError: ``out`` exists, or the disk is full.
        """
        if dtype is not None and dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r} is unknown, expected one of: {', '.join(DTYPES)}")
        places = find_places(self.folder, out=None if out is None else Path(out))
        plan = plan_merge(places, dtype=None if dtype is None else DTYPES[dtype])
        for line in merge(plan, places.out, allow_lossy=allow_lossy).lines():
            log.note(line)
        return Model(places.out, device=self._how["device"])


def load(
    folder: Folder,
    *,
    adapter: Folder | None = None,
    dtype: str | None = None,
    device: str = "auto",
    quantize: str | None = None,
) -> Model:
    """Name a model to work with; see :class:`Model` for the arguments. A run folder gives a :class:`Run`.

    Raises:
        InputError: The folder holds no model.
        UsageError: The base of a run or adapter is not on this machine.
    """
    kind = Run if (Path(folder) / "result.json").is_file() else Model
    model = kind(folder, adapter=adapter, dtype=dtype, device=device, quantize=quantize)
    _ = model.base  # a wrong folder is an error now, rather than at the first use
    return model


def prepare(data: Data, model: Model | Folder, *, seed: int = 0, **settings: Any) -> Prepared:
    """Read and tokenize rows as :meth:`Model.finetune` does, to look at them first.

    Args:
        data: The rows.
        model: The model whose tokenizer and chat template are used.
        seed: Decides which rows are held out.
        settings: Other keys of the config section ``data``, such as ``validation=0.1`` or ``columns={…}``.

    Returns:
        The tokenized rows, and a ``report`` whose ``lines()`` say what was read, dropped and learned.

    Raises:
        InputError: The rows cannot be read.
        UsageError: A setting is wrong.
    """
    config = validate({**settings, "path": _data_path(data)}, DataConfig, name="prepare")
    base = model.base if isinstance(model, Model) else find_folders(Path(model))[0]
    return prepare_rows(config, Tokenizer.load(base), cache=cache_folder(), seed=seed)


def run(
    config: Folder | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    **sections: Any,
) -> Run:
    """Run a config, as ``lit-lora finetune --config`` does.

    Args:
        config: A YAML file or the name of a shipped config; ``sections`` alone if omitted.
        resume: Continue after the newest checkpoint of the run folder.
        overwrite: Replace a run that is already in the folder.
        dry_run: Stop before the first step, write nothing.
        sections: Keys of the config, which win over those of the file: ``train={"max_steps": 20}``, ``out=…`` …

    Raises:
        UsageError: A key or value is wrong, all problems at once.
        InputError: Model or rows cannot be read.
    """
    settings: dict[str, Any] = {}
    if config is not None:
        read = read_yaml(find_config(Path(config)))
        settings = dict(read) if isinstance(read, dict) else {}
    for key, value in sections.items():
        section = settings.get(key)
        if isinstance(section, dict) and isinstance(value, Mapping):
            settings[key] = {**section, **value}
        else:
            settings[key] = value

    recipe = str(settings.get("recipe", "lora"))
    if recipe not in RECIPES:
        raise UsageError(
            f"recipe {recipe!r} is unknown{did_you_mean(recipe, RECIPES)}, expected one of: {', '.join(RECIPES)}"
        )
    module = importlib.import_module(RECIPES[recipe])
    checked = validate(settings, module.Config, name=str(config or "config"))
    options = Options(dry_run=dry_run, resume=resume, overwrite=overwrite)
    return Run(execute(module.finetune, checked, options))


def _values(metrics: Sequence[Metric]) -> dict[str, float]:
    """Metrics as plain numbers."""
    values: dict[str, float] = {}
    for metric in metrics:
        values[metric.name] = metric.value.value if isinstance(metric.value, Share) else metric.value
    return values


def _data_path(data: Data) -> str:
    """What a config calls ``data.path``; rows are written into the cache, under the hash of their content."""
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    text = "".join(f"{json.dumps(dict(row), ensure_ascii=False)}\n" for row in data)
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = cache_folder() / "rows" / f"{name}.jsonl"
    if not path.is_file():
        write_text(path, text)
    return str(path)


def _encode(tokenizer: Tokenizer, prompt: Prompt, reading: TrainedReading, raw: bool) -> list[int]:
    """Token ids of one prompt."""
    if not prompt:
        raise UsageError("the prompt is empty")
    if not isinstance(prompt, str):
        if raw:
            raise UsageError("raw=True continues texts, expected a text instead of a conversation")
        messages = list(prompt)
        if reading.config.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": reading.config.system})
        return encode_prompt(tokenizer, fold_system(messages) if reading.config.system_role == "fold" else messages)
    if raw:
        return encode_text(tokenizer, prompt)
    return encode_prompt(tokenizer, reading.conversation(prompt))
