"""Everything around template.py, in the order in which a run uses it:

1. command line and presets     2. processes, devices, seeds     3. data     4. batches
5. the model in training        6. evaluation                    7. what a run leaves on disk

No method is implemented here: the model, the loss and the loop are in template.py.
"""
import argparse
import contextlib
import copy
import datetime
import inspect
import io
import json
import math
import os
import random
import re
import signal
import socket
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

# timm, torchvision and continuum take seconds to import: the functions that need them do it, after
# the command line has been read. So a wrong flag is answered sooner.

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
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True)
# The data sets that torchvision can download, by their names in continuum.
PACKAGES = dict(cifar100="CIFAR100", cifar10="CIFAR10", mnist="MNIST", svhn="SVHN",
                fashion_mnist="FashionMNIST")


class InputError(Exception):
    """The user gave something unusable; the text says what is wrong and what to do."""


def launched_as():
    """(rank on this machine, rank, number of processes), as torchrun, SLURM or MPI say."""
    for local_rank, rank, world_size in (
            ("LOCAL_RANK", "RANK", "WORLD_SIZE"),
            ("SLURM_LOCALID", "SLURM_PROCID", "SLURM_NTASKS"),
            ("MPI_LOCALRANKID", "PMI_RANK", "PMI_SIZE"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")):
        if rank in os.environ and world_size in os.environ:
            return tuple(int(os.environ.get(name, 0)) for name in (local_rank, rank, world_size))
    return 0, 0, 1


def fail(message, everywhere=True):
    """End with one line on stderr and exit code 2; torchrun adds its own report.

    Bad input is bad on every rank, and rank 0 speaks for all. everywhere=False: only this rank has
    seen it. The others notice that it left, and leave the word to it (`report_unless_left`).
    """
    rank, joined = launched_as()[1], dist.is_initialized()
    if rank == 0 or not everywhere:
        tqdm.write(f"error: {' '.join(str(message).split())}", file=sys.stderr)
        sys.stderr.flush()
    if everywhere and joined:
        dist.barrier()  # if one left first, torchrun would end rank 0 in the middle of its line
        dist.destroy_process_group()
    elif everywhere and rank:
        time.sleep(60)  # rank 0 leaves, and then torchrun ends this process
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
    def parse_args(self, args=None, namespace=None):
        if args is None:  # the process was started for this command, and may end with it
            end_at_signals()
        return super().parse_args(args, namespace)

    def error(self, message):  # argparse itself would print its usage, once per rank
        fail(f"{message} (--help lists all flags)")


class TrainingParser(Parser):
    def format_help(self):
        """With examples, and the defaults by data set, a method's own (`fill_in`) among them."""
        text, own = super().format_help(), self.get_default("presets") or {}
        text += """
examples:
  python template.py --lambda_kd 0.5 --seed 1
  torchrun --nproc_per_node=4 template.py --data_set cifar100 --data_path DIR --amp bf16
  python -m tutorial.methods.lucir --output_dir runs/lucir --resume

defaults, and below them where those of a data set differ:
"""
        common = {**COMMON, **own.get("all", {})}
        for name, preset in {"": common, **PRESETS}.items():
            values = {**preset, **own.get("all", {}), **own.get(name, {})}
            words = [f"--{flag} {value}" for flag, value in values.items()
                     if not name or value != common.get(flag)]
            text += f"  {name:14} {' '.join(words)}\n"
        return text


def get_parser():
    """The command line. Flags without a default here take it from the preset of --data_set."""
    parser = TrainingParser(allow_abbrev=False)
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
        choices=["barycenter", "cluster", "entropy", "first", "random"], help="choice of "
        "exemplars, see select_exemplars in utils.py (barycenter)")
    add = parser.add_argument_group("training").add_argument
    add("--batch_size", type=natural, help="images per step over ALL processes")
    add("--num_epochs", type=natural, help="epochs per task")
    add("--lr", type=positive, help="first learning rate of the cosine schedule")
    add("--momentum", type=number(0, 0.9999), default=0.9, help="of SGD (0.9)")
    add("--weight_decay", type=share, help="of SGD, on all weights")
    add("--smooth", type=number(0, 0.9999), default=0.0, help="label smoothing (0)")
    add("--lambda_kd", type=lambda_kd, help="weight of distillation, 0 to 1; 0: none; "
        "dynamic: known / (known + new) classes")
    add("--temperature", type=positive, default=2.0, help="temperature of distillation (2)")
    add("--no_align", action="store_true", help="leave out weight alignment")
    add("--seed", type=number(0, 2 ** 32 - 1, int), default=0, help="of all that is random (0)")
    add = parser.add_argument_group("machine and run").add_argument
    add("--amp", default="none", choices=["none", "bf16", "fp16"], help="mixed precision (none)")
    add("--compile", action="store_true", help="compile the backbone with torch.compile")
    add("--sync_bn", action=argparse.BooleanOptionalAction, default=True, help="on several GPUs: "
        "BatchNorm over the global batch (default), or over each GPU's part, which is faster")
    add("--device", choices=["cuda", "cpu"], help="(cuda if there is one, else cpu)")
    add("--num_workers", type=count, help="loading processes per training process")
    add("--eval_every_epoch", type=count, default=0, help="log test accuracy every N epochs (0)")
    add("--output_dir", help="(runs/<method>_<data_set>_b<bases>_inc<increment>_seed<seed>_<time>-"
        "<process>)")
    add("--resume", action="store_true", help="continue the run in --output_dir, if there is one")
    add("--stop_after_task", type=natural, help="stop after N tasks; --resume goes on")
    add("--no_plots", dest="plots", action="store_false", help="draw no accuracy and confusion")
    return parser


# ---------------------------------------------------------------------------------------------
# 2. Processes, devices, seeds
# ---------------------------------------------------------------------------------------------

# What rank 0 says when a signal ends the process. `Run` keeps it true.
last_words = None


def end_at_signals():
    """Let Ctrl-C and SIGTERM (from SLURM, or torchrun) end this process at once, with one line.

    A thread waits for them: the main one may be deep in a message to a process that is gone. What
    is on disk stays whole, as after any other end (`write_file`).
    """
    # tqdm's own lock is one for several processes, which a process that ends at once would leave.
    tqdm.set_lock(threading.RLock())
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.set_wakeup_fd(theirs.fileno())  # the number of a signal comes through here
    ends = [number for number in (signal.SIGINT, signal.SIGTERM)
            if signal.getsignal(number) != signal.SIG_IGN]  # as the starter may wish, such as nohup
    for number in ends:
        signal.signal(number, lambda *_: None)

    def wait():
        with ours, theirs:
            while (number := ours.recv(1)[0]) not in ends:
                pass  # of a loading process that ended, for DataLoader
        _, rank, world_size = launched_as()
        # torchrun sends SIGTERM also when another process has failed, which has said why.
        if rank == 0 and (last_words or world_size == 1 or number == signal.SIGINT):
            name = signal.Signals(number).name
            text = f"ended by {name}: {last_words or 'nothing is saved yet'}\n"
            os.write(2, ("\n" * sys.stderr.isatty() + text).encode())  # below the bar
        os._exit(128 + number)

    threading.Thread(target=wait, daemon=True).start()


def available_cores():
    """CPU cores that this process may use, where the system can tell, else all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def fill_in(args):
    """A copy of args, where each flag that is not on the command line has its preset's value."""
    args = argparse.Namespace(**vars(args))
    # A method may bring presets: parser.set_defaults(presets={data set or "all": {flag: value}}).
    own = vars(args).pop("presets", {})
    own = {**own.get("all", {}), **own.get(args.data_set, {})}
    for name, value in {**COMMON, **PRESETS[args.data_set], **own}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def settings(args):
    """The flags whose values are not the preset's, in words, for the first line of a run."""
    preset = vars(fill_in(get_parser().parse_args(["--data_set", args.data_set])))
    changed = [f"--{name} {str(value)[:60]}" for name, value in args.config.items()
               if hasattr(args, name) and name not in MAY_DIFFER and value != preset.get(name)]
    return " ".join(changed) or "settings as preset"


def setup(args):
    """Check every flag, join the processes of the launch, and seed all generators.

    Returns a copy of args, filled in, and with what is known now: `rank`, `local_rank`,
    `world_size`, `distributed` (timm's names), `device` as a torch device, and `config`, the flags
    that a checkpoint and results.json remember. With CUDA a process has a GPU of its own.
    """
    import timm

    import resnet  # noqa: F401  (importing it makes resnet20 ... resnet56 known to timm)
    args = fill_in(args)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine
    if args.num_workers is None:  # tiny images cost less to load than to pass between processes
        # (More than 32 only fill the memory: each keeps two batches ready.)
        args.num_workers = min(32, available_cores() // here) if args.input_size > 16 else 0
    args.config = dict(vars(args))
    args.local_rank, args.rank, args.world_size = launched_as()
    args.distributed = args.world_size > 1
    if args.batch_size % args.world_size:
        fail(f"--batch_size {args.batch_size} counts the images of all processes together and "
             f"must be a multiple of their number, {args.world_size}")
    if not timm.is_model(args.backbone):
        near = timm.list_models(f"*{args.backbone.split('_')[0]}*")[:4]
        fail(f"unknown --backbone {args.backbone}: any name in timm.list_models() works"
             + ", such as " * bool(near) + ", ".join(near))
    try:
        try_transform(args)
    except Exception as error:
        fail(f"--aa {args.aa} is no auto-augment string of timm, or fails on some images "
             f"({type(error).__name__}: {error}): try rand-m9-mstd0.5-inc1-mmax9, or none")
    gpus = torch.cuda.device_count()
    if args.device == "cuda" and gpus < here:
        fail(f"--device cuda: {here} processes on this machine, but torch finds {gpus} GPUs",
             everywhere=args.rank == 0 or args.local_rank > 0)  # perhaps on this machine alone
    args.device = torch.device(args.device or ("cuda" if gpus >= here else "cpu"))
    if args.device.type == "cuda":
        # (srun may let each process see its own GPU only.)
        args.device = torch.device("cuda", args.local_rank % gpus)
        torch.cuda.set_device(args.device)
        torch.backends.cudnn.benchmark = True
    if args.distributed:
        join_processes(args)
    if args.rank == 0 and 0 < gpus < here and args.config["device"] is None:
        print(f"note: {here} processes on {gpus} GPU(s), so they run on the CPU", file=sys.stderr)
    set_seed(args)  # the same first weights on every rank
    return args


def join_processes(args):
    """Make the process group: nccl for tensors on GPUs, gloo for all else."""
    cuda = args.device.type == "cuda"
    if dist.get_debug_level() == dist.DebugLevel.OFF:
        dist.set_debug_level(dist.DebugLevel.INFO)  # DDP then names weights without a gradient
    try:
        store, *_ = next(rendezvous("env://", args.rank, args.world_size))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = own_store(store, args)
        if args.rank == 0:
            store.set("device", args.device.type)
        elif (first := store.get("device").decode()) != args.device.type:
            fail(f"these processes would compute on the {args.device.type}, those of rank 0 on the "
                 f"{first}: one machine has fewer GPUs than processes. --device cpu takes the CPU "
                 "everywhere", everywhere=args.local_rank > 0)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=args.rank,
            world_size=args.world_size, device_id=args.device if cuda else None)
    except (ValueError, RuntimeError) as error:
        fail(f"the processes could not join ({error}): start them with torchrun; inside a SLURM "
             "allocation, unset SLURM_NTASKS to run plain python")
    sys.excepthook = report_unless_left


def own_store(torchrun, args):
    """Where the processes of this start leave their addresses for each other. torchrun's own store
    outlives its restarts, and would give them addresses of the dead. (It counts the restarts, but
    each machine for itself.) So rank 0 opens another, and leaves its port in torchrun's."""
    host, minutes = os.environ["MASTER_ADDR"], datetime.timedelta(minutes=30)
    if args.rank == 0:
        store = dist.TCPStore(host, 0, args.world_size, True, minutes, wait_for_workers=False)
        torchrun.set("port", str(store.port))
        return store
    for _ in range(1800):
        port = int(torchrun.get("port"))
        try:  # at the port of a dead rank 0 nobody answers
            socket.create_connection((host, port), 10).close()
            return dist.TCPStore(host, port, args.world_size, False, minutes)
        except OSError:
            time.sleep(1)
    raise RuntimeError(f"no answer from {host}, port {port}")


def report_unless_left(kind, error, trace):
    """The last word of a process that ends by an exception. One that only lost another process in
    the middle of a message leaves it to the other to say why: torchrun ends it at once, if there is
    torchrun. If not, it says what it knows."""
    lost = re.search("(closed|reset) by peer|[Bb]roken pipe", str(error))
    unused = re.search(r"did not receive grad for rank \d+: (.*)", str(error))  # from DDP
    if lost and issubclass(kind, RuntimeError):
        time.sleep(10)
        tqdm.write(f"error: lost another process of this launch ({lost[0]})", file=sys.stderr)
    elif unused:
        time.sleep(10 * (dist.get_rank() > 0))  # rank 0 speaks for all
        tqdm.write(f"error: the loss does not depend on these weights, and all processes wait for "
                   f"their gradients: {unused[1]}. While they rest, set their requires_grad to "
                   "False before fit, or make them when they are needed (in expand_model)",
                   file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def set_seed(args, *numbers, rank=0):
    """Seed python, numpy and torch from --seed and numbers such as (task, stage, epoch), and apart
    by rank; return the number drawn from them. So no generator's state needs to be saved."""
    import timm.utils
    sequence = np.random.SeedSequence([1 + len(numbers), args.seed, *numbers])
    drawn = int(sequence.generate_state(1)[0]) >> 1
    timm.utils.random_seed(drawn, rank)
    return drawn


@contextlib.contextmanager
def python_and_numpy_kept():
    """Inside, the generators of python and numpy may be seeded and drawn from; after it they go on
    as if nothing had been."""
    states = random.getstate(), np.random.get_state()
    yield
    random.setstate(states[0]), np.random.set_state(states[1])


def seed_epoch(trainer):
    """Seed for the next epoch: dropout on each rank by itself. Returns a seed that is the same on
    all ranks, for the order of the images and their augmentation."""
    args = trainer.args
    return set_seed(args, trainer.task, trainer.stage, trainer.epoch, rank=args.rank)


def gather(shard, size, args):
    """The rows of all ranks in the order of the data: rank r holds rows r, r + N, r + 2N, ...

    shard: (about size / N, ...) on this rank. Returns (size, ...) on every rank, the same bits.
    """
    if not args.distributed:
        return shard
    padded = shard.new_zeros(math.ceil(size / args.world_size), *shard.shape[1:])
    padded[:len(shard)] = shard
    parts = [torch.empty_like(padded) for _ in range(args.world_size)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:size]


def from_rank_0(value, args):
    """What rank 0 has, on every rank."""
    box = [value]
    if args.distributed:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def together(make, args):
    """make() on every rank. Where it raises InputError on some, all end with one line, which says
    what the first of them saw; so none waits for a rank that left."""
    made = problem = None
    try:
        made = make()
    except InputError as error:
        problem = str(error)
    problems = [problem]
    if args.distributed:
        if problem and args.rank:
            problem = f"rank {args.rank}: {problem}"  # perhaps on another machine
        problems = [None] * args.world_size
        dist.all_gather_object(problems, problem)
    if any(problems):
        fail(next(filter(None, problems)))
    return made


def rank_0_first(make, args, say):
    """make() on rank 0, then on the others, which find on disk what rank 0 downloaded. Where it
    fails on some, all end, with one line: say(what went wrong)."""
    def attempt():
        try:
            return make()
        except Exception as error:
            raise InputError(say(f"{type(error).__name__}: {str(error)[:200]}"))
    made = together(lambda: None if args.rank else attempt(), args)
    return together(lambda: attempt() if args.rank else made, args)


# ---------------------------------------------------------------------------------------------
# 3. Data
# ---------------------------------------------------------------------------------------------

# Up to this side, in pixels, images are small: cropped by a shift, and held in memory.
SMALL = 64
# But not above this memory for train and test together: 170,000 images of 64 x 64, more than Tiny
# ImageNet has. A task's own images are copied from there, up to three times (chapter 12).
MEMORY_LIMIT = 2 * 2 ** 30


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

    Class numbers follow the sorted folder names. Raises InputError.
    """
    from torchvision.datasets import ImageFolder
    root, splits, classes = Path(args.data_path), [], []
    for names in (["train"], ["test", "val"]):
        folders = [root / name for name in names if (root / name).is_dir()]
        if not folders:
            raise InputError(f"{root} has no folder {' or '.join(names)}: --data_path takes a "
                             "folder with train/<class>/* and test/<class>/* (or val)")
        # Some data sets have a test folder without classes beside val: the fuller one counts.
        folder = max(folders, key=lambda folder: sum(path.is_dir() for path in folder.iterdir()))
        try:
            images = ImageFolder(str(folder))
        except OSError as error:  # no class at all, a class without an image, no permission
            raise InputError(f"{folder}: {error}") from None
        # numpy's strings: a million Python objects would be copied into every loading worker.
        try:
            paths = np.array([path for path, _ in images.samples], np.dtypes.StringDType())
        except UnicodeEncodeError as error:
            raise InputError(f"{error.object!a}: a name that is not UTF-8; rename it") from None
        splits.append((paths, np.array(images.targets)))
        classes.append(images.classes)
    if classes[0] != classes[1]:
        odd = sorted(set(classes[0]) ^ set(classes[1]))
        raise InputError(f"{root}: train and test need the same classes; only one of them has "
                         f"{odd[:5]}")
    if args.data_set == "imagenet100" and len(classes[0]) == 1000:  # the field's 100 of 1000
        keep = np.sort(np.random.RandomState(1993).permutation(1000)[:100])
        splits = [(x[np.isin(y, keep)], np.searchsorted(keep, y[np.isin(y, keep)]))
                  for x, y in splits]
        classes[0] = [classes[0][i] for i in keep]
    return splits, classes[0]


def load_package(args):
    """The arrays of a data set of torchvision, downloaded by rank 0 if need be."""
    from continuum import datasets
    source = getattr(datasets, PACKAGES[args.data_set])
    with contextlib.redirect_stdout(sys.stderr):
        found = rank_0_first(
            lambda: [source(args.data_path, train=train, download=args.rank == 0)
                     for train in (True, False)],
            args, lambda problem: f"{args.data_set} is not in {args.data_path} and could not be "
            f"downloaded ({problem}): give --data_path a folder with its files, or with "
            "train/<class>/* and test/<class>/*")
    splits = [split.get_data()[:2] for split in found]
    splits = [(np.repeat(x[..., None], 3, axis=3) if x.ndim == 3 else x, y) for x, y in splits]
    names = getattr(getattr(found[0], "dataset", None), "classes", None)  # SVHN has none
    return splits, names or [str(i) for i in np.unique(splits[0][1])]


def load_data(args):
    """[(x, y) of train, (x, y) of test], class names. x: images (n, H, W, 3) uint8, or n paths.
    Raises InputError."""
    if args.data_set == "digits":
        return load_digits(), [str(i) for i in range(10)]
    try:
        # (Where rank 0 has a folder, all need one: no machine may start a download by itself.)
        if args.data_set not in PACKAGES or from_rank_0(
                os.path.isdir(os.path.join(args.data_path, "train")), args):
            return load_folder(args)
    except OSError as error:  # no permission, a name too long
        raise InputError(f"--data_path {args.data_path}: {error.strerror}") from None
    return load_package(args)


def open_image(source):
    """A path or an (H, W, 3) uint8 array as an RGB image; 16-bit grey keeps its upper 8 bits."""
    if not isinstance(source, str):
        return Image.fromarray(source)
    image = Image.open(source)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def read(sources, fits, args):
    """Images scaled and cut to squares of --input_size: (n, S, S, 3) uint8. If they do not fit into
    memory: only a look whether each file is an image. Raises InputError."""
    from torchvision import transforms
    size = args.input_size
    square = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])
    pixels = torch.zeros(len(sources) * fits, size, size, 3, dtype=torch.uint8)
    silent = args.rank > 0 or not sys.stderr.isatty()
    for i, source in enumerate(tqdm(sources, "reading", leave=False, disable=silent)):
        try:
            if fits:
                pixels[i] = torch.from_numpy(np.array(square(open_image(source))))
            else:
                Image.open(source).close()
        except Exception as error:
            raise InputError(f"{source}: no image ({type(error).__name__}); mend or remove it")
    return pixels


def hold(x, fits, args):
    """Images as they are kept during a run. x: (n, H, W, 3) uint8, or n paths.

    Those that fit are read once: (n, S, S, 3), a uint8 tensor, and, if they are augmented there, on
    the GPU. Of others each rank looks at a share of the files. (Of more than 100,000 that would
    take minutes: there a broken one is named when its turn comes.)
    """
    mine, size = x[args.rank::args.world_size], args.input_size
    if fits and (x.ndim == 1 or x.shape[1:3] != (size, size)):
        x = gather(together(lambda: read(mine, True, args), args), len(x), args)
    elif x.ndim == 1 and len(x) <= 100_000:
        together(lambda: read(mine, False, args), args)
    return torch.as_tensor(x, device=args.device) if fits and in_batches(args) else x


def get_class_order(args, nb_classes):
    """The classes in the order in which they are learned: a list of class numbers. InputError: the
    file does not hold it."""
    order = args.class_order  # default, seed, natural, a file, or from Python the list itself
    if order in ("default", "seed"):
        seed = 1993 if order == "default" else args.seed
        return np.random.RandomState(seed).permutation(nb_classes).tolist()
    if order == "natural":
        return list(range(nb_classes))
    if isinstance(order, str):
        try:
            order = [int(word) for word in re.findall(r"[^\s,\[\]]+", Path(order).read_text())]
        except (OSError, ValueError):
            order = []
    if sorted(order) != list(range(nb_classes)):
        raise InputError(f"--class_order {args.class_order}: default, seed, natural, or a file "
                         f"that holds each of 0 to {nb_classes - 1} once")
    return order


def fingerprint(x, labels):
    """A number that changes with the labels, and with the names of the files, if x are paths."""
    names = "\n".join(x) if x.ndim == 1 else ""
    return zlib.crc32(labels.tobytes() + names.encode())


def compare_copies(splits, args):
    """InputError: this machine has other labels or files than that of rank 0."""
    prints = [fingerprint(x, labels) for x, labels in splits]
    if prints != from_rank_0(prints, args):
        raise InputError(f"other files in {args.data_path} than rank 0 has: copy them again")


class Scenario:
    """continuum's `ClassIncremental`, over row numbers: `images(t)` are the images of task t.

    x, y: the whole data set, images or paths and labels; x is kept as `hold` says. The labels of
    the images are positions in the class order: the first task has the labels 0 to num_bases - 1.
    """

    def __init__(self, x, y, fits, increments, class_order, class_names, args):
        from continuum import ClassIncremental
        from continuum.datasets import InMemoryDataset
        from continuum.tasks import TaskType
        rows = InMemoryDataset(np.arange(len(y)), y, data_type=TaskType.TENSOR)
        self.tasks = ClassIncremental(rows, increment=increments, class_order=class_order)
        self.increments, self.class_order = increments, class_order
        self.class_names = [class_names[c] for c in class_order]
        self.files = x if x.ndim == 1 else None
        labels = np.argsort(class_order)[y]
        self.data = ImageSet(hold(x, fits, args), labels, args, np.arange(len(y)))
        # Changes with the files or the labels: by it a resumed run knows its data set.
        self.fingerprint = fingerprint(x, labels)

    def images(self, tasks):
        """The images of one task, or of a slice of tasks, as an ImageSet."""
        rows, _, _ = self.tasks[tasks].get_raw_samples()
        return self.data.select(rows)


def build_scenarios(args):
    """Two `Scenario`s, train and test, with the same tasks."""
    splits, class_names = together(lambda: load_data(args), args)  # not all machines may have it
    together(lambda: compare_copies(splits, args), args)
    (_, train_y), (_, test_y) = splits
    total, counts = len(class_names), np.bincount(train_y)
    first, increment, wrong = args.num_bases or args.increment, args.increment, []
    if first > total or first < total < increment:
        first, increment = total - total // 2, max(1, total // 4)
        wrong.append(f"--num_bases {args.num_bases} --increment {args.increment} ask for more "
                     f"classes (try --num_bases {first} --increment {increment})")
    if 0 < args.memory_size < total:
        wrong.append(f"--memory_size {args.memory_size} is less than an exemplar for each class "
                     f"(try 0, or --memory_size {20 * total})")
    increments = [first] + [increment] * ((total - first) // increment)
    increments += [total - sum(increments)] * (sum(increments) < total)
    # (A file may differ from one machine to the other.)
    order = from_rank_0(together(lambda: get_class_order(args, total), args), args)
    tasks = np.split(counts[order], np.cumsum(increments)[:-1])
    # (grow.py loads its first task, and trains on the others.)
    smallest = min(map(sum, tasks[getattr(args, "loaded_tasks", 0):]))
    if smallest < args.batch_size:
        share = 2 ** int(math.log2(max(1, smallest / 3 / args.world_size)))
        wrong.append(f"--batch_size {args.batch_size} is more than the {smallest} images of the "
                     f"smallest task (try --batch_size {share * args.world_size})")
    if wrong:
        fail(f"{args.data_set} has {total} classes with {counts.min()} to {counts.max()} training "
             f"images each: {'; '.join(wrong)}")
    # (A zoom needs the pixels that scaling would throw away.)
    fits = args.input_size <= SMALL and crops(args) == "shift" and (
        3 * args.input_size ** 2 * (len(train_y) + len(test_y)) <= MEMORY_LIMIT)
    return [Scenario(x, y, fits, increments, order, class_names, args) for x, y in splits]


def get_statistics(args):
    """Mean and standard deviation of the colours, and whether a mirror image keeps its class."""
    return STATISTICS.get(args.data_set, IMAGENET_STATISTICS)


def crops(args):
    """shift: the whole image, moved by up to 1/8 of its side; zoom: any part of it, enlarged."""
    return args.crop or ("shift" if args.input_size <= SMALL else "zoom")


def in_batches(args):
    """Whether training images are only shifted and mirrored: small ones then in whole batches."""
    return crops(args) == "shift" and args.aa == "none" and args.color_jitter == args.reprob == 0


def build_transform(args, train):
    """timm's `create_transform`; small images are cropped from a padded frame, not zoomed into.

    Up to 64 pixels the random zoom of ImageNet recipes would throw most of an image away. Its
    place is taken by a shift of up to 1/8 of the side (the usual padding of 4 for 32 pixels);
    --crop zoom brings it back, out of the padded image.
    """
    import timm.data
    from torchvision import transforms
    mean, std, flip = get_statistics(args)
    transform = timm.data.create_transform(
        args.input_size, is_training=train, hflip=0.5 * flip, mean=mean, std=std,
        color_jitter=args.color_jitter or None, auto_augment=None if args.aa == "none" else args.aa,
        interpolation="bicubic", re_prob=args.reprob, re_mode=args.remode, re_count=args.recount,
        crop_pct=args.crop_pct)
    size, small = args.input_size, args.input_size <= SMALL
    # Resize does nothing to images that have the right size already.
    if train and crops(args) == "shift":
        transform.transforms[:1] = [transforms.Resize(size), transforms.RandomCrop(size, size // 8)]
        if small:  # as in `read`
            transform.transforms.insert(1, transforms.CenterCrop(size))
    elif train and small:
        transform.transforms.insert(0, transforms.Pad(size // 8))
    elif small:
        transform.transforms[:2] = [transforms.Resize(size), transforms.CenterCrop(size)]
    return transform


def try_transform(args, times=3000):
    """Augment a tiny image many times: Pillow 13 refuses what some strings of --aa ask for now and
    then (to keep 0 bits of a picture), and that shall not come up after hours."""
    import timm.utils
    steps, image = build_transform(args, train=True).transforms, Image.new("RGB", (8, 8))
    timm.utils.random_seed(0)
    for step in steps:
        for _ in range(times * (type(step).__module__ == "timm.data.auto_augment")):
            step(image)


class ImageSet(Dataset):
    """Images with labels. x: (n, H, W, 3) uint8, or n paths; y: (n,) labels.

    `rows` are their numbers in the data set of a `Scenario` (-1: in none). Small images are
    augmented in batches (`BatchLoader`); for others, loading workers ask one by one: images[i] is
    image i, augmented at random, images[i, seed] likewise but from this seed alone, whatever the
    process, and images[i, None] the clean image.
    """

    def __init__(self, x, y, args, rows=None):
        self.x = torch.from_numpy(x) if isinstance(x, np.ndarray) and x.ndim == 4 else x
        self.y, self.args, self.rows = y, args, np.full(len(y), -1) if rows is None else rows
        self.transforms = [build_transform(args, train) for train in (False, True)]

    def __len__(self):
        return len(self.y)

    def __getitem__(self, key):
        index, seed = key if isinstance(key, tuple) else (key, int(torch.randint(2 ** 32, ())))
        before = torch.get_rng_state()  # what a method draws must not depend on who loads images
        if seed is not None:  # the three generators that transforms draw from
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
        source = self.x[index].cpu().numpy() if torch.is_tensor(self.x) else str(self.x[index])
        try:
            image = self.transforms[seed is not None](open_image(source))
        except Exception as error:
            name = source if isinstance(source, str) else f"image {index}"
            text = " ".join(str(error).split())
            raise InputError(f"{name}: {type(error).__name__}: {text}; mend or remove the image, "
                             f"or change --aa {self.args.aa}") from None
        torch.set_rng_state(before)
        return image, int(self.y[index])

    def __getitems__(self, keys):
        """A batch, as DataLoader asks for it. (To keep numpy's generator takes half a millisecond,
        too long for each image.)"""
        with python_and_numpy_kept():
            return [self[key] for key in keys]

    def in_memory(self):
        """Whether the images are held in the size in which the network sees them."""
        size = self.args.input_size
        return torch.is_tensor(self.x) and self.x.shape[1:3] == (size, size) and size <= SMALL

    def select(self, which):
        """The images of these rows (a slice, a mask or indices), in this order."""
        which = np.arange(len(self))[which]
        pixels = self.x[torch.from_numpy(which)] if torch.is_tensor(self.x) else self.x[which]
        return ImageSet(pixels, self.y[which], self.args, self.rows[which])

    def join(self, others):
        """This set followed by all sets in the list `others`."""
        sets = [self, *others]
        join = torch.cat if torch.is_tensor(self.x) else np.concatenate
        return ImageSet(join([s.x for s in sets]), np.concatenate([s.y for s in sets]), self.args,
                        np.concatenate([s.rows for s in sets]))


# ---------------------------------------------------------------------------------------------
# 4. Batches
# ---------------------------------------------------------------------------------------------

class SeededSampler:
    """Which images an epoch shows on this rank, each with a seed for its augmentation.

    All ranks draw one order from `seed`, which is set before each epoch. Of it the global batches
    of --batch_size images are cut, so they hold the same images for every number N of processes;
    rank r takes every N-th image from the r-th on. An incomplete last batch is left out. (A smaller
    set is one batch, of the largest multiple of N images in it.)

    sampler: another order, such as torch's WeightedRandomSampler, for all ranks together.
    """

    def __init__(self, size, args, sampler=None):
        self.size = size if sampler is None else len(sampler)
        self.sampler, self.seed = sampler, 0
        self.rank, self.world_size = args.rank, args.world_size
        self.share = min(args.batch_size, self.size) // args.world_size  # of a batch
        if self.share == 0:
            fail(f"{self.size} images cannot be shared by {args.world_size} processes")
        self.batches = self.size // (self.share * args.world_size)

    def __len__(self):
        return self.batches * self.share

    def draw(self):
        """(row numbers, seeds), two tensors: this rank's part of the epoch."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.sampler is None:
            order = torch.randperm(self.size, generator=generator)
        else:  # it may draw from any generator: from the same seed on every rank
            with python_and_numpy_kept(), torch.random.fork_rng(devices=[]):
                for seed in random.seed, np.random.seed, torch.default_generator.manual_seed:
                    seed(self.seed)
                order = torch.tensor(list(self.sampler))
            if order.shape != (self.size,):
                fail(f"the sampler gives numbers of the shape {tuple(order.shape)}: it has to give "
                     f"as many row numbers as its length says, {self.size}, and no batches of them")
        # A seed for each place in the order, not for each image, which may come up twice.
        seeds = torch.randint(2 ** 32, (len(order),), generator=generator)
        mine = slice(self.rank, len(self) * self.world_size, self.world_size)
        return order[mine], seeds[mine]

    def __iter__(self):
        order, seeds = self.draw()
        return zip(order.tolist(), seeds.tolist())


def normalise(pixels, args):
    """(batch, S, S, 3) uint8 -> (batch, 3, S, S) float32 on the device, in channels_last."""
    mean, std, _ = get_statistics(args)
    images = pixels.to(args.device).permute(0, 3, 1, 2).float().div_(255)
    for colour in range(3):  # numbers, not tensors, which would have to be sent to the GPU
        images[:, colour].sub_(mean[colour]).div_(std[colour])
    return images


def crop_and_flip(framed, rows, tops, lefts, flips, size):
    """Images `rows` of framed (n, P, P, 3), cropped at (tops, lefts) and mirrored where flips is 1:
    (batch, size, size, 3). One gather; bit for bit torchvision's pad, crop and flip."""
    side, steps = framed.shape[1], torch.arange(size, device=framed.device)
    down = tops[:, None] + steps  # (batch, size), as are those across
    across = lefts[:, None] + torch.where(flips[:, None] == 1, size - 1 - steps, steps)
    pixels = (rows[:, None, None] * side + down[:, :, None]) * side + across[:, None, :]
    return framed.view(-1, 3).index_select(0, pixels.flatten()).view(-1, size, size, 3)


class BatchLoader:
    """Training batches of images in memory, without any Python per image. A pass gives (images,
    targets), of `share` images each."""

    def __init__(self, images, sampler, share, args):
        self.sampler, self.share, self.args = sampler, share, args
        self.margin = margin = args.input_size // 8
        self.framed = F.pad(images.x, (0, 0, margin, margin, margin, margin))  # with black
        self.targets = torch.from_numpy(images.y).to(images.x.device)

    def __len__(self):
        return math.ceil(len(self.sampler) / self.share)

    def __iter__(self):
        rows, seeds = self.sampler.draw()
        # The shift and the flip are read off the seed like the digits of a number.
        shifts = 2 * self.margin + 1
        tops, lefts = seeds % shifts, seeds // shifts % shifts
        # Only where a mirror image keeps its class.
        flips = seeds // shifts ** 2 % 2 * get_statistics(self.args)[2]
        draws = torch.stack([rows, tops, lefts, flips]).to(self.framed.device)
        for batch in draws.split(self.share, dim=1):
            pixels = crop_and_flip(self.framed, *batch, self.args.input_size)
            yield normalise(pixels, self.args), self.targets[batch[0]]


def make_batches(images, sampler, share, args):
    """Batches of `share` images that a SeededSampler chooses, from memory or by workers."""
    if in_batches(args) and images.in_memory():
        return BatchLoader(images, sampler, share, args)
    # A generator of its own: how often it draws must not change what dropout draws.
    return DataLoader(images, share, sampler=sampler, num_workers=args.num_workers,
                      persistent_workers=args.num_workers > 0, generator=torch.Generator(),
                      pin_memory=args.device.type == "cuda")


def train_loader(train_set, args, sampler=None):
    """Shuffled, augmented batches of batch_size / N images per rank. sampler: see SeededSampler."""
    sampler = SeededSampler(len(train_set), args, sampler)
    return make_batches(train_set, sampler, sampler.share, args)


def clean_batches(image_set, args, rows=None):
    """Clean (images, targets) on the device: these rows of the set, or this rank's share r, r + N,
    ..., which is every image exactly once over all ranks."""
    rows = torch.arange(len(image_set))[args.rank::args.world_size] if rows is None else rows
    if image_set.in_memory():
        targets = torch.from_numpy(image_set.y)
        for batch in rows.split(500) if len(rows) else ():
            pixels = image_set.x[batch.to(image_set.x.device)]
            yield normalise(pixels, args), targets[batch].to(args.device)
    else:
        workers = args.num_workers if len(image_set) > 2000 else 0  # starting them takes a second
        keys = [(row, None) for row in rows.tolist()]
        yield from to_device(DataLoader(image_set, 250, sampler=keys, num_workers=workers,
                                        generator=torch.Generator(),
                                        pin_memory=args.device.type == "cuda"), args)


def to_device(loader, args):
    """The batches of a loader on the device, images in the fast channels_last layout."""
    try:
        for images, targets in loader:
            yield (images.to(args.device, non_blocking=True, memory_format=torch.channels_last),
                   targets.to(args.device, non_blocking=True))
    except InputError as error:  # from a worker process its traceback comes along: last line
        fail(str(error).strip().splitlines()[-1].split("InputError: ")[-1], everywhere=False)


@torch.no_grad()
def for_all_images(function, image_set, args):
    """function(images), which has a row for each image, for all clean images: (n, ...) float32, in
    the order of the set. Each rank computes its share, then all ranks get all rows. (Call the
    model's eval() before: after `fit` it is in training mode, and images move BatchNorm.)"""
    # A rank for which there is no image takes one along, which `gather` leaves out.
    rows = torch.arange(args.rank, max(len(image_set), args.rank + 1), args.world_size)
    shard = []
    # (Not compiled: the last batch is smaller, and would be compiled for itself.)
    with torch.compiler.set_stance("force_eager"):
        for images, _ in clean_batches(image_set, args, rows % len(image_set)):
            with autocast(args):
                shard.append(function(images).float())
    return gather(torch.cat(shard), len(image_set), args)


# ---------------------------------------------------------------------------------------------
# 5. The model in training
# ---------------------------------------------------------------------------------------------

def autocast(args):
    """bf16 or fp16 for the heavy operations where --amp asks for it; parameters stay float32."""
    return torch.autocast(args.device.type, torch.float16 if args.amp == "fp16" else torch.bfloat16,
                          enabled=args.amp != "none")


def make_backbone(args):
    """A timm model without head: images -> features (batch, num_features). Raises InputError."""
    import timm

    import resnet  # noqa: F401  (as above, for those who use a model without `setup`)
    options = dict(num_classes=0, pretrained=args.pretrained)
    try:
        try:  # transformers must know the size of their images; convolutional networks need not
            backbone = timm.create_model(args.backbone, img_size=args.input_size, **options)
        except TypeError:
            backbone = timm.create_model(args.backbone, **options)
        features = backbone.eval()(torch.zeros(2, 3, args.input_size, args.input_size))
    except Exception as error:
        raise InputError(f"--backbone {args.backbone} --input_size {args.input_size}"
                         f"{' --pretrained' * args.pretrained}: {str(error)[:300]}")
    backbone.num_features = features.shape[1]  # what comes out; some models announce another
    features.sum().backward()  # DDP waits for every gradient: leave out what is never used
    for parameter in backbone.parameters():
        parameter.requires_grad_(parameter.grad is not None).grad = None
    return backbone


def create_backbone(args):
    """The network of --backbone on the device, without head.

    On several GPUs BatchNorm takes its statistics over the global batch (SyncBatchNorm). torch
    has no such layer for the CPU: there each process normalises its own part of the batch.
    """
    backbone = together(lambda: make_backbone(args), args)  # a download may fail on one machine
    if args.distributed and args.device.type == "cuda" and args.sync_bn:
        from timm.layers import convert_sync_batchnorm
        backbone = convert_sync_batchnorm(backbone)
    backbone = backbone.to(args.device, memory_format=torch.channels_last)
    if args.compile:
        compile_backbone(backbone, args)
    return backbone


def compile_backbone(backbone, args):
    """Compile the backbone, which never changes, unlike the heads on top of it. On CUDA its kernels
    are recorded as a graph, so that Python need not launch them one by one."""
    backbone.compile(mode="reduce-overhead" if args.device.type == "cuda" else None)


def frozen_copy(model, args):
    """A copy that learns nothing, BatchNorm's running averages included."""
    model = copy.deepcopy(model).requires_grad_(False).eval()
    if args.compile:
        compile_backbone(model.backbone, args)
    return model


def distribute(model, args):
    """The model as it is called in training: its gradients are averaged over all ranks.

    Rank 0's parameters go to all ranks once, here. On the CPU BatchNorm's running averages drift
    apart during an epoch and are made equal at its end (`Run.end_epoch`).
    """
    if not args.distributed:
        return model
    on_gpu = [args.device] if args.device.type == "cuda" else None
    warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated")
    # Of 1 x 1 convolutions, whose strides can be written in two ways for the same layout.
    warnings.filterwarnings("ignore", message=r"Grad strides do not match[^[]*\[\d+, \d+, 1, 1\]")
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=on_gpu, broadcast_buffers=False, gradient_as_bucket_view=True)


def SGD(parameters, lr, args):
    """torch's SGD in its fused form, a few kernels for all weights. Not under fp16, where the first
    step may be skipped for an overflow: after that, fused momentum begins with arbitrary numbers
    (torch 2.15). Who sets gradients by hand gives them the layout of their weights: the fused form
    does not look."""
    return torch.optim.SGD(parameters, lr, args.momentum, weight_decay=args.weight_decay,
                           fused=True if args.amp != "fp16" else None)


def train_mode(model, resting):
    """The model ready to learn, but for the modules in `resting`, whose BatchNorm keeps still."""
    model.train()
    for module in resting:
        module.eval()


def step(loss, optimizer, scaler):
    """One step downhill. The scaler acts under --amp fp16 only: small gradients would become 0."""
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


@contextlib.contextmanager
def frozen(trainer, modules):
    """Inside, these modules of trainer.model learn nothing: no gradients, no running averages."""
    learning = [weight for module in modules for weight in module.parameters()
                if weight.requires_grad]
    for weight in learning:
        weight.requires_grad_(False)
    trainer.resting = modules
    try:
        yield
    finally:
        trainer.resting = []
        for weight in learning:
            weight.requires_grad_(True)


def average_batchnorm(model, args):
    """Make BatchNorm's running averages equal on all ranks: the mean over them, in one message.
    (One for each layer, as in `timm.utils.distribute_bn`, takes 40 times as long for ResNet-20.)"""
    buffers = [buffer for name, buffer in model.named_buffers() if "running_" in name]
    if args.distributed and buffers:
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        dist.all_reduce(flat)
        flat /= args.world_size
        for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers])):
            buffer.copy_(mean.view_as(buffer))


