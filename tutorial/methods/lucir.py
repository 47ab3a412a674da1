"""LUCIR: "Learning a Unified Classifier Incrementally via Rebalancing" (Hou et al., CVPR 2019).
Chapter 16.

    torchrun --nproc_per_node=2 -m tutorial.methods.lucir
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import utils
from template import CilClassifier, CilModel, CilTrainer, main


class CosineClassifier(CilClassifier):
    """logits = sigma cos(phi(x), w_c): lengths play no part. One learnable sigma for all heads."""

    def __init__(self, embed_dim):
        super().__init__(embed_dim)
        self.sigma = nn.Parameter(torch.ones(()))

    def expand(self, nb_classes):
        self.heads.append(nn.Linear(self.embed_dim, nb_classes, bias=False))

    def forward(self, features):
        with torch.autocast(features.device.type, enabled=False):  # 16 bits are too few here
            weights = torch.cat([head.weight for head in self.heads])  # (known + new, embed_dim)
            return self.sigma * F.normalize(features.float(), dim=1) @ F.normalize(weights, dim=1).T


class LUCIRModel(CilModel):
    """A cosine classifier on signed features: the backbone's very last ReLU is left out."""

    def __init__(self, backbone):
        super().__init__(backbone)
        self.fc = CosineClassifier(self.backbone.num_features)
        stages = [stage for name, stage in self.backbone.named_children() if name[:5] == "layer"]
        # (Of an HRNet only the first stage has such a name, and its last ReLU is elsewhere.)
        relus = [name for name in ("last_relu", "act3", "act2")  # of our blocks, of timm's
                 if len(stages) > 2 and hasattr(stages[-1][-1], name)]
        if not relus:
            utils.fail("this method needs a ResNet as --backbone, such as resnet32 or resnet18")
        setattr(stages[-1][-1], relus[0], nn.Identity())


def freeze_old_rows(heads):
    """Stop the learning of all heads but the newest; return the mean length of their rows."""
    heads[:-1].requires_grad_(False)
    return torch.cat([head.weight for head in heads[:-1]]).norm(dim=1).mean().item()


def balanced_finetune(trainer, train_set, reinit=False):
    """A second stage from the second task on: the heads alone, old and new, for --num_epochs_ft
    epochs on the exemplars, the same number of each class. reinit: begin with new heads."""
    args = trainer.args
    if args.num_epochs_ft and trainer.exemplars:
        trainer.update_memory(train_set.select(train_set.y >= trainer.known_classes))
        heads = trainer.model.fc.heads.requires_grad_(True)
        for head in heads if reinit else ():  # the same on every rank: all draw the same numbers
            fresh = CilClassifier(head.in_features)
            fresh.expand(head.out_features)
            head.load_state_dict(fresh.heads[0].state_dict())
        with utils.frozen(trainer, [trainer.model.backbone]):
            trainer.fit(trainer.exemplars[0].join(trainer.exemplars[1:]), heads.parameters(),
                        args.num_epochs_ft, args.lr_ft)


class LUCIR(CilTrainer):
    """Less-forget constraint, margin ranking and imprinted weights, on cosines."""

    model_class = LUCIRModel

    def expand_model(self, nb_new, new_data):
        """Freeze the old rows, and imprint: a new row starts as the mean direction of its class."""
        super().expand_model(nb_new, new_data)
        if self.known_classes == 0:
            return
        length = freeze_old_rows(self.model.fc.heads)
        features = F.normalize(utils.extract_features(self.model, new_data, self.args), dim=1)
        means = torch.stack([features[new_data.y == c].mean(dim=0) for c in np.unique(new_data.y)])
        self.model.fc.heads[-1].weight.data.copy_(length * F.normalize(means, dim=1))

    def train_task(self, train_set):
        """With --num_epochs_ft a second stage for the rows."""
        super().train_task(train_set)
        balanced_finetune(self, train_set)

    def compute_loss(self, images, targets):
        """CE, from the second task on + less-forget + margin ranking. Returns loss and logits."""
        logits, features = self.parallel_model(images)  # (batch, known + new), (batch, embed_dim)
        loss = F.cross_entropy(logits, targets)
        if self.teacher is None:
            return loss, logits
        if features.requires_grad:  # not in the second stage
            # Less-forget: the features shall keep their direction, the more so the more is known.
            weight = self.args.lambda_base * math.sqrt(self.known_classes / self.nb_new)
            cosine = F.cosine_similarity(features.float(), self.teacher(images)[1].float())
            loss = loss + weight * (1 - cosine).mean()
        # Margin ranking: for an exemplar, its class beats the K strongest new ones by a margin.
        cosines = logits / self.model.fc.sigma
        rivals = cosines[:, self.known_classes:].topk(min(self.args.margin_k, self.nb_new)).values
        own = cosines.gather(1, targets[:, None])  # (batch, 1)
        ranking = (self.args.margin - own + rivals).relu().mean(dim=1)  # (batch,), of all images
        old = targets < self.known_classes  # a mask, since to choose rows would wait for the GPU
        return loss + utils.global_mean(ranking, old, self.args), logits


def get_parser():
    parser = utils.get_parser()
    add = parser.add_argument_group("LUCIR").add_argument
    add("--lambda_base", type=utils.number(0), help="weight of the less-forget constraint")
    add("--margin", type=utils.number(0, 2), default=0.5, help="margin of cosines (0.5)")
    add("--margin_k", type=utils.number(1, kind=int), default=2, help="strongest new classes (2)")
    add("--num_epochs_ft", type=utils.number(0, kind=int), default=0, help="class-balanced epochs")
    add("--lr_ft", type=utils.number(1e-12), default=0.01, help="their learning rate (0.01)")
    paper = dict(aa="none", fixed_memory=True)
    parser.set_defaults(no_align=True, presets={
        "all": dict(lambda_base=5.0), "cifar100": dict(paper, num_epochs=160),
        **dict.fromkeys(("imagenet100", "imagenet1000"), dict(paper, lambda_base=10.0))})
    return parser


if __name__ == "__main__":
    main(get_parser().parse_args(), LUCIR)
