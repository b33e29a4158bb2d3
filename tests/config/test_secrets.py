"""No secret is written down, whatever it looks like and however it comes: each kind is planted by each way."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cqlora.cli import run_program
from cqlora.config.run_yaml import describe_config, write_run_yaml
from cqlora.config.schema import RunConfig
from cqlora.config.secrets import is_secret_name, refuse_secrets
from cqlora.errors import ConfigError
from tests.conftest import run_verb

# In pieces, so that no scanner of repositories takes them for real ones.
KINDS = {
    "github": "gh" + "p_" + "a1B2" * 9,
    "github fine-grained": "github" + "_pat_" + "11ABCDE0Y0" * 3,
    "hugging face": "h" + "f_" + "AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh",
    "w&b": "0123456789abcdef" * 2 + "01234567",
    "openai": "s" + "k-" + "proj-Ab1Cd2Ef3Gh4Ij5Kl6Mn7",
    "aws": "AK" + "IA" + "IOSFODNN7EXAMPLE",
    "aliyun": "LT" + "AI" + "5tPlantedPlanted4Xy2",
    "url": "https://" + "user:pass1234@host.example/x.jsonl",
    "bearer": "Bear" + "er abc123def456ghi7",
    "slack": "xo" + "xb-123456789012-abcdef",
    "jwt": "ey" + "JhbGciOiJI.eyJzdWIiOiIx.c2ln",
    "address, token": "https://host.example/x.jsonl?to" + "ken=abc123def456",
    "address, user": "https://" + "a1b2c3d4e5f6a7b8@host.example/x.git",
    "address, signed": "https://b.s3.amazonaws.com/x?X-Amz-Date=20260101&X-Amz-Sig" + "nature=0f1e2d3c4b5a6978",
    "hook": "https://hooks.sl" + "ack.com/services/T0AB/B0CD/plantedplanted",
    "environment": "correct-horse-battery-staple",
}
"""Kind → a secret of it; the last has no form of its own and is known because the environment holds it."""


@dataclass
class Plant:
    """A command line, the environment and the files that carry a secret."""

    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    experiment: str = ""


def in_file(text: str) -> Callable[[str], Plant]:
    return lambda secret: Plant(["experiment=mine"], experiment=text.replace("SECRET", f'"{secret}"'))


WAYS: dict[str, Callable[[str], Plant]] = {
    "override": lambda s: Plant([f"tracking.group='{s}'"]),
    "forced override": lambda s: Plant([f"++tracking.group='{s}'"]),
    "list item": lambda s: Plant([f"tracking.tags=[a,'{s}']"]),
    "inside words": lambda s: Plant([f"tracking.project='my {s} project'"]),
    "folder": lambda s: Plant([f"hydra.run.dir='outputs/{s}'"]),
    "job name": lambda s: Plant([f"hydra.job.name='{s}'"]),
    "job environment": lambda s: Plant([f"+hydra.job.env_set.NOTE='{s}'"]),
    "interpolation": lambda s: Plant(["tracking.group=${oc.env:DB_PASS}"], {"DB_PASS": s}),
    "interpolation inside": lambda s: Plant(["tracking.group=x-${oc.env:DB_PASS}-y"], {"DB_PASS": s}),
    "interpolation decoded": lambda s: Plant(
        ["experiment=mine"], {"DB_PASS": s}, "tracking: {group: '${oc.decode:${oc.env:DB_PASS}}'}"
    ),
    "interpolation after the job": lambda s: Plant(
        ["tracking.group=${hydra:job.name}${oc.env:DB_PASS}"], {"DB_PASS": s}
    ),
    "interpolation in a folder": lambda s: Plant(["hydra.run.dir=outputs/${oc.env:DB_PASS}"], {"DB_PASS": s}),
    "copied environment": lambda s: Plant(["hydra.job.env_copy=[DB_PASS]"], {"DB_PASS": s}),
    "sweep": lambda s: Plant([f"tracking.group=a,'{s}'", "--multirun"]),
    "sweep of an interpolation": lambda s: Plant(["tracking.group=a,${oc.env:DB_PASS}", "--multirun"], {"DB_PASS": s}),
    "own file": in_file("tracking: {group: SECRET}"),
    "own file, list": in_file("tracking:\n  tags: [a, SECRET]"),
    "own file, key": in_file("data:\n  sources:\n    SECRET: {kind: wiki}"),
    "own file, source": in_file("data:\n  sources:\n    sample_zh: {path: SECRET}"),
    "own file, hydra": in_file("hydra:\n  job:\n    env_set: {NOTE: SECRET}"),
    "own file, interpolation": lambda s: Plant(
        ["experiment=mine"], {"DB_PASS": s}, "tracking: {group: '${oc.env:DB_PASS}'}"
    ),
    "own file, swept": lambda s: Plant(
        ["experiment=mine", "seed=1,2", "--multirun"], {}, f'tracking: {{group: "{s}"}}'
    ),
}
"""How a value gets into a configuration."""
REFUSED_WAYS: dict[str, Callable[[str], Plant]] = {
    "unknown key": lambda s: Plant([f"+tracking.note='{s}'"]),
    "no override": lambda s: Plant([s]),
    "unfinished list": lambda s: Plant([f"tracking.tags=[{s}"]),
    "wrong type": lambda s: Plant([f"seed='{s}'"]),
    "unknown choice": lambda s: Plant([f"model='{s}'"]),
    "unknown variable": lambda s: Plant([f"model.path=${{oc.env:NOT_SET,'{s}'}}"]),
    "own file, wrong type": in_file("seed: SECRET"),
    "own file, wrong choice": in_file("lora: {method: SECRET}"),
    "own file, unknown key": in_file("tracking: {SECRET: 1}"),
    "own file, no YAML": in_file("tracking: [SECRET"),
    "own file, defaults": in_file("defaults: [SECRET]"),
}
"""Ways that lead nowhere, and whose refusal must not repeat the secret."""


def write_down(config: RunConfig) -> None:
    """What a run writes of its configuration: run.yaml, and what trackers are given."""
    write_run_yaml(config, Path("run"))
    Path("run", "tracker.txt").write_text(str(describe_config(config)), encoding="utf-8")


def compose_planted(plant: Plant, folder: Path, monkeypatch, capfd) -> tuple[int, str]:
    """Exit code, and everything that was printed or written, names of files included."""
    mine = folder.parent / f"{folder.name}-configs"
    (mine / "experiment").mkdir(parents=True)
    (mine / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{plant.experiment}\n", encoding="utf-8")
    for name, value in plant.environment.items():
        monkeypatch.setenv(name, value)
    flags = ["hydra.output_subdir=.hydra", "stage=pretrain", "--config-dir", str(mine)]
    monkeypatch.setattr(sys, "argv", ["cqlora run", *plant.arguments, *flags])
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        run_program("config", RunConfig, write_down)
    printed = capfd.readouterr()
    written = [f"{file}\n{file.read_text(encoding='utf-8') if file.is_file() else ''}" for file in folder.rglob("*")]
    return int(ended.value.code or 0), "\n".join([printed.out, printed.err, *written])


def cases() -> list[tuple[str, str]]:
    """Each kind by two ways, each way with a kind in its turn; values of the environment by every way that works."""
    kinds, ways = list(KINDS), [*WAYS, *REFUSED_WAYS]
    pairs = {(kind, way) for kind in kinds for way in ("override", "own file, list")}
    pairs |= {(kinds[number % len(kinds)], way) for number, way in enumerate(ways)}
    return sorted(pairs | {("environment", way) for way in WAYS})


@pytest.mark.parametrize("kind, way", cases())
def test_a_planted_secret_is_refused_and_stands_nowhere(kind, way, tmp_path, monkeypatch, capfd):
    secret = KINDS[kind]
    if kind == "environment":
        monkeypatch.setenv("MYSQL_ROOT_PASSWORD", secret)
    code, message = compose_planted({**WAYS, **REFUSED_WAYS}[way](secret), tmp_path, monkeypatch, capfd)
    assert code == 2
    assert secret not in message
    assert "error: " in message and "Traceback" not in message
    assert way in REFUSED_WAYS or "secret" in message


@pytest.mark.parametrize("way", WAYS)
def test_what_is_no_secret_gets_through_by_each_of_these_ways(way, tmp_path, monkeypatch, capfd):
    plant = WAYS[way]("wiki_zh_marker")
    renamed = Plant(
        [argument.replace("DB_PASS", "MY_NOTE") for argument in plant.arguments],
        dict(zip(["MY_NOTE"], plant.environment.values(), strict=False)),
        plant.experiment.replace("DB_PASS", "MY_NOTE"),
    )
    code, message = compose_planted(renamed, tmp_path, monkeypatch, capfd)
    assert code == 0, message
    assert "wiki_zh_marker" in message


MORE_FORMS = {
    "azure sas": "https://a.blob.core.windows.net/c/x?sv=2024-01-01&se=2026-01-01&s" + "ig=Ab%2Bc1%2Fd2%3D",
    "google signed": "https://storage.googleapis.com/b/x?X-Goog-Sig" + "nature=00ff00ff00ff",
    "oss signed": "https://b.oss-cn-beijing.aliyuncs.com/x?Expires=1&Sig" + "nature=q1w2e3r4%3D",
    "api key": "https://host/x?api_" + "key=planted9",
    "access token": "https://oapi.dingtalk.com/robot/send?access_to" + "ken=0123abcd",
    "fragment": "https://host/#access_to" + "ken=planted9",
    "key of a hook": "https://qyapi.weixin.qq.com/cgi-bin/webhook/send?k" + "ey=693axxx6-7aoc-4bc4-97a0",
    "encoded": "https://host/?next=%2Fx%3Fto" + "ken%3Dplanted99",
    "account key": "DefaultEndpointsProtocol=https;AccountName=a;Account" + "Key=Zm9vYmFyYmF6==",
    "user of 40 digits": "https://" + "0123456789abcdef" * 2 + "01234567@host/x",
    "mixed user": "https://" + "s3cR3tTok@host/x",
    "discord": "https://disc" + "ord.com/api/webhooks/123456/planted-planted",
    "feishu": "https://open.fei" + "shu.cn/open-apis/bot/v2/hook/planted-planted",
    "teams": "https://a.web" + "hook.office.com/webhookb2/planted-planted",
    "telegram": "https://api.telegram.org/bot" + "123456789:AA" + "plantedplanted-PLANTED_0123456789"[:33],
    "deepseek": "s" + "k-" + "0123456789abcdef" * 2,
    "openrouter": "s" + "k-or-v1-" + "0123456789abcdef" * 4,
    "anthropic": "s" + "k-ant-api03-Planted0Planted1Planted2",
    "stripe": "sk_l" + "ive_0123456789abcdefPLANTED",
    "groq": "gs" + "k_" + "Planted0" * 6,
    "zhipu": "0123456789abcdef" * 2 + "." + "PlantedPlanted00",
    "sendgrid": "S" + "G." + "planted_planted-0." + "planted_planted-1",
}
"""Forms that need no more than one way each."""


@pytest.mark.parametrize("form", MORE_FORMS)
def test_each_form_is_known_wherever_it_stands(form):
    for text in (MORE_FORMS[form], f"see {MORE_FORMS[form]} there", f"[a,'{MORE_FORMS[form]}']"):
        with pytest.raises(ConfigError) as caught:
            refuse_secrets([f"tracking.group={text}"])
        assert MORE_FORMS[form] not in str(caught.value)


INNOCENT = [
    "data.sources.x.path=https://huggingface.co/datasets/a/b/resolve/main/x.jsonl?download=true",
    "data.sources.x.path=https://host/x.jsonl?key=title&max_tokens=512&pad_token=endoftext&sort=design",
    "data.sources.x.path=https://username@host/x.jsonl",
    "data.sources.x.path=ssh://git@github.com/a/b",
    "data.sources.x.path=https://zhang.san%40example.com@host/x",
    "data.sources.x.path=s3://bucket/a?versionId=3sL4kqtJlcpXroDTDmJ",
    "data.sources.x.path=https://slack.com/services/what-is-there",
    "system='什么是 token？比如 https://host/x?token=词元'",
    "tracking.group=sk_live_music-gsk_r8_xai-of-the-year-2026",
    "tracking.group=run-" + "0123456789abcdef" * 2 + ".jsonl",
    "data.sources.x.path='/data/a;b;sig=1'",
    "model.path=models/tiny",
    "model.path=/data/" + "ab12" * 16 + "/x",
    "model.path=hub/models--meta-llama--Llama-2-7b/snapshots/" + "0123456789abcdef01234567" * 2 + "/",
    "model.path=hub/snapshots/" + "0123456789" * 4,
    "hydra.run.dir=outputs/" + "89abcdef01" * 4,
    "data.cache_dir=cache/" + "5" * 64,
    "stage.eval_tokens=4096",
    "stage.max_tokens=5",
    "max_tokens=1024",
    "measure_tokens=2048",
    "tokens=1000",
    "vocab.control_tokens=false",
    "vocab.model=mistral/tokenizer.model",
    "tokenizer=chinese",
    "data.sources.oasst1.sample_tokens=100000",
    "data.sources.secretary.path=a.jsonl",
    "tracking.project=tokenization-passes",
    "tracking.entity=basic-research",
    "tracking.tags=[bearer,basic,passage,monkey]",
    "tracking.group=hf_llama_2_7b_chinese_instruct_v2",
    "tracking.group=sk-learn-experiments-of-last-year",
    "data.sources.x.dataset=https://huggingface.co/datasets/user@host",
    "data.sources.x.path=s3://bucket/prefix:1/x",
    "system='The bearer of this letter may pass: 密码 is the word for password.'",
    "adapter=[outputs/a,outputs/b]",
    "hydra.job.name=key",
    "keep_last=2",
    "--multirun",
    "",
]


@pytest.mark.parametrize("argument", INNOCENT)
def test_ordinary_arguments_are_no_secrets(argument):
    refuse_secrets([argument])


@pytest.mark.parametrize(
    "argument",
    ["+tracking.api_key=abc", "+data.hf_token=x", "+x={apiKey: abc", "stage.password=1", "+a.AWS_ACCESS_KEY_ID=x",
     "+hydra.job.env_set.DB_PASS=abcd", "++a.credentials=[x]", "+tracking.authorization=abc"],
)  # fmt: skip
def test_a_key_whose_name_says_that_it_holds_a_secret_is_refused_whatever_it_holds(argument):
    with pytest.raises(ConfigError, match="environment"):
        refuse_secrets([argument])


def test_names_of_secrets_differ_from_names_of_counts_tokens_and_paths():
    secret = "DB_PASS AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY apiKey hf_token PGPASSWORD GITHUB_PAT SSH_KEY private_key"
    innocent = "max_tokens tokenizer pad_token HF_TOKEN_PATH compass bypass key num_key_value_heads keep_last"
    assert all(map(is_secret_name, secret.split()))
    assert not any(map(is_secret_name, innocent.split()))


def test_the_program_itself_refuses_a_planted_variable_before_it_makes_a_folder(tmp_path):
    arguments = ("stage=pretrain", "tracking.group=${oc.env:AWS_ACCESS_KEY_ID}")
    done = run_verb(tmp_path, "run", *arguments, expect=2, AWS_ACCESS_KEY_ID="planted")
    assert done.stderr.count("\n") == 1
    assert "planted" not in done.stdout + done.stderr and not list(tmp_path.iterdir())