def global_mean(values, mask, args):
    """Mean of the values under the mask, over all ranks together, of which some may have none. A
    loss: DDP divides gradients by the number of ranks, so this is multiplied by it."""
    count = mask.sum()
    if args.distributed:
        dist.all_reduce(count)
    return (values * mask).sum() * args.world_size / count.clamp(min=1)


class Progress:
    """What rank 0 shows of the training: on a terminal a bar, else (in a log) a line a minute."""

    def __init__(self, args, increments, labels):
        """labels: of all training images, from which follows how much work each task is."""
        new = np.bincount(task_of_class(increments)[labels])[:args.stop_after_task]
        # Images an epoch. (An estimate: a memory may hold less, and a second fit is not counted.)
        self.work = new + args.memory_size * (np.arange(len(new)) > 0)
        self.tasks, self.silent, self.start = len(increments), args.rank > 0, None
        self.shown, self.bar = time.time(), None
        if not self.silent and sys.stderr.isatty():
            self.bar = tqdm(total=1, leave=False, bar_format="{desc} |{bar}| {percentage:.0f} %")

    def done(self, trainer, part):
        """The share of the run's work that is done when so much of this epoch is, both 0 to 1."""
        task = min(1, trainer.stage + (trainer.epoch + part) / trainer.run.num_epochs)
        return (self.work[:trainer.task].sum() + task * self.work[trainer.task]) / self.work.sum()

    def begin_epoch(self, trainer):
        if self.start is None:  # of this process: a resumed run may be half done already
            self.start = time.time(), self.done(trainer, 0)

    def due(self):
        """Whether to show something now; it has to be read from the device, which takes time."""
        return not self.silent and time.time() > self.shown + (0.5 if self.bar else 60)

    def show(self, trainer, part, averages):
        """averages: of the part of the epoch that is done (`Meter.read`)."""
        self.shown, done = time.time(), self.done(trainer, part)
        began, before = self.start
        later = f" stage {trainer.stage + 1}" * (trainer.stage > 0)
        if later and done in (before, 1):  # no one knows how long it is
            ending = "the last stage"
        else:
            left = (self.shown - began) * (1 - done) / max(done - before, 1e-9)  # seconds
            ending = f"{datetime.timedelta(seconds=round(left))} left"
        text = (f"task {trainer.task + 1}/{self.tasks}{later} epoch {trainer.epoch + 1}/"
                f"{trainer.run.num_epochs}: loss {averages['loss']:.3f}, "
                f"accuracy {averages['train_accuracy']:.1f} %, "
                f"{averages['images_per_second']:.0f} images/s, {ending}")
        if self.bar:
            self.bar.n = done
            self.bar.set_description_str(text)
        else:
            print(text, flush=True)


