"""`python -m train.plan.table`: check every large config on every topology, and write docs/plans.md."""

from train.plan.environment import prepare


def main() -> None:
    """Write the page; JAX is imported only after its environment is set."""
    prepare()
    from train.cli import run_main
    from train.plan.page import main as command

    run_main(command)


if __name__ == "__main__":
    main()
