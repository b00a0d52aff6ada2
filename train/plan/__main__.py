"""`python -m train.plan configs/llama3_8b_post_block.py --topology v5e:4x4`."""

from train.plan.environment import prepare


def main() -> None:
    """Run the fit check; JAX is imported only after its environment is set."""
    prepare()
    from train.cli import run_main
    from train.plan.command import main as command

    run_main(command)


if __name__ == "__main__":
    main()
