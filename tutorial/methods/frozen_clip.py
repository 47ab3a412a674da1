"""A frozen backbone of one's own: the image tower of the tiny CLIP, which was trained on even digits
and their names, in the place of a model of timm. Chapter 23.

    torchrun --nproc_per_node=2 -m tutorial.methods.frozen_clip --head ridge
"""
from timm.models import register_model

import utils
from template import main
from tutorial.methods import frozen
from tutorial.methods.tiny_clip import train


def get_parser():
    parser = frozen.get_parser()
    # The tasks of ALTA: each has an even digit, which the tower knows, and an odd one.
    parser.set_defaults(backbone="tiny_clip", input_size=8, num_bases=0, class_order="natural")
    return parser


if __name__ == "__main__":
    args = frozen.check(get_parser().parse_args())
    if args.input_size != 8:
        utils.fail(f"--input_size {args.input_size}: the image tower of the tiny CLIP takes 8")

    @register_model
    def tiny_clip(pretrained=False, **options):
        """What --backbone tiny_clip stands for: a module that turns images (batch, 3, 8, 8) into
        features (batch, dim). Any pre-trained network can be made known so."""
        return train(args).visual

    main(args, frozen.Frozen)
