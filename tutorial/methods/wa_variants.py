"""WA with one detail changed: the clipped weights of its paper (chapter 8), a loss in which the
labels keep their full strength (chapters 7, 8 and 10), or the factor T^2 of Hinton's distillation
(chapter 7).

    python -m tutorial.methods.wa_variants --variant clipped
    python -m tutorial.methods.wa_variants --variant survey
    python -m tutorial.methods.wa_variants --variant t_squared
    python -m tutorial.methods.wa_variants --variant unscaled
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


class OtherLossWA(CilTrainer):
    """WA whose loss is put together in another way, by `combine`."""

    def compute_loss(self, images, targets):
        logits, _ = self.parallel_model(images)
        ce = F.cross_entropy(logits, targets, label_smoothing=self.args.smooth)
        if self.teacher is None:
            return ce, logits
        kd = knowledge_distillation(logits, self.teacher(images)[0], self.args.temperature)
        dynamic = self.known_classes / logits.shape[1]
        weight = dynamic if self.args.lambda_kd == "dynamic" else self.args.lambda_kd
        return self.combine(ce, kd, weight), logits


class TSquaredWA(OtherLossWA):
    """(1 - lambda) CE + lambda T^2 KD, as in Hinton's paper."""

    def combine(self, ce, kd, weight):
        return (1 - weight) * ce + weight * self.args.temperature ** 2 * kd


class UnscaledWA(OtherLossWA):
    """CE + lambda / (1 - lambda) KD: WA's loss, divided by 1 - lambda: its gradient keeps its
    direction, and the labels count in full against learning rate and weight decay."""

    def combine(self, ce, kd, weight):
        return ce + weight / (1 - weight) * kd


class SurveyWA(OtherLossWA):
    """CE + 2 KD, as in github.com/zhoudw-zdw/CIL_Survey: the above for lambda = 2 / 3."""

    def combine(self, ce, kd, weight):
        return ce + 2 * kd


VARIANTS = {"clipped": ClippedWA, "survey": SurveyWA, "t_squared": TSquaredWA,
            "unscaled": UnscaledWA}


def get_parser():
    parser = utils.get_parser()
    parser.add_argument("--variant", required=True, choices=VARIANTS, help="weights clipped at 0, "
                        "CE + 2 KD, KD times T^2, or the loss divided by 1 - lambda")
    return parser


if __name__ == "__main__":
    args = get_parser().parse_args()
    if args.variant == "survey" and args.lambda_kd is not None:
        utils.fail(f"--lambda_kd {args.lambda_kd}: the loss of --variant survey is CE + 2 KD")
    if args.variant == "unscaled" and args.lambda_kd == 1:
        utils.fail("--lambda_kd 1 leaves nothing to the labels: below 1, or another --variant")
    main(args, VARIANTS[args.variant])
