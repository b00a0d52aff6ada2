"""`python -m train.serve`, see `train.serve.command`."""

from train.cli import run_main


def main() -> None:
    """Run the command."""
    from train.serve import command  # without the extra `serve`, this is an error that says what to install

    command.main()


if __name__ == "__main__":
    run_main(main)
