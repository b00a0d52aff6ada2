"""`python -m jaxsteer.lm_eval`: the harness's own command, with this model as the default."""

import sys
from collections.abc import Sequence

from lm_eval.__main__ import cli_evaluate

import jaxsteer.lm_eval.model  # noqa: F401 - registers the model


def with_default_model(arguments: Sequence[str]) -> list[str]:
    """The harness's arguments, with `--model jaxsteer` where they evaluate without naming a model."""
    command = arguments[0] if arguments else ""
    named = any(argument.partition("=")[0] in ("--model", "-M") for argument in arguments)
    if named or not arguments or command in ("ls", "validate", "-h", "--help"):
        return list(arguments)
    start = 1 if command == "run" else 0
    return ["run", "--model", "jaxsteer", *arguments[start:]]


def main() -> None:
    """Run the harness's command."""
    sys.argv[1:] = with_default_model(sys.argv[1:])
    try:
        cli_evaluate()
    except (ValueError, OSError) as error:  # what was asked for is wrong: a model, a file, a setting
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
