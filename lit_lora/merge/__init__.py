"""Merging an adapter into its base model, with proof, and switching tasks on a loaded model."""

from lit_lora.merge.folder import DTYPES, Forecast, MergeReport, forecast, merge
from lit_lora.merge.plan import MergePlan, Places, find_adapter, find_places, plan_merge
from lit_lora.merge.switch import TaskSwitcher

__all__ = [
    "DTYPES",
    "Forecast",
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
