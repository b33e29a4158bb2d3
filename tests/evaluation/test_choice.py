"""Multiple choice from local folders: lm-eval's own scores on the same files, to the last digit."""

import csv
import random
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `evaluation`")

import lm_eval
import lm_eval.tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import AutoTokenizer

from cqlora.errors import ConfigError, DataError
from cqlora.evaluation.choice import (
    BENCHMARKS,
    check_tasks,
    list_subjects,
    list_tasks,
    load_from_hub,
    read_questions,
    score_choices,
)
from cqlora.evaluation.harness import EngineLM
from tests.inference.conftest import load_stock

SUBJECTS = {"ceval": ("law", "physician"), "cmmlu": ("agronomy", "arts"), "mmlu": ("anatomy", "virology")}


def write_rows(file: Path, header: tuple[str, ...] | None, rows: list[list[str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([header, *rows] if header else rows)


def write_benchmark(name: str, root: Path) -> Path:
    """Two subjects in the published layout: an id before C-Eval's and CMMLU's rows, no header in MMLU's."""
    chooser = random.Random(name)
    words = ["长江", "黄河", "river", "Asia", "longest", "水", "河流", "None", "", "two, three"]
    for subject, questions in zip(SUBJECTS[name], (11, 7), strict=True):
        for (split, suffix), count in ((BENCHMARKS[name].questions, questions), (BENCHMARKS[name].examples, 5)):
            rows = [
                [
                    f"{' '.join(chooser.choices(words, k=4))} {number}？",
                    *chooser.choices(words, k=4),
                    *chooser.choice("ABCD"),
                ]
                for number in range(count)
            ]
            header = {
                "ceval": ("id", "question", "A", "B", "C", "D", "answer"),
                "cmmlu": ("", "Question", "A", "B", "C", "D", "Answer"),
                "mmlu": None,
            }[name]
            numbered = [[str(number), *row] for number, row in enumerate(rows)] if header else rows
            write_rows(root / split / f"{subject}{suffix}", header, numbered)
    return root


def own_tasks(name: str, root: Path) -> list[ConfigurableTask]:
    """lm-eval's definitions on the same files, read by `datasets`' own reader of CSV."""
    benchmark = BENCHMARKS[name]
    tasks = []
    for subject in SUBJECTS[name]:
        file = Path(lm_eval.tasks.__file__).parent / benchmark.definitions / f"{benchmark.prefix}{subject}.yaml"
        config = load_yaml(file, resolve_func=True)
        files = {split: str(root / split / (subject + end)) for split, end in (benchmark.questions, benchmark.examples)}
        options = {"data_files": files, "keep_default_na": False}
        config |= {"dataset_path": "csv", "dataset_name": None, "dataset_kwargs": options}
        config.pop("tag", None)
        tasks.append(ConfigurableTask(config=config))
    return tasks


@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("name", ["ceval", "cmmlu"])
def test_scores_are_lm_evals_own_to_the_last_digit(name, shots, base, engine, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    root = write_benchmark(name, tmp_path / name)
    (ours,) = score_choices(engine, base, name, str(root), [shots], None, batch_tokens=700)
    stock = HFLM(load_stock(base), tokenizer=AutoTokenizer.from_pretrained(base), batch_size=3, device="cpu")
    theirs = lm_eval.simple_evaluate(
        stock, tasks=own_tasks(name, root), num_fewshot=shots, task_manager=TaskManager(include_defaults=False)
    )
    assert list(ours.subjects) == [BENCHMARKS[name].prefix + subject for subject in SUBJECTS[name]]
    for subject, found in ours.subjects.items():
        told = theirs["results"][subject]
        assert (found["accuracy"], found["error"]) == (told["acc,none"], told["acc_stderr,none"])
        assert found["questions"] == told["sample_len"]
    assert ours.first_prompt == theirs["samples"][next(iter(ours.subjects))][0]["arguments"][0][0]
    assert ours.first_prompt.count("答案：") == shots + 1


def test_log_likelihoods_are_those_of_lm_evals_model(base, engine):
    """Continuations of one, several and no shared tokens, an empty context, and a text too long for the model."""
    requests = [
        Asked(("河流最长的是", " 长江")),
        Asked(("河流最长的是", "A")),
        Asked(("河流最长的是", "B")),
        Asked(("", "The longest river")),
        Asked(("The longest river " * 300, "is in Asia")),
    ]
    stock = HFLM(load_stock(base), tokenizer=AutoTokenizer.from_pretrained(base), batch_size=2, device="cpu")
    ours = EngineLM(engine, base, batch_tokens=300).loglikelihood(requests, disable_tqdm=True)
    theirs = stock.loglikelihood(requests, disable_tqdm=True)
    assert [found for found, _ in ours] == pytest.approx([found for found, _ in theirs], rel=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


class Asked:
    """A request as lm-eval's tasks make them."""

    def __init__(self, args: tuple[str, str]) -> None:
        self.args = args


def test_micro_weights_questions_and_macro_subjects(base, engine, tmp_path):
    root = write_benchmark("mmlu", tmp_path / "mmlu")
    (found,) = score_choices(engine, base, "mmlu", str(root), [0], None, batch_tokens=700)
    accuracies = [found.subjects[f"mmlu_{subject}"]["accuracy"] for subject in SUBJECTS["mmlu"]]
    told = found.describe()
    assert told["micro"] == pytest.approx((11 * accuracies[0] + 7 * accuracies[1]) / 18)
    assert told["macro"] == pytest.approx(sum(accuracies) / 2)
    errors = [found.subjects[f"mmlu_{subject}"]["error"] for subject in SUBJECTS["mmlu"]]
    assert told["macro_error"] == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2)
    assert told["first_prompt"].endswith("Answer:")


def test_rows_of_mmlu_become_the_hubs(tmp_path):
    root = write_benchmark("mmlu", tmp_path)
    with (root / "test" / "anatomy_test.csv").open(encoding="utf-8", newline="") as stream:
        first = next(csv.reader(stream))
    (row, *_) = read_questions(BENCHMARKS["mmlu"], root / "test" / "anatomy_test.csv")
    assert row == {"question": first[0], "choices": first[1:5], "answer": "ABCD".index(first[5])}


def test_folders_that_are_none_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(DataError, match=r"holds no val/SUBJECT_val.csv"):
        check_tasks(["ceval"], {"ceval": str(tmp_path)})
    root = write_benchmark("ceval", tmp_path)
    (root / "dev" / "physician_dev.csv").unlink()
    with pytest.raises(DataError, match=r"has no dev/physician_dev.csv"):
        list_subjects(BENCHMARKS["ceval"], root)
    write_rows(root / "val" / "law_val.csv", ("id", "question", "A", "B", "C", "D", "answer"), [["0", *"qabcd", "E"]])
    with pytest.raises(DataError, match=r"law_val.csv, row 2 has answer='E'"):
        read_questions(BENCHMARKS["ceval"], root / "val" / "law_val.csv")


def test_a_subject_that_lm_eval_does_not_know_is_refused(tmp_path):
    root = write_benchmark("cmmlu", tmp_path)
    for split in ("dev", "test"):
        (root / split / "arts.csv").rename(root / split / "handicraft.csv")
    with pytest.raises(ConfigError, match="lm-eval has no cmmlu_handicraft"):
        list_tasks("cmmlu", str(root))


def test_an_unknown_task_and_a_hub_out_of_reach_are_told():
    class Manager:
        task_index = ("arc_easy",)

        def load(self, names):
            raise ConnectionError("no route\nto host")

    with pytest.raises(ConfigError, match="tasks= has arc_esay, which lm-eval does not know"):
        load_from_hub(Manager(), "arc_esay")
    with pytest.raises(DataError, match=r"the dataset of arc_easy cannot be fetched \(no route to host\)"):
        load_from_hub(Manager(), "arc_easy")


@pytest.mark.parametrize(
    "content, told",
    [
        (b"", "has no question"),
        (b"id,question,A,B,C,D,answer\n", "has no question"),
        ("id,question,A,B,C,D,answer\n0,长江,a,b,c,d,A\n".encode("gb18030"), "is not in UTF-8"),
        (f"id,question,A,B,C,D,answer\n0,{'x' * 200_000},a,b,c,d,A\n".encode(), "cannot be read as CSV"),
    ],
)
def test_damaged_files_of_questions_are_told_before_a_model_is_loaded(content, told, tmp_path):
    root = write_benchmark("ceval", tmp_path)
    check_tasks(["ceval"], {"ceval": str(root)})
    (root / "dev" / "physician_dev.csv").write_bytes(content)
    with pytest.raises(DataError, match=rf"physician_dev.csv {told}"):
        check_tasks(["ceval"], {"ceval": str(root)})


def test_a_mistyped_task_is_told_before_a_model_is_loaded():
    check_tasks(["arc_easy", "cmmlu"], {})
    with pytest.raises(ConfigError, match="tasks= has cevall, which lm-eval does not know; did you mean ceval"):
        check_tasks(["cevall"], {})
