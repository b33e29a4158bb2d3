"""Every key of every verb with its type, default and meaning, read from the schemas: `--help` and the page of keys.

`python -m cqlora.config.reference [en|zh]` prints docs/configuration.md or docs/configuration.zh-CN.md.
Meanings in English are the docstrings under the fields; those in Chinese stand in docs/configuration.zh-CN.yaml.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from cqlora.config.schema import CONFIG_DIR

SCHEMAS = {
    "run": ("cqlora.config.schema", "RunConfig"),
    "plan": ("cqlora.plan.__main__", "PlanConfig"),
    "prepare": ("cqlora.config.schema", "RunConfig"),
    "fetch": ("cqlora.fetch", "FetchConfig"),
    "convert": ("cqlora.convert", "ConvertConfig"),
    "extend": ("cqlora.extend", "ExtendConfig"),
    "evaluate": ("cqlora.evaluation.config", "EvaluateConfig"),
    "merge": ("cqlora.merge", "MergeConfig"),
    "generate": ("cqlora.generate", "GenerateConfig"),
    "chat": ("cqlora.chat", "ChatConfig"),
    "serve": ("cqlora.serve.config", "ServeConfig"),
    "report": ("cqlora.report.config", "ReportConfig"),
    "push": ("cqlora.push", "PushConfig"),
}
"""Verb → where its schema is."""

_TYPES = {int: "integer", float: "number", bool: "true or false", str: "text"}
_CHINESE_TYPES = {
    "list of integers": "整数列表", "list of text": "列表", "group": "配置组", "integer": "整数", "number": "数值",
    "true or false": "true 或 false", "text": "文本", " or null": "，或 null", "text or list": "文本或列表",
    "required": "必填", " or ": "、",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One key."""

    key: str
    field: str
    """The schema and its field, `StageConfig.epochs`: the same wherever the field stands."""
    type: str
    default: str
    meaning: str
    """The docstring under the field, on one line."""


def load_schema(verb: str) -> type:
    """The schema of a verb."""
    module, name = SCHEMAS[verb]
    schema: type = getattr(importlib.import_module(module), name)
    return schema


def list_entries(schema: type, prefix: str = "") -> Iterator[Entry]:
    """The keys of a schema and of the schemas within, in their order; those that only a variant has come last."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        owner, meaning = find_meaning(schema, field.name)
        hint, key = hints[field.name], prefix + field.name
        inner = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else hint
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            nested = f"{key}.NAME." if inner is not hint else f"{key}."
            yield from list_entries(inner, nested)
            for variant in inner.__subclasses__():
                known = {entry.name for entry in dataclasses.fields(inner)}
                yield from (e for e in list_entries(variant, nested) if e.key.rpartition(".")[2] not in known)
        else:
            yield Entry(key, f"{owner}.{field.name}", name_type(hint), name_default(field), meaning)


@functools.cache
def read_meanings(schema: type) -> dict[str, str]:
    """Field → the docstring under it, of the fields that this class itself declares."""
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for declared, below in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(declared, ast.AnnAssign) and isinstance(declared.target, ast.Name):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
            found[declared.target.id] = " ".join(str(text).split()) if is_text else ""
    return found


def find_meaning(schema: type, name: str) -> tuple[str, str]:
    """The class that a field's docstring is in, and the docstring."""
    for kind in schema.__mro__:
        if dataclasses.is_dataclass(kind) and name in (meanings := read_meanings(kind)):
            return kind.__name__, meanings[name]
    return schema.__name__, ""


def name_type(hint: Any) -> str:
    """A type in words; an enumeration by its choices."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (inner,) = (part for part in typing.get_args(hint) if part is not type(None))
        return f"{name_type(inner)} or null"
    if typing.get_origin(hint) is list:
        return "list of integers" if typing.get_args(hint) == (int,) else "list of text"
    if dataclasses.is_dataclass(hint):
        return "group"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(f"`{choice.name}`" for choice in hint)
    return _TYPES.get(hint, "text or list")


def name_default(field: "dataclasses.Field[Any]") -> str:
    """A default as it is typed, or the key or variable whose value it is; `required` where there is none."""
    made = field.default_factory
    value = made() if made is not dataclasses.MISSING else field.default
    if value is MISSING or value == MISSING or value is dataclasses.MISSING:
        return "required"
    if isinstance(value, Enum):
        return f"`{value.name}`"
    if isinstance(value, bool) or value is None:
        return f"`{str(value).lower()}`".replace("none", "null")
    if isinstance(value, list):
        return f"`[{','.join(map(str, value))}]`"
    if isinstance(value, str) and value.startswith("${"):
        return f"`{value[2:-1].removeprefix('oc.env:').partition(',')[0]}`"
    return f"`{value}`" if value != "" else '`""`'


def render_help(config_name: str, schema: type, folders: list[Path]) -> str:
    """What `--help` shows of a verb: its groups with the choices in these folders, and its keys."""
    parts = []
    for group in list_groups(config_name):
        choices = {file.stem for folder in folders for file in (folder / group).glob("*.yaml")}
        parts.append(textwrap.fill(f"{group}: {', '.join(sorted(choices))}", 112, subsequent_indent="    "))
    head = ["Groups, of which each is chosen by name (GROUP=NAME):", "", *parts, ""] if parts else []
    # Run as a program, a module's schema is `__main__`'s, whose source Python does not find.
    verb = next(verb for verb, (_, name) in SCHEMAS.items() if name == schema.__name__)
    return "\n".join([*head, "Keys (KEY=VALUE):", "", *map(describe_entry, list_entries(load_schema(verb)))])


def list_groups(config_name: str) -> list[str]:
    """The groups that a program's configuration is composed of, those of the files that it includes among them."""
    import yaml

    file = CONFIG_DIR / f"{config_name}.yaml"
    if not file.is_file():
        return []
    groups: list[str] = []
    for entry in yaml.safe_load(file.read_text(encoding="utf-8"))["defaults"]:
        groups += list(entry) if isinstance(entry, dict) else list_groups(entry)
    return [group for group in groups if not group.startswith("override ")]