class Meter:
    """Loss and accuracy of an epoch. The sums stay on the device: they are read at the end, and
    when there is something to show, so no step waits for the GPU."""

    def __init__(self, trainer, steps):
        self.trainer, self.steps, self.done, self.start = trainer, steps, 0, time.time()
        # loss, correct, images of this rank
        self.sums = torch.zeros(3, device=trainer.args.device)
        trainer.run.progress.begin_epoch(trainer)

    def update(self, loss, logits, targets):
        correct = (logits.detach().argmax(dim=1) == targets).sum()
        images = torch.full_like(correct, len(targets))
        self.sums += torch.stack([loss.detach().float() * len(targets), correct, images])
        self.done += 1
        progress = self.trainer.run.progress
        if progress.due():  # as if the other ranks had the same
            progress.show(self.trainer, self.done / self.steps,
                          self.read(self.sums * self.trainer.args.world_size))

    def read(self, sums):
        (loss, correct, images), seconds = sums.tolist(), time.time() - self.start
        return {"loss": loss / images, "train_accuracy": 100 * correct / images,
                "images": int(images), "seconds": seconds, "images_per_second": images / seconds}

    def averages(self):
        """{"loss", "train_accuracy" (%), "images", "seconds", "images_per_second"} of all ranks."""
        if self.trainer.args.distributed:
            dist.all_reduce(self.sums)
        return self.read(self.sums)


