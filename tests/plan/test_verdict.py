"""What fits, what does not, and what would."""

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cqlora.config.choices import Checkpointing
from cqlora.config.schema import CONFIG_DIR, HardwareConfig
from cqlora.plan.estimate import GIB
from cqlora.plan.fit import Fit
from cqlora.plan.layouts import suggest_layouts
from cqlora.plan.memory import plan_memory
from cqlora.plan.verdict import _read_group, judge
from tests.plan.runs import compose_run

BASE = "experiment=chinese_llama_65b_base"


def test_65b_fits_four_a100_with_room() -> None:
    verdict = judge(compose_run(BASE, "hardware=4xa100"))
    assert verdict.fit is Fit.fits
    assert verdict.sentence.endswith("of 79.2 GiB per GPU")
    assert not verdict.suggestions


def test_65b_does_not_fit_one_4090_and_every_change_that_is_named_fits() -> None:
    verdict = judge(compose_run(BASE, "hardware=1x4090"))
    assert verdict.fit is Fit.does_not_fit
    assert "hardware=1x4090 has 23.6" in verdict.sentence
    assert {"hardware", "model"} <= {key for option in verdict.suggestions for key in option.overrides}
    for option in verdict.suggestions:
        typed = [f"{key}={value}" for key, value in option.overrides.items()]
        defaults = [] if "hardware" in option.overrides else ["hardware=1x4090"]
        assert plan_memory(compose_run(BASE, *defaults, *typed)).fit is Fit.fits
        assert option.time is not None


def test_sharding_that_does_not_fit_is_offered_offload_first() -> None:
    verdict = judge(compose_run(BASE, "hardware=2x4090"))
    assert verdict.fit is Fit.does_not_fit
    assert verdict.suggestions[0].overrides == {"hardware.cpu_offload": "true"}


def test_a_batch_that_is_too_large_is_offered_a_smaller_one() -> None:
    verdict = judge(
        compose_run("stage=pretrain", "model=llama2_13b", "hardware=1x4090", "hardware.micro_batch_size=32")
    )
    assert verdict.fit is Fit.does_not_fit
    assert list(verdict.suggestions[0].overrides) == ["hardware.micro_batch_size"]


def test_a_refusal_is_one_sentence_with_the_smallest_change() -> None:
    verdict = judge(compose_run(BASE, "hardware=2x4090"))
    assert verdict.refusal == (
        f"the run {verdict.sentence}; add hardware.cpu_offload=true, or see what would fit with `cqlora plan`."
    )


def test_host_memory_that_is_too_small_is_said() -> None:
    config = compose_run(BASE, "hardware=2x4090", "hardware.cpu_offload=true", "hardware.host_memory_gib=32")
    verdict = judge(config)
    assert verdict.fit is Fit.does_not_fit
    assert "of host memory, and hardware=2x4090 has 32.0" in verdict.sentence


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=llama2_7b", "hardware=1xa100"], Checkpointing.none),
        (["model=llama2_7b", "hardware=1x4090", "hardware.micro_batch_size=8"], Checkpointing.full),
        (
            ["model=llama2_7b", "hardware=1xa100", "hardware.activation_checkpointing=full"],
            Checkpointing.full,
        ),
        (["model=tiny", "hardware=cpu"], Checkpointing.none),
    ],
)
def test_auto_recomputes_only_where_nothing_else_fits(overrides: list[str], expected: Checkpointing) -> None:
    config = compose_run("stage=pretrain", *overrides)
    assert config.hardware.activation_checkpointing is expected


def test_auto_plans_what_it_resolves_to() -> None:
    auto = compose_run("stage=pretrain", "model=llama2_7b", "hardware=1xa100")
    none = compose_run("stage=pretrain", "model=llama2_7b", "hardware=1xa100", "hardware.activation_checkpointing=none")
    assert plan_memory(auto) == plan_memory(none)


def test_layouts_are_reported_fastest_first_and_all_fit() -> None:
    options = suggest_layouts(compose_run(BASE, "hardware=4xa100"))
    assert len(options) > 5
    assert all(option.memory.fit is Fit.fits for option in options)
    speeds = [option.seconds_per_token for option in options]
    assert speeds == sorted(speeds)


def test_parts_add_up_to_the_peak_of_a_step() -> None:
    for hardware in ("4xa100", "4xa100_40g", "1xa100"):
        memory = plan_memory(compose_run(BASE, f"hardware={hardware}"))
        assert sum(memory.parts.values()) == pytest.approx(memory.step)


def test_checkpoints_on_disk_count_parameters_and_states_of_those_kept_and_one_more() -> None:
    memory = plan_memory(compose_run(BASE, "hardware=4xa100"))
    trained = 799_539_200
    assert memory.disk == trained * (3 * 12 + 4)
    assert memory.disk / GIB == pytest.approx(29.8, abs=0.1)


def test_the_machines_that_a_plan_names_are_those_that_hydra_composes() -> None:
    machines = {machine.name: machine for machine in _read_group("hardware", HardwareConfig)}
    files = {file.stem for file in (CONFIG_DIR / "hardware").glob("*.yaml")}
    assert set(machines) == {name for name in files if not name.startswith("slurm_")}
    for name, machine in machines.items():
        with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
            assert machine == OmegaConf.to_object(compose("config", ["stage=pretrain", f"hardware={name}"]).hardware)
