"""A fair comparison of methods: the same rows, seeds and budget for all, and a learning rate chosen for each."""

from lit_lora.compare.jobs import Job, Outcome, Runner, locked
from lit_lora.compare.plan import check_folders, count_runs, run_all, seconds_per_run
from lit_lora.compare.report import summary_table, write_report
from lit_lora.compare.rows import Row, rows_of
from lit_lora.compare.settings import CompareConfig, Variant, load_comparison

__all__ = [
    "CompareConfig",
    "Job",
    "Outcome",
    "Row",
    "Runner",
    "Variant",
    "check_folders",
    "count_runs",
    "load_comparison",
    "locked",
    "rows_of",
    "run_all",
    "seconds_per_run",
    "summary_table",
    "write_report",
]
