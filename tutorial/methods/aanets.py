"""AANets: "Adaptive Aggregation Networks for Class-Incremental Learning" (Liu et al., CVPR 2021,
arXiv 2010.05063), over iCaRL, LUCIR or PODNet. Chapter 18.

    torchrun --nproc_per_node=2 -m tutorial.methods.aanets --baseline lucir
"""
import copy

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import utils
from template import CilTrainer, main
from tutorial.methods import icarl, lucir, podnet


class Scaling(nn.Module):
    """A convolution's weight times one learnt number for each of its filter slices (out, in)."""

    def __init__(self, weight):
        super().__init__()
        self.scale = nn.Parameter(torch.ones_like(weight[:, :, :1, :1]))

    def forward(self, weight):
        return weight * self.scale


def make_branch(backbone, kind):
    """A copy of the backbone. free: all of it learns; fixed: nothing but BatchNorm's averages; ss:
    scale and shift, that is frozen convolutions with learnt scales, and BatchNorm learns."""
    branch = copy.deepcopy(backbone)
    if kind == "fixed":
        branch.requires_grad_(False)
    for module in [m for m in branch.modules() if isinstance(m, nn.Conv2d) and kind == "ss"]:
        module.weight.requires_grad_(False)
        parametrize.register_parametrization(module, "weight", Scaling(module.weight))
    return branch


def levels(backbone):
    """The residual levels of a ResNet as lists of modules; the stem belongs to the first."""
    found, level = [], []
    for name, module in backbone.named_children():
        level.append(module)
        if name.startswith("layer"):
            found, level = [*found, level], []
    return found


class DualBackbone(nn.Module):
    """x_k = alpha_k stable_k(x_(k-1)) + (1 - alpha_k) plastic_k(x_(k-1)), one alpha for a level."""

    def __init__(self, backbone, kinds, alpha):
        super().__init__()
        self.stable, self.plastic = (make_branch(backbone, kind) for kind in kinds)
        self.num_features, self.feature_info = backbone.num_features, backbone.feature_info
        device = next(backbone.parameters()).device
        self.alphas = nn.ParameterList(  # no gradients but in their own pass
            [nn.Parameter(torch.tensor(alpha, device=device), requires_grad=False)
             for _ in levels(backbone)])

    def forward_intermediates(self, x, indices):
        maps = []
        for alpha, stable, plastic in zip(self.alphas, levels(self.stable), levels(self.plastic)):
            one, other = x, x
            for a, b in zip(stable, plastic):
                one, other = a(one), b(other)
            mixed = alpha * one.float() + (1 - alpha) * other.float()  # (batch, C_k, H_k, W_k)
            x = mixed.to(one.dtype)
            maps.append(x)
        return x, maps[-indices:]

    def forward_head(self, x, pre_logits=True):
        return self.stable.forward_head(x, pre_logits=pre_logits)

    def forward(self, x):
        return self.forward_head(self.forward_intermediates(x, 1)[0])


class AANets(CilTrainer):
    """Put before a baseline: from the second task on it has two branches, and alternates."""

    def expand_model(self, nb_new, new_data):
        """In the second task the network becomes two copies of itself."""
        single = self.args.branch_mode == "single"
        # (An HRNet has one level by its names, and the rest of it would be left out.)
        if len(levels(self.model.backbone)) < 3 and self.task == 0:
            utils.fail(f"--backbone {self.args.backbone}: aanets needs a ResNet, such as resnet32")
        if self.args.memory_size == 0 and self.args.fusion_lr and not single:
            utils.fail("--memory_size 0: alpha learns from exemplars; or pass --fusion_lr 0")
        if self.task == 1:
            # With one branch alpha stays 1: the other has no effect, and learns nothing.
            kinds = self.args.branch_1, "fixed" if single else self.args.branch_2
            self.model.backbone = DualBackbone(self.model.backbone, kinds, 1.0 if single else 0.5)
        super().expand_model(nb_new, new_data)

    def train_task(self, train_set):
        """Draw alpha's balanced set: the old exemplars, and as many images of each new class."""
        self.balanced = None
        if self.known_classes and self.args.fusion_lr and self.args.branch_mode == "dual":
            m = min(len(images) for images in self.exemplars)
            draw = np.random.RandomState([self.args.seed, self.task])  # the same on every rank
            new = [draw.permutation(np.flatnonzero(train_set.y == self.known_classes + c))[:m]
                   for c in range(self.nb_new)]
            old = [images.select(slice(m)) for images in self.exemplars[:self.known_classes]]
            balanced = train_set.select(np.concatenate(new)).join(old)
            self.balanced = utils.train_loader(balanced, self.args)
        super().train_task(train_set)
        if self.known_classes:
            self.run.results.setdefault("alphas", []).append(
                [float(alpha) for alpha in self.model.backbone.alphas])

    def train_epoch(self, loader, optimizer):
        """The baseline's pass (alpha fixed), then alpha's (all else fixed): cross-entropy alone, in
        eval mode. Plain SGD, which has no state, so a resumed run loses nothing."""
        averages = super().train_epoch(loader, optimizer)
        if self.balanced is None or self.stage > 0:  # a second stage leaves the features alone
            return averages
        alphas = self.model.backbone.alphas.requires_grad_(True)
        lr = self.args.fusion_lr * optimizer.param_groups[0]["lr"] / optimizer.defaults["lr"]
        self.balanced.sampler.seed = loader.sampler.seed
        utils.average_batchnorm(self.model, self.args)  # one network on all ranks
        self.model.eval()
        for images, targets in utils.to_device(self.balanced, self.args):
            loss = F.cross_entropy(self.model(images)[0], targets)  # float32 also under --amp
            gradients = torch.stack(torch.autograd.grad(loss, list(alphas)))  # of alpha alone
            if self.args.distributed:  # the bare model: average by hand
                dist.all_reduce(gradients)
            for alpha, gradient in zip(alphas, gradients / self.args.world_size):
                alpha.data.sub_(lr * gradient)
        alphas.requires_grad_(False)
        return averages


BASELINES = {"icarl": (icarl, icarl.ICaRL), "lucir": (lucir, lucir.LUCIR),
             "podnet": (podnet, podnet.PODNet)}


def get_parser(baseline="lucir"):
    parser = BASELINES[baseline][0].get_parser()
    add = parser.add_argument_group("AANets").add_argument
    add("--baseline", default="lucir", choices=BASELINES, help="(lucir)")
    add("--branch_mode", default="dual", choices=["dual", "single"], help="(dual)")
    add("--branch_1", default="ss", choices=["ss", "fixed", "free"], help="stable branch (ss)")
    add("--branch_2", default="free", choices=["free", "fixed", "ss"], help="plastic branch (free)")
    add("--fusion_lr", type=utils.number(0, 1), default=0.01, help="of alpha; 0: always 1/2 (0.01)")
    return parser


if __name__ == "__main__":
    first = utils.Parser(add_help=False)  # the baseline decides which further flags there are
    first.add_argument("--baseline", default="lucir", choices=BASELINES)
    name = first.parse_known_args()[0].baseline
    args, Baseline = get_parser(name).parse_args(), BASELINES[name][1]
    if args.compile:
        utils.fail("--compile: here the network changes in the second task, so leave it out")
    main(args, type(f"{Baseline.__name__}+AANets", (AANets, Baseline), {}))
