"""DER: "DER: Dynamically Expandable Representation for Class Incremental Learning" (Yan et al.,
CVPR 2021, arXiv 2103.16788), without its pruning, as in the released code. Chapter 22.

    torchrun --nproc_per_node=2 -m tutorial.methods.der

The network grows by one backbone per task. With ResNet-32 that is 466,256 parameters each time, so
the six tasks of CIFAR-100 with base 50 and increment 10 end with 2,836,751, the heads included.
"""
import copy

import torch
import torch.nn.functional as F
from torch import nn

import utils
from template import CilModel, CilTrainer, main
from tutorial.methods.lucir import balanced_finetune


class ExpandableBackbone(nn.Module):
    """Phi(x) = [F_1(x), ..., F_t(x)], (batch, t d): a backbone F_u, a branch, for each task u so
    far. Only the newest learns; the others keep their weights and BatchNorm's averages."""

    def __init__(self, backbone):
        super().__init__()
        self.branches, self.num_features = nn.ModuleList([backbone]), backbone.num_features
        self.aux = None  # in training a head on the newest branch alone, from the second task on

    def expand(self, nb_new):
        """Freeze what is there. Add a branch and its auxiliary head, for nb_new classes and one
        for all that is not new."""
        newest = copy.deepcopy(self.branches[-1])  # it goes on from there, as in the released code
        self.branches.requires_grad_(False)  # without gradients DDP and SGD pass them over
        self.branches.append(newest)
        self.num_features += newest.num_features
        # In here, not beside the classifier, so that it rests with the branches in stage 2, where
        # it has no gradient: DDP would wait for one.
        self.aux = nn.Linear(newest.num_features, 1 + nb_new)

    def train(self, mode=True):
        """Old branches stay in eval mode, whoever asks for another: no average moves."""
        super().train(mode)
        self.branches[:-1].eval()
        return self

    def forward(self, images):
        return torch.cat([branch(images) for branch in self.branches], dim=1)


class DERModel(CilModel):
    """Returns beside logits and features the auxiliary logits (batch, 1 + new), None in task 1."""

    def __init__(self, backbone):
        super().__init__(ExpandableBackbone(backbone))

    def forward(self, images):
        features, aux = self.backbone(images), self.backbone.aux  # (batch, t d)
        own = features[:, -aux.in_features:] if aux else None  # (batch, d), of the newest branch
        return self.fc(features), features, aux(own) if aux else None

    def widen(self, nb_new):
        """A new branch for nb_new classes, and old heads that see it: they keep their weights for
        the features that were there, and draw new ones for the branch."""
        self.backbone.expand(nb_new)
        old_heads, self.fc.heads = self.fc.heads, nn.ModuleList()
        self.fc.embed_dim = self.backbone.num_features
        for old in old_heads:
            self.fc.expand(old.out_features)  # on every rank the same numbers are drawn
            self.fc.heads[-1].weight.data[:, :old.in_features] = old.weight.data
            self.fc.heads[-1].bias.data[:] = old.bias.data


class DER(CilTrainer):
    """A new backbone for each task beside the frozen old ones, then a balanced classifier."""

    model_class = DERModel

    def expand_model(self, nb_new, new_data):
        """From the second task on, one more branch first."""
        self.teacher = None  # nothing is distilled: no copy in training, or in checkpoints
        if self.known_classes:
            self.model.widen(nb_new)
        super().expand_model(nb_new, new_data)

    def train_task(self, train_set):
        """Stage 1: the new branch and the classifier, on everything. Stage 2, from the second task
        on: a classifier from scratch, on the same number of exemplars of each class."""
        super().train_task(train_set)
        balanced_finetune(self, train_set, reinit=True)

    def compute_loss(self, images, targets):
        """Stage 1: CE(H(Phi(x)), y) + lambda_aux CE(H_aux(F_t(x)), y_aux), where y_aux is 0 for all
        old classes, and 1 to |new| for the new. Stage 2: CE(H(Phi(x)) / T, y). Returns the loss, a
        scalar, and the logits."""
        logits, _, aux_logits = self.parallel_model(images)  # (batch, known + new), aux: see above
        if self.stage == 1:
            return F.cross_entropy(logits / self.args.temperature_ft, targets), logits
        loss = F.cross_entropy(logits, targets)
        if aux_logits is not None:
            # There all old images are one class: the new branch shall find what the old ones lack.
            aux_targets = (targets - self.known_classes + 1).clamp(min=0)  # (batch,)
            loss = loss + self.args.lambda_aux * F.cross_entropy(aux_logits, aux_targets)
        return loss, logits


def get_parser():
    parser = utils.get_parser()
    add = parser.add_argument_group("DER").add_argument
    add("--lambda_aux", type=utils.number(0), default=1.0, help="weight of the auxiliary loss (1)")
    add("--num_epochs_ft", type=utils.number(0, kind=int), help="epochs of stage 2")
    add("--lr_ft", type=utils.number(1e-12), help="its learning rate")
    add("--temperature_ft", type=utils.number(1e-12), help="its logits are divided by this")
    parser.set_defaults(no_align=True, presets={
        "all": dict(num_epochs_ft=20, lr_ft=0.1, temperature_ft=5.0),
        "cifar100": dict(aa="none", fixed_memory=True, num_epochs_ft=30)})
    return parser


if __name__ == "__main__":
    args = get_parser().parse_args()
    if args.compile:
        utils.fail("--compile: here the network grows with every task, so leave it out")
    if args.memory_size == 0 and args.num_epochs_ft != 0:
        utils.fail("--memory_size 0: stage 2 learns from exemplars; or pass --num_epochs_ft 0")
    main(args, DER)
