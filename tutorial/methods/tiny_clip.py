"""A small CLIP that is trained here, on even digits and their names, so that ALTA runs without a
network. Chapter 21.

    python -m tutorial.methods.tiny_clip runs/tiny_clip.pt    # for --clip_weights: saves its seconds
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import utils

DIGITS = "zero one two three four five six seven eight nine".split()
CONFIG = dict(
    embed_dim=128, quick_gelu=True,
    vision_cfg=dict(image_size=8, patch_size=2, width=64, layers=2, head_width=16),
    text_cfg=dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=2))
KNOWN = [0, 2, 4, 6, 8]  # the classes that it has seen: each task of two digits brings a new one
CAPTIONS = ["{}", "a {}", "a photo of a {}", "a photo of a {}.", "a scan of the digit {}"]


def import_open_clip():
    try:
        import open_clip
    except Exception as error:  # torchvision for another torch: RuntimeError, not ImportError
        utils.fail(f"this method needs open_clip ({type(error).__name__}: {str(error)[:100]}): "
                   "pip install open_clip_torch")
    return open_clip


def train(args, num_steps=200, groups=32):
    """Contrastive training (Radford et al., 2021, arXiv 2103.00020) on images of the even digits.

    A step takes `groups` groups of one image per known digit. In a group each image must find its
    caption among the captions, and each caption its image: a cross-entropy in both directions.
    """
    open_clip = import_open_clip()
    # The seed and the machine are those of the run; its data and augmentation are not.
    own = utils.fill_in(utils.get_parser().parse_args([]))  # the preset of the digits
    utils.set_seed(args)
    clip = open_clip.CLIP(**CONFIG)
    tokenizer = open_clip.SimpleTokenizer(context_length=clip.context_length)
    (x, y), _ = utils.load_digits()
    images = utils.ImageSet(x, y, own)
    rows = [np.flatnonzero(y == digit) for digit in KNOWN]
    tokens = tokenizer([caption.format(DIGITS[digit]) for caption in CAPTIONS for digit in KNOWN])
    optimizer = torch.optim.AdamW(clip.parameters(), 1e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, num_steps)
    match = torch.arange(len(KNOWN)).repeat(groups)
    for step in range(num_steps):
        draw = np.random.RandomState([args.seed, step])
        picked = [(draw.choice(rows[k]), draw.randint(2 ** 31)) for _ in range(groups)
                  for k in range(len(KNOWN))]
        batch = torch.stack([images[key][0] for key in picked])
        vision = F.normalize(clip.encode_image(batch), dim=1).view(groups, len(KNOWN), -1)
        text = F.normalize(clip.encode_text(tokens), dim=1).view(len(CAPTIONS), len(KNOWN), -1)
        text = text[torch.from_numpy(draw.randint(len(CAPTIONS), size=groups))]
        logits = clip.logit_scale.exp() * vision @ text.mT  # (groups, images, captions)
        loss = (F.cross_entropy(logits.flatten(0, 1), match)
                + F.cross_entropy(logits.mT.flatten(0, 1), match)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=float(np.log(100)))  # as in the paper
    return clip


def get_parser():
    parser = utils.get_parser()
    parser.add_argument("file", type=Path, help="where to write the weights")
    parser.add_argument("--num_steps", type=utils.number(1, kind=int), default=200, help="(200)")
    return parser


if __name__ == "__main__":
    args = get_parser().parse_args()
    if args.file.exists():
        utils.fail(f"{args.file} is there already: name another file")
    args = utils.setup(args)
    args.file.parent.mkdir(parents=True, exist_ok=True)
    utils.write_tensors(args.file, train(args, args.num_steps).state_dict())
