"""WA with one detail changed: the clipped weights of its paper (chapter 8), or the factor T^2 of
Hinton's distillation (chapter 7).

    python -m tutorial.methods.wa_variants --variant clipped
    python -m tutorial.methods.wa_variants --variant t_squared
"""
import torch.nn.functional as F

import utils
from template import CilTrainer, knowledge_distillation, main


class ClippedWA(CilTrainer):
    """WA with the paper's weight clipping: after every step no weight of the classifier is < 0."""

    def train_epoch(self, loader, optimizer):
        def clip(*_):
            for head in self.model.fc.heads:
                head.weight.data.clamp_(min=0)
        hook = optimizer.register_step_post_hook(clip)
        averages = super().train_epoch(loader, optimizer)
        hook.remove()
        return averages


class TSquaredWA(CilTrainer):
    """WA with (1 - lambda) CE + lambda T^2 KD, as in Hinton's paper."""

    def compute_loss(self, images, targets):
        logits, _ = self.parallel_model(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.args.smooth)
        if self.teacher is not None:
            dynamic, T = self.known_classes / logits.shape[1], self.args.temperature
            weight = dynamic if self.args.lambda_kd == "dynamic" else self.args.lambda_kd
            kd = knowledge_distillation(logits, self.teacher(images)[0], T)
            loss = (1 - weight) * loss + weight * T ** 2 * kd
        return loss, logits


def get_parser():
    parser = utils.get_parser()
    parser.add_argument("--variant", required=True, choices=["clipped", "t_squared"],
                        help="weights clipped at 0, or distillation times T^2")
    return parser


if __name__ == "__main__":
    args = get_parser().parse_args()
    main(args, ClippedWA if args.variant == "clipped" else TSquaredWA)
