"""Memory and time of a run before it is launched, from its configuration alone; no torch."""

from cqlora.plan.fit import Fit
from cqlora.plan.layouts import Option, suggest_layouts
from cqlora.plan.memory import MemoryPlan, plan_memory, resolve_checkpointing
from cqlora.plan.time import TimePlan, plan_time
from cqlora.plan.verdict import Verdict, judge

__all__ = [
    "Fit",
    "MemoryPlan",
    "Option",
    "TimePlan",
    "Verdict",
    "judge",
    "plan_memory",
    "plan_time",
    "resolve_checkpointing",
    "suggest_layouts",
]
