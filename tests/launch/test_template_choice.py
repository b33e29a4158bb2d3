"""Which template a run settles on: what was asked for, the adapter's, the base's own, or ChatML."""

import json

import pytest
from omegaconf import OmegaConf

from cqlora.base import read_base
from cqlora.config.choices import Template
from cqlora.config.run_yaml import load_run_yaml
from cqlora.data.cache import fingerprint_choices
from cqlora.data.sources import find_sources
from cqlora.errors import ConfigError, ModelError
from cqlora.launch.settle import look_ahead, look_around, read_earlier, settle
from cqlora.train.state import describe_identity, require_same_run
from tests.cards import change_card
from tests.data.template_families import source_of
from tests.runs import SMALL, build_base, finish_run, read_state, typed_run

OWN = source_of("smollm2")


@pytest.fixture
def own_base(workspace, tmp_path):
    """A tiny base that carries SmolLM2's template."""
    base = build_base(workspace, tmp_path / "own", tied=False)
    (base / "cqlora.json").unlink()
    (base / "chat_template.jinja").write_text(OWN)
    return base


def settled(workspace, base, *overrides):
    return typed_run(workspace, "stage=sft", f"model.path={base}", *overrides)


def test_auto_is_the_bases_own_and_a_name_is_that(workspace, own_base):
    assert settled(workspace, own_base).stage.template is Template.base
    assert settled(workspace, own_base, "stage.template=chatml").stage.template is Template.chatml
    assert settled(workspace, f"{workspace}/models/tiny").stage.template is Template.chatml
    config = settled(workspace, own_base, "stage.template=auto")
    assert settle(config, look_ahead(config)).stage.template is Template.base


def test_a_template_whose_tokens_the_base_has_not_is_refused_before_anything_starts(workspace, own_base):
    with pytest.raises(ModelError, match="ends a reply with none of the tokenizer's control tokens") as refused:
        settled(workspace, own_base, "stage.template=llama3")
    assert "\n" not in str(refused.value)
    (own_base / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"has no chat template of its own; use stage\.template=chatml"):
        settled(workspace, own_base, "stage.template=base")


def test_the_template_is_part_of_the_cache_and_chatml_alone_leaves_its_name_as_it_was(workspace, own_base, tmp_path):
    def fingerprint(*overrides):
        config = settled(workspace, own_base, *overrides)
        locations = find_sources(config.data, "sft")
        return fingerprint_choices(config, read_base(own_base), locations, tmp_path)

    found = [fingerprint(*each) for each in (
        (), ("stage.thinking=mask",), ("stage.template=chatml",), ("stage.template=chatml", "stage.thinking=drop"),
        ("stage.template=qwen",),
    )]  # fmt: skip
    assert len(set(found)) == len(found)
    (own_base / "chat_template.jinja").write_text(OWN.replace("helpful", "kind"))
    assert fingerprint() not in found and fingerprint("stage.template=chatml") == found[2]


def test_an_adapter_is_continued_in_its_template_or_refused(workspace, own_base, tmp_path, call_verb):
    config = settled(workspace, own_base, "stage.max_steps=1", "model.quantization=none", "stage.template=qwen")
    assert finish_run(config, tmp_path / "run") == 0
    adapter = tmp_path / "run" / "adapter"
    again = ("stage.max_steps=1", "model.quantization=none", f"stage.init_adapter={adapter}")
    went_on = settled(workspace, own_base, *again)
    assert went_on.stage.template is Template.qwen
    # `prepare` builds the cache that the run will look for.
    prepared = call_verb(tmp_path, "prepare", *SMALL, "stage=sft", f"model.path={own_base}", *again,
                         f"data.cache_dir={tmp_path / 'cache'}").stdout  # fmt: skip
    name = fingerprint_choices(went_on, read_base(own_base), find_sources(went_on.data, "sft"), tmp_path)
    assert name[:32] in prepared
    with pytest.raises(ConfigError, match=r"stage\.template=qwen and not base; type stage\.template=qwen"):
        settled(workspace, own_base, *again, "stage.template=base")
    told = json.loads((adapter / "cqlora.json").read_text())["chat_template"]
    change_card(adapter, chat_template={**told, "source": OWN})
    with pytest.raises(ConfigError, match=r"was tuned in another text of stage\.template=qwen"):
        settled(workspace, own_base, *again)


def test_a_run_of_before_there_was_a_choice_goes_on_in_chatml(workspace, own_base, tmp_path):
    config = settled(workspace, own_base, "stage.max_steps=1", "model.quantization=none", "stage.template=chatml")
    assert finish_run(config, tmp_path / "run") == 0
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    state = read_state(checkpoint)
    identity = {
        key: value for key, value in state["identity"].items() if key not in ("stage.template", "stage.thinking")
    }
    assert len(identity) == len(state["identity"]) - 2
    (checkpoint / "state.json").write_text(json.dumps(state | {"identity": identity}))
    assert read_earlier(str(checkpoint), tmp_path / "run")["stage.template"] == "chatml"
    asked = settled(workspace, own_base, "stage.max_steps=1", "model.quantization=none")
    asked.stage.template = Template.auto
    asked.stage.resume = str(checkpoint)
    went_on = settle(asked, look_around(asked, tmp_path / "run"))
    assert went_on.stage.template is Template.chatml
    same = describe_identity(went_on, {}, 1) | {
        key: value for key, value in identity.items() if not key.startswith("stage.")
    }
    require_same_run(same, checkpoint, went_on.model)
    file = tmp_path / "run" / "run.yaml"
    written = OmegaConf.load(file)
    for key in ("template", "thinking"):
        del written.stage[key]
    OmegaConf.save(written, file)
    assert load_run_yaml(file).stage.template is Template.chatml
