"""The two frozen towers of CLIP for ALTA, from open_clip: images -> features, prompts -> features.
Chapter 21.
"""
import functools
import logging
import re
import warnings

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F

import utils
from tutorial.methods import tiny_clip
from tutorial.methods.tiny_clip import DIGITS, import_open_clip

# The image towers of ALTA and the side of their square images, in pixels.
VISUALS = {"tiny": 8, "RN50": 224, "RN101": 224, "RN50x4": 288, "RN50x16": 384, "ViT-B/32": 224,
           "ViT-B/16": 224}


def readable(names):
    """The class names as words: digits as "zero" to "nine", numbers of WordNet as ImageNet's names,
    without the numbers of MNIST ("0 - zero") and CUB-200 ("001.Crow"), underscores as spaces."""
    if sorted(names) == [str(i) for i in range(10)]:
        names = [DIGITS[int(name)] for name in names]
    if all(re.fullmatch(r"n\d{8}", name) for name in names):
        rows = timm.data.ImageNetInfo("imagenet-1k").label_names()
        known = import_open_clip().IMAGENET_CLASSNAMES
        names = [known[rows.index(name)] if name in rows else name for name in names]
    return [re.sub(r"^(\d - |\d{3}\.)| / .*", "", name).replace("_", " ") for name in names]


class ClipTowers:
    """A CLIP model of open_clip that never learns.

    No `nn.Module`, and that is the point: what holds it does not find its weights. They are in no
    checkpoint and no optimizer, DDP and `train()` pass it by, and copies of a model share it.

    image_dim: D, of the features; width: W, of a word's embedding; scale: s, what CLIP learnt to
    multiply cosines by, 100 in OpenAI's weights. mean, std: of the pixels that the towers expect;
    the images come with those of the data set (as by default).
    """

    def __init__(self, clip, args, mean=None, std=None):
        self.clip, self.args = clip.eval().requires_grad_(False).to(args.device), args
        self.scale = float(clip.logit_scale.exp())
        self.width = clip.token_embedding.embedding_dim
        own = utils.get_statistics(args)[:2]  # of the images as they come
        (mean, std), (own_mean, own_std) = (
            [torch.tensor(numbers, device=args.device)[:, None, None] for numbers in pair]
            for pair in ((mean, std) if mean else own, own))
        self.gain, self.shift = own_std / std, (own_mean - mean) / std
        self.image_dim = clip.visual.output_dim
        self.tokenizer = import_open_clip().SimpleTokenizer(context_length=clip.context_length)

    def __deepcopy__(self, memo):
        return self

    def fingerprint(self):
        """A number that changes with any bit of the weights."""
        weights = [w for w in self.clip.state_dict().values() if w.dtype == torch.float32]
        return sum((i + 1) * int(w.contiguous().view(torch.int32).sum()) for i, w in
                   enumerate(weights)) % 2 ** 32

    @torch.no_grad()
    def encode_images(self, images):
        """(batch, 3, px, px) -> (batch, D) float32, not normalised."""
        return self.clip.encode_image(images * self.gain + self.shift).float()

    def tokenize(self, prompts):
        """(prompts, L) with L the length of the longest prompt, not CLIP's 77: exact, since a word
        sees only the words before it and the answer is read at the prompt's end."""
        tokens = self.tokenizer(prompts)
        lengths = [len(self.tokenizer.encode(prompt)) + 2 for prompt in prompts]  # start and end
        if max(lengths) > tokens.shape[1]:
            utils.fail(f"the class name in {prompts[lengths.index(max(lengths))]!r} is too long: "
                       f"the text tower reads {tokens.shape[1]} tokens")
        return tokens[:, :max(lengths)].to(self.args.device)

    def encode_prompts(self, tokens, context=None):
        """Normalised features (prompts, D) of tokens (prompts, L). context: (4, W), learnt vectors
        in the place of the first four words; gradients reach them, and nothing else."""
        clip, length = self.clip, tokens.shape[1]
        words = clip.token_embedding(tokens)  # (prompts, L, W)
        if context is not None:
            context = context.expand(len(words), *context.shape)
            words = torch.cat([words[:, :1], context, words[:, 1 + context.shape[1]:]], dim=1)
        words = clip.transformer(words + clip.positional_embedding[:length],
                                 attn_mask=clip.attn_mask[:length, :length])
        # The end of a prompt has the largest number of all tokens.
        ends = clip.ln_final(words)[torch.arange(len(words)), tokens.argmax(dim=1)]
        return F.normalize((ends @ clip.text_projection).float(), dim=1)


def load(args):
    """The towers of --visual with --clip_weights: `openai`, from a hub, or a file. Ends the launch
    where there is neither network nor file, or where the file is another model's."""
    open_clip = import_open_clip()
    if args.visual == "tiny":
        return ClipTowers(load_tiny(args), args, *utils.STATISTICS["digits"][:2])
    name = f"{args.visual.replace('/', '-')}-quickgelu"  # without it: other activations, silently
    make = functools.partial(open_clip.create_model, name, precision="fp32")
    logging.disable(logging.ERROR)  # what goes wrong is said once, by us
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clip = utils.rank_0_first(
            lambda: read(make, args.clip_weights), args,
            lambda problem: f"--visual {args.visual} --clip_weights {args.clip_weights}: "
            f"{problem}; without a network pass a file of OpenAI's weights, or --visual tiny")
    logging.disable(logging.NOTSET)
    return ClipTowers(clip, args, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)


def load_weights(clip, args):
    """The file --clip_weights into the tiny CLIP. InputError: it holds something else."""
    try:
        clip.load_state_dict(torch.load(args.clip_weights, weights_only=True))
    except Exception as error:
        raise utils.InputError(f"--clip_weights {args.clip_weights}: not written by "
                               f"tutorial.methods.tiny_clip ({type(error).__name__})") from None


def load_tiny(args):
    """The tiny CLIP: out of the file --clip_weights, or trained now by rank 0, for all."""
    clip = import_open_clip().CLIP(**tiny_clip.CONFIG)
    if args.clip_weights != "openai":
        utils.together(lambda: load_weights(clip, args), args)  # not all machines may have the file
    elif args.rank == 0:
        clip = tiny_clip.train(args)
    clip.to(args.device)
    if args.distributed:
        for tensor in clip.state_dict().values():
            dist.broadcast(tensor, src=0)
    return clip


def read(make, weights):
    """A CLIP model with weights of a name or of a file: a state dict (.pt, .safetensors), or the
    archive that OpenAI gives out, which is a program for torch.jit."""
    try:
        archive = torch.jit.load(weights, map_location="cpu").state_dict()
    except (RuntimeError, ValueError):  # no file, or a file of another kind
        return make(pretrained=weights, require_pretrained=True)
    clip = make(pretrained=None)
    numbers = ("input_resolution", "context_length", "vocab_size")  # beside the weights
    clip.load_state_dict({name: archive[name] for name in archive if name not in numbers})
    return clip
