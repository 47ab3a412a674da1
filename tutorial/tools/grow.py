"""New classes for a model that was trained long ago (chapter 14).

    torchrun --nproc_per_node=2 -m tutorial.tools.grow --model runs/OLD/model.pt --data_path DIR \
        --increment 5 --memory_size 200 --batch_size 32

DIR/train and DIR/test (or val) hold a folder for each class, old and new. Of an old class train/
needs no more than the exemplars, which keep.py puts there. Epochs, learning rate and the rest are
flags as ever, with the preset of the old run's data set.

Another method grows, too, with `GrownWA` before it. In a file of your own:

    from tutorial.methods import lucir
    from tutorial.tools.grow import GrownWA, get_parser, grow

    class GrownLUCIR(GrownWA, lucir.LUCIR):
        pass

    if __name__ == "__main__":
        grow(get_parser(lucir.get_parser()).parse_args(), GrownLUCIR)
"""
import re
from pathlib import Path

import torch

import utils
from template import CilTrainer, main
from tutorial.tools.use import load


class GrownWA(CilTrainer):
    """WA whose first task is a finished run: its weights are loaded, not trained."""

    def expand_model(self, nb_new, new_data):
        """The first task gets one head for all old classes, and the weights of the old model."""
        super().expand_model(nb_new, new_data)
        if self.task == 0:
            saved = torch.load(self.args.model, map_location="cpu", weights_only=True)
            weights = {}
            for name, weight in saved["state_dict"].items():
                name = re.sub(r"^fc\.heads\.\d+\.", "fc.heads.0.", name)
                # The old heads, one for each old task, become one.
                weights[name] = torch.cat([weights[name], weight]) if name in weights else weight
            self.model.load_state_dict(weights)

    def train_task(self, train_set):
        """Nothing to learn in the first task. Its exemplars are chosen as after any other."""
        if self.task > 0:
            super().train_task(train_set)


def continue_from(args, model_class):
    """Fill in what the old run decides: network, image size, and the old classes as first task."""
    given = [name for name in ("num_bases", "backbone", "input_size") if getattr(args, name)]
    if given or args.data_set != "digits" or args.class_order != "default":
        utils.fail("--data_set, --class_order, --num_bases, --backbone and --input_size come from "
                   "--model; leave them out")
    try:
        saved = torch.load(args.model, map_location="cpu", weights_only=True)
        old = saved["class_names"][:sum(saved["increments"])]
        folders = sorted(path.name for path in (Path(args.data_path) / "train").iterdir()
                         if path.is_dir())
    except Exception as error:
        utils.fail(f"--model {args.model} --data_path {args.data_path}: needs the model.pt of a "
                   f"finished run and a folder with train/<class>/* ({error})")
    load(args.model, model_class)  # says so and ends here if it is another network
    for name in ("data_set", "backbone", "input_size"):
        setattr(args, name, saved["args"][name])
    if args.data_set == "digits":
        utils.fail(f"{args.model} learned scikit-learn's digits, which are no folder of images: "
                   "start from a run with --data_set image_folder")
    missing, new = set(old) - set(folders), set(folders) - set(old)
    if missing or not new:
        utils.fail(f"{args.data_path}/train " + (
            f"lacks the old classes {sorted(missing)[:5]}: keep some images of each, best the "
            "exemplars" if missing else "holds no new class"))
    # The old classes keep their labels: they come first, in the order in which they were learned.
    args.class_order = [folders.index(name) for name in [*old, *sorted(new)]]
    args.num_bases = len(old)


def grow(args, Trainer=GrownWA):
    """`main` of the template, with the finished run --model as first task."""
    continue_from(args, Trainer.model_class)
    main(args, Trainer)


def get_parser(parser=None):
    """parser: that of another method, with its flags."""
    parser = parser or utils.get_parser()
    parser.add_argument("--model", required=True, help="model.pt of the finished run")
    parser.set_defaults(loaded_tasks=1)  # so the old classes' images need not fill a batch
    return parser


if __name__ == "__main__":
    grow(get_parser().parse_args())
