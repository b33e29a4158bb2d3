"""The verb: what it refuses before it loads anything, and its life as a process."""

import gc
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import openai
import pytest

from cqlora.engine import LlamaEngine
from cqlora.errors import ConfigError
from cqlora.serve import server as serving
from cqlora.serve.config import ServeConfig
from tests.conftest import HANG_SECONDS, ROOT, run_verb
from tests.serve.fake import fake_config, running
from tests.weights.adapters import write_adapter

KEY = "correct-horse-battery-staple"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "base has no value; add base=VALUE."),
        (("base=.", "quantization=int3"), "quantization=int3 is unknown; use auto, nf4, none."),
        (("base=.", "slots=0"), "slots=0 cannot be served with; give 1 or more."),
        (("base=.", "port=70000"), "port=70000 is no port"),
        (("base=.", "timeout=0"), "timeout=0 leaves no time"),
        (("base=.", "slot=2"), "slots"),
        (("base=.", "port=1x"), "port"),
        (("base=.", "host=0.0.0.0"), "host=0.0.0.0 can be reached from other machines and CQLORA_API_KEY is not set"),
    ],
)
def test_what_cannot_be_served_is_reported_before_anything_is_loaded(workspace, arguments, sentence):
    done = run_verb(workspace, "serve", *arguments, expect=2, CQLORA_API_KEY="")
    assert sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_folders_are_checked_before_anything_is_loaded(tiny, workspace):
    for arguments, code, sentence in (
        (("base=nowhere",), 1, "model folder nowhere does not exist"),
        ((f"base={tiny}", "adapter=nowhere"), 2, "adapter=nowhere has no adapter_config.json"),
    ):
        done = run_verb(workspace, "serve", *arguments, expect=code, CQLORA_API_KEY="")
        assert sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_key_is_refused_on_the_command_line(workspace):
    done = run_verb(workspace, "serve", "base=.", f"name={KEY}", expect=2, CQLORA_API_KEY=KEY)
    assert "put it in" in done.stderr and KEY not in done.stderr


def test_help_loads_neither_torch_nor_the_web(workspace):
    code = (
        "import sys; sys.argv = ['serve', '--help']\n"
        "import runpy, atexit\n"
        "atexit.register(lambda: print(sorted({'torch', 'transformers', 'fastapi', 'uvicorn'} & set(sys.modules))))\n"
        "runpy.run_module('cqlora.serve', run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "slots  (integer; 8)" in done.stdout and done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_served_model_ends_on_a_signal_with_its_reply_finished(tiny, tmp_path, number):
    command = [sys.executable, "-m", "cqlora.serve", f"base={tiny}", "port=0", "name=little", "max_tokens=200"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CQLORA_API_KEY": KEY}
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        url = re.match(r"(http://127\.0\.0\.1:\d+) serves little: ", line)[1]
        with openai.OpenAI(base_url=url + "/v1", api_key=KEY, max_retries=0) as client:
            messages = [{"role": "user", "content": "hi"}]
            stream = client.chat.completions.create(model="little", messages=messages, stream=True, max_tokens=200)
            next(iter(stream))
            threading.Timer(0.05, server.send_signal, [number]).start()
            reasons = [chunk.choices[0].finish_reason for chunk in stream]
        assert reasons[-1] in ("stop", "length")
        assert server.wait(timeout=HANG_SECONDS) == 0
    finally:
        server.kill()
        server.wait()


def test_an_adapter_is_served_with_its_base(tiny, tmp_path):
    adapter = write_adapter(tiny, tmp_path / "polite")
    config = fake_config(base=str(tiny), adapter=str(adapter), max_tokens=64)
    messages = [{"role": "user", "content": "模型 answers"}]
    with running(config.load_engine(), config) as run:
        client = openai.OpenAI(base_url=run.url + "/v1", api_key="none", max_retries=0)
        reply = client.chat.completions.create(model="polite", messages=messages, max_tokens=12, temperature=0)
    alone = LlamaEngine(tiny, "", use_lora=False).generate(messages, max_new_tokens=12, temperature=0.0)
    joined = LlamaEngine(adapter, tiny).generate(messages, max_new_tokens=12, temperature=0.0)
    assert reply.choices[0].message.content == joined != alone


def test_what_was_loaded_is_spared_from_garbage_collection_before_anybody_is_answered(monkeypatch):
    loaded = [[number] for number in range(1000)]
    seen: list[list[object]] = []
    server = SimpleNamespace(run=lambda sockets: seen.append(gc.get_objects()))
    monkeypatch.setattr(ServeConfig, "load_engine", lambda config: loaded)
    monkeypatch.setattr(serving, "Server", lambda *_: server)
    try:
        serving.run_server(fake_config(), "", None)
    finally:
        gc.unfreeze()
        logging.getLogger("cqlora").setLevel(logging.NOTSET)
    assert not {id(each) for each in seen[0]} & {id(each) for each in loaded}


@pytest.mark.parametrize(("device", "program"), [("cuda", "`vllm serve .`"), ("cpu", "llama.cpp")])
def test_the_program_that_is_faster_on_the_device_is_named_at_the_start(device, program, monkeypatch, caplog):
    monkeypatch.setattr(ServeConfig, "load_engine", lambda config: None)
    monkeypatch.setattr(serving, "Server", lambda *_: SimpleNamespace(run=lambda sockets: None))
    try:
        serving.run_server(fake_config(base=".", device=device), "", None)
    finally:
        gc.unfreeze()
        logging.getLogger("cqlora").setLevel(logging.NOTSET)
    (said,) = caplog.messages
    assert program in said


def test_without_the_extra_the_error_says_what_to_install(monkeypatch, tiny):
    for module in [name for name in sys.modules if name.startswith("cqlora.serve.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    from cqlora.serve.__main__ import serve

    with pytest.raises(ConfigError, match=r"needs fastapi, .* pip install 'cqlora\[serve\]'"):
        serve(fake_config(base=str(tiny)))
