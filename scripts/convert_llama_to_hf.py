"""`cqlora convert` with the flags of the older script."""

import argparse
import sys

from cqlora.convert import main


def translate(arguments: list[str]) -> list[str]:
    """`--input_dir A --model_size 65B --output_dir B` as overrides."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input_dir", required=True, help="folder of Meta's files, or its parent")
    parser.add_argument("--model_size", default="", help="7B, 13B, 30B, 33B, 65B, 70B, 8B, 1B, 3B")
    parser.add_argument("--output_dir", required=True)
    known, overrides = parser.parse_known_args(arguments)
    # Quoted, so that Hydra takes any character of a path.
    return [f"{key}={value!r}" for key, value in vars(known).items()] + overrides


if __name__ == "__main__":
    sys.argv[1:] = translate(sys.argv[1:])
    main()
