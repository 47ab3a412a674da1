"""BAL_FT and BAL_JOINT: "On the importance of cross-task features for class-incremental learning"
(Soutif-Cormerais et al., 2021, arXiv 2106.11930). Chapter 19.

    torchrun --nproc_per_node=2 -m tutorial.methods.bal_ft --loss own
"""
import math

import numpy as np
import torch.nn.functional as F

import utils
from template import main
from tutorial.methods.lucir import balanced_finetune
from tutorial.methods.patience import Patience, add_arguments


class BalFT(Patience):
    """Replay alone, with or without a loss between tasks, then heads balanced on the exemplars."""

    def train_task(self, train_set):
        """Stage 1 on everything, stage 2 for the heads: it makes the tasks' logits comparable."""
        increments = self.run.increments[:self.task + 1]
        self.task_of = utils.task_of_class(increments).to(self.args.device)
        super().train_task(train_set)
        balanced_finetune(self, train_set, self.args.reinit_heads)

    def compute_loss(self, images, targets):
        """Cross-entropy over all classes, or in stage 1 (--loss own) over those of the image's own
        task. Returns the loss, a scalar, and the logits."""
        logits, _ = self.parallel_model(images)  # (batch, known + new)
        scores = logits
        if self.args.loss == "own" and self.stage == 0:
            # No term compares classes of two tasks, so no feature is asked to tell them apart.
            others = self.task_of[targets][:, None] != self.task_of  # (batch, known + new)
            scores = logits.masked_fill(others, -math.inf)
        return F.cross_entropy(scores, targets), logits


class BalJoint(BalFT):
    """The upper bound: all images of all tasks so far, in both stages."""

    def update_memory(self, new_data):
        """A memory without a limit."""
        if len(self.exemplars) == self.known_classes:
            self.exemplars += [new_data.select(new_data.y == c) for c in np.unique(new_data.y)]


def get_parser():
    parser = utils.get_parser()
    add = parser.add_argument_group("BAL_FT and BAL_JOINT").add_argument
    add("--loss", default="all", choices=["all", "own"], help="of stage 1, over all classes or "
        "over the own task's: with or without cross-task features (all)")
    add("--upper_bound", default="none", choices=["none", "joint"], help="joint: BAL_JOINT (none)")
    add("--num_epochs_ft", type=utils.number(0, kind=int), help="epochs of stage 2")
    add("--lr_ft", type=utils.number(1e-12), help="its learning rate")
    add("--reinit_heads", action="store_true", help="begin stage 2 with new heads")
    add_arguments(parser)
    paper = dict(num_bases=0, aa="none", weight_decay=2e-4, fixed_memory=True, patience=10)
    parser.set_defaults(no_align=True, presets={
        "all": dict(num_epochs_ft=20, lr_ft=0.1, patience=0, validation="new"),
        "cifar100": dict(paper, increment=10, num_epochs=200),
        "imagenet100": dict(paper, increment=4, num_epochs=100, batch_size=256, num_epochs_ft=25)})
    return parser


if __name__ == "__main__":
    args = get_parser().parse_args()
    if args.memory_size == 0 and args.num_epochs_ft != 0 and args.upper_bound == "none":
        utils.fail("--memory_size 0: stage 2 learns from exemplars; or pass --num_epochs_ft 0")
    if args.upper_bound == "joint":
        args.validation = args.validation or "seen"
    main(args, BalJoint if args.upper_bound == "joint" else BalFT)
