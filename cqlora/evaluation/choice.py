"""Multiple choice: C-Eval, CMMLU, MMLU and other tasks of lm-evaluation-harness, from a hub or from local folders."""

import csv
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cqlora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from cqlora.engine import LlamaEngine

_INSTALL = "`pip install cqlora[evaluation]`"
_LETTERS = "ABCD"
_MOST_CHARACTERS = 131_072
"""Of a cell: a longer one is a quote that was never closed."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A set of subjects as lm-eval defines it and as its authors publish it."""

    group: str
    """lm-eval's name of all subjects together."""
    prefix: str
    """What stands before a subject in the names of lm-eval's tasks."""
    definitions: str
    """Folder of the tasks within lm-eval's."""
    questions: tuple[str, str]
    """Split that is scored, as lm-eval names it, and the end of its files' names in the folder of that name."""
    examples: tuple[str, str]
    """Split that examples are taken from, likewise."""
    columns: tuple[str, ...]
    """Columns that a row must have."""
    has_header: bool = True


BENCHMARKS = {
    "ceval": Benchmark(
        "ceval-valid", "ceval-valid_", "ceval", ("val", "_val.csv"), ("dev", "_dev.csv"),
        ("question", "A", "B", "C", "D", "answer"),
    ),
    "cmmlu": Benchmark(
        "cmmlu", "cmmlu_", "cmmlu", ("test", ".csv"), ("dev", ".csv"), ("Question", "A", "B", "C", "D", "Answer"),
    ),
    "mmlu": Benchmark(
        "mmlu", "mmlu_", "mmlu/default", ("test", "_test.csv"), ("dev", "_dev.csv"),
        ("question", "A", "B", "C", "D", "answer"), has_header=False,
    ),
}  # fmt: skip
"""Benchmarks whose published folders can be read, by the name under which a user asks for them."""


def check_tasks(tasks: list[str], roots: dict[str, str]) -> None:
    """Raise for what can be known to be wrong before a model is loaded.

    Raises:
        ConfigError: lm-eval is missing, or knows no such task.
        DataError: a folder without subjects, or a file of questions that is damaged.
    """
    import importlib.util

    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(f"tasks={tasks} needs lm-eval, which is not installed; install it with {_INSTALL}.")
    for task in tasks:
        if roots.get(task):
            benchmark, root = BENCHMARKS[task], Path(roots[task])
            for subject in list_subjects(benchmark, root):
                for split, suffix in (benchmark.questions, benchmark.examples):
                    read_questions(benchmark, root / split / (subject + suffix))
    others = [task for task in tasks if task not in BENCHMARKS]
    if others:
        from lm_eval.tasks import TaskManager

        index = TaskManager().task_index
        for task in others:
            require_known(task, index)


def require_known(task: str, index: Iterable[str]) -> None:
    """Raise ConfigError for a task that lm-eval's index has not."""
    if task not in index:
        near = get_close_matches(task, [*BENCHMARKS, *index], n=1)
        hint = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists what it does."
        raise ConfigError(f"tasks= has {task}, which lm-eval does not know; {hint}")


def list_subjects(benchmark: Benchmark, root: Path) -> list[str]:
    """The subjects whose questions lie under `root` in the published layout.

    Raises:
        DataError: there are none, or one has no examples.
    """
    (split, suffix), (dev, dev_suffix) = benchmark.questions, benchmark.examples
    found = sorted(file.name.removesuffix(suffix) for file in (root / split).glob(f"*{suffix}"))
    if not found:
        raise DataError(
            f"{root} holds no {split}/SUBJECT{suffix}, as {benchmark.group} is published; give the folder in which "
            f"{dev}/ and {split}/ lie."
        )
    lacking = next((each for each in found if not (root / dev / (each + dev_suffix)).is_file()), None)
    if lacking:
        raise DataError(f"{root} has no {dev}/{lacking}{dev_suffix} beside {split}/{lacking}{suffix}; fetch it too.")
    return found


def read_questions(benchmark: Benchmark, file: Path) -> list[dict[str, Any]]:
    """The rows of one file, as the hub's dataset has them.

    Raises:
        DataError: the file is no CSV in UTF-8 or has no question, a column is missing, or an answer is none of A, B,
            C and D.
    """
    rows = read_rows(file, None if benchmark.has_header else benchmark.columns)
    answer = benchmark.columns[-1]
    for number, row in enumerate(rows, start=1 + benchmark.has_header):
        lacking = next((column for column in benchmark.columns if row.get(column) is None), None)
        if lacking or row[answer] not in tuple(_LETTERS):
            what = f"no {lacking}" if lacking else f"{answer}={row[answer]!r}, which is none of A, B, C, D"
            raise DataError(f"{file}, row {number} has {what}; restore the file as it was published.")
    kept = [{column: row[column] for column in benchmark.columns} for row in rows]
    if benchmark.has_header:
        return kept
    # The hub's rows of MMLU have the choices as a list and the answer as its place in it.
    return [
        {
            "question": row["question"],
            "choices": [row[letter] for letter in _LETTERS],
            "answer": _LETTERS.index(row["answer"]),
        }
        for row in kept
    ]


