"""metrics.jsonl always, trackers as asked, secrets nowhere."""

import json
import logging
import math
import re
import shutil
import sqlite3
from html import escape
from pathlib import Path

import pytest

from cqlora.config.choices import Tracker, TrackingMode
from cqlora.config.run_yaml import flatten, list_changes, load_run_yaml
from cqlora.config.tracking import TrackingConfig
from cqlora.errors import TrainingError
from cqlora.launch.start import read_final_loss
from cqlora.system.metrics import append_metrics, name_values, read_metrics, rewind_metrics
from cqlora.train.tracking import (
    MetricsLog,
    define_metrics,
    describe_wandb,
    start_wandb,
    sweep_group,
    wandb_mode,
    wandb_options,
)
from tests.conftest import run_verb
from tests.runs import SMALL, finish_run, typed_run

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_PlantedPlantedPlantedPlanted",
    "CQLORA_API_KEY": "sk-planted-planted-planted-planted",
    "MY_PASSWORD": "planted-password-in-the-environment",
}

REPLIES = ("stage.eval_generations=1", "stage.eval_generation_tokens=4")
TRACKED = ("tracking=wandb", "tracking.tags=[mine]", "tracking.group=g", "stage.schedule=constant")


def small_run(workspace: Path, folder: Path, *overrides: str, **environment: str):
    paths = (
        f"model.path={workspace}/models/tiny",
        f"data.cache_dir={workspace}/cache",
        f"hydra.run.dir={folder}",
    )
    arguments = [a for a in SMALL if not a.startswith("tracking")]
    return run_verb(workspace, "run", "stage=sft", "stage.max_steps=2", *arguments, *paths, *overrides, **environment)


def files_with(folder: Path, secret: str) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]


def test_every_line_of_the_record_has_the_published_fields(workspace, tmp_path):
    assert finish_run(typed_run(workspace, "stage=pretrain", "stage.max_steps=2"), tmp_path) == 0
    rows = read_metrics(tmp_path)
    train = [row for row in rows if row["kind"] == "train"]
    fields = {
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "peak_memory_gib",
        "seconds",
    }
    assert all(fields | {"matmul_share"} <= row.keys() for row in train)
    assert [row["step"] for row in train] == [1, 2]
    assert train[1]["tokens"] > train[0]["tokens"] > 0
    fields = {
        "step",
        "source",
        "language",
        "loss",
        "perplexity",
        "bits_per_character",
        "bits_per_byte",
        "tokens",
    }
    assert [row["step"] for row in rows if row["kind"] == "eval" and fields <= row.keys()] == [0, 0, 2, 2]
    assert all(not isinstance(value, dict | list) for row in rows for value in row.values())
    seen = [name for name in train[0] if name.startswith("loss/")]
    assert seen and set(seen) <= {"loss/sample_zh/zh", "loss/sample_en/en"}


@pytest.fixture(scope="module")
def tracked(workspace, tmp_path_factory) -> Path:
    """A run's folder that W&B wrote to, offline, with secrets in the environment."""
    folder = tmp_path_factory.mktemp("tracked") / "run"
    small_run(workspace, folder, *TRACKED, WANDB_MODE="offline", **SECRETS)
    return folder


def test_wandb_offline_records_config_group_tags_and_values_and_no_secret_of_the_environment(tracked):
    segments = list((tracked / "wandb").glob("offline-run-*"))
    assert len(segments) == 1
    stored = b"".join(file.read_bytes() for file in segments[0].rglob("*.wandb"))
    for word in (b"learning_rate", b"train/loss", b"mine", b"sample_dialog"):
        assert word in stored
    for secret in SECRETS.values():
        assert files_with(tracked, secret) == []


