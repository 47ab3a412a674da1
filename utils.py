"""Everything around template.py, in the order in which a run uses it:

1. command line and presets     2. processes, devices, seeds     3. data and transforms
4. training helpers             5. evaluation                    6. what a run leaves on disk

No method is implemented here: the model, the loss and the loop are in template.py.
"""
import argparse
import contextlib
import inspect
import io
import json
import math
import os
import platform
import random
import re
import sys
import time
import warnings
from pathlib import Path

import filelock
import numpy as np
import timm
import timm.data
import timm.layers
import timm.utils
import torch
import torch.distributed as dist
from continuum import ClassIncremental, datasets as continuum_datasets
from continuum.tasks import TaskType
from PIL import Image
from timm.utils.distributed import world_info_from_env
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder
from tqdm import tqdm

import resnet  # noqa: F401  (importing it makes resnet20 ... resnet56 known to timm)

# ---------------------------------------------------------------------------------------------
# 1. Command line and presets
# ---------------------------------------------------------------------------------------------

# Defaults by data set. A flag on the command line wins over the preset, the preset over COMMON.
COMMON = dict(num_bases=0, increment=10, backbone="resnet32", input_size=32, batch_size=128,
              num_epochs=170, lr=0.1, weight_decay=5e-4, memory_size=2000, fixed_memory=False,
              lambda_kd="dynamic", aa="rand-m9-mstd0.5-inc1-mmax9")
IMAGENET = dict(backbone="resnet18", input_size=224, num_epochs=90, weight_decay=1e-4)
PRESETS = {
    # 1,797 scans of 8x8 pixels that scikit-learn carries. With so few steps per task the dynamic
    # lambda (0.67 to 0.8) would leave the labels too little to hold old and new classes apart.
    "digits": dict(num_bases=4, increment=2, backbone="resnet20", input_size=8, batch_size=32,
                   num_epochs=40, memory_size=30, lambda_kd=0.4, aa="none"),
    "cifar100": dict(num_bases=50),  # the protocol of most tables
    "cifar10": dict(increment=2),
    "mnist": dict(increment=2, input_size=28, num_epochs=30, aa="none"),
    "fashion_mnist": dict(increment=2, input_size=28, num_epochs=50, aa="none"),
    "svhn": dict(increment=2, num_epochs=50, aa="none"),
    "tiny_imagenet": dict(num_bases=100, increment=20, input_size=64),
    "cub200": dict(IMAGENET, num_bases=100, increment=20),
    "imagenet100": dict(IMAGENET, num_bases=50),
    "imagenet1000": dict(IMAGENET, num_bases=500, increment=100, memory_size=20000),
    "image_folder": dict(IMAGENET),
}
# Mean and standard deviation of the training pixels (for the digits: of all 1,797,
# approximately), and whether a mirror image keeps its class.
STATISTICS = {
    "digits": ((0.3053,) * 3, (0.3764,) * 3, False),
    "mnist": ((0.1307,) * 3, (0.3081,) * 3, False),
    "fashion_mnist": ((0.2860,) * 3, (0.3530,) * 3, True),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), False),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), True),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762), True),
}
IMAGENET_STATISTICS = (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD, True)


class InputError(Exception):
    """The user gave something unusable; the text says what is wrong and what to do."""


