"""`cqlora merge` with the flags of the older script."""

import argparse
import sys

from cqlora.merge import main


def translate(arguments: list[str]) -> list[str]:
    """`--lora_model_path A --base_model_path B --output_model_path C` as overrides."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lora_model_path", required=True, help="adapter folder; several as A,B in the order trained")
    parser.add_argument("--base_model_path", required=True, help="Hugging Face folder of the base")
    parser.add_argument("--output_model_path", required=True)
    known, overrides = parser.parse_known_args(arguments)
    # Quoted, so that Hydra takes any character of a path.
    adapters = ",".join(repr(path) for path in known.lora_model_path.split(","))
    paths = [f"base={known.base_model_path!r}", f"output_dir={known.output_model_path!r}"]
    return [f"adapter=[{adapters}]", *paths, *overrides]


if __name__ == "__main__":
    sys.argv[1:] = translate(sys.argv[1:])
    main()