def test_an_offline_run_that_is_resumed_adds_a_segment_of_the_same_run_and_overwrites_none(
    workspace, tracked, tmp_path
):
    folder = shutil.copytree(tracked, tmp_path / "run", symlinks=True)
    run_id = (folder / "wandb_run_id").read_text()
    (first,) = folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb")
    before = first.read_bytes()
    small_run(workspace, folder, *TRACKED, "stage.max_steps=4")
    assert (folder / "wandb_run_id").read_text() == run_id and first.read_bytes() == before
    segments = list(folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(segments) == 2
    assert all(b"train/loss" in file.read_bytes() for file in segments)


def test_wandb_has_flat_keys_what_was_changed_the_plan_and_the_adapter(workspace, tmp_path):
    wandb = ("tracking=wandb", "tracking.log_adapter=true", *REPLIES)
    small_run(workspace, tmp_path / "run", *wandb, WANDB_MODE="offline")
    (file,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    stored = file.read_bytes()
    for word in (b"lora.rank", b"changed", b"plan/peak_memory_gib", b"adapter_model.safetensors", b"eval/replies"):
        assert word in stored
    tables = (tmp_path / "run").glob("wandb/offline-run-*/files/media/table/eval/replies_*.table.json")
    found = sorted((json.loads(table.read_text(encoding="utf-8")) for table in tables), key=lambda t: len(t["data"]))
    assert [len(table["data"]) for table in found] == [2, 4], "all of the run's replies so far, at each evaluation"
    assert as_rows(found[-1]) == logged_replies(tmp_path / "run")


def test_curves_are_over_tokens_and_the_objectives_have_their_goals(workspace):
    defined: dict[str, dict[str, str]] = {}

    class Run:
        def define_metric(self, name: str, **given: str) -> None:
            defined[name] = given

    config = typed_run(workspace, "stage=pretrain", "sweep.objectives=[eval/loss,eval/sample_zh/zh/loss:maximize]")
    define_metrics(Run(), config)
    assert all(given["step_metric"] == "train/tokens" for name, given in defined.items() if name != "train/tokens")
    assert defined["eval/loss"]["summary"] == "min,last"
    assert defined["eval/sample_zh/zh/loss"]["summary"] == "max,last"


def test_what_differs_from_the_defaults_is_named(workspace):
    changed = list_changes(typed_run(workspace, "stage=pretrain", "lora.alpha=7"))
    assert {"lora.rank", "lora.alpha"} <= set(changed)
    assert not {"lora.method", "seed", "model.name"} & set(changed)


def test_tensorboard_writes_events_into_the_run_folder(workspace, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    small_run(workspace, tmp_path / "run", "tracking=tensorboard", *REPLIES)
    # Hyperparameters are in a file of their own, a folder below.
    file = min((tmp_path / "run").rglob("events.out.tfevents.*"), key=lambda file: len(file.parts))
    events = EventAccumulator(str(file)).Reload()
    logged = {each.step: each.value for each in events.Scalars("train/loss")}
    assert logged == pytest.approx(logged_losses(tmp_path / "run"), rel=1e-6)
    told = [each.tensor_proto.string_val[0].decode() for each in events.Tensors("eval/replies/text_summary")]
    rows = logged_replies(tmp_path / "run")
    assert [len(table.splitlines()) for table in told] == [2 + 2, 2 + 4]
    assert told[-1].splitlines()[2:] == [
        f"| {' | '.join('<br>'.join(escape(str(c)).splitlines()).replace('|', '&#124;') for c in row.values())} |"
        for row in rows
    ]


def as_rows(table: dict) -> list[dict]:
    """A table of columns and data as one object a row."""
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def logged_replies(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "kind"} for row in read_metrics(run) if row["kind"] == "reply"]


def logged_losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run) if row["kind"] == "train"}


def test_trackio_has_the_runs_losses_in_its_folder(workspace, tmp_path):
    pytest.importorskip("trackio", reason="needs the extra `trackio`")
    small_run(workspace, tmp_path / "run", "tracking=trackio", "tracking.project=p", *REPLIES,
              TRACKIO_DIR=str(tmp_path / "kept"))  # fmt: skip
    with sqlite3.connect(tmp_path / "kept" / "p.db") as database:
        rows = [(name, step, json.loads(row)) for name, step, row in
                database.execute("select run_name, step, metrics from metrics")]  # fmt: skip
    logged = {step: row["train/loss"] for _, step, row in rows if "train/loss" in row}
    assert logged == logged_losses(tmp_path / "run") and len(logged) == 2
    assert {name for name, _, _ in rows} == {"sft-tiny-run"}
    tables = [row["eval/replies"] for _, _, row in rows if "eval/replies" in row]
    assert tables[-1]["_value"] == logged_replies(tmp_path / "run")
    assert not [file for secret in SECRETS.values() for file in files_with(tmp_path, secret)]


