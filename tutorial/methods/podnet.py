"""PODNet: "PODNet: Pooled Outputs Distillation for Small-Tasks Incremental Learning" (Douillard et
al., ECCV 2020, arXiv 2004.13513). Chapter 17.

    torchrun --nproc_per_node=2 -m tutorial.methods.podnet
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import nn

import utils
from template import CilClassifier, CilModel, CilTrainer, main
from tutorial.methods.lucir import balanced_finetune, freeze_old_rows

PROXIES = 10  # of each class


class LocalSimilarityClassifier(CilClassifier):
    """Several proxies w_kp for each class k, compared by r_kp = -|phi/|phi| - w_kp/|w_kp||^2.
    The logit is eta sum_p softmax_p(r_kp) r_kp: the nearest proxies count most."""

    def __init__(self, embed_dim):
        super().__init__(embed_dim)
        self.eta = nn.Parameter(torch.ones(()))

    def expand(self, nb_classes):
        self.heads.append(nn.Linear(self.embed_dim, nb_classes * PROXIES, bias=False))
        nn.init.kaiming_normal_(self.heads[-1].weight, nonlinearity="linear")

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):  # 16 bits are too few here
            weights = torch.cat([head.weight for head in self.heads])  # (classes * PROXIES, d)
            r = 2 * F.normalize(features.float(), dim=1) @ F.normalize(weights, dim=1).T - 2
            r = r.unflatten(1, (-1, PROXIES))  # (batch, classes, PROXIES)
            return self.eta * (r.softmax(dim=2) * r).sum(dim=2)


class PODModel(CilModel):
    """Returns the feature maps of the levels beside logits and features."""

    def __init__(self, backbone):
        super().__init__(backbone)
        self.fc = LocalSimilarityClassifier(self.backbone.num_features)

    def forward(self, images):
        levels = min(4, len(self.backbone.feature_info))
        last, maps = self.backbone.forward_intermediates(images, indices=levels)
        features = self.backbone.forward_head(last, pre_logits=True)  # (batch, embed_dim)
        return self.fc(features), features, maps


def pod_spatial(old_maps, maps):
    """Distance of the maps (batch, C, H, W), squared, summed over width and over height, and then
    normalised; the mean over the levels."""
    def pooled(x):
        x = x.float().pow(2)
        return F.normalize(torch.cat([x.sum(3).flatten(1), x.sum(2).flatten(1)], dim=1), dim=1)
    distances = [(pooled(a) - pooled(b)).norm(dim=1).mean() for a, b in zip(old_maps, maps)]
    return torch.stack(distances).mean()


def nca(logits, targets, margin=None):
    """-log exp(q_t - margin) / sum_{k != t} exp(q_k), not below 0; with margin None the released
    code's form, where the margin cancels and the sum has 1 more: see the chapter. (batch,)"""
    own = logits.gather(1, targets[:, None])[:, 0]
    others = logits.scatter(1, targets[:, None], -math.inf)
    if margin is None:
        top = logits.max(dim=1).values
        return top - own + (others - top[:, None]).exp().sum(dim=1).log1p()
    return (others.logsumexp(dim=1) - own + margin).relu()


class PODNet(CilTrainer):
    """Distillation of pooled feature maps, and a classifier with several proxies for a class."""

    model_class = PODModel

    def expand_model(self, nb_new, new_data):
        """New proxies are the centres of k-means on the class's features; old ones are frozen."""
        super().expand_model(nb_new, new_data)
        if self.known_classes == 0:
            return
        length = freeze_old_rows(self.model.fc.heads)
        features = utils.extract_features(self.model, new_data, self.args)
        features = F.normalize(features, dim=1).numpy()
        centres = []
        for c in np.unique(new_data.y):
            own = features[new_data.y == c]
            own = np.resize(own, (max(len(own), PROXIES), own.shape[1]))  # repeats a few images
            centres.append(KMeans(PROXIES, n_init=1, random_state=0).fit(own).cluster_centers_)
        rows = torch.from_numpy(np.concatenate(centres))
        self.model.fc.heads[-1].weight.data.copy_(length * rows)

    def train_task(self, train_set):
        """Then a second stage for the proxies."""
        super().train_task(train_set)
        balanced_finetune(self, train_set)

    def compute_loss(self, images, targets):
        """NCA + factor (lambda_spatial spatial + lambda_flat flat). Returns the loss and logits."""
        logits, features, maps = self.parallel_model(images)
        margin = 0.6 * self.model.fc.eta if self.args.nca == "paper" else None
        loss = nca(logits, targets, margin).mean()
        if self.teacher is not None and features.requires_grad:  # not in the second stage
            _, old_features, old_maps = self.teacher(images)
            factor = math.sqrt(logits.shape[1] / self.nb_new)  # all classes, the new included
            spatial = self.args.lambda_spatial * pod_spatial(old_maps, maps)
            flat = 1 - F.cosine_similarity(features.float(), old_features.float()).mean()
            loss = loss + factor * (spatial + self.args.lambda_flat * flat)
        return loss, logits


def get_parser():
    parser = utils.get_parser()
    add = parser.add_argument_group("PODNet").add_argument
    add("--lambda_spatial", type=utils.number(0), help="weight of POD-spatial")
    add("--lambda_flat", type=utils.number(0), help="weight of POD-flat")
    add("--nca", default="released", choices=["paper", "released"],
        help="form of the loss (released)")
    add("--num_epochs_ft", type=utils.number(0, kind=int), help="epochs of the second stage")
    add("--lr_ft", type=utils.number(1e-12), help="its learning rate")
    paper = dict(aa="none", fixed_memory=True)
    parser.set_defaults(no_align=True, presets={
        "all": dict(lambda_spatial=3.0, lambda_flat=1.0, num_epochs_ft=20, lr_ft=0.05),
        "digits": dict(backbone="resnet32_signed"),
        "cifar100": dict(paper, backbone="resnet32_signed", num_epochs=160),
        "imagenet100": dict(paper, num_epochs=90, lr=0.05, weight_decay=5e-4, batch_size=64,
                            lambda_spatial=8.0, lambda_flat=10.0, lr_ft=0.01),
        "imagenet1000": dict(paper, lr=0.05, batch_size=64, lambda_spatial=8.0, lambda_flat=10.0,
                             lr_ft=0.01)})
    return parser


if __name__ == "__main__":
    args = get_parser().parse_args()
    if args.compile:
        utils.fail("--compile: this method asks the network for its feature maps, so leave it out")
    main(args, PODNet)
