"""A validation set, and a learning rate that falls when the loss there stops falling (the schedule
of FACIL, Masana et al., arXiv 2010.15277). Chapter 19.

Off without --patience. To use it, derive from `Patience` in place of `CilTrainer`, and call
`add_arguments(parser)`. The loss must not talk to other ranks (LUCIR's does): here they may have
different numbers of batches.
"""
import numpy as np
import torch

import utils
from template import CilTrainer


class BestWeights(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """After `patience` epochs without a better loss: a lower rate, and back to the best weights.
    Below --lr_min, or after num_epochs, the fit ends with them."""

    def __init__(self, optimizer, trainer, num_epochs):
        args, self.trainer = trainer.args, trainer
        self.num_epochs, self.lr_min = num_epochs, min(args.lr_min, optimizer.defaults["lr"])
        self.weights = None  # the model's state after the best epoch so far
        super().__init__(optimizer, factor=1 / args.lr_factor, threshold=0, eps=0,
                         patience=args.patience - 1)

    def step(self):
        """At the end of an epoch, with the validation loss that `Patience.train_epoch` found."""
        loss, model, rate = self.trainer.validation_loss, self.trainer.model, self.get_last_lr()
        if self.weights is None or loss < self.best:
            self.weights = {name: x.clone() for name, x in model.state_dict().items()}
        super().step(loss)
        learned = self.get_last_lr()[0] < self.lr_min or self.last_epoch == self.num_epochs
        if learned or self.get_last_lr() != rate:
            model.load_state_dict(self.weights)
        if learned:  # a rate of 0 ends the fit
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0
            self._last_lr = [0.0] * len(self._last_lr)

    def state_dict(self):
        return {name: x for name, x in super().state_dict().items() if name != "trainer"}


@torch.no_grad()
def validation_loss(trainer):
    """The trainer's own loss over clean images that it never learns from; all ranks together."""
    args = trainer.args
    trainer.model.eval()
    # "new" follows the newest task only, and does not see what happens to the old ones.
    sets = trainer.validation[-1:] if args.validation == "new" else trainer.validation
    sums = torch.zeros(2, device=args.device)  # loss, images of this rank
    for images, targets in utils.clean_batches(sets[0].join(sets[1:]), args):
        with utils.autocast(args), torch.compiler.set_stance("force_eager"):
            loss = trainer.compute_loss(images, targets)[0].float()
        sums += torch.stack([loss * len(targets), torch.ones_like(loss) * len(targets)])
    if args.distributed:
        torch.distributed.all_reduce(sums)
    return float(sums[0] / sums[1])


class Patience(CilTrainer):
    """The template, with --validation_share of each class held out and early stopping."""

    validation = []  # an ImageSet for each task so far

    def expand_model(self, nb_new, new_data):
        """Take the validation images out of new_data, before anything learns or chooses from it."""
        if self.args.patience:
            draw = np.random.RandomState([self.args.seed, self.task])
            held = np.zeros(len(new_data), dtype=bool)
            for c in np.unique(new_data.y):  # the same on every rank, and again after a resume
                rows = draw.permutation(np.flatnonzero(new_data.y == c))
                share = max(1, round(len(rows) * self.args.validation_share))
                held[rows[:min(share, len(rows) - 1)]] = True
            self.validation = [*self.validation, new_data.select(held)]
            vars(new_data).update(vars(new_data.select(~held)))
        super().expand_model(nb_new, new_data)

    def make_optimizer(self, parameters, num_epochs, lr):
        """Without --patience the template's schedule."""
        optimizer, cosine = super().make_optimizer(parameters, num_epochs, lr)
        scheduler = BestWeights(optimizer, self, num_epochs) if self.args.patience else cosine
        return optimizer, scheduler

    def train_epoch(self, loader, optimizer):
        """One pass, then a look at the validation images."""
        averages = super().train_epoch(loader, optimizer)
        if self.args.patience:
            utils.average_batchnorm(self.model, self.args)
            averages["validation_loss"] = self.validation_loss = validation_loss(self)
        return averages


def add_arguments(parser):
    add = parser.add_argument_group("schedule by validation").add_argument
    add("--patience", type=utils.number(0, kind=int), help="epochs without a better validation "
        "loss until the rate falls; 0: no validation set, the cosine schedule of the template")
    add("--validation", choices=["new", "seen"], help="its images: of the newest task, or of all "
        "so far, which are then kept beside the memory")
    add("--validation_share", type=utils.number(1e-6, 0.5), default=0.1, help="of each class (0.1)")
    add("--lr_factor", type=utils.number(1.01), default=3.0, help="the rate is divided by it (3)")
    add("--lr_min", type=utils.number(1e-12), default=1e-4, help="below it a stage is over (1e-4)")