def test_mlflow_has_the_runs_losses_and_a_run_that_goes_on_is_one(workspace, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra `mlflow`")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    small_run(workspace, tmp_path / "run", "tracking=mlflow", "stage.schedule=constant", *REPLIES,
              MLFLOW_TRACKING_URI=store)  # fmt: skip
    small_run(workspace, tmp_path / "run", "tracking=mlflow", "stage.max_steps=3", "stage.schedule=constant", *REPLIES,
              MLFLOW_TRACKING_URI=store)  # fmt: skip
    client = mlflow.MlflowClient(store)
    (experiment,) = client.search_experiments(filter_string="name = 'cqlora'")
    (run,) = client.search_runs([experiment.experiment_id])
    logged = {each.step: each.value for each in client.get_metric_history(run.info.run_id, "train/loss")}
    assert logged == logged_losses(tmp_path / "run") and len(logged) == 3
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "eval/replies.json")).read_text())
    assert as_rows(table) == logged_replies(tmp_path / "run")
    assert run.data.params["lora.rank"] and run.info.run_name == "sft-tiny-run"


def test_a_secret_among_the_overrides_starts_nothing_and_leaves_no_folder(workspace, tmp_path):
    secret = SECRETS["WANDB_API_KEY"]
    for override in (
        f"+tracking.api_key={secret}",
        f"tracking.project={secret}",
        f"tracking.tags=[{secret}]",
    ):
        done = run_verb(workspace, "run", "stage=sft", f"hydra.run.dir={tmp_path}/run", override, expect=2)
        assert "environment" in done.stderr and secret not in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()


def test_wandb_is_online_only_with_a_key(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    automatic = TrackingConfig(tracker=Tracker.wandb)
    assert wandb_mode(automatic) == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_mode(automatic) == "online"
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert wandb_mode(automatic) == "online"
    assert wandb_mode(TrackingConfig(tracker=Tracker.wandb, mode=TrackingMode.offline)) == "offline"


def test_a_server_that_cannot_be_reached_is_told_in_a_sentence(workspace, tmp_path, monkeypatch):
    import wandb

    def refuse(**options: object) -> None:
        raise wandb.errors.CommError("Failed to get resume status: no such host.\nwhile retrying")

    monkeypatch.setattr(wandb, "init", refuse)
    # It sets what W&B reads when it is imported.
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(
        TrainingError, match=r"\(Failed to get resume status: no such host\); add tracking\.mode=offline"
    ):
        start_wandb(typed_run(workspace, "stage=sft", "tracking=wandb"), tmp_path)


def test_jobs_of_a_sweep_share_a_group_and_the_agent_chooses_the_id(workspace, tmp_path, monkeypatch):
    config = typed_run(workspace, "stage=sft")
    folder = tmp_path / "multirun" / "sft" / "2026-01-01_00-00-00" / "3"
    folder.mkdir(parents=True)
    options = wandb_options(config, folder)
    assert options["group"] == sweep_group(folder) == "sft-2026-01-01_00-00-00"
    assert options["job_type"] == "sft" and options["id"] == wandb_options(config, folder)["id"]
    assert options["tags"] == ["tiny", "sample", "cpu"]
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    assert "id" not in wandb_options(config, folder)
    assert sweep_group(tmp_path / "outputs") is None


def test_a_line_that_a_kill_cut_short_is_dropped_and_rewinding_keeps_events(tmp_path):
    for step in (1, 2, 3):
        append_metrics(tmp_path, {"kind": "train", "step": step, "loss": float(step)})
        append_metrics(tmp_path, {"kind": "event", "step": step, "event": "checkpoint"})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "st')
    assert len(read_metrics(tmp_path)) == 6
    rewind_metrics(tmp_path, 1)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1]
    assert [row["step"] for row in rows if row["kind"] == "event"] == [1, 2, 3]


