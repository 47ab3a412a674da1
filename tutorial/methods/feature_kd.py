"""An idea of one's own as a subclass (chapter 13): WA that distils features instead of logits.

    torchrun --nproc_per_node=2 -m tutorial.methods.feature_kd --feature_weight 1
"""
import torch.nn.functional as F

import utils
from template import CilTrainer, main


class FeatureKD(CilTrainer):
    """WA with another distillation: the features of old and new model shall point the same way."""

    def compute_loss(self, images, targets):
        """CE + feature_weight (1 - cos(phi(x), phi_old(x))). Returns the loss and the logits."""
        logits, features = self.parallel_model(images)  # (batch, known + new), (batch, embed_dim)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.args.smooth)
        if self.teacher is not None:
            _, old_features = self.teacher(images)  # (batch, embed_dim)
            cosine = F.cosine_similarity(features.float(), old_features.float())  # (batch,)
            loss = loss + self.args.feature_weight * (1 - cosine).mean()
        return loss, logits


def get_parser():
    parser = utils.get_parser()
    parser.add_argument("--feature_weight", type=utils.number(0), default=1.0,
                        help="weight of the distillation of features (1)")
    return parser


if __name__ == "__main__":
    main(get_parser().parse_args(), FeatureKD)
