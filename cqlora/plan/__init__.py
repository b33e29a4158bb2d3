"""Memory and time of a run before it is launched, from its configuration alone; no torch."""

from cqlora.plan.fit import Fit
from cqlora.plan.layouts import Option, suggest_layouts
from cqlora.plan.memory import MemoryPlan, choose_checkpointing, plan_memory
from cqlora.plan.time import TimePlan, plan_time
from cqlora.plan.verdict import Verdict, judge
from cqlora.plan.workload import Rows

__all__ = [
    "Fit",
    "MemoryPlan",
    "Option",
    "Rows",
    "TimePlan",
    "Verdict",
    "choose_checkpointing",
    "judge",
    "plan_memory",
    "plan_time",
    "suggest_layouts",
]
