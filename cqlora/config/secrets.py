"""What counts as a secret, by its name, by its form, or as a value of the environment; and where it is refused.

One list for everything: overrides, YAML files, resolved values, names of environment variables. Secrets belong in
the environment, which workers and trackers inherit; configurations, logs and trackers are written down.
"""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from cqlora.errors import ConfigError

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SECRET_WORD = re.compile(r"(password|passwd|passphrase|passcode|pwd|secret|apikey)s?$")
_SECRET_ENDINGS = {"pass", "token", "credential", "credentials", "pat", "jwt", "bearer", "authorization", "pin"}
_TEXT_TOKENS = {"pad", "eos", "bos", "unk", "mask", "sep", "cls", "stop", "end", "start", "special", "control", "per"}
_KEY_OWNERS = {"api", "access", "account", "private", "auth", "encryption", "signing", "ssh", "master", "service"}
_WHERE_ENDINGS = {"path", "file", "dir", "folder", "url", "name", "id", "count", "length", "size"}
_LOOKS_RANDOM = r"(?=\S*[A-Z])(?=\S*[a-z])(?=\S*[0-9])"
_LOOKS_RANDOM_USER = _LOOKS_RANDOM.replace(r"\S", r"[^/\s@]")

_FORMS = (
    r"\bhf_(?=\w*[A-Z]\w*[A-Z]\w*[A-Z])(?=\w*[a-z])[A-Za-z0-9]{20,}",
    rf"\bsk-{_LOOKS_RANDOM}[A-Za-z0-9_-]{{20,}}",
    r"\bsk-(?:[a-z0-9]+-)*[0-9a-f]{32,}",
    r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,}",
    rf"\b(?:gsk_|r8_|xai-|nvapi-|pplx-){_LOOKS_RANDOM}[A-Za-z0-9_-]{{30,}}",
    r"\b[0-9a-f]{32}\.[A-Za-z0-9]{16}\b",
    r"\bSG\.[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{16,}",
    r"(?<!\d)\d{6,12}:AA[A-Za-z0-9_-]{33}",
    r"\bgh[opsur]_[A-Za-z0-9]{20,}",
    r"\bgithub_pat_\w{20,}",
    rf"\bglpat-{_LOOKS_RANDOM}[\w-]{{16,}}",
    r"\bwandb_v1_\w{20,}",
    r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    r"\b(AKIA|ASIA|AGPA|AROA)[A-Z0-9]{16}\b",
    rf"\bLTAI{_LOOKS_RANDOM}[A-Za-z0-9]{{12,}}",
    rf"\bAKID{_LOOKS_RANDOM}[A-Za-z0-9]{{28,}}",
    r"\bms-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    r"\bAIza[A-Za-z0-9_-]{35}",
    r"\bya29\.[A-Za-z0-9_-]{20,}",
    rf"\bnpm_{_LOOKS_RANDOM}[A-Za-z0-9]{{30,}}",
    r"\bpypi-Ag[A-Za-z0-9_-]{40,}",
    r"\bdapi[0-9a-f]{32}\b",
    r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    r"\b[Bb]earer\s+(?:(?=\S*\d)\S{8,}|[A-Za-z]{20,})",
    r"\b[Bb]asic\s+(?=\S*[\d=])[A-Za-z0-9+/]{8,}={0,2}",
    r"[A-Za-z][A-Za-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@",
    # A user's name alone is none, unless it is as long and mixed as no name.
    r"://(?:(?=[^/\s@]*\d)(?=[^/\s@]*[A-Za-z])[\w~+=-]{16,}|" + _LOOKS_RANDOM_USER + r"[\w~+=-]{8,}|[\w~+=-]{24,})@",
    # Whoever knows the address of a hook may post there.
    r"hooks\.slack\.com/\w+/\S{8,}",
    r"discord(?:app)?\.com/api/webhooks/\d+/\S{8,}",
    r"webhook\.office\.com/webhookb2/\S{8,}",
    r"open\.(?:feishu\.cn|larksuite\.com)/open-apis/bot/v2/hook/\S{8,}",
    # W&B's older keys; a commit's hash has the same form and stands in paths, between slashes.
    r"(?<![/\w])[0-9a-f]{40}(?![/\w])",
)
_FORM = re.compile("|".join(f"(?:{form})" for form in _FORMS))
_PARAMETER = re.compile(r"[?&;#]([\w.-]+)=([\w%.~+/=:-]{6,})", re.ASCII)
"""A parameter of an address, or a part of a connection string."""
_SIGNATURES = {"sig", "sign", "signature"}
_MAY_BE_SECRET = {"key", "auth", "code", "ticket"}
"""Names of parameters whose value is a secret where it looks like one."""
_NAMED_INSIDE = re.compile(r"([\w.-]+)['\"]?\s*:\s*(?![\s{\[])")
_SHORTEST_PLANTED = 8
"""Characters from which a value of the environment is looked for inside others; shorter ones occur by chance."""
_GENERATED = ("hydra.runtime", "hydra.overrides", "hydra.help", "hydra.hydra_help", "hydra.job.override_dirname")
"""Keys that Hydra fills in itself, from what is checked elsewhere and from the machine."""


