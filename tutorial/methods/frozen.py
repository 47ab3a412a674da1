"""A frozen backbone: after the first task, or from the start, nothing is trained. The classifier
follows from sums over the images, in closed form. Chapter 23.

    torchrun --nproc_per_node=2 -m tutorial.methods.frozen --adapt
    torchrun --nproc_per_node=2 -m tutorial.methods.frozen --adapt --head ridge

--head means is SimpleCIL (Zhou et al., arXiv 2303.07338), --head ridge is RanPAC (McDonnell et al.,
NeurIPS 2023, arXiv 2307.02251), and with --adapt near to ACIL (Zhuang et al., NeurIPS 2022, arXiv
2205.14922).
"""
import os

import torch
import torch.nn.functional as F

import utils
from template import CilModel, CilTrainer, main


class FrozenModel(CilModel):
    """Heads on h(x) = relu(phi(x) R), (batch, width), once there is an R; until then h = phi."""

    def __init__(self, backbone):
        super().__init__(backbone)
        self.register_buffer("R", None)  # (embed_dim of the backbone, width), drawn, never trained

    def lift(self, features):
        return features if self.R is None else (features @ self.R).relu()

    def forward(self, images):
        features = self.backbone(images)
        with torch.autocast(features.device.type, enabled=False):  # 16 bits are too few here
            return self.fc(self.lift(features.float())), features


def check_memory(width, args):
    """InputError: the Gram matrices and what it takes to solve them do not fit into memory."""
    # In float64 two matrices that stay, and three to solve with.
    need, here = 40 * width ** 2, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    size = getattr(os, "sysconf", lambda _: 2 ** 31)  # (Windows does not say)
    have = size("SC_PHYS_PAGES") * size("SC_PAGE_SIZE") / here
    if args.device.type == "cuda":
        have = torch.cuda.get_device_properties(args.device).total_memory
    if need > have:
        raise utils.InputError(f"--projection {width} takes {need / 1e9:.1f} GB of {have / 1e9:.0f}")


def solve(sums, ridge):
    """(G + ridge g I)^-1 C, (width, classes), for sums = [G, C], with g the mean of G's diagonal:
    so a ridge means the same for every scale of the features."""
    gram, goals = sums[:, :len(sums)].clone(), sums[:, len(sums):]
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.cholesky_solve(goals, torch.linalg.cholesky(gram))


def choose_ridge(fit, held_out):
    """The power of ten whose solution from some images has the smallest squared error on others."""
    def error(ridge):
        # |X V - Y|^2 = <V, G V> - 2 <V, C> + |Y|^2: the sums are enough, no image is needed.
        weights, width = solve(fit, ridge), len(fit)
        return (weights * (held_out[:, :width] @ weights - 2 * held_out[:, width:])).sum().item()
    return min((10.0 ** power for power in range(-8, 3)), key=error)


class Frozen(CilTrainer):
    """Class means, or ridge regression on random features, of a network that keeps still."""

    model_class = FrozenModel

    def train_task(self, train_set):
        """With --adapt learn the first task as usual. From then on nothing is trained."""
        # No teacher: nothing is distilled, and a copy would take memory.
        self.teacher, args, fc = None, self.args, self.model.fc
        if self.task == 0:
            width = args.projection if args.head == "ridge" else 0
            utils.together(lambda: check_memory(width or fc.embed_dim, args), args)
            if args.adapt:
                super().train_task(train_set)
            if width:
                utils.set_seed(args)  # from --seed alone: the same R for every order of the classes
                self.model.R = torch.randn(fc.embed_dim, width).to(args.device)
                fc.embed_dim = width  # of the heads to come
            # In no file: a resumed run begins after the first task's training, and adds up again.
            self.sums = torch.zeros(2, fc.embed_dim, fc.embed_dim).to(args.device, torch.double)

    def update_memory(self, new_data):
        """Add the new images to the sums; no image is kept. sums[0], of most images, is [G, C] =
        [X^T X, X^T Y]: the rows of X are their h(x), those of Y one-hot. sums[1] is the same of
        every fifth image, which choose_ridge needs."""
        self.sums = F.pad(self.sums, (0, self.nb_new))  # (2, width, width + known + new)
        # (n, phi's width): each rank computes a share, then all have all of them, the same bits.
        features = utils.for_all_images(self.model.eval().backbone, new_data, self.args)
        goals = F.one_hot(torch.from_numpy(new_data.y), self.known_classes + self.nb_new)
        fifth = torch.from_numpy(new_data.rows % 5 == 0)  # by a number that knows of no task
        for total, chosen in zip(self.sums, (~fifth, fifth)):
            for rows in chosen.nonzero()[:, 0].split(1000):
                h = self.model.lift(features[rows]).double()  # (1000, width)
                total.addmm_(h.T, torch.cat([h, goals[rows].to(h)], dim=1))

    def finish_task(self):
        """The rows of all heads: directions of the class means, or the solution of the ridge."""
        sums, heads = self.sums.sum(0), self.model.fc.heads
        # The largest logit is that of the largest cosine: |phi(x)| scales all of them alike.
        weights = F.normalize(sums[:, len(sums):], dim=0)  # (width, known + new)
        if self.args.head == "ridge":
            ridge = self.args.ridge or choose_ridge(*self.sums)
            self.run.results.setdefault("ridges", []).append(ridge)
            weights = solve(sums, ridge)
        # (The first task's heads may have been narrower: what they have learned goes.)
        for head, rows in zip(heads, weights.T.float().split([len(head.bias) for head in heads])):
            head.weight.data, head.bias.data = rows.contiguous(), torch.zeros_like(head.bias)


def get_parser():
    parser = utils.get_parser()
    add = parser.add_argument_group("frozen").add_argument
    add("--adapt", action="store_true", help="train the network on the first task")
    add("--head", default="means", choices=["means", "ridge"], help="nearest class mean (means)")
    add("--projection", type=utils.number(0, kind=int), help="random features for the ridge, or 0")
    add("--ridge", type=utils.number(1e-8, 1e8), help="fixed (chosen on every fifth image)")
    parser.set_defaults(no_align=True, presets={
        "all": dict(memory_size=0, projection=10000), "digits": dict(projection=1000)})
    return parser


def check(args):
    """The arguments, if they are right for this method; else the end, with one line."""
    if args.memory_size:
        utils.fail(f"--memory_size {args.memory_size}: this method keeps no image")
    return args


if __name__ == "__main__":
    main(check(get_parser().parse_args()), Frozen)
