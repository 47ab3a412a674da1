"""The epochs of finished or running runs, for TensorBoard (chapter 13).

    pip install tensorboard
    python -m tutorial.tools.board runs/my_loss runs/another
    tensorboard --logdir runs

Writes a folder `tensorboard` into each run's directory, in place of the one of an earlier call.
"""
import json
import shutil
from pathlib import Path

import utils


def scalars(text):
    """Every number of a log.jsonl: (name, value, step), where step counts the epochs of all tasks
    and stages from 1. A last line that is not written to its end yet is left out."""
    text = text[:text.rfind("\n") + 1]
    for step, line in enumerate(text.splitlines(), 1):
        for name, value in json.loads(line).items():
            if isinstance(value, (int, float)):
                yield name, value, step


def write(folder):
    """The scalars of the run in `folder` as an event file, in folder/tensorboard."""
    from torch.utils.tensorboard import SummaryWriter
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    with SummaryWriter(folder / "tensorboard") as writer:
        for name, value, step in scalars((folder / "log.jsonl").read_text()):
            writer.add_scalar(name, value, step)


def main():
    parser = utils.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="output directories of runs")
    for folder in parser.parse_args().runs:
        try:
            write(folder)
        except ImportError:
            utils.fail("TensorBoard is not installed: pip install tensorboard")
        except OSError as error:
            utils.fail(f"{folder}: {error.strerror}: the output directory of a run has a log.jsonl")


if __name__ == "__main__":
    main()