def extract_features(model, image_set, args):
    """Features of the clean images: (n, embed_dim) float32 on the CPU, the same on every rank."""
    model.eval()
    return for_all_images(lambda images: model(images)[1], image_set, args).cpu()


def select_exemplars(trainer, new_data, m, herding):
    """(Up to) m exemplars of each class of new_data, as a list of ImageSets, best images first.

    barycenter: herding(features, m); cluster: nearest to the class mean first; entropy: where the
    answer is least certain; first: in the order of the data; random: any. Rank 0 decides for all,
    also where the machines of a launch round differently.
    """
    args, model, exemplars = trainer.args, trainer.model, []
    features = extract_features(model, new_data, args)
    for label in np.unique(new_data.y) if m else ():
        rows = torch.from_numpy(new_data.y == label).nonzero()[:, 0]
        own = features[rows]
        if args.herding_method == "barycenter":
            best = herding(own, m)
        elif args.herding_method == "cluster":
            best = (own - own.mean(dim=0)).norm(dim=1).argsort(stable=True)
        elif args.herding_method == "entropy":
            chances = model.fc(own.to(args.device)).detach().softmax(dim=1).cpu()
            best = torch.special.entr(chances).sum(dim=1).argsort(descending=True, stable=True)
        else:  # random, first
            best = torch.randperm(len(rows)) if args.herding_method == "random" else slice(None)
        rows = rows[best][:m]
        if args.distributed:
            dist.broadcast(rows, src=0)
        exemplars.append(new_data.select(rows.numpy()))
    return exemplars


