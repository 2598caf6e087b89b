"""`python -m training`: the same as `weightdiff train`."""

from training.cli import train

if __name__ == "__main__":
    train(prog_name="python -m training")