def test_a_new_line_never_joins_one_that_a_kill_cut_short_and_a_damaged_line_is_reported(tmp_path, caplog):
    append_metrics(tmp_path, {"kind": "train", "step": 1, "loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "st')
    append_metrics(tmp_path, {"kind": "event", "step": 1, "event": "damaged_checkpoint"})
    for line in (b"\xff", b"[1]", b'{"kind": "train", "stap": 1}', b"[" * 9_999, b'{"kind": "eval", "step": 1}'):
        with (tmp_path / "metrics.jsonl").open("ab") as stream:
            stream.write(line + b"\n")
    append_metrics(tmp_path, {"kind": "train", "step": 2, "loss": 2.0})
    with caplog.at_level(logging.WARNING):
        rows = read_metrics(tmp_path)
    assert [(row["kind"], row["step"]) for row in rows] == [("train", 1), ("event", 1), ("train", 2)]
    assert [int(number) for number in re.findall(r"line (\d+) is damaged", caplog.text)] == [2, 4, 5, 6, 7, 8]
    rewind_metrics(tmp_path, 2)
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == 3


def test_a_flipped_bit_of_an_event_that_no_checkpoint_vouches_for_is_left_out_and_told(tmp_path, caplog):
    row = {"kind": "event", "step": 3, "event": "checkpoint"}
    append_metrics(tmp_path, row)
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(tmp_path) == [row]
    content, left_out = file.read_bytes(), 0
    for place in range(len(content) - 1):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        rows = read_metrics(tmp_path)
        # Under another name the seal is a detail more, of an event that is right.
        assert not rows or row.items() <= rows[0].items()
        left_out += not rows
    assert caplog.text.count("line 1 is damaged and left out") == left_out > 100
    file.write_bytes(content)
    rewind_metrics(tmp_path, 1)
    assert file.read_bytes() == content


def test_non_finite_numbers_stay_valid_json_and_out_of_the_trackers(tmp_path):
    append_metrics(tmp_path, {"kind": "event", "step": 1, "event": "skipped_step", "loss": math.nan})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["loss"] == "nan"
    assert name_values({"kind": "train", "step": 1, "loss": math.inf, "tokens": 3}) == {"train/tokens": 3}
    assert flatten({"a": {"b": 1}, "c": [1]}) == {"a.b": 1, "c": [1]}


def test_one_held_out_loss_weighs_every_token_alike_for_trackers_and_for_sweepers(tmp_path):
    logged = []

    class Tracker:
        def log(self, values, step):
            logged.append((step, values))

    rows = [
        {"kind": "eval", "step": 7, "source": "zh", "language": "zh", "loss": 2.0, "tokens": 300},
        {"kind": "eval", "step": 7, "source": "zh", "language": "mixed", "loss": 4.0, "tokens": 50},
        {"kind": "eval", "step": 7, "source": "en", "language": "en", "loss": 6.0, "tokens": 50},
    ]
    metrics = MetricsLog(tmp_path, [Tracker()])
    for row in rows:
        metrics.log(row)
    metrics.log_mean(rows)
    assert logged[-1] == (7, {"eval/loss": pytest.approx((600 + 200 + 300) / 400), "train/tokens": 0})
    assert read_final_loss(tmp_path) == pytest.approx(2.75)
    assert len(read_metrics(tmp_path)) == 3
    before = len(logged)
    metrics.log_mean([])
    assert len(logged) == before


def test_where_a_wandb_run_is_to_be_seen_is_reported(tmp_path):
    class Run:
        url, dir = "https://wandb.ai/me/cqlora/runs/abc", f"{tmp_path}/a b/wandb/offline-run-1-abc/files"
        offline = False

    assert describe_wandb(Run(), tmp_path / "a b") == ["W&B: https://wandb.ai/me/cqlora/runs/abc"]
    Run.offline = True
    first, second = describe_wandb(Run(), tmp_path / "a b")
    assert first.endswith(f"{tmp_path}/a b/wandb/offline-run-1-abc")
    assert second == f"upload it with: wandb sync '{tmp_path}/a b'/wandb/offline-run-*"


def test_the_jobs_of_a_sweep_are_named_by_what_tells_them_apart_and_without_a_tracker_leave_their_own_files_only(
    workspace, tmp_path
):
    paths = (f"model.path={workspace}/models/tiny", f"data.cache_dir={workspace}/cache")
    arguments = [*SMALL, *paths, "stage=pretrain", "stage.max_steps=1", "lora.rank=2,4", f"hydra.sweep.dir={tmp_path}"]
    run_verb(workspace, "run", *[a for a in arguments if a != "lora.rank=4"], "--multirun", **SECRETS)
    names = [load_run_yaml(tmp_path / job / "run.yaml").tracking.name for job in "01"]
    assert names == ["pretrain-tiny-0 lora.rank=2", "pretrain-tiny-1 lora.rank=4"]
    for job in "01":
        left = {file.name for file in (tmp_path / job).iterdir()}
        assert left == {"adapter", "checkpoints", "metrics.jsonl", "report.html", "run.yaml", "workers"}
    for secret in SECRETS.values():
        assert files_with(tmp_path, secret) == []