# ---------------------------------------------------------------------------------------------
# 6. Evaluation
# ---------------------------------------------------------------------------------------------

def task_of_class(increments):
    """The number of the task that each class came with: (classes,)."""
    return torch.repeat_interleave(torch.arange(len(increments)), torch.tensor(increments))


def evaluate(trainer, predict=None):
    """`score` on the test images of all tasks so far, each image counted once over all ranks, with
    the answers of `predict`: the trainer's own, or another."""
    test_set = trainer.run.test_scenario.images(slice(0, trainer.task + 1))
    trainer.model.eval()
    logits = for_all_images(predict or trainer.predict, test_set, trainer.args).cpu()
    return score(logits, torch.from_numpy(test_set.y), trainer.run.increments[:trainer.task + 1])


def score(logits, targets, increments):
    """What the answers are worth. logits: (n, columns), a column for each class so far, and perhaps
    for classes of tasks to come, which may compete; targets: (n,); increments: of the tasks so far.

    Returns, in percent, "acc1" and "acc5" on all images; "accuracy" and "task_aware", lists of each
    task; "cumulative", a list: of the tasks 1 to k, with only their classes as answers;
    "task_inference": the share of answers in the right task. And "confusion": row i, column j
    counts images of class i that were taken for class j.
    """
    from sklearn.metrics import confusion_matrix
    total, columns, tasks = sum(increments), logits.shape[1], range(len(increments))
    # Classes to come belong to no task so far.
    task_of = torch.cat([task_of_class(increments), torch.full((columns - total,), len(tasks))])
    task, predicted = task_of[targets], logits.argmax(dim=1)
    right = predicted == targets
    top5 = (logits.topk(min(5, total)).indices == targets[:, None]).any(dim=1)
    own = logits.masked_fill(task[:, None] != task_of, -math.inf).argmax(dim=1) == targets
    so_far = [logits[:, :end].argmax(dim=1) == targets for end in np.cumsum(increments)]

    def percent(hits):
        return 100 * hits.double().mean().item()

    return {"acc1": percent(right), "acc5": percent(top5),
            "accuracy": [percent(right[task == u]) for u in tasks],
            "task_aware": [percent(own[task == u]) for u in tasks],
            "cumulative": [percent(so_far[k][task <= k]) for k in tasks],
            "task_inference": percent(task_of[predicted] == task),
            "confusion": confusion_matrix(targets, predicted,
                                          labels=range(columns))[:total].tolist()}


