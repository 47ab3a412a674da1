"""New classes for a model that was trained long ago (chapter 13).

    torchrun --nproc_per_node=2 -m tutorial.grow --model runs/OLD/model.pt --data_path DIR \
        --increment 5 --memory_size 200

DIR/train and DIR/test (or val) hold a folder for each class, old and new. Of an old class train/
needs no more than the images that were kept as exemplars.
"""
from pathlib import Path

import torch

import utils
from template import CilTrainer, main


class GrownWA(CilTrainer):
    """WA whose first task is a finished run: its weights are loaded, not trained."""

    def expand_model(self, nb_new, new_data):
        """The first task gets the heads and the weights of the old model, others one more head."""
        if self.task > 0:
            return super().expand_model(nb_new, new_data)
        saved = torch.load(self.args.model, map_location="cpu", weights_only=True)
        for nb_classes in saved["increments"]:
            super().expand_model(nb_classes, new_data)
        self.model.load_state_dict(saved["state_dict"])

    def train_task(self, train_set):
        """Nothing to learn in the first task. Its exemplars are chosen as after any other."""
        if self.task > 0:
            super().train_task(train_set)


def continue_from(args):
    """Fill in what the old run decides: network, image size, and the old classes as first task."""
    try:
        saved = torch.load(args.model, map_location="cpu", weights_only=True)
        old = saved["class_names"][:sum(saved["increments"])]
        folders = sorted(path.name for path in (Path(args.data_path) / "train").iterdir()
                         if path.is_dir())
    except Exception as error:
        utils.fail(f"--model {args.model} --data_path {args.data_path}: needs the model.pt of a "
                   f"finished run and a folder with train/<class>/* ({error})")
    missing = [name for name in old if name not in folders]
    if missing:
        utils.fail(f"{args.data_path}/train lacks the old classes {missing[:5]}: keep some images "
                   "of each, best the exemplars")
    # The old classes keep their labels, so they come first, in the order in which they were learned.
    args.class_order = [folders.index(name) for name in old]
    args.class_order += [i for i, name in enumerate(folders) if name not in old]
    args.num_bases = len(old)
    for name in ("data_set", "backbone", "input_size"):
        setattr(args, name, saved["args"][name])


if __name__ == "__main__":
    parser = utils.get_parser()
    parser.add_argument("--model", required=True, help="model.pt of the finished run")
    arguments = parser.parse_args()
    continue_from(arguments)
    main(arguments, GrownWA)
