"""Merging an adapter into its base model, with proof, and switching tasks on a loaded model."""

from lit_lora.merge.folder import DTYPES, MergeReport, merge
from lit_lora.merge.plan import MergePlan, Places, find_adapter, find_places, plan_merge
from lit_lora.merge.switch import TaskSwitcher
from lit_lora.merge.write import forecast

__all__ = [
    "DTYPES",
    "MergePlan",
    "MergeReport",
    "Places",
    "TaskSwitcher",
    "find_adapter",
    "find_places",
    "forecast",
    "merge",
    "plan_merge",
]