def forgetting(matrix):
    """Mean over the old tasks u of max_{t<T} a[t][u] - a[T][u], percent points (Chaudhry et al.,
    ECCV 2018). matrix: row t, after task t, has t + 1 entries. 0 after the first task."""
    last = len(matrix) - 1
    drops = [max(row[u] for row in matrix[u:last]) - matrix[last][u] for u in range(last)]
    return sum(drops) / len(drops) if drops else 0.0


# ---------------------------------------------------------------------------------------------
# 7. What a run leaves on disk
# ---------------------------------------------------------------------------------------------

# The trainer's own version, in every results.json: another one may draw other random numbers.
VERSION = "2"
# What results.json keeps of `score` after each task: one entry, or one row, for a task.
HISTORY = {"acc1s": "acc1", "acc5s": "acc5", "accuracy_matrix": "accuracy",
           "task_aware_matrix": "task_aware", "cumulative_matrix": "cumulative",
           "task_inference": "task_inference"}
MAY_DIFFER = {"resume", "output_dir", "num_workers", "stop_after_task", "plots", "device"}
# What a checkpoint may hold beside tensors, numbers and texts: np.float64, which a schedule of your
# own, or a number that `train_epoch` returns, becomes too easily.
NUMPY_NUMBERS = [np.float64(0).__reduce__()[0], np.dtype, *(
    type(np.dtype(kind)) for kind in (bool, int, float))]
