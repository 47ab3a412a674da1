"""iTAML: "iTAML: An Incremental Task-Agnostic Meta-learning Approach" (Rajasegaran et al., CVPR
2020, arXiv 2003.11652). Chapter 20.

    torchrun --nproc_per_node=2 -m tutorial.methods.itaml
"""
import contextlib
import math

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import utils
from template import CilTrainer, main
from tutorial.methods import itaml_networks  # noqa: F401  (makes its networks known to timm)
from tutorial.methods.itaml_inference import report, task_losses, tasks_of


def outer_rate(task, nb_tasks, beta):
    """eta = exp(-beta s / M), with s from 0 to M - 1: the later the task, the shorter the step."""
    return math.exp(-beta * task / nb_tasks)


def copies(tensors):
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def move(parameters, start, end, rate):
    """parameters <- (1 - rate) start + rate end"""
    for parameter, a, b in zip(parameters, start, end):
        parameter.copy_(torch.lerp(a, b, rate))


def inner_step(trainer, images, targets, count, parameters, optimizer):
    """One step on the images of one task: `count` on all ranks together, and maybe none on this.
    Returns the losses and logits of `task_losses`."""
    args, model, scaler = trainer.args, trainer.model, trainer.run.scaler
    task_of = tasks_of(trainer)
    losses = torch.zeros(0, device=args.device)
    logits = torch.zeros(0, len(task_of), device=args.device)
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    # SyncBatchNorm (on several GPUs) waits for every rank, also for one without images.
    synced = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
    model.train((count if synced else len(images)) > 1)  # one image is no batch
    if len(images) or synced:
        with utils.autocast(args) if len(images) else contextlib.nullcontext():
            losses, logits = task_losses(model, images, targets, task_of)
    loss = scaler.scale(losses.sum() / count)
    if loss.requires_grad:
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    if args.distributed:  # the bare model: add up by hand
        total = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(total)
        gradients = total.split([parameter.numel() for parameter in parameters])
    optimizer.zero_grad()  # to None: the heads of other tasks do not move
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.view_as(parameter)
    scaler.step(optimizer)
    scaler.update()
    return losses.detach(), logits.detach()


class ITAML(CilTrainer):
    """Inner steps for each task of a batch, and an outer step from the start towards their ends."""

    def make_optimizer(self, parameters, num_epochs, lr):
        """RAdam or SGD, and a rate that falls at --milestones."""
        args = self.args
        optimizer = (torch.optim.SGD(parameters, lr, args.momentum, 0, args.weight_decay)
                     if args.optimizer == "sgd" else
                     torch.optim.RAdam(parameters, lr, weight_decay=args.weight_decay))
        return optimizer, torch.optim.lr_scheduler.MultiStepLR(
            optimizer, [max(1, round(s * num_epochs)) for s in args.milestones], args.gamma)

    def train_epoch(self, loader, optimizer):
        """For each batch the inner steps of one task after the other, then the outer step. Without
        DDP: ranks may hold images of different tasks, and would wait for each other for ever."""
        args, paper, task_of = self.args, self.args.meta == "paper", tasks_of(self)
        rate = outer_rate(self.task, len(self.run.increments), args.beta)
        shared = [p for p in self.model.backbone.parameters() if p.requires_grad]  # theta
        # The tasks' shares of a batch have ever new sizes, for each of which cudnn would look for
        # its fastest algorithm.
        torch.backends.cudnn.benchmark = False
        meter = utils.Meter(self, len(loader))
        for images, targets in utils.to_device(loader, args):  # (batch / ranks, 3, H, W)
            tasks = task_of[targets]
            counts = torch.bincount(tasks, minlength=self.task + 1)
            if args.distributed:  # the tasks of the global batch, the same on every rank
                dist.all_reduce(counts)
            start, ends = copies(shared), []
            losses = torch.zeros(len(targets), device=args.device)
            logits = torch.zeros(len(targets), len(task_of), device=args.device)
            for task, count in enumerate(counts.tolist()):
                if count == 0:
                    continue
                head, own = list(self.model.fc.heads[task].parameters()), tasks == task
                before = copies(head)
                if paper:  # every task starts from the same point
                    move(shared, start, start, 0)
                for _ in range(args.inner_steps):
                    losses[own], logits[own] = inner_step(
                        self, images[own], targets[own], count, shared + head, optimizer)
                ends.append(copies(shared))
                move(head, before, copies(head), rate)  # a head moves in its own task's steps only
            end = [torch.stack(same).mean(dim=0) for same in zip(*ends)] if paper else ends[-1]
            move(shared, start, end, rate)
            meter.update(losses.mean(), logits, targets)  # the accuracy shown is task-aware
        return meter.averages()

    def finish_task(self):
        """Record and print the four numbers of `report`."""
        scores = report(self)
        for name, score in scores.items():
            self.run.results.setdefault(name, []).append(score)
        if self.args.rank == 0:
            tqdm.write(f"task {self.task + 1}: " + ", ".join(  # above the bar, if there is one
                f"{name} {score:.2f}" for name, score in scores.items()))


def get_parser():
    parser = utils.get_parser()
    add = parser.add_argument_group("iTAML").add_argument
    add("--meta", default="paper", choices=["paper", "released"], help="outer step (paper)")
    add("--beta", type=utils.number(0, 1e6), help="of eta = exp(-beta task / tasks)")
    add("--inner_steps", type=utils.number(1, kind=int), default=1, help="for each task (1)")
    add("--optimizer", choices=["radam", "sgd"], help="of the inner steps")
    add("--milestones", type=utils.number(0, 1), nargs="+", help="shares of the epochs after which "
        "the learning rate falls")
    add("--gamma", type=utils.number(1e-6, 1), help="what it is multiplied by then")
    released = dict(num_bases=0, aa="none")
    parser.set_defaults(no_align=True, herding_method="first", presets={
        "all": dict(beta=1.0, optimizer="radam", lr=0.01, weight_decay=0.0, gamma=0.2,
                    milestones=[0.25, 0.5, 0.75]),
        "mnist": dict(released, backbone="mlp400", beta=0.5, optimizer="sgd", lr=0.1, gamma=0.5,
                      weight_decay=1e-3, num_epochs=20, batch_size=256),
        "svhn": dict(released, backbone="thin_resnet18", num_epochs=20, batch_size=256),
        "cifar100": dict(released, backbone="thin_resnet18", num_epochs=70,
                         milestones=[2 / 7, 4 / 7, 6 / 7]),
        # No recipe was ever released for these: tasks of equal size, and our own schedule.
        "cub200": dict(num_bases=0, increment=10), "imagenet100": dict(num_bases=0),
        "imagenet1000": dict(num_bases=0)})
    return parser


if __name__ == "__main__":
    args = get_parser().parse_args()
    if args.compile:
        utils.fail("--compile: the tasks' shares of a batch have ever new sizes, so leave it out")
    main(args, ITAML)