def fail(message, any_rank=False):
    """End this process with one line on stderr and exit code 2; torchrun adds its own report.

    Rank 0 speaks for all, because bad input is mostly bad on every rank; `any_rank` is for what
    one rank alone has seen. The others wait for torchrun to end them: if one left first, torchrun
    would end rank 0 in the middle of its line. If nobody ends them, they speak up themselves.
    """
    if world_info_from_env()[1] and not any_rank:
        time.sleep(60)
    tqdm.write(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(2)


def number(low, high=math.inf, kind=float):
    """An argparse type: a number from low to high; NaN is outside of every range."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


def lambda_kd(text):
    return text if text == "dynamic" else number(0, 1)(text)


class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse itself would print its usage, once per rank
        fail(f"{message} (--help lists all flags)")


def get_parser():
    """The command line. Flags without a default here take it from the preset of --data_set."""
    parser = Parser(allow_abbrev=False)
    count, natural, share, positive = (number(0, kind=int), number(1, kind=int), number(0, 1),
                                       number(1e-12, 1e12))
    add = parser.add_argument_group("data and tasks").add_argument
    add("--data_set", default="digits", choices=PRESETS, help="data and preset (digits)")
    add("--data_path", default="data", help="folder with the data, or to download it to (data)")
    add("--num_bases", type=count, help="classes of the first task; 0: as many as --increment")
    add("--increment", type=natural, help="classes of further tasks; the last may be smaller")
    add("--class_order", default="default", help="default: numpy's permutation for seed 1993; "
        "seed: one drawn from --seed; natural: as they are; or a file of the class numbers")
    add("--input_size", type=natural, help="side of the square images, in pixels")
    add("--crop", choices=["shift", "zoom"], help="random crops: the whole image, shifted, or any "
        "part of it (shift up to 64 pixels, zoom above)")
    add("--crop_pct", type=number(0.1, 1), default=0.875, help="part of the side that a test image "
        "above 64 pixels keeps (0.875)")
    add("--color_jitter", type=share, default=0.0, help="strength; without --aa only (0)")
    add("--aa", help="timm auto-augment string, such as rand-m9-mstd0.5-inc1-mmax9, or none")
    add("--reprob", type=share, default=0.0, help="probability of random erasing (0)")
    add("--remode", default="pixel", choices=["const", "rand", "pixel"], help="erase with (pixel)")
    add("--recount", type=natural, default=1, help="regions erased at most (1)")
    add = parser.add_argument_group("model and memory").add_argument
    add("--backbone", help="any timm model, or resnet20/32/44/56 for small images")
    add("--pretrained", action="store_true", help="start from timm's pretrained weights")
    add("--memory_size", type=count, help="exemplars in total; 0: no replay")
    add("--fixed_memory", action=argparse.BooleanOptionalAction, help="memory_size / all classes "
        "exemplars for each class from the start; without it, memory_size / classes so far")
    add("--herding_method", default="barycenter",
        choices=["barycenter", "cluster", "entropy", "first", "random"])
    add = parser.add_argument_group("training").add_argument
    add("--batch_size", type=natural, help="images per step over ALL processes")
    add("--num_epochs", type=natural, help="epochs per task")
    add("--lr", type=positive, help="first learning rate of the cosine schedule")
    add("--momentum", type=number(0, 0.9999), default=0.9)
    add("--weight_decay", type=share)
    add("--smooth", type=number(0, 0.9999), default=0.0, help="label smoothing (0)")
    add("--lambda_kd", type=lambda_kd, help="weight of distillation, 0 to 1; 0: none; "
        "dynamic: known / (known + new) classes")
    add("--temperature", type=positive, default=2.0, help="temperature of distillation (2)")
    add("--no_align", action="store_true", help="leave out weight alignment")
    add("--seed", type=number(0, 2 ** 32 - 1, int), default=0)
    add = parser.add_argument_group("machine and run").add_argument
    add("--amp", default="none", choices=["none", "bf16", "fp16"], help="mixed precision (none)")
    add("--compile", action="store_true", help="use torch.compile")
    add("--device", choices=["cuda", "cpu"], help="(cuda if there is one, else cpu)")
    add("--num_workers", type=count, help="loading processes per training process")
    add("--eval_every_epoch", type=count, default=0, help="log test accuracy every N epochs (0)")
    add("--output_dir", help="(runs/<method>_<data_set>_b<bases>_inc<increment>_seed<seed>_<time>)")
    add("--resume", action="store_true", help="continue the run in --output_dir, if there is one")
    add("--stop_after_task", type=count, default=0, help="stop after N tasks; --resume goes on")
    add("--plots", default=True, action="store_true", help="draw accuracy and confusion (default)")
    add("--no_plots", dest="plots", action="store_false")
    return parser


# ---------------------------------------------------------------------------------------------
# 2. Processes, devices, seeds
# ---------------------------------------------------------------------------------------------

def available_cores():
    """CPU cores that this process may use, where the system can tell, else all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def fill_in(args):
    """Give each flag that is not on the command line the value of its preset."""
    # A method may bring presets: parser.set_defaults(presets={data set or "all": {flag: value}}).
    own = vars(args).pop("presets", {})
    own = {**own.get("all", {}), **own.get(args.data_set, {})}
    for name, value in {**COMMON, **PRESETS[args.data_set], **own}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def setup(args):
    """Fill in the preset, check every flag, and join the processes of the launch.

    Adds `rank`, `local_rank`, `world_size`, `distributed` and the torch `device` to args (timm's
    names): nccl and one GPU per process where there is CUDA, gloo on the CPU, and no process
    group at all for a plain `python template.py`.
    """
    fill_in(args)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine
    if args.num_workers is None:  # tiny images cost less to load than to pass between processes
        args.num_workers = min(8, available_cores() // here) if args.input_size > 16 else 0
    args.config = dict(vars(args))  # what a checkpoint and results.json remember
    world_size = world_info_from_env()[2]
    if args.batch_size % world_size:
        fail(f"--batch_size {args.batch_size} counts the images of all processes together and "
             f"must be a multiple of their number, {world_size}")
    if not timm.is_model(args.backbone):
        near = timm.list_models(f"*{args.backbone.split('_')[0]}*")[:4]
        fail(f"unknown --backbone {args.backbone}: any name in timm.list_models() works"
             + ", such as " * bool(near) + ", ".join(near))
    try:
        transform = build_transform(args, train=True)
    except Exception as error:
        fail(f"--aa {args.aa} is no auto-augment string of timm ({type(error).__name__} {error}): "
             "try rand-m9-mstd0.5-inc1-mmax9, or none")
    if may_keep_no_bits(transform):
        fail(f"--aa {args.aa} fails on some images: use rand-m9-mstd0.5-inc1-mmax9")
    gpus = torch.cuda.device_count()
    if args.device == "cuda" and gpus < here:
        fail(f"--device cuda: {here} processes on this machine, but torch finds {gpus} GPUs")
    args.device = torch.device(args.device or ("cuda" if gpus >= here else "cpu"))
    args.local_rank, args.rank, args.world_size = world_info_from_env()
    args.distributed = args.world_size > 1
    if args.device.type == "cuda":
        args.device = torch.device("cuda", args.local_rank)
        torch.cuda.set_device(args.device)
    try:  # the prefix keeps a restart by torchrun from finding addresses of the dead processes
        if args.distributed:
            store, *_ = next(rendezvous("env://", args.rank, args.world_size))
            store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
            dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo", store=store,
                                    rank=args.rank, world_size=args.world_size)
    except (ValueError, RuntimeError) as error:
        fail(f"the processes could not join ({error}): start them with torchrun; inside a SLURM "
             "allocation, unset SLURM_NTASKS to run plain python")
    if args.rank == 0 and 0 < gpus < here:
        print(f"note: {here} processes on {gpus} GPU(s), so they run on the CPU", file=sys.stderr)
    if args.distributed:  # who only lost its peers is ended by torchrun before it complains
        sys.excepthook = lambda *error: (time.sleep(10), sys.__excepthook__(*error))
    torch.backends.cudnn.benchmark = True
    set_seed(args.seed)  # the same first weights on every rank


def set_seed(*numbers, rank=0):
    """Seed python, numpy and torch from numbers such as (seed, task, stage, epoch), apart by
    rank; return the number drawn from them. So no generator's state needs to be saved."""
    drawn = int(np.random.SeedSequence([len(numbers), *numbers]).generate_state(1)[0]) >> 1
    timm.utils.random_seed(drawn, rank)
    return drawn


def gather(shard, size, args):
    """The rows of all ranks in the order of the data: rank r holds rows r, r + N, r + 2N, ...

    shard: (about size / N, d) on this rank. Returns (size, d) on every rank, the same bits.
    """
    if not args.distributed:
        return shard
    padded = shard.new_zeros(math.ceil(size / args.world_size), *shard.shape[1:])
    padded[:len(shard)] = shard
    parts = [torch.empty_like(padded) for _ in range(args.world_size)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:size]


def first_problem(problem, args):
    """What went wrong (a text, or None) on the first rank where something did; the same on every
    rank. So `fail` says once what some ranks have seen, and none waits for a rank that left."""
    problems = [problem]
    if args.distributed:
        if problem and args.rank:
            problem = f"rank {args.rank}: {problem}"  # perhaps on another machine
        problems = [None] * args.world_size
        dist.all_gather_object(problems, problem)
    return next(filter(None, problems), None)


def rank_0_first(make, args):
    """make() on rank 0, then on the others, which find on disk what rank 0 downloaded. Returns what
    it made and None, or None and what went wrong (`first_problem`)."""
    made = problem = None
    for turn in (True, False):
        if (args.rank == 0) == turn:
            try:
                made = make()
            except Exception as error:
                problem = f"{type(error).__name__}: {str(error)[:200]}"
        problem = first_problem(problem, args)
        if problem:
            return None, problem
    return made, None


# ---------------------------------------------------------------------------------------------
# 3. Data and transforms
# ---------------------------------------------------------------------------------------------

def load_digits():
    """scikit-learn's digits: [(images (n, 8, 8, 3) uint8, labels), the same of a test quarter]."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split
    digits = load()
    images = np.repeat((digits.images * 255 / 16).astype(np.uint8)[..., None], 3, axis=3)
    train_x, test_x, train_y, test_y = train_test_split(
        images, digits.target, test_size=0.25, stratify=digits.target, random_state=0)
    return [(train_x, train_y), (test_x, test_y)]


def load_folder(args):
    """DIR/train/<class>/* and DIR/{test,val}/<class>/*: [(paths, labels) of train, of test], names.

    Only paths are kept: the images stay on disk. Class numbers follow the sorted folder names.
    """
    root, splits, classes = Path(args.data_path), [], []
    for names in (["train"], ["test", "val"]):
        folders = [root / name for name in names if (root / name).is_dir()]
        if not folders:
            fail(f"{root} has no folder {' or '.join(names)}: --data_path takes a folder with "
                 "train/<class>/* and test/<class>/* (or val)")
        # Some data sets have a test folder without classes beside val: the fuller one counts.
        folder = max(folders, key=lambda folder: sum(path.is_dir() for path in folder.iterdir()))
        try:
            images = ImageFolder(str(folder))
        except OSError as error:  # no class at all, a class without an image, no permission
            fail(f"{folder}: {error}")
        paths = np.array([path for path, _ in images.samples], dtype=object)
        splits.append((paths, np.array(images.targets)))
        classes.append(images.classes)
    if classes[0] != classes[1]:
        odd = sorted(set(classes[0]) ^ set(classes[1]))
        fail(f"{root}: train and test need the same classes; only one of them has {odd[:5]}")
    if args.data_set == "imagenet100" and len(classes[0]) == 1000:  # the field's 100 of 1000
        keep = np.sort(np.random.RandomState(1993).permutation(1000)[:100])
        splits = [(x[np.isin(y, keep)], np.searchsorted(keep, y[np.isin(y, keep)]))
                  for x, y in splits]
        classes[0] = [classes[0][i] for i in keep]
    paths = np.concatenate([x for x, _ in splits])
    if len(paths) <= 100_000:  # seconds; of more images, a broken one is named when its turn comes
        broken = None
        for path in paths[args.rank::args.world_size]:  # every rank looks at a share
            try:
                Image.open(path).close()
            except Exception as error:
                broken = f"{path}: no image ({type(error).__name__}); mend or remove it"
        broken = first_problem(broken, args)
        if broken:
            fail(broken)
    return splits, classes[0]


def load_data(args):
    """[(x, y) of train, (x, y) of test], class names. x: images (n, H, W, 3), or n paths."""
    if args.data_set == "digits":
        return load_digits(), [str(i) for i in range(10)]
    source = dict(cifar100="CIFAR100", cifar10="CIFAR10", mnist="MNIST", svhn="SVHN",
                  fashion_mnist="FashionMNIST").get(args.data_set)
    if source is None or (Path(args.data_path) / "train").is_dir():
        return load_folder(args)
    source = getattr(continuum_datasets, source)
    with contextlib.redirect_stdout(sys.stderr):
        found, problem = rank_0_first(lambda: [
            source(args.data_path, train=train, download=args.rank == 0)
            for train in (True, False)], args)
    if problem:
        fail(f"{args.data_set} is not in {args.data_path} and could not be downloaded ({problem}): "
             "give --data_path a folder with its files, or with train/<class>/* and test/<class>/*")
    splits = [split.get_data()[:2] for split in found]
    splits = [(np.repeat(x[..., None], 3, axis=3) if x.ndim == 3 else x, y) for x, y in splits]
    names = getattr(getattr(found[0], "dataset", None), "classes", None)  # SVHN has none
    return splits, names or [str(i) for i in np.unique(splits[0][1])]


def get_class_order(args, nb_classes):
    """The classes in the order in which they are learned: a list of class numbers."""
    if args.class_order in ("default", "seed"):
        seed = 1993 if args.class_order == "default" else args.seed
        return np.random.RandomState(seed).permutation(nb_classes).tolist()
    if args.class_order == "natural":
        return list(range(nb_classes))
    order = args.class_order  # a file, or from Python the list itself
    try:
        if not isinstance(order, list):
            order = [int(word) for word in re.findall(r"[^\s,\[\]]+", Path(order).read_text())]
    except (OSError, ValueError) as error:
        fail(f"--class_order {args.class_order}: default, seed, natural, or a file of numbers "
             f"({error})")
    if sorted(order) != list(range(nb_classes)):
        fail(f"--class_order {args.class_order}: must hold each of 0 to {nb_classes - 1} once")
    return order


def build_scenarios(args):
    """Two continuum `ClassIncremental` scenarios, train and test, with the same tasks.

    Labels are positions in the class order: the first task has the labels 0 to num_bases - 1.
    """
    splits, class_names = load_data(args)
    total, first = len(class_names), args.num_bases or args.increment
    if first > total or first < total < args.increment:
        fail(f"--num_bases {args.num_bases} --increment {args.increment}: {args.data_set} has "
             f"{total} classes only")
    if 0 < args.memory_size < total:
        fail(f"--memory_size {args.memory_size}: 0, or at least one exemplar for each of {total} "
             "classes")
    increments = [first] + [args.increment] * ((total - first) // args.increment)
    increments += [total - sum(increments)] * (sum(increments) < total)
    order, scenarios = get_class_order(args, total), []
    for x, y in splits:
        kind = TaskType.IMAGE_PATH if x.ndim == 1 else TaskType.IMAGE_ARRAY
        data = continuum_datasets.InMemoryDataset(x, y, data_type=kind)
        scenarios.append(ClassIncremental(data, increment=increments, class_order=order))
        scenarios[-1].class_names = [class_names[i] for i in order]
    smallest = min(len(taskset) for taskset in scenarios[0])
    if smallest < args.batch_size:
        fail(f"--batch_size {args.batch_size}: the smallest task has {smallest} images only")
    return scenarios


def get_statistics(args):
    """Mean and standard deviation of the colours, and whether a mirror image keeps its class."""
    return STATISTICS.get(args.data_set, IMAGENET_STATISTICS)


def build_transform(args, train):
    """timm's `create_transform`; small images are cropped from a padded frame, not zoomed into.

    Up to 64 pixels the random zoom of ImageNet recipes would throw most of an image away. Its
    place is taken by a shift of up to 1/8 of the side (the usual padding of 4 for 32 pixels);
    --crop zoom brings it back, out of the padded image.
    """
    mean, std, flip = get_statistics(args)
    transform = timm.data.create_transform(
        args.input_size, is_training=train, hflip=0.5 * flip, mean=mean, std=std,
        color_jitter=args.color_jitter or None, auto_augment=None if args.aa == "none" else args.aa,
        interpolation="bicubic", re_prob=args.reprob, re_mode=args.remode, re_count=args.recount,
        crop_pct=args.crop_pct)
    size, small = args.input_size, args.input_size <= 64
    crop = args.crop or ("shift" if small else "zoom")
    # Resize does nothing to images that have the right size already.
    if train and crop == "shift":
        transform.transforms[:1] = [transforms.Resize(size), transforms.RandomCrop(size, size // 8)]
    elif train and small:
        transform.transforms.insert(0, transforms.Pad(size // 8))
    elif small:
        transform.transforms[:2] = [transforms.Resize(size), transforms.CenterCrop(size)]
    return transform


def may_keep_no_bits(transform):
    """Whether timm's auto-augment can posterize to 0 bits, which Pillow 13 refuses: at strength 10
    where a larger one changes more (inc1, augmix), below 2.5 where it changes less."""
    for step in transform.transforms:
        for op in getattr(step, "ops", [op for pair in getattr(step, "policy", []) for op in pair]):
            spread = 6 * op.magnitude_std  # beyond that once in a billion draws
            low, high = op.magnitude - spread, op.magnitude + spread
            if math.isinf(spread):  # drawn evenly from 0 to the strength, which is left out
                low, high = 0, math.nextafter(op.magnitude, 0)
            reached = [min(max(strength, 0), op.magnitude_max or 10) for strength in (low, high)]
            if "Posterize" in op.name and any(op.level_fn(strength, op.hparams)[0] < 1
                                              for strength in reached):
                return True
    return False


def open_image(source):
    """A path or an (H, W, 3) uint8 array as an RGB image; 16-bit grey keeps its upper 8 bits."""
    if not isinstance(source, str):
        return Image.fromarray(source)
    image = Image.open(source)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


class ImageSet(Dataset):
    """Images with labels: `images[i]` is the clean image i, `images[i, seed]` an augmented one.

    An augmentation depends on its seed alone, so the same images come out whatever the number of
    processes and of loading workers. Made from a continuum task set or a pair (x, y).
    x: (n, H, W, 3) uint8, or n paths; y: (n,) labels.
    """

    def __init__(self, taskset, args):
        self.x, self.y = taskset.get_raw_samples()[:2] if hasattr(taskset, "trsf") else taskset
        self.args, self.clean = args, build_transform(args, train=False)
        self.augment = build_transform(args, train=True)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, None)
        before = torch.get_rng_state()  # dropout must not depend on where images are loaded
        if seed is not None:  # the three generators that transforms draw from
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
        source = self.x[index] if self.x.ndim > 1 else str(self.x[index])
        try:
            image = open_image(source)
            image = self.clean(image) if seed is None else self.augment(image)
        except Exception as error:
            name = source if isinstance(source, str) else f"image {index}"
            text = " ".join(str(error).split())
            raise InputError(f"{name}: {type(error).__name__}: {text}; mend or remove the image, "
                             f"or change --aa {self.args.aa}") from None
        torch.set_rng_state(before)
        return image, int(self.y[index])

    def select(self, rows):
        """The images of these rows (a slice or indices), in this order."""
        return ImageSet((self.x[rows], self.y[rows]), self.args)

    def join(self, others):
        """This set followed by all sets in the list `others`."""
        sets = [self, *others]
        return ImageSet((np.concatenate([s.x for s in sets]), np.concatenate([s.y for s in sets])),
                        self.args)


# ---------------------------------------------------------------------------------------------
# 4. Training helpers
# ---------------------------------------------------------------------------------------------

class SeededSampler(DistributedSampler):
    """torch's sampler (rank r takes images r, r + N, ... of one permutation that all ranks draw
    alike), with a seed for each image's augmentation beside its index."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epoch)
        seeds = torch.randint(2 ** 32, (len(self.dataset),), generator=generator).tolist()
        return ((index, seeds[index]) for index in super(SeededSampler, self).__iter__())


def train_loader(train_set, args):
    """Batches of batch_size / N images per rank. The incomplete last batch is left out, so the
    global batches hold the same images for every number N of processes that divides their size.
    (A smaller set is one batch of the largest multiple of N images in it, so there N changes the
    batch by up to N - 1 images.)"""
    sampler = SeededSampler(train_set, args.world_size, args.rank, drop_last=True)
    size = min(args.batch_size, len(train_set)) // args.world_size
    if size == 0:
        fail(f"{len(train_set)} images cannot be shared by {args.world_size} processes")
    return DataLoader(train_set, size, sampler=sampler, drop_last=True,
                      num_workers=args.num_workers, persistent_workers=args.num_workers > 0,
                      pin_memory=args.device.type == "cuda")


def clean_batches(image_set, args):
    """Every clean image exactly once over all ranks, without padding: rank r has r, r + N, ..."""
    shard = range(args.rank, len(image_set), args.world_size)
    workers = args.num_workers if len(image_set) > 2000 else 0  # starting them takes a second
    return to_device(DataLoader(image_set, 256, sampler=shard, num_workers=workers), args)


def to_device(loader, args):
    """The batches of a loader on the device, images in the fast channels_last layout."""
    try:
        for images, targets in loader:
            yield (images.to(args.device, non_blocking=True, memory_format=torch.channels_last),
                   targets.to(args.device, non_blocking=True))
    except InputError as error:  # from a worker process its traceback comes along: last line
        fail(str(error).strip().splitlines()[-1].split("InputError: ")[-1], any_rank=True)


def autocast(args):
    """bf16 or fp16 for the heavy operations where --amp asks for it; parameters stay float32."""
    return torch.autocast(args.device.type, torch.float16 if args.amp == "fp16" else torch.bfloat16,
                          enabled=args.amp != "none")


def create_backbone(args):
    """A timm model without head on the device: images -> features (batch, num_features).

    On several GPUs BatchNorm takes its statistics over the global batch (SyncBatchNorm). torch
    has no such layer for the CPU: there each process normalises its own part of the batch.
    """
    options = dict(num_classes=0, pretrained=args.pretrained)
    try:
        try:  # transformers must know the size of their images; convolutional networks need not
            backbone = timm.create_model(args.backbone, img_size=args.input_size, **options)
        except TypeError:
            backbone = timm.create_model(args.backbone, **options)
        features = backbone.eval()(torch.zeros(2, 3, args.input_size, args.input_size))
    except Exception as error:
        fail(f"--backbone {args.backbone} --input_size {args.input_size}"
             f"{' --pretrained' * args.pretrained}: {str(error)[:300]}")
    backbone.num_features = features.shape[1]  # what comes out; some models announce another
    features.sum().backward()  # DDP waits for every gradient: leave out what is never used
    for parameter in backbone.parameters():
        parameter.requires_grad_(parameter.grad is not None).grad = None
    if args.distributed and args.device.type == "cuda":
        backbone = timm.layers.convert_sync_batchnorm(backbone)
    return backbone.to(args.device, memory_format=torch.channels_last)


def distribute(model, args):
    """The model as it is called in training: gradients averaged over all ranks, compiled or not.

    Rank 0's parameters go to all ranks once, here. On the CPU BatchNorm's running averages drift
    apart during an epoch and are made equal at its end (`Run.end_epoch`).
    """
    if args.distributed:
        on_gpu = [args.local_rank] if args.device.type == "cuda" else None
        warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated")
        model = torch.nn.parallel.DistributedDataParallel(
            model, device_ids=on_gpu, broadcast_buffers=False)
    if args.compile:
        torch.compiler.reset()  # the model has grown: forget the compiled one
        model = torch.compile(model)
    return model


def average_batchnorm(model, args):
    """Make BatchNorm's running averages equal on all ranks: the mean over them."""
    if args.distributed:
        timm.utils.distribute_bn(model, args.world_size, reduce=True)


@contextlib.contextmanager
def frozen(module):
    """Inside, the module learns nothing: no gradients, and eval mode even after `train()`."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.eval().requires_grad_(False)
    module.train = lambda mode=True: module
    try:
        yield
    finally:
        del module.train
        for parameter in learning:
            parameter.requires_grad_(True)


def global_mean(values, args):
    """Mean of the values of all ranks together, where ranks may hold different numbers of them or
    none. A loss: DDP divides gradients by the number of ranks, so this is multiplied by it."""
    count = torch.tensor(float(values.numel()), device=values.device)
    if args.distributed:
        dist.all_reduce(count)
    return values.sum() * args.world_size / count.clamp(min=1)


class Meter:
    """The batches of one epoch, its loss and accuracy over all ranks, and a bar on rank 0.

    The sums stay on the device: they are read once a second for the bar and once at the end, so
    no step waits for the GPU.
    """

    def __init__(self, loader, args, title):
        self.args, self.loader, self.start, self.shown = args, loader, time.time(), 0.0
        self.sums = torch.zeros(3, device=args.device)  # loss, correct, images of this rank
        self.bar = tqdm(total=len(loader), desc=title, leave=False,
                        disable=args.rank > 0 or not sys.stderr.isatty())

    def __iter__(self):
        return to_device(self.loader, self.args)

    def update(self, loss, logits, targets):
        correct = (logits.detach().argmax(dim=1) == targets).sum()
        images = torch.full_like(correct, len(targets))
        self.sums += torch.stack([loss.detach().float() * len(targets), correct, images])
        self.bar.update()
        if not self.bar.disable and time.time() > self.shown + 1:
            self.shown, (loss, correct, images) = time.time(), self.sums.tolist()
            self.bar.set_postfix(loss=f"{loss / images:.3f}", acc=f"{100 * correct / images:.1f}%")

    def averages(self):
        """{"loss", "train_accuracy" (%), "images", "seconds", "images_per_second"} of all ranks."""
        self.bar.close()
        if self.args.distributed:
            dist.all_reduce(self.sums)
        (loss, correct, images), seconds = self.sums.tolist(), time.time() - self.start
        return {"loss": loss / images, "train_accuracy": 100 * correct / images,
                "images": int(images), "seconds": seconds, "images_per_second": images / seconds}


@torch.no_grad()
def extract_features(model, image_set, args, mirror=False):
    """Features of the clean (or mirrored) images: (n, d) float32 on the CPU of every rank, the same
    bits.

    Each rank computes its share, then all ranks get all rows in the order of the set.
    """
    model.eval()
    shard = [torch.zeros(0, model.fc.embed_dim, device=args.device)]
    for images, _ in clean_batches(image_set, args):
        with autocast(args):
            shard.append(model(images.flip(3) if mirror else images)[1].float())
    return gather(torch.cat(shard), len(image_set), args).cpu()


@torch.no_grad()
def select_exemplars(model, new_data, m, args):
    """(Up to) m exemplars of each class of new_data, as a list of ImageSets, best images first.

    barycenter: `herding`; cluster: nearest to the class mean first; entropy: where the answer is
    least certain; first: in the order of the data; random: any. Rank 0 decides for all, also where
    the machines of a launch round differently.
    """
    features, exemplars = extract_features(model, new_data, args), []
    for label in np.unique(new_data.y) if m else ():
        rows = torch.from_numpy(new_data.y == label).nonzero()[:, 0]
        if args.herding_method == "barycenter":
            best = herding(features[rows], m)
        elif args.herding_method == "cluster":
            best = (features[rows] - features[rows].mean(0)).norm(dim=1).argsort(stable=True)[:m]
        elif args.herding_method == "entropy":
            chances = model.fc(features[rows].to(args.device)).softmax(dim=1).cpu()
            best = torch.special.entr(chances).sum(1).argsort(descending=True, stable=True)[:m]
        elif args.herding_method == "first":
            best = torch.arange(len(rows))[:m]
        else:
            best = torch.randperm(len(rows))[:m]
        rows = rows[best].to(args.device)
        if args.distributed:
            dist.broadcast(rows, src=0)
        exemplars.append(new_data.select(rows.cpu().numpy()))
    return exemplars


def herding(features, m):
    """iCaRL's choice of exemplars (Rebuffi et al., CVPR 2017, Algorithm 4). O(n m d).

    Greedily picks the row that brings the mean of the picked rows closest to the class mean, on
    L2-normalised features. features: (n, d), of one class. Returns min(m, n) row numbers, the
    most important first, so that a smaller memory is a prefix of a larger one.
    """
    features = torch.nn.functional.normalize(features.double(), dim=1)
    mean, total = features.mean(dim=0), torch.zeros(features.shape[1], dtype=torch.float64)
    taken, order = torch.zeros(len(features), dtype=torch.float64), []
    for k in range(1, min(m, len(features)) + 1):
        distance = (mean - (total + features) / k).norm(dim=1) + taken
        order.append(int(distance.argmin()))
        total += features[order[-1]]
        taken[order[-1]] = math.inf
    return torch.tensor(order, dtype=torch.int64)


# ---------------------------------------------------------------------------------------------
# 5. Evaluation
# ---------------------------------------------------------------------------------------------

def task_of_class(increments, args):
    """The number of the task that each class came with: (classes,), on the device."""
    return torch.tensor(np.repeat(range(len(increments)), increments), device=args.device)


@torch.no_grad()
def evaluate(trainer, predict=None):
    """Accuracy on the test images of all tasks so far, each image counted once over all ranks, with
    the scores of `predict`: the trainer's own, or another.

    Returns, in percent, "acc1" and "acc5" on all images; "accuracy" and "task_aware", lists of each
    task; the means of these two that weigh a task by its classes, "class_weighted" and
    "class_weighted_task_aware"; "cumulative", a list: of the tasks 1 to k, with only their classes
    as answers; "task_inference": the share of answers in the right task. And "confusion": row i,
    column j counts images of class i that were taken for class j.
    """
    args, increments = trainer.args, trainer.run.increments[:trainer.task + 1]
    test_set = ImageSet(trainer.run.test_scenario[:trainer.task + 1], args)
    total, task_of = sum(increments), task_of_class(trainer.run.increments, args)
    ends = np.cumsum(increments)
    rows = [torch.zeros(0, 4 + len(ends), dtype=int, device=args.device)]
    trainer.model.eval()
    for images, targets in clean_batches(test_set, args):
        with autocast(args):
            # (batch, total), or more: a method may let classes of tasks to come compete
            logits = (predict or trainer.predict)(images).float()
        top5 = (logits.topk(min(5, total)).indices == targets[:, None]).any(dim=1)
        other = task_of[targets][:, None] != task_of[:logits.shape[1]]
        in_task = logits.masked_fill(other, -math.inf).argmax(dim=1)
        first = [logits[:, :end].argmax(dim=1) == targets for end in ends]  # the first k tasks
        rows.append(torch.stack([targets, logits.argmax(dim=1), top5, in_task == targets, *first],
                                dim=1))
    rows = gather(torch.cat(rows), len(test_set), args).cpu().numpy()
    # (test images,) each, the same on every rank
    true, predicted, top5, in_task, *first = rows.T
    confusion = np.zeros((total, max(total, predicted.max() + 1)), dtype=int)
    task_of = task_of.cpu().numpy()
    task = task_of[true]
    np.add.at(confusion, (true, predicted), 1)

    def percent(hits):
        return float(100 * hits.mean())

    tasks = range(len(increments))
    accuracy = [percent((predicted == true)[task == u]) for u in tasks]
    task_aware = [percent(in_task[task == u]) for u in tasks]
    return {"acc1": percent(predicted == true), "acc5": percent(top5),
            "accuracy": accuracy, "task_aware": task_aware,
            "class_weighted": float(np.average(accuracy, weights=increments)),
            "class_weighted_task_aware": float(np.average(task_aware, weights=increments)),
            "cumulative": [percent(first[k][task <= k]) for k in tasks],
            "task_inference": percent(task_of[predicted] == task),
            "confusion": confusion.tolist()}


def forgetting(matrix):
    """Mean over the old tasks u of max_{t<T} a[t][u] - a[T][u], percent points (Chaudhry et al.,
    ECCV 2018). matrix: row t, after task t, has t + 1 entries. 0 after the first task."""
    last = len(matrix) - 1
    drops = [max(row[u] for row in matrix[u:last]) - matrix[last][u] for u in range(last)]
    return sum(drops) / len(drops) if drops else 0.0


def cumulative_forgetting(matrix):
    """Mean over k < T of max_{t<=T} b[t][k] - b[T][k], percent points, at least 0 (Soutif et al.,
    2021, arXiv 2106.11930). matrix: b, the "cumulative" accuracies; row t has t + 1 entries."""
    last = len(matrix) - 1
    drops = [max(row[k] for row in matrix[k:]) - matrix[last][k] for k in range(last)]
    return sum(drops) / len(drops) if drops else 0.0


# ---------------------------------------------------------------------------------------------
# 6. What a run leaves on disk
# ---------------------------------------------------------------------------------------------

# What results.json keeps of `evaluate` after each task: one entry, or one row, for a task.
HISTORY = {"acc1s": "acc1", "acc5s": "acc5", "accuracy_matrix": "accuracy",
           "task_aware_matrix": "task_aware", "cumulative_matrix": "cumulative",
           "task_inference": "task_inference", "class_weighted": "class_weighted",
           "class_weighted_task_aware": "class_weighted_task_aware"}
MAY_DIFFER = {"resume", "output_dir", "num_workers", "stop_after_task", "plots", "device"}


def write_file(path, data):
    """Write bytes beside the file, then rename: a reader finds the old file or the new, whole."""
    temporary = path.with_name(path.name + ".part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        fail(f"{path} could not be written ({error.strerror}); the file of before is still whole")


def write_tensors(path, content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


def launch_name():
    """The same for all starts of one launch: torchrun's agent, our parent, outlives its workers."""
    return f"{platform.node()} {os.getppid()}"


class Run:
    """The output directory of a run: log.jsonl, checkpoint.pt, results.json, model.pt and plots.

    Rank 0 reads and writes; all ranks hold the same numbers. A checkpoint is written after every
    epoch. What comes after the last epoch of a task (herding, alignment, evaluation) is computed
    again when a run is resumed there, with the same result.
    """

    def __init__(self, trainer, scenario, test_scenario):
        args = self.args = trainer.args
        self.test_scenario = test_scenario
        method = type(trainer).__name__
        if method == "CilTrainer":  # WA itself, or a copy of template.py, which goes by its name
            file = Path(inspect.getfile(type(trainer))).stem
            method = "WA" if file == "template" else file
        cuda = args.device.type == "cuda"
        self.start, self.images, self.train_seconds, self.saved = time.time(), 0, 0.0, {}
        self.log = []
        self.results = {
            "method": method, "args": args.config, "increments": list(scenario.increments),
            "class_order": [int(c) for c in scenario.class_order],
            "class_names": scenario.class_names, **{key: [] for key in HISTORY}, "gammas": [],
            "world_size": args.world_size,
            "device": torch.cuda.get_device_name() if cuda else args.device.type,
            "versions": {"python": sys.version.split()[0], "torch": str(torch.__version__),
                         "timm": timm.__version__, "numpy": np.__version__}}
        self.increments = self.results["increments"]
        if args.rank == 0:
            self.open_directory(method)
        if args.distributed:  # what rank 0 read goes to all: only its machine needs the file
            box = [self.saved]
            dist.broadcast_object_list(box, src=0, device=args.device)
            self.saved = box[0]

    def open_directory(self, method):
        args = self.args
        name = f"{method}_{args.data_set}_b{args.num_bases}_inc{args.increment}_seed{args.seed}_"
        self.dir = Path(args.output_dir or f"runs/{name}{time.strftime('%Y%m%d-%H%M%S')}")
        if not args.output_dir:  # the newest run of this kind that may be continued, if any
            self.dir = max((file.parent for file in Path("runs").glob(f"{name}*/checkpoint.pt")
                            if self.may_continue(file.parent)), default=self.dir)
        self.lock = filelock.FileLock(self.dir / ".lock")
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=6)  # freed by the system at our end; workers follow in 5 s
        except filelock.Timeout:
            fail(f"--output_dir {self.dir}: another run is writing there")
        except OSError as error:
            fail(f"--output_dir {self.dir}: not a directory that can be written ({error.strerror})")
        found = [name for name in ("checkpoint.pt", "results.json", "log.jsonl", "model.pt")
                 if (self.dir / name).exists()]
        if found and not self.may_continue(self.dir):
            fail(f"--output_dir {self.dir} already holds {found[0]}: pass --resume to continue "
                 "that run, or name another directory")
        if found == ["results.json"] and (self.dir / ".launch").exists():
            found = []  # our own run, ended before its first epoch: begin again
        if found and found[0] != "checkpoint.pt":
            fail(f"--resume: {self.dir} holds {found[0]} but no checkpoint.pt to go on from; name "
                 "another --output_dir")
        if found:
            self.load(self.dir / "checkpoint.pt")
        write_file(self.dir / ".launch", launch_name().encode())

    def may_continue(self, folder):
        """With --resume, or where torchrun --max-restarts has started again the very launch that
        wrote into this folder."""
        again, mark = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), folder / ".launch"
        return self.args.resume or again and mark.exists() and mark.read_text() == launch_name()

    def load(self, path):
        try:  # weights_only: a checkpoint from a stranger runs no code
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                saved = torch.load(path, map_location="cpu", weights_only=True)
            saved = {key: saved[key] for key in (
                "task", "stage", "epoch", "model", "teacher", "optimizer", "scheduler", "scaler",
                "exemplars", "results", "log", "images", "train_seconds", "seconds")}
            config, mine = saved["results"]["args"], self.args.config
        except Exception as error:
            fail(f"--resume: {path} is no whole checkpoint of this trainer "
                 f"({type(error).__name__}); name another --output_dir")
        changed = [f"--{name} {config.get(name)} (now {mine[name]})" for name in mine
                   if name not in MAY_DIFFER and config.get(name) != mine[name]]
        changed += [name for name in ("method", "increments", "class_order")
                    if saved["results"].get(name) != self.results[name]]
        if changed:
            fail(f"--resume: {path} was made with {', '.join(changed)}; use the same command, or "
                 "another --output_dir")
        if 0 < self.args.stop_after_task <= saved["task"]:
            fail(f"--stop_after_task {self.args.stop_after_task}: {path} is in task "
                 f"{saved['task'] + 1} already")
        self.saved = saved

    def tasks(self, trainer):
        """(task, number of new classes) one after the other, up to --stop_after_task."""
        for task, nb_new in enumerate(self.increments[:self.args.stop_after_task or None]):
            trainer.stage = -1  # the first `fit` of a task is stage 0
            set_seed(self.args.seed, task)  # the same new weights on every rank
            yield task, nb_new

    def reached(self, trainer):
        """False for a task that was over before a resume. At the task of the checkpoint: load
        weights, teacher and exemplars into the trainer, whose model has the right shape by now.
        """
        saved, task = self.saved, trainer.task
        if saved and task == saved["task"]:
            trainer.model.load_state_dict(saved["model"])
            if trainer.teacher is not None:
                trainer.teacher.load_state_dict(saved["teacher"])
            trainer.scaler.load_state_dict(saved["scaler"])
            trainer.exemplars = [
                ImageSet((np.array(x, dtype=object) if isinstance(x, list) else x.numpy(),
                          y.numpy()), self.args) for x, y in saved["exemplars"]]
            self.results.update(saved["results"], args=self.args.config,
                                world_size=self.args.world_size)
            self.images, self.train_seconds = saved["images"], saved["train_seconds"]
            self.start, self.log = time.time() - saved["seconds"], saved["log"]
            self.write_log()
        return task >= saved.get("task", 0)

    def epochs(self, trainer, loader, optimizer, scheduler, num_epochs):
        """The epochs of one fit, seeded one by one: all of them, those after the checkpoint, or
        none if the fit was over before a --resume."""
        trainer.stage += 1
        here = [trainer.task, trainer.stage]
        there = [self.saved.get(key, -1) for key in ("task", "stage")]
        first = 0 if here > there else num_epochs
        if here == there:
            # Again: before a second stage a method may have changed weights, drawn heads anew.
            trainer.model.load_state_dict(self.saved["model"])
            optimizer.load_state_dict(self.saved["optimizer"])
            scheduler.load_state_dict(self.saved["scheduler"])
            first = self.saved["epoch"] + 1
        for epoch in range(first, num_epochs):
            seed = set_seed(self.args.seed, *here, epoch, rank=self.args.rank)
            loader.sampler.set_epoch(seed)  # without the rank: one order of images for all
            self.lr = scheduler.get_last_lr()[0]
            yield epoch
        set_seed(self.args.seed, *here, num_epochs)

    def end_epoch(self, trainer, averages, optimizer, scheduler):
        """Make BatchNorm's averages equal on all ranks, log the epoch, write the checkpoint."""
        args = self.args
        weights = torch.stack([p.detach().abs().max() for p in trainer.model.parameters()])
        if not (all(map(math.isfinite, averages.values())) and weights.isfinite().all()):
            fail(f"the loss ({averages['loss']}) or a weight left the finite numbers in task "
                 f"{trainer.task + 1}, epoch {trainer.epoch + 1}, --lr {args.lr}: try a smaller "
                 "one; the checkpoint of the epoch before is kept")
        average_batchnorm(trainer.model, args)
        if args.eval_every_epoch and (trainer.epoch + 1) % args.eval_every_epoch == 0:
            averages["test_accuracy"] = evaluate(trainer)["acc1"]
        self.images += averages["images"]
        self.train_seconds += averages["seconds"]
        if args.rank:
            return
        self.log.append({"task": trainer.task + 1, "stage": trainer.stage + 1,
                         "epoch": trainer.epoch + 1, **averages, "lr": self.lr})
        write_tensors(self.dir / "checkpoint.pt", {
            "task": trainer.task, "stage": trainer.stage, "epoch": trainer.epoch,
            "model": trainer.model.state_dict(),
            "teacher": trainer.teacher and trainer.teacher.state_dict(),
            "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "exemplars": [(s.x.tolist() if s.x.ndim == 1 else torch.from_numpy(s.x),
                           torch.from_numpy(s.y)) for s in trainer.exemplars],
            "results": self.results, "log": self.log, "images": self.images,
            "train_seconds": self.train_seconds, "seconds": time.time() - self.start})
        self.write_log()

    def write_log(self):
        if self.args.rank == 0:
            lines = [json.dumps(line) + "\n" for line in self.log]
            write_file(self.dir / "log.jsonl", "".join(lines).encode())

    def end_task(self, trainer, scores):
        """Add a row to the accuracy matrix, print one line, write results.json."""
        results, done = self.results, trainer.task + 1
        for key, score in HISTORY.items():
            results[key] = results[key] + [scores[score]]
        results.update(
            confusion=scores["confusion"], finished=done == len(self.increments),
            average_incremental_accuracy=sum(results["acc1s"]) / done,
            last_accuracy=scores["acc1"], forgetting=forgetting(results["accuracy_matrix"]),
            cumulative_forgetting=cumulative_forgetting(results["cumulative_matrix"]),
            seconds=time.time() - self.start,
            images_per_second=self.images / max(self.train_seconds, 1e-9))
        if self.args.rank == 0:
            print(f"task {done}/{len(self.increments)}: {scores['acc1']:.2f} % of the test images "
                  f"of {sum(self.increments[:done])} classes right", flush=True)
            write_file(self.dir / "results.json", json.dumps(results).encode())

    def finish(self, trainer):
        """Plots, model.pt, the final table and the paths of the files; leave the process group."""
        results, args = self.results, self.args
        if args.rank == 0:
            mean, std, _ = get_statistics(args)
            write_tensors(self.dir / "model.pt", {
                "args": args.config, "mean": list(mean), "std": list(std),
                "increments": self.increments[:trainer.task + 1],
                "class_order": results["class_order"], "class_names": results["class_names"],
                "state_dict": trainer.model.state_dict()})
            if any(images.x.ndim == 1 for images in trainer.exemplars):  # paths: which to keep
                kept = {results["class_names"][images.y[0]]: images.x.tolist()
                        for images in trainer.exemplars if len(images)}
                write_file(self.dir / "exemplars.json", json.dumps(kept, indent=1).encode())
            if args.plots:
                for name, draw in ("accuracy", plot_accuracy), ("confusion", plot_confusion):
                    buffer = io.BytesIO()
                    draw(results).savefig(buffer, dpi=120)
                    write_file(self.dir / f"{name}.png", buffer.getvalue())
            print("\ntest accuracy (%)\nafter task" + "".join(
                f"  task {u + 1:<2}" for u in range(trainer.task + 1)) + "   all")
            for t, (row, acc1) in enumerate(zip(results["accuracy_matrix"], results["acc1s"])):
                cells = [f"{a:8.2f}" for a in row] + [" " * 8] * (trainer.task - t)
                print(f"{t + 1:>10}" + "".join(cells) + f"{acc1:8.2f}")
            print(f"average incremental accuracy {results['average_incremental_accuracy']:.2f} %, "
                  f"last {results['last_accuracy']:.2f} %, forgetting {results['forgetting']:.2f} "
                  f"points, {results['seconds']:.0f} s\n")
            print(*sorted(f for f in self.dir.iterdir() if f.name[0] != "."), sep="\n", flush=True)
            self.lock.release()
        if args.distributed:
            dist.barrier()
            dist.destroy_process_group()


