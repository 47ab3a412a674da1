"""iCaRL: "Incremental Classifier and Representation Learning" (Rebuffi et al., CVPR 2017, arXiv
1611.07725). Chapter 15.

    torchrun --nproc_per_node=2 -m tutorial.methods.icarl
"""
import torch
import torch.nn.functional as F

import utils
from template import CilTrainer, knowledge_distillation, main


class ICaRL(CilTrainer):
    """Distillation by sigmoids, and classification by the nearest mean of exemplars (NME)."""

    means = torch.zeros(0)  # (known + new, embed_dim) after `finish_task`; in no file of the run

    def compute_loss(self, images, targets):
        """sigmoid: one-hot targets for new classes, the teacher's sigmoids for old ones (equation
        of Algorithm 3). softmax: CE + KD, LUCIR's baseline of the name. Returns loss, logits."""
        logits, _ = self.parallel_model(images)  # (batch, known + new)
        if self.args.icarl_loss == "softmax":
            loss = F.cross_entropy(logits, targets)
            if self.teacher is not None:  # the published weight beta T^2 is 0.25 * 2^2 = 1
                loss = loss + knowledge_distillation(logits, self.teacher(images)[0],
                                                     self.args.temperature)
            return loss, logits
        goal = F.one_hot(targets, logits.shape[1]).float()
        if self.teacher is not None:  # it overrules the labels of the exemplars, too
            goal[:, :self.known_classes] = self.teacher(images)[0].float().sigmoid()
        return F.binary_cross_entropy_with_logits(logits.float(), goal), logits

    def finish_task(self):
        """The mean feature of each class's exemplars, for the network as it is now."""
        if not self.exemplars:
            return
        images = self.exemplars[0].join(self.exemplars[1:])
        # A mirror image keeps its class on photos, not on digits.
        flip = utils.get_statistics(self.args)[2]
        features = F.normalize(utils.extract_features(self.model, images, self.args), dim=1)
        if flip:
            mirrored = utils.for_all_images(lambda x: self.model(x.flip(3))[1], images, self.args)
            features = features + F.normalize(mirrored.cpu(), dim=1)  # all ranks have all of them
        means = [features[images.y == c].mean(dim=0) for c in range(len(self.exemplars))]
        self.means = F.normalize(torch.stack(means), dim=1).to(self.args.device)
        # The other answer, that of the network's logits, is recorded beside.
        network = utils.evaluate(self, super().predict)["acc1"]
        self.run.results.setdefault("network_acc1s", []).append(network)

    def predict(self, images):
        """Cosine of the features and each class mean: the largest is the nearest mean."""
        logits, features = self.model(images)
        if len(self.means) < logits.shape[1]:  # in the middle of a task, or without a memory
            return logits
        with torch.autocast(features.device.type, enabled=False):  # 16 bits are too few here
            return F.normalize(features.float(), dim=1) @ self.means.T  # (batch, known + new)


def get_parser():
    parser = utils.get_parser()
    parser.add_argument("--icarl_loss", default="sigmoid", choices=["sigmoid", "softmax"],
                        help="the paper's, or that of later code bases (sigmoid)")
    paper = dict(num_epochs=70, lr=2.0, weight_decay=5e-5, aa="none", fixed_memory=True)
    parser.set_defaults(no_align=True, presets={
        "digits": dict(lr=0.3), "cifar100": paper,
        **dict.fromkeys(("imagenet100", "imagenet1000"),
                        dict(paper, num_epochs=60, weight_decay=1e-5))})
    return parser


if __name__ == "__main__":
    main(get_parser().parse_args(), ICaRL)
