"""Whether llama.cpp reads our GGUF files as the model that they were made from: ids, logits, greedy replies.

    python benchmarks/llamacpp.py BASE --adapter ADAPTER --llama-python VENV/bin/python [--tokens 32]
    python benchmarks/llamacpp.py MERGED --llama-python VENV/bin/python

VENV holds llama-cpp-python and numpy. `cqlora merge` writes the model as a Hugging Face folder and as GGUF of
either type. LlamaEngine generates from the folder in float32; llama.cpp encodes the same texts and
conversations by the file's own tokenizer and chat template, reads prompts with our replies after them, and
replies itself. Every conversation has a system message, since some bases' own templates make one up where
there is none.

Greedy replies part where two tokens are about as likely. Noise is what llama.cpp changes at the distance of our two
likeliest tokens, over all places; where replies part at a distance within it, nothing is wrong with the file.
`rounded` is what our float32 arithmetic gives on the file's own numbers: what the rounding of the weights does,
without llama.cpp.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
TYPES = ("f16", "q8_0")
QUESTIONS = [
    "What is the capital of France?", "Write a short poem about the sea.", "How do I boil an egg?",
    "Explain photosynthesis to a child.", "List three rivers of Asia.", "What is 17 + 25?", "Tell me a joke.",
    "Translate 'good morning' into Chinese.", "Why is the sky blue?", "Give me advice on learning to swim.",
    "长江有多长？", "请介绍一下北京。", "中国最大的城市是哪里？", "写一首关于春天的短诗。", "怎样煮米饭？",
    "什么是机器学习？", "请把“谢谢”翻译成英文。", "1 + 2 * 3 等于多少？", "讲一个简短的故事。", "为什么要多喝水？",
    "def add(a, b): 这段代码做什么？", "用一句话介绍 Python 3.12。", "The word 模型 means what?", "你好 👋",
]  # fmt: skip
TEXTS = [
    *QUESTIONS, "  two  leading spaces", "trailing space ", "\n", "\n\n\tindented\r\n", "   ",
    "1234567890 3.14159 1,000",
    "😀 👨‍👩‍👧 🇨🇳 e\u0301 é", "龘𠀀㐀 rare 汉字", "全角：ＡＢＣ１２３，。！", "no\u00a0break\u3000wide\u200bzero",
    "it's DON'T they'RE",
    "<|im_end|> <|im_start|>system </s> <s>", "def f(x):\n    return {k: v for k, v in x}\n", "كتاب ספר книга 本 책",
    "https://example.org/a?b=c&d=1#x", "a" * 200, "北京是中国的首都，上海是中国最大的城市。" * 4,
]  # fmt: skip
SYSTEM = {"role": "system", "content": "You are a helpful assistant. 请简短回答。"}


def main() -> None:
    """Merge, generate, ask llama.cpp, compare; or, in a child, be llama.cpp."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        answer_job(options.base, options.job)
        return
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Both files beside the folder that they were made from."""
    merged = options.base if options.adapter is None else merge(options, folder / "merged")
    job = generate(merged, options.tokens)
    ours = job.pop("logits")
    for kind in TYPES:
        output = merge(options, folder / kind, "format=gguf", f"gguf_type={kind}")
        file = output / f"{kind}.{kind}.gguf"
        theirs = ask_llama(options.llama_python, file, job, folder / f"{kind}.json")
        print(f"\n{kind}: {file.stat().st_size / 2**20:.0f} MiB")
        report_ids(job, theirs)
        report_logits("llama.cpp", ours, theirs["logits"])
        rounded = read_back(file, job)
        report_logits("rounded", ours, rounded)
        report_logits("llama.cpp beside rounded", rounded, theirs["logits"])
        report_replies(job, theirs, ours)


def merge(options: argparse.Namespace, output: Path, *arguments: str) -> Path:
    """`cqlora merge`, as a user runs it."""
    adapter = "[]" if options.adapter is None else options.adapter.resolve()
    command = [sys.executable, "-m", "cqlora.merge", f"base={options.base.resolve()}", f"adapter={adapter}"]
    subprocess.run([*command, f"output_dir={output}", *arguments], check=True, cwd=output.parent, env=own_environment())
    return output


def own_environment() -> dict[str, str]:
    """This checkout's package first."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def generate(merged: Path, tokens: int) -> dict[str, Any]:
    """Our ids, greedy replies, and the logits before each of a reply's tokens."""
    sys.path.insert(0, str(ROOT))
    from cqlora.engine import LlamaEngine

    engine = LlamaEngine(merged, "", use_lora=False, dtype="float32")
    chats = [[SYSTEM, {"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [engine.encode_messages(chat) for chat in chats]
    texts = [engine._tokenizer.text.encode(text, add_special_tokens=False).ids for text in TEXTS]
    replies, logits = [], []
    for prompt in prompts:
        reply = reply_greedily(engine, prompt, tokens)
        replies.append(reply)
        logits.append(engine._decoder.all_logits(prompt + reply)[len(prompt) - 1 : -1].numpy())
    return {
        "texts": texts, "chats": chats, "prompts": prompts, "replies": replies, "logits": logits,
        "tokens": tokens, "ends": sorted(engine._end_ids),
    }  # fmt: skip


def reply_greedily(engine: Any, prompt: list[int], tokens: int) -> list[int]:
    """Our reply, its end token among its ids."""
    from cqlora.inference.requests import Sampling

    batch = engine.open_batch(1)
    reply = batch.admit(prompt, Sampling(temperature=0, max_new_tokens=tokens))
    while reply.finish_reason is None:
        batch.step()
    return list(reply.ids[len(prompt) :])


def ask_llama(python: str, file: Path, job: dict[str, Any], job_file: Path) -> dict[str, Any]:
    """What llama.cpp makes of the job, in a process of its own Python."""
    job_file.write_text(json.dumps(job), encoding="utf-8")
    subprocess.run([python, __file__, str(file), "--job", str(job_file)], check=True)
    answer: dict[str, Any] = json.loads(job_file.with_suffix(".answer").read_text(encoding="utf-8"))
    with np.load(job_file.with_suffix(".npz")) as arrays:
        answer["logits"] = [arrays[str(place)] for place in range(len(job["prompts"]))]
    return answer


def answer_job(file: Path, job_file: Path) -> None:
    """In the child: the same with llama.cpp."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    job = json.loads(job_file.read_text(encoding="utf-8"))
    room = max(map(len, job["prompts"])) + job["tokens"] + 1
    llama = Llama(str(file), n_ctx=room, logits_all=True, verbose=False)
    bos, eos = (llama.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos"))
    spell = {kind: llama._model.token_get_text(int(token)) for kind, token in (("bos", bos), ("eos", eos))}
    template = Jinja2ChatFormatter(
        llama.metadata["tokenizer.chat_template"], eos_token=spell["eos"], bos_token=spell["bos"]
    )
    rendered = [template(messages=chat).prompt for chat in job["chats"]]
    answer = {
        "texts": [llama.tokenize(text.encode(), add_bos=False, special=False) for text in TEXTS],
        "prompts": [llama.tokenize(text.encode(), add_bos=False, special=True) for text in rendered],
        "replies": [continue_greedily(llama, prompt, job) for prompt in job["prompts"]],
    }
    job_file.with_suffix(".answer").write_text(json.dumps(answer), encoding="utf-8")
    logits = {}
    for place, (prompt, reply) in enumerate(zip(job["prompts"], job["replies"], strict=True)):
        llama.reset()
        llama.eval(prompt + reply)
        logits[str(place)] = np.array(llama.scores[len(prompt) - 1 : len(prompt) + len(reply) - 1])
    np.savez(job_file.with_suffix(".npz"), **logits)


def continue_greedily(llama: Any, prompt: list[int], job: dict[str, Any]) -> list[int]:
    """llama.cpp's reply, its end token among its ids."""
    llama.reset()
    llama.eval(prompt)
    reply: list[int] = []
    while len(reply) < job["tokens"]:
        reply.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        if reply[-1] in job["ends"]:
            break
        llama.eval(reply[-1:])
    return reply


def read_back(file: Path, job: dict[str, Any]) -> list[np.ndarray]:
    """The logits of transformers on the file's own numbers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    logits = []
    with torch.no_grad():
        for prompt, reply in zip(job["prompts"], job["replies"], strict=True):
            found = model(input_ids=torch.tensor([prompt + reply]), use_cache=False).logits[0]
            logits.append(found[len(prompt) - 1 : -1].numpy())
    return logits


def report_ids(job: dict[str, Any], theirs: dict[str, Any]) -> None:
    """How many texts and prompts have the same ids; those that have not."""
    for kind, shown in (("texts", TEXTS), ("prompts", QUESTIONS)):
        same = [ours == found for ours, found in zip(job[kind], theirs[kind], strict=True)]
        print(f"  {kind} with the same ids: {sum(same)} of {len(same)}")
        for text in [text for text, equal in zip(shown, same, strict=True) if not equal]:
            print(f"    not {text!r}")


def report_logits(name: str, ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    """Differences of logits after the prompts and before every token of our replies."""
    first = max(np.abs(one[0] - other[0]).max() for one, other in zip(ours, theirs, strict=True))
    one, other = np.concatenate(ours), np.concatenate(theirs)
    agreed = one.argmax(1) == other.argmax(1)
    difference = np.abs(one - other)
    print(
        f"  {name}: first token's logits differ by up to {first:.4f}, all places' by {difference.max():.4f}, mean "
        f"{difference.mean():.4f} (their deviation is {one.std():.2f}); top 1 agrees at {agreed.sum()} of {len(one)}"
    )


def distances(logits: list[np.ndarray], references: list[np.ndarray]) -> Iterator[np.ndarray]:
    """By reply and place, how far apart the reference's two likeliest tokens are in `logits`."""
    for found, reference in zip(logits, references, strict=True):
        second, likeliest = reference.argsort(axis=1)[:, -2:].T
        places = np.arange(len(found))
        yield found[places, likeliest] - found[places, second]


def report_replies(job: dict[str, Any], theirs: dict[str, Any], ours: list[np.ndarray]) -> None:
    """How many greedy replies are the same, and how near a tie the others part."""
    own, found = list(distances(ours, ours)), list(distances(theirs["logits"], ours))
    noise = np.abs(np.concatenate(own) - np.concatenate(found))
    parted = []
    for number, (one, other) in enumerate(zip(job["replies"], theirs["replies"], strict=True)):
        if one != other:
            place = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
            parted.append((number, place, own[number][place], found[number][place]))
    print(f"  the same reply: {len(own) - len(parted)} of {len(own)}")
    print(
        f"  our two likeliest tokens are {np.median(np.concatenate(own)):.3f} apart (median); noise: median "
        f"{np.median(noise):.4f}, 99% {np.quantile(noise, 0.99):.4f}, largest {noise.max():.4f}"
    )
    for number, place, gap, their_gap in parted:
        within = (noise < gap).mean()
        print(
            f"    parts at token {place + 1}: {gap:.4f} apart, in llama.cpp {their_gap:.4f}; "
            f"{1 - within:.0%} of the noise is larger; {QUESTIONS[number]!r}"
        )


if __name__ == "__main__":
    main()