def describe_entry(entry: Entry) -> str:
    """A key for a terminal."""
    line = f"  {entry.key}  ({entry.type}; {entry.default})".replace("`", "")
    return "\n".join([line, *textwrap.wrap(entry.meaning, 112, initial_indent="      ", subsequent_indent="      ")])


def render_page(language: str, meanings: dict[str, str]) -> str:
    """The page of all keys in a language, `en` or `zh`; `meanings` are the Chinese ones by field."""
    chinese = language == "zh"
    title = "# 配置项" if chinese else "# Every key"
    about = _CHINESE_ABOUT if chinese else _ENGLISH_ABOUT
    head = "| 键 | 类型 | 默认值 | 含义 |" if chinese else "| key | type | default | meaning |"
    parts = [title, about]
    for verb in (
        "run",
        "plan",
        "convert",
        "extend",
        "evaluate",
        "merge",
        "generate",
        "chat",
        "serve",
        "report",
        "push",
        "fetch",
    ):
        entries = list(list_entries(load_schema(verb)))
        if verb == "plan":
            run = {entry.key for entry in list_entries(load_schema("run"))}
            entries = [entry for entry in entries if entry.key not in run]
        rows = [row_of(entry, meanings if chinese else None) for entry in entries]
        heading = {"run": "run, prepare, plan"}.get(verb, verb)
        parts.append("\n".join([f"## {heading}", "", head, "|---|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def row_of(entry: Entry, chinese: dict[str, str] | None) -> str:
    """One line of the table."""
    kind, default, meaning = entry.type, entry.default, entry.meaning
    if chinese is not None:
        meaning = chinese[entry.field]
        for english, translated in sorted(_CHINESE_TYPES.items(), key=lambda pair: -len(pair[0])):
            kind, default = (kind if kind.startswith("`") else kind.replace(english, translated)), default
        default = _CHINESE_TYPES["required"] if default == "required" else default
    escaped = meaning.replace("|", "\\|")
    return f"| `{entry.key}` | {kind} | {default} | {escaped} |"


_ENGLISH_ABOUT = """Generated by `python -m cqlora.config.reference` from the schemas. [中文](configuration.zh-CN.md)

Type `KEY=VALUE` after a verb; `cqlora VERB --help` shows the same. Group files in `configs/` set some of these to
values of their own, which `cqlora run … --cfg job` shows. `~` in a path is your home folder. An option that would have
no effect, such as `lora.pissa_iterations` without `lora.method=pissa`, is refused.

Group files of your own lie in a folder laid out like `configs/`, given with `--config-dir FOLDER`; a mistake in one is
reported with its file and line. Secrets (API keys, tokens, passwords, addresses with a password) are refused in
arguments, files and `${oc.env:…}`, since runs and trackers write the configuration down: they are read from the
environment."""

_CHINESE_ABOUT = """本页由 `python -m cqlora.config.reference zh` 生成。[English](configuration.md)

在子命令后写 `键=值` 即可；`cqlora 子命令 --help` 给出英文说明。`configs/` 中的配置组文件会改写其中一部分默认值，
用 `cqlora run … --cfg job` 可以查看实际取值。路径里的 `~` 表示用户主目录。不起作用的选项会直接报错，
例如没有 `lora.method=pissa` 时设置 `lora.pissa_iterations`。

自己的配置组文件放在与 `configs/` 结构相同的文件夹里，用 `--config-dir 文件夹` 指定；写错时会给出文件和行号。
密钥（API key、token、密码、带密码的网址）无论出现在参数、文件还是 `${oc.env:…}` 里都会被拒绝，
因为运行记录和 tracker 会保存配置；密钥只从环境变量读取。"""


def main() -> None:
    """Print the page of a language."""
    import yaml

    language = sys.argv[1] if len(sys.argv) > 1 else "en"
    file = Path(__file__).parents[2] / "docs" / "configuration.zh-CN.yaml"
    print(render_page(language, yaml.safe_load(file.read_text(encoding="utf-8")) if language == "zh" else {}), end="")


if __name__ == "__main__":
    main()
