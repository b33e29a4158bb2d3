"""Who may ask: the key, the Host rule, the address."""

import httpx
import pytest

from cqlora.errors import ConfigError
from cqlora.serve.listener import bind, is_loopback, read_key
from cqlora.serve.requests import ChatRequest
from tests.serve.fake import FakeEngine, fake_config, running

KEY = "correct-horse-battery-staple"
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def guarded():
    with running(FakeEngine(), fake_config(), KEY) as run:
        yield run


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer wrong", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", "Bearer ÿ" + KEY],
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/chat/completions", "/openapi.json"])
def test_without_the_right_key_nothing_is_answered(guarded, path, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    response = httpx.request("POST" if "chat" in path else "GET", guarded.url + path, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key" and KEY not in response.text


def test_with_the_key_all_is_open(guarded):
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(guarded.url + "/v1/chat/completions", json=CHAT, headers=headers).status_code == 200
    assert httpx.get(guarded.url + "/metrics", headers=headers).status_code == 200


def test_health_and_the_page_need_no_key(guarded):
    for path in ("/health", "/", "/page/chat.js"):
        assert httpx.get(guarded.url + path).status_code == 200
    assert httpx.get(guarded.url + "/page/../app.py").status_code in (401, 404)
    assert httpx.get(guarded.url + "/page/%2e%2e%2fapp.py").status_code == 404


def test_the_key_is_compared_in_constant_time(guarded, monkeypatch):
    compared = []
    monkeypatch.setattr("cqlora.serve.guard.hmac.compare_digest", lambda *pair: compared.append(pair) or False)
    httpx.get(guarded.url + "/v1/models", headers={"Authorization": "Bearer guess"})
    assert compared == [(b"guess", KEY.encode())]


def test_without_a_key_another_name_for_this_machine_is_refused():
    """A page on a name that was made to point here sends its own Host: DNS rebinding."""
    with running(FakeEngine(), fake_config()) as run:
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::1", "a:b:c", ""):
            assert httpx.get(run.url + "/v1/models", headers={"Host": host}).status_code == 421, host
        for host in ("localhost", "localhost:8000", "LocalHost:8000", "127.0.0.1:1", "[::1]:8000"):
            assert httpx.get(run.url + "/v1/models", headers={"Host": host}).status_code == 200


def test_an_address_that_others_reach_demands_a_key(monkeypatch):
    monkeypatch.delenv("CQLORA_API_KEY", raising=False)
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        assert read_key(host) == "" and is_loopback(host)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.com", ""):
        with pytest.raises(ConfigError, match="CQLORA_API_KEY"):
            read_key(host)
    monkeypatch.setenv("CQLORA_API_KEY", KEY)
    assert read_key("0.0.0.0") == read_key("127.0.0.1") == KEY


@pytest.mark.parametrize(
    "key", ["short", "with a space in the middle", "密钥密钥密钥密钥密钥密钥密钥密钥", "tab\tin-it-0123456789"]
)
def test_a_key_that_can_be_guessed_or_not_be_sent_is_refused(monkeypatch, key):
    monkeypatch.setenv("CQLORA_API_KEY", key)
    with pytest.raises(ConfigError) as refused:
        read_key("127.0.0.1")
    assert key not in str(refused.value)


def test_a_port_that_is_taken_and_an_address_that_is_none_are_described_in_a_sentence():
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        with pytest.raises(ConfigError, match=f"port={listener.getsockname()[1]} cannot be listened on"):
            bind("127.0.0.1", listener.getsockname()[1])
    with pytest.raises(ConfigError, match=r"host=nowhere\.invalid"):
        bind("nowhere.invalid", 0)


def test_a_number_that_is_none_is_no_temperature():
    for text in ("NaN", "Infinity"):
        with pytest.raises(ValueError, match="temperature"):
            ChatRequest.model_validate(CHAT | {"temperature": float(text)})