def plot_accuracy(results):
    """Accuracy on each task's test images, and on all of them, after each task."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, matrix = figure.subplots(), results["accuracy_matrix"]
    tasks = range(1, len(matrix) + 1)
    for u in range(len(matrix)):
        label = f"task {u + 1}" if len(matrix) <= 12 else None
        axes.plot(tasks[u:], [row[u] for row in matrix[u:]], "o-", lw=1, ms=3, label=label)
    axes.plot(tasks, results["acc1s"], "ks-", lw=2, label="all tasks so far")
    axes.set(xlabel="tasks learned", ylabel="test accuracy (%)", ylim=(0, 102), xticks=tasks,
             title=f"{results['method']} on {results['args']['data_set']}: average incremental "
                   f"accuracy {results['average_incremental_accuracy']:.1f} %")
    axes.legend(fontsize=8, ncols=2)
    return figure


def plot_confusion(results):
    """Row: true class, column: predicted class, percent of the row; lines between the tasks."""
    from matplotlib.figure import Figure
    share = np.array(results["confusion"], dtype=float)
    share *= 100 / share.sum(axis=1, keepdims=True)
    figure = Figure(figsize=(5.5, 4.6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="magma", vmin=0, vmax=100)
    for border in np.cumsum(results["increments"][:len(results["acc1s"])])[:-1] - 0.5:
        axes.axhline(border, color="w", lw=0.5)
        axes.axvline(border, color="w", lw=0.5)
    axes.set(xlabel="predicted class (in the order learned)", ylabel="true class")
    figure.colorbar(image, label="percent of the true class")
    return figure
