"""What a folder, a file, an adapter, a run or a Hub repository is, without loading weights."""

from lit_lora.inspection.entry import inspect
from lit_lora.inspection.report import AdapterFacts, Inspection, ModelFacts, Part, Problem, Target, TokenizerFacts

__all__ = ["AdapterFacts", "Inspection", "ModelFacts", "Part", "Problem", "Target", "TokenizerFacts", "inspect"]