# A checkpoint is written at the end of an epoch if the last one is older than this.
CHECKPOINT_SECONDS = 30


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
        fail(f"{path} could not be written ({error.strerror}); what was there before is still "
             "whole", everywhere=False)


def write_tensors(path, content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


class Run:
    """The output directory of a run: log.jsonl, checkpoint.pt, results.json, model.pt and plots.

    Rank 0 reads and writes; all ranks hold the same results. A checkpoint is written at the end of
    each fit, and within it after an epoch if half a minute has passed. What comes after the last
    epoch of a task (herding, alignment, evaluation) is computed again when a run is resumed there,
    with the same result.
    """

    def __init__(self, trainer, scenario, test_scenario):
        import timm
        global last_words
        args = self.args = trainer.args
        self.scenario, self.test_scenario = scenario, test_scenario
        self.scaler = torch.amp.GradScaler(args.device.type, enabled=args.amp == "fp16")
        method = type(trainer).__name__
        if method == "CilTrainer":  # WA itself, or a copy of template.py, which goes by its name
            file = Path(inspect.getfile(type(trainer))).stem
            method = "WA" if file == "template" else file
        cuda = args.device.type == "cuda"
        self.start = self.saved_at = time.time()
        self.images, self.train_seconds, self.log = 0, 0.0, []
        self.increments = scenario.increments
        self.results = {
            "method": method, "args": args.config, "increments": self.increments,
            "class_order": scenario.class_order,
            "class_names": scenario.class_names, **{key: [] for key in HISTORY}, "gammas": [],
            "world_size": args.world_size,
            "device": torch.cuda.get_device_name() if cuda else args.device.type,
            "versions": {"trainer": VERSION, "python": sys.version.split()[0],
                         "torch": str(torch.__version__), "timm": timm.__version__,
                         "numpy": np.__version__}}
        self.checkpoint = last_words = None  # (an earlier run in this process may have left some)
        together(lambda: args.rank or self.open_directory(method), args)
        self.checkpoint = from_rank_0(self.checkpoint, args)  # only its machine needs the file
        self.first_task = self.checkpoint["task"] if self.checkpoint else 0
        if args.rank == 0:
            if self.checkpoint:
                self.note_saved(*(self.checkpoint[name] for name in ("task", "stage", "epoch")))
            print(f"{self.dir}: {method} on {args.data_set}, {len(self.increments)} tasks, "
                  f"{sum(self.increments)} classes, {args.num_epochs} epochs a task, "
                  f"{args.world_size} process{'es' * (args.world_size > 1)} on "
                  f"{self.results['device']}, {settings(args)}", flush=True)
            if self.checkpoint:
                print(last_words, flush=True)
        self.progress = Progress(args, self.increments, scenario.data.y)

    def note_saved(self, task, stage, epoch):
        """Prepare the last words of `end_at_signals`."""
        global last_words
        later = f"stage {stage + 1}, " * (stage > 0)
        last_words = (f"saved to {self.dir} up to task {task + 1}, {later}epoch {epoch}; go on "
                      "with --resume")

    def open_directory(self, method):
        """Make or find the directory, and read the checkpoint of a resumed run. InputError: the
        directory, or what it holds, cannot be used."""
        args = self.args
        name = f"{method}_{args.data_set}_b{args.num_bases}_inc{args.increment}_seed{args.seed}_"
        now = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"  # of several runs in one second
        self.dir = Path(args.output_dir or f"runs/{name}{now}")
        if args.resume and not args.output_dir:  # the newest run of this kind, if there is one
            self.dir = max((file.parent for file in Path("runs").glob(f"{name}*/checkpoint.pt")),
                           default=self.dir)
        self.lock = filelock.FileLock(self.dir / ".lock")
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=6)  # freed by the system at our end; workers follow in 5 s
        except filelock.Timeout:
            raise InputError(f"--output_dir {self.dir}: another run is writing there") from None
        except OSError as error:
            raise InputError(f"--output_dir {self.dir}: not a directory that can be written "
                             f"({error.strerror})") from None
        found = [name for name in ("checkpoint.pt", "results.json", "model.pt", "log.jsonl")
                 if (self.dir / name).exists()]
        if found and not args.resume:
            raise InputError(f"--output_dir {self.dir} already holds {found[0]}: pass --resume to "
                             "continue that run, or name another directory")
        if "checkpoint.pt" in found:
            return self.read_checkpoint(self.dir / "checkpoint.pt")
        log, results = self.dir / "log.jsonl", self.dir / "results.json"
        try:
            before = json.loads(results.read_text())
            done, changed = len(before["acc1s"]), self.changed_since(before)
        except (OSError, ValueError, KeyError, TypeError):
            done, changed = 0, []
        if changed:
            raise InputError(f"--resume: {self.dir} holds a run with {', '.join(changed)}; use the "
                             "same command, or another --output_dir")
        if found and (not log.exists() or f'"task": {done},' in log.read_text()):
            raise InputError(f"--resume: {self.dir} holds {found[0]} but no checkpoint.pt to go on "
                             "from; name another --output_dir")
        # A new run, or our own, which ended before its first checkpoint: begin again.
        write_file(log, b"")

    def changed_since(self, before):
        """What is not as in the results of before, in words; [] if this is the same run."""
        config, mine = before["args"], self.args.config
        changed = [f"--{name} {config.get(name)} (now {mine[name]})" for name in mine
                   if name not in MAY_DIFFER and config.get(name) != mine[name]]
        return changed + [name for name in ("method", "increments", "class_order")
                          if before.get(name) != self.results[name]]

    def read_checkpoint(self, path):
        try:  # weights_only: a checkpoint from a stranger runs no code
            with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY_NUMBERS):
                warnings.simplefilter("ignore")
                saved = torch.load(path, map_location="cpu", weights_only=True)
            changed = self.changed_since(saved["results"])
            version, data = saved["results"]["versions"]["trainer"], saved["data"]
        except Exception as error:
            raise InputError(f"--resume: {path} is no whole checkpoint of this trainer "
                             f"({type(error).__name__}); name another --output_dir") from None
        changed += ["other images"] * (data != self.scenario.fingerprint)
        changed += ["another version of the trainer"] * (version != VERSION)
        if changed:
            raise InputError(f"--resume: {path} was made with {', '.join(changed)}; use the same "
                             "command, or another --output_dir")
        if saved["task"] >= (self.args.stop_after_task or math.inf):
            raise InputError(f"--stop_after_task {self.args.stop_after_task}: {path} is in task "
                             f"{saved['task'] + 1} already")
        self.checkpoint = saved

    def restore(self, trainer):
        """In the task of the checkpoint, if there is one: put its weights, teacher and exemplars
        into the trainer, whose model has the right shape by now."""
        saved = self.checkpoint
        if not saved or trainer.task != saved["task"]:
            return
        trainer.model.load_state_dict(saved["model"])
        if trainer.teacher is not None:
            trainer.teacher.load_state_dict(saved["teacher"])
        self.scaler.load_state_dict(saved["scaler"])
        trainer.exemplars = [self.scenario.data.select(rows.numpy()) for rows in saved["exemplars"]]
        now = {key: self.results[key] for key in ("args", "world_size", "device", "versions")}
        self.results.update({**saved["results"], **now})
        self.images, self.train_seconds = saved["images"], saved["train_seconds"]
        self.start, self.log = time.time() - saved["seconds"], saved["log"]
        if self.args.rank == 0:  # without what came after the checkpoint, and a torn last line
            lines = [json.dumps(line) + "\n" for line in self.log]
            write_file(self.dir / "log.jsonl", "".join(lines).encode())

    def restore_fit(self, trainer, optimizer, scheduler, num_epochs):
        """The number of epochs of this fit that are done: 0, or after a --resume those of the
        checkpoint, whose weights, optimizer and schedule are loaded, or all of an earlier fit."""
        saved, epochs = self.checkpoint, 0
        place = (trainer.task, trainer.stage)
        if saved and place < (saved["task"], saved["stage"]):
            epochs = num_epochs
        elif saved and place == (saved["task"], saved["stage"]):
            # Again: before a second stage a method may have changed weights, drawn heads anew.
            trainer.model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])
            epochs = saved["epoch"]
        self.num_epochs, self.lr = num_epochs, scheduler.get_last_lr()[0]
        set_seed(self.args, *place, epochs)  # as end_epoch leaves the generators
        return epochs

    def end_epoch(self, trainer, averages, optimizer, scheduler):
        """Make BatchNorm's averages equal on all ranks, log the epoch, and write a checkpoint if it
        was the last of a fit, or half a minute has passed since the one before.

        averages: what `train_epoch` returns. All that is in it goes to log.jsonl, also numbers,
        lists and tensors of your own; "loss", "images" and "seconds" must be."""
        args = self.args
        weights = torch.stack([p.detach().abs().max() for p in trainer.model.parameters()
                               if p.numel()])
        if not (math.isfinite(averages["loss"]) and weights.isfinite().all()):
            fail(f"the loss ({averages['loss']}) or a weight left the finite numbers in task "
                 f"{trainer.task + 1}, epoch {trainer.epoch}, --lr {args.lr}: try a smaller one; "
                 f"{last_words or 'nothing is saved yet'}")
        average_batchnorm(trainer.model, args)
        if args.eval_every_epoch and trainer.epoch % args.eval_every_epoch == 0:
            averages["test_accuracy"] = evaluate(trainer)["acc1"]
        # From here to the next epoch all ranks draw the same numbers.
        set_seed(args, trainer.task, trainer.stage, trainer.epoch)
        self.images += averages["images"]
        self.train_seconds += averages["seconds"]
        if args.rank:
            return
        numbers = {name: value.tolist() if hasattr(value, "tolist") else value  # tensors, arrays
                   for name, value in averages.items()}
        line = {"task": trainer.task + 1, "stage": trainer.stage + 1, "epoch": trainer.epoch,
                **numbers, "lr": self.lr}
        self.log.append(line)
        try:
            with open(self.dir / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            fail(f"{self.dir / 'log.jsonl'} could not be written ({error.strerror})",
                 everywhere=False)
        self.lr = scheduler.get_last_lr()[0]  # of the next epoch
        last = trainer.epoch == self.num_epochs or max(scheduler.get_last_lr()) == 0
        if last or time.time() > self.saved_at + CHECKPOINT_SECONDS:
            self.write_checkpoint(trainer, optimizer, scheduler)

    def write_checkpoint(self, trainer, optimizer, scheduler):
        self.saved_at = time.time()
        if any((images.rows < 0).any() for images in trainer.exemplars):
            fail("a checkpoint holds the numbers of the exemplars, so they must be images of the "
                 "training set, chosen by `select`", everywhere=False)
        write_tensors(self.dir / "checkpoint.pt", {
            "task": trainer.task, "stage": trainer.stage, "epoch": trainer.epoch,
            "model": trainer.model.state_dict(),
            "teacher": trainer.teacher and trainer.teacher.state_dict(),
            "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
            "scaler": self.scaler.state_dict(), "data": self.scenario.fingerprint,
            "exemplars": [torch.from_numpy(images.rows) for images in trainer.exemplars],
            "results": self.results, "log": self.log, "images": self.images,
            "train_seconds": self.train_seconds, "seconds": time.time() - self.start})
        self.note_saved(trainer.task, trainer.stage, trainer.epoch)

    def end_task(self, trainer, scores):
        """Add a row to the accuracy matrix, print one line, write results.json."""
        results, done = self.results, trainer.task + 1
        for key, name in HISTORY.items():
            results[key] = results[key] + [scores[name]]
        results.update(
            confusion=scores["confusion"], finished=done == len(self.increments),
            average_incremental_accuracy=sum(results["acc1s"]) / done,
            last_accuracy=scores["acc1"], forgetting=forgetting(results["accuracy_matrix"]),
            parameters=sum(weight.numel() for weight in trainer.model.parameters()),
            seconds=time.time() - self.start,
            images_per_second=self.images / max(self.train_seconds, 1e-9))
        if self.args.rank == 0:
            tqdm.write(f"task {done}/{len(self.increments)}: {scores['acc1']:.2f} % of the test "
                       f"images of {sum(self.increments[:done])} classes right")
            sys.stdout.flush()
            write_file(self.dir / "results.json", json.dumps(results).encode())

    def finish(self, trainer):
        """Plots, model.pt, the final table and the paths of the files; leave the process group."""
        results, args = self.results, self.args
        if args.rank == 0:
            # Once more: a subclass may have added to it at the end of the last task.
            write_file(self.dir / "results.json", json.dumps(results).encode())
            mean, std, _ = get_statistics(args)
            write_tensors(self.dir / "model.pt", {
                "args": args.config, "mean": list(mean), "std": list(std),
                "increments": self.increments[:trainer.task + 1],
                "class_order": results["class_order"], "class_names": results["class_names"],
                "state_dict": trainer.model.state_dict()})
            files = self.scenario.files
            if files is not None and trainer.exemplars:  # which images to keep
                kept = {results["class_names"][images.y[0]]: files[images.rows].tolist()
                        for images in trainer.exemplars if len(images)}
                write_file(self.dir / "exemplars.json", json.dumps(kept, indent=1).encode())
            if args.plots:
                for name, draw in ("accuracy", plot_accuracy), ("confusion", plot_confusion):
                    buffer = io.BytesIO()
                    draw(results).savefig(buffer, dpi=120)
                    write_file(self.dir / f"{name}.png", buffer.getvalue())
            if self.progress.bar:
                self.progress.bar.close()
            self.print_table()
            self.lock.release()
        if args.distributed:
            dist.barrier()
            dist.destroy_process_group()

    def print_table(self):
        """The accuracy matrix, the averages, what seems wrong, and the files of the run."""
        results = self.results
        tasks = range(1, len(results["acc1s"]) + 1)
        print("\ntest accuracy (%)\nafter task" + "".join(f"  task {u:<2}" for u in tasks)
              + "   all")
        for t, row, acc1 in zip(tasks, results["accuracy_matrix"], results["acc1s"]):
            cells = [f"{a:8.2f}" for a in row] + [" " * 8] * (len(tasks) - t)
            print(f"{t:>10}" + "".join(cells) + f"{acc1:8.2f}")
        print(f"average incremental accuracy {results['average_incremental_accuracy']:.2f} %, "
              f"last {results['last_accuracy']:.2f} %, forgetting {results['forgetting']:.2f} "
              f"points, {results['seconds']:.0f} s\n")
        for task in tasks:
            lines = [line for line in self.log if line["task"] == task and line["stage"] == 1
                     and "train_accuracy" in line]
            best = max((line["train_accuracy"] for line in lines), default=100)
            # What a network gets right that always gives the same answer.
            largest = np.bincount(self.scenario.images(task - 1).y).max()
            chance = max((100 * largest / line["images"] for line in lines), default=0)
            if best < chance + (100 - chance) / 10 < 100:
                print(f"note: in task {task} not even the training images were learned ({best:.1f} "
                      "% right at best): try a smaller --lr and --batch_size, --aa none, or more "
                      "epochs")
        if not results["finished"]:
            print(f"stopped after task {tasks[-1]} of {len(self.increments)} (--stop_after_task): "
                  f"without this flag, and with --output_dir {self.dir} --resume, the run goes on")
        print(*sorted(f for f in self.dir.iterdir() if f.name[0] != "."), sep="\n", flush=True)


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