def read_rows(file: Path, header: tuple[str, ...] | None) -> list[dict[str, Any]]:
    """The rows of a CSV file; `header` is None where its first line names the columns.

    Raises:
        DataError: it is empty, or no CSV in UTF-8.
    """
    csv.field_size_limit(_MOST_CHARACTERS)
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            rows = [dict(row) for row in csv.DictReader(stream, header)]
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not in UTF-8; write it so, as in `iconv -f gb18030 -t utf-8`.") from error
    except csv.Error as error:
        raise DataError(f"{file} cannot be read as CSV ({error}); restore the file as it was published.") from error
    if not rows:
        raise DataError(f"{file} has no question; restore the file as it was published.")
    return rows


def load_local(benchmark: Benchmark, root: Path, subject: str, **_: Any) -> dict[str, Any]:
    """Both splits of a subject, as lm-eval takes a dataset."""
    from datasets import Dataset

    return {
        split: Dataset.from_list(read_questions(benchmark, root / split / (subject + suffix)))
        for split, suffix in (benchmark.questions, benchmark.examples)
    }


def list_tasks(task: str, root: str) -> list[Any]:
    """lm-eval's tasks of a name: of its hub's datasets, or the same definitions on local files.

    Raises:
        ConfigError: lm-eval knows no such task, or a local subject is none of it.
        DataError: a dataset cannot be reached.
    """
    import lm_eval.tasks
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    benchmark = BENCHMARKS.get(task)
    if not root or benchmark is None:
        return load_from_hub(TaskManager(), benchmark.group if benchmark else task)
    definitions = Path(lm_eval.tasks.__file__).parent / benchmark.definitions
    index = TaskManager(include_defaults=False, include_path=definitions).task_index
    tasks = []
    for subject in list_subjects(benchmark, Path(root)):
        name = benchmark.prefix + subject
        if name not in index:
            raise ConfigError(f"{root} has the subject {subject}, and lm-eval has no {name}; take its files out.")
        config = load_yaml(index[name].yaml_path, resolve_func=True)
        dataset = partial(load_local, benchmark, Path(root), subject)
        config = {key: value for key, value in config.items() if key not in ("tag", "dataset_name")}
        tasks.append(ConfigurableTask(config={**config, "custom_dataset": dataset}))
    return tasks


def load_from_hub(manager: Any, name: str) -> list[Any]:
    """The tasks of a name or group, their datasets fetched."""
    require_known(name, manager.task_index)
    try:
        return list(manager.load([name])["tasks"].values())
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise DataError(
            f"the dataset of {name} cannot be fetched ({reason}); reach the hub, or give its published folder, as in "
            "ceval.root=FOLDER."
        ) from error


@dataclass(frozen=True, slots=True)
class ChoiceScore:
    """What a model scored on a task."""

    task: str
    shots: int
    subjects: dict[str, dict[str, Any]]
    """Accuracy, error, questions by subject."""
    first_prompt: str

    def describe(self) -> dict[str, Any]:
        """For the record: micro weights subjects by their questions, macro weights them alike."""
        from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr, unweighted_mean_stderr

        accuracies, errors, sizes = (
            [each[key] for each in self.subjects.values()] for key in ("accuracy", "error", "questions")
        )
        known = None not in errors
        return {
            "task": self.task,
            "shots": self.shots,
            "micro": float(aggregate_subtask_metrics(accuracies, sizes)),
            "micro_error": float(pooled_sample_stderr(errors, sizes)) if known else None,
            "macro": sum(accuracies) / len(accuracies),
            "macro_error": float(unweighted_mean_stderr(errors)) if known else None,
            "first_prompt": self.first_prompt,
            "subjects": self.subjects,
        }


def score_choices(
    engine: "LlamaEngine", folder: Path, task: str, root: str, shots: list[int], limit: int | None, batch_tokens: int
) -> Iterator[ChoiceScore]:
    """A task's score at each number of shots; `folder` holds the model's tokenizer.

    Raises:
        ConfigError, DataError: as `list_tasks`; a task without accuracy.
    """
    import lm_eval
    from lm_eval.tasks import TaskManager

    from cqlora.evaluation.harness import EngineLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = EngineLM(engine, folder, batch_tokens)
    # It need not know others: its own would read fourteen thousand definitions first, for seconds.
    manager = TaskManager(include_defaults=False)
    for count in shots:
        # Made anew each time: a task keeps its requests and the number of its examples.
        found = lm_eval.simple_evaluate(
            model, tasks=list_tasks(task, root), num_fewshot=count, limit=limit, task_manager=manager,
            confirm_run_unsafe_code=False,
        )  # fmt: skip
        yield read_results(task, count, found)


def read_results(task: str, shots: int, found: dict[str, Any]) -> ChoiceScore:
    """The accuracies among what lm-eval returns."""
    subjects = {}
    for name, metrics in found["results"].items():
        if name not in found["samples"]:
            continue
        if "acc,none" not in metrics:
            raise ConfigError(f"tasks= has {task}, which has no accuracy; evaluate runs tasks of multiple choice.")
        error = metrics["acc_stderr,none"]
        subjects[name] = {
            "accuracy": float(metrics["acc,none"]),
            "error": None if error == "N/A" else float(error),
            "questions": int(metrics["sample_len"]),
        }
    first = next(iter(found["samples"].values()))
    return ChoiceScore(task, shots, subjects, first[0]["arguments"][0][0])
