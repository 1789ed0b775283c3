"""Merge an adapter into its base model with proof, combine adapters, switch tasks, and see what a run changed."""

from lit_lora.merge.combine import Combined, combine
from lit_lora.merge.folder import Forecast, MergeReport, forecast, merge
from lit_lora.merge.plan import MergePlan, Places, find_places, plan_merge
from lit_lora.merge.spectrum import Change, Changes, find_changes
from lit_lora.merge.switch import TaskSwitcher

__all__ = [
    "Change",
    "Changes",
    "Combined",
    "Forecast",
    "MergePlan",
    "MergeReport",
    "Places",
    "TaskSwitcher",
    "combine",
    "find_changes",
    "find_places",
    "forecast",
    "merge",
    "plan_merge",
]
