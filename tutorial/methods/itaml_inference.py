"""How iTAML answers: it finds the task of many images together, adapts a copy of the network to
this task's exemplars, and asks the copy for the class. Chapter 20.
"""
import copy
import math
from argparse import Namespace

import numpy as np
import torch
import torch.nn.functional as F

import utils

# The p of the continua that are reported; the adaptation's learning rate, as released.
SIZES, RATE = (1, 5, 20), 1e-3


def tasks_of(trainer):
    """The task of each class so far: (known + new,), on the device."""
    return utils.task_of_class(trainer.run.increments[:trainer.task + 1]).to(trainer.args.device)


def task_losses(model, images, targets, task_of):
    """Sigmoid BCE of each image, the mean over the outputs of its own task: (batch,); and the
    logits (batch, known + new), minus infinity outside of the own task."""
    logits = model(images)[0].float()
    own = task_of[targets][:, None] == task_of  # (batch, known + new)
    goal = F.one_hot(targets, len(task_of)).float()
    losses = F.binary_cross_entropy_with_logits(logits, goal, reduction="none") * own
    return losses.sum(dim=1) / own.sum(dim=1), logits.masked_fill(~own, -math.inf)


def adapt(trainer, task, rate=RATE):
    """A copy of the model after one epoch of Adam on the exemplars of this task. Every rank does
    the same work for the same copy (on GPUs up to rounding). With one task, or no exemplars,
    nothing is to be done."""
    model, args = copy.deepcopy(trainer.model), trainer.args
    if trainer.task == 0 or not trainer.exemplars:
        return model
    task_of = tasks_of(trainer)
    classes = (task_of == task).nonzero()[:, 0].tolist()
    images = trainer.exemplars[classes[0]].join([trainer.exemplars[c] for c in classes[1:]])
    # All images on every rank, and too few to start a loading process for them.
    alone = Namespace(**vars(args) | dict(rank=0, world_size=1, batch_size=1, num_workers=0))
    sampler = utils.SeededSampler(len(images), alone)
    sampler.seed = utils.set_seed(args, trainer.task, task)
    optimizer = torch.optim.Adam(model.train().parameters(), rate)
    for x, y in utils.to_device(utils.make_batches(images, sampler, 64, alone), args):
        if len(x) > 1:  # BatchNorm needs more than one
            optimizer.zero_grad()
            task_losses(model, x, y, task_of)[0].mean().backward()
            optimizer.step()
    return model


def continuum(best, told, tasks, p):
    """Answers if images arrive p at a time and each p are taken for images of one task: that with
    the largest mean of `best`. A rest of fewer than p counts as a continuum, too.

    best: (n, tasks), each task's largest logit; told: (n,), whether the class is right when the
    task is told; tasks: the true task, or (n,) of them. Returns two (n,): whether class and task
    are right, and whether the task is.
    """
    sums = np.add.reduceat(best, np.arange(0, len(best), p), axis=0)
    found = sums.argmax(axis=1).repeat(p)[:len(best)] == tasks
    return found & told, found


def answer(trainer, task, rate=RATE):
    """best (n, tasks), base (n,), told (n,) for the n test images of a task, in a seeded order.

    best: each task's largest logit; base: whether the largest of all logits is right; told: whether
    the network that is adapted to this task, at this rate, finds the class among the task's."""
    adapted = adapt(trainer, task, rate).eval()
    args, model, task_of = trainer.args, trainer.model.eval(), tasks_of(trainer)
    tasks, test_set = range(trainer.task + 1), trainer.run.test_scenario.images(task)

    def row(images):
        logits, other = model(images)[0].float(), adapted(images)[0].float()
        other = other.masked_fill(task_of != task, -math.inf)
        return torch.stack([*(logits[:, task_of == t].amax(dim=1) for t in tasks),
                            logits.argmax(dim=1), other.argmax(dim=1)], dim=1)

    rows = utils.for_all_images(row, test_set, args).cpu().numpy()
    rows[:, -2:] = rows[:, -2:] == test_set.y[:, None]
    # The images of a folder lie class by class; a continuum holds any images of its task.
    rows = rows[np.random.RandomState([args.seed, task]).permutation(len(rows))]
    return rows[:, :-2], rows[:, -2] > 0, rows[:, -1] > 0


def report(trainer):
    """The four numbers, in percent, over the test images of all tasks so far:

    base: one image at a time, no adaptation, all classes compete (as every other chapter reports);
    continuum_p: p images of one task at a time, and adaptation (the paper's number, for p = 20);
    task_accuracy_p: the share of images whose task is found so; oracle: the task is told.
    """
    answers = [answer(trainer, task) for task in range(trainer.task + 1)]
    _, base, told = (np.concatenate(part) for part in zip(*answers))
    scores = {"base": base.mean()}
    for p in SIZES:
        found = [continuum(best, told, task, p) for task, (best, _, told) in enumerate(answers)]
        right, task_found = np.concatenate(found, axis=1).mean(axis=1)
        scores[f"continuum_{p}"], scores[f"task_accuracy_{p}"] = right, task_found
    scores["oracle"] = told.mean()
    return {name: 100 * float(score) for name, score in scores.items()}