def is_secret_name(name: str) -> bool:
    """Whether a key or an environment variable of this name holds a secret: `DB_PASS`, `apiKey`, not `max_tokens`."""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words:
        return False
    if words[-1] in _WHERE_ENDINGS and words[-3:] != ["access", "key", "id"]:
        return False
    before = words[-2] if len(words) > 1 else ""
    if words[-1] == "token":
        return before not in _TEXT_TOKENS
    if words[-1] in ("key", "keys"):
        return before in _KEY_OWNERS or name.isupper()
    return any(map(_SECRET_WORD.search, words)) or words[-1] in _SECRET_ENDINGS or words[-3:] == ["access", "key", "id"]


def has_secret_form(text: str) -> bool:
    """Whether a text is or holds what is a secret by its form, in an address percent-encoded or not."""
    return any(
        _FORM.search(each) or any(map(is_secret_parameter, _PARAMETER.findall(each))) for each in {text, unquote(text)}
    )


def is_secret_parameter(parameter: tuple[str, str]) -> bool:
    """Whether a parameter of an address carries a secret: `token=…`, `X-Amz-Signature=…`, not `max_tokens=…`."""
    name, value = parameter
    last = name.lower().rpartition("-")[2]
    if last in _MAY_BE_SECRET:
        return len(value) >= 16 and re.search(r"\d", value) is not None and re.search(r"[A-Za-z]", value) is not None
    return last in _SIGNATURES or is_secret_name(name)


def planted_secrets(environment: Mapping[str, str]) -> set[str]:
    """Values of the environment that are secrets by name or by form; the path of a file that exists is none."""
    return {
        value
        for name, value in environment.items()
        if len(value) >= _SHORTEST_PLANTED
        and (is_secret_name(name) or has_secret_form(value))
        and not (value.startswith(("/", "~")) and Path(value).expanduser().exists())
    }


def holds_secret(text: str) -> bool:
    """Whether a text has the form of a secret or holds one of the environment's."""
    return has_secret_form(text) or any(secret in text for secret in planted_secrets(os.environ))


def refuse_secrets(arguments: list[str]) -> None:
    """Raise ConfigError for an argument of the command line that carries a secret, before anything writes it down."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        key = key.lstrip("+~-")
        named = value not in ("", "null", "''", '""') and not value.startswith("{") and is_secret_name(leaf_name(key))
        if named or holds_secret(argument) or ("{" in value and any(map(is_secret_name, _NAMED_INSIDE.findall(value)))):
            raise refusal(key)


def refuse_secret_values(composed: Any) -> None:
    """Raise ConfigError for a secret in a composition: as a value, resolved where it can be, or as a key."""
    planted = planted_secrets(os.environ)
    for key, name, value in walk_values(composed):
        if key.startswith(_GENERATED):
            continue
        text = str(value)
        known = any(secret in text or secret in key for secret in planted)
        named = isinstance(value, str | int | float) and text and not isinstance(value, bool) and is_secret_name(name)
        if known or named or has_secret_form(text) or has_secret_form(key):
            raise refusal(key)


def walk_values(node: Any, path: str = "", name: str = "") -> Iterator[tuple[str, str, Any]]:
    """Each leaf of a composition: its dotted key, the name that it goes by (a list's for its items), its value."""
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if node._is_none() or node._is_missing() or node._is_interpolation():
        return
    for key in node if isinstance(node, DictConfig) else range(len(node)):
        full, own = f"{path}.{key!s}".lstrip("."), str(key) if isinstance(node, DictConfig) else name
        if OmegaConf.is_missing(node, key):
            continue
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            # What cannot be resolved yet is looked at again when it can; a refusal of the environment is final.
            raise_refusal(error)
            value = node._get_node(key)._value()
        if OmegaConf.is_config(value):
            yield from walk_values(value, full, own)
        else:
            yield full, own, value


def guard_environment() -> None:
    """Make `${oc.env:NAME}` refuse variables that hold secrets; how every configuration reads the environment."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("oc.env", read_variable, replace=True)


def read_variable(name: str, *default: str | None) -> str | None:
    """The environment variable's value, or the default.

    Raises:
        ConfigError: it holds a secret.
        KeyError: it is not set and there is no default.
    """
    value = os.environ.get(name)
    if value is None:
        if default:
            return default[0]
        raise KeyError(f"environment variable {name} is not set")
    if is_secret_name(name) or has_secret_form(value):
        raise refusal(f"${{oc.env:{name}}}")
    return value


def raise_refusal(error: BaseException | None) -> None:
    """Raise the ConfigError among an exception's causes, if there is one."""
    while error is not None:
        if isinstance(error, ConfigError):
            raise error
        error = error.__cause__ or error.__context__


def refusal(key: str) -> ConfigError:
    """The sentence, which names the key unless the key is the secret."""
    where = "a value" if not key or holds_secret(key) else key
    return ConfigError(
        f"{where} carries a secret, which would end up in configurations and logs; put it in the environment instead "
        "(WANDB_API_KEY, HF_TOKEN, CQLORA_API_KEY), where it is read without being named."
    )


def leaf_name(key: str) -> str:
    """The last part of a dotted key that is a name and no index: `tags` of `tracking.tags.0`, also in `tags[0]`."""
    parts = [part for part in re.split(r"[.\[\]@]", key) if part and not part.isdigit()]
    return parts[-1] if parts else ""
