"""Download datasets of the Hugging Face Hub: one configuration of one, all its splits or one of them."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lit_lora.errors import InputError, UsageError, first_line
from lit_lora.files import atomic_folder, require_safe_names

if TYPE_CHECKING:
    from datasets import DatasetBuilder

__all__ = ["HubData", "fetch_hub_data", "parse_hub_data"]

_PATH = re.compile(
    r"hub:(?P<repo>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w./-]+))?(#(?P<revision>[\w./-]+))?"
)

# What to download by hand if the Hub cannot be reached.
_BY_HAND = {
    "tatsu-lab/alpaca": "alpaca_data.json from github.com/tatsu-lab/stanford_alpaca",
    "databricks/databricks-dolly-15k": "databricks-dolly-15k.jsonl from that dataset's page on huggingface.co",
}


@dataclass(frozen=True)
class HubData:
    """What a ``hub:`` path names."""

    repo: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    """A branch, tag or commit."""

    @property
    def name(self) -> str:
        """The path without split and revision."""
        return f"hub:{self.repo}:{self.config}" if self.config else f"hub:{self.repo}"


def parse_hub_data(path: str) -> HubData | None:
    """What ``hub:OWNER/NAME[:CONFIG][@SPLIT][#REVISION]`` names; ``None`` for another path.

    Raises:
        UsageError: The path begins with ``hub:`` but is malformed.
    """
    if not path.startswith("hub:"):
        return None
    match = _PATH.fullmatch(path)
    if match is None:
        raise UsageError(
            f"{path}: expected hub:OWNER/NAME, hub:OWNER/NAME:CONFIG, hub:OWNER/NAME@SPLIT or hub:OWNER/NAME#REVISION"
        )
    return HubData(match["repo"], match["config"], match["split"], match["revision"])


def fetch_hub_data(data: HubData, cache: Path) -> Path:
    """The folder with the Parquet files of a dataset, one or more per split; downloaded unless it is in the cache.

    If a split is named, only that split is downloaded, and the folder has no other.

    Raises:
        InputError: The dataset cannot be downloaded, its configuration must be named, or it has no such split.
    """
    parts = [data.repo, data.config, data.revision, f"@{data.split}" if data.split else None]
    folder = cache / "hub" / "--".join(re.sub(r"[^\w.@-]", "-", part) for part in parts if part)
    if folder.is_dir():
        return folder
    with atomic_folder(folder) as temporary:
        try:
            _download(data, temporary)
        except InputError:
            raise
        except Exception as error:  # of datasets, huggingface_hub, httpx or the operating system
            file = _BY_HAND.get(data.repo, f"the data files from huggingface.co/datasets/{data.repo}")
            raise InputError(
                f"{data.name}: cannot be downloaded: {first_line(error)[:160]}",
                hint=f"download {file} and give its path instead (a gated dataset needs HF_TOKEN in the environment)",
            ) from error
    return folder


def _download(data: HubData, folder: Path) -> None:
    # Importing these takes seconds, and most runs read local files.
    import huggingface_hub  # noqa: PLC0415
    from datasets.data_files import DataFilesDict  # noqa: PLC0415

    # Fails within seconds if the Hub cannot be reached; datasets alone would retry for minutes.
    huggingface_hub.HfApi().dataset_info(data.repo, revision=data.revision, timeout=20)
    builder = _open_builder(data, folder / "tmp")
    files_by_split = builder.config.data_files
    splits = [str(split) for split in files_by_split]
    require_safe_names([f"{split}.parquet" for split in splits], data.name)
    if data.split is not None:
        if data.split not in splits:
            raise InputError(
                f"{data.name}: no split {data.split!r}, it has: {', '.join(splits)}",
                hint=f"a split: {data.name}@{splits[0]}; a branch, tag or commit: {data.name}#{data.split}",
            )
        # With fewer files to read, the builder downloads fewer.
        builder.config.data_files = DataFilesDict({data.split: files_by_split[data.split]})
        splits = [data.split]

    # The card may state the sizes of all splits, so they are not checked against those downloaded.
    written = folder / "tmp" / "parquet"
    builder.download_and_prepare(str(written), file_format="parquet", verification_mode="no_checks")
    for split in splits:
        # One file NAME-SPLIT.parquet, or several NAME-SPLIT-00000-of-00002.parquet. The dataset's name goes, because
        # files are told apart by the words in their names.
        prefix = f"{builder.dataset_name}-{split}"
        for file in written.glob(f"{prefix}*.parquet"):
            if re.fullmatch(rf"{re.escape(prefix)}(-\d+-of-\d+)?\.parquet", file.name):
                file.rename(folder / file.name.removeprefix(f"{builder.dataset_name}-"))
    shutil.rmtree(folder / "tmp")


def _open_builder(data: HubData, cache: Path) -> DatasetBuilder:
    """What knows the files of a dataset; nothing but their list is downloaded yet.

    Raises:
        InputError: The configuration is unknown, or there are several and none is named.
    """
    import datasets  # noqa: PLC0415

    try:
        return datasets.load_dataset_builder(data.repo, data.config, revision=data.revision, cache_dir=str(cache))
    except ValueError:
        configs = datasets.get_dataset_config_names(data.repo, revision=data.revision)
        if data.config in configs or len(configs) < 2:
            raise
        problem = f"no configuration {data.config!r}, it has" if data.config else "several configurations"
        raise InputError(
            f"hub:{data.repo}: {problem}: {', '.join(configs)}", hint=f"name one: hub:{data.repo}:{configs[0]}"
        ) from None
