"""Merging an adapter into its base model, with proof, switching tasks on a loaded model, and what a run changed."""

from lit_lora.merge.folder import Forecast, MergeReport, forecast, merge
from lit_lora.merge.plan import MergePlan, Places, find_adapter, find_places, plan_merge
from lit_lora.merge.spectrum import Change, Changes, find_changes
from lit_lora.merge.switch import TaskSwitcher

__all__ = [
    "Change",
    "Changes",
    "Forecast",
    "MergePlan",
    "MergeReport",
    "Places",
    "TaskSwitcher",
    "find_adapter",
    "find_changes",
    "find_places",
    "forecast",
    "merge",
    "plan_merge",
]
