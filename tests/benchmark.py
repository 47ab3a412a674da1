"""How fast is the trainer? Images per second at CIFAR size, beside a plain loop in the same run.

    python tests/benchmark.py                   # CPU, bf16, about two minutes
    python tests/benchmark.py --device cuda

The plain loop is what a first script looks like: float32, NCHW, `.item()` every step, and images
that are augmented one by one through PIL. Both train ResNet-32 on batches of 128. The images are
random, written as PNG files or held in memory, so no data set is needed. Read the ratios: absolute
numbers change with whatever else the machine is doing.
"""
import argparse
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import template  # noqa: E402
import utils  # noqa: E402


def rate(step, images, warmup, args):
    """Images per second of step(), which trains or reads `images` images."""
    for _ in range(warmup):
        step()
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=25, help="batches of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many is printed")
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--aa", default="none")
    parser.add_argument("--folder", action="store_true", help="PNG files instead of memory")
    mine = parser.parse_args()
    flags = ["--data_set=cifar100", f"--aa={mine.aa}", "--amp=bf16", f"--device={mine.device}",
             f"--num_workers={mine.num_workers}"]
    args = utils.setup(utils.get_parser().parse_args(flags))
    size = 128 * mine.steps
    draw = np.random.RandomState(0)
    x = draw.randint(0, 256, (size, 32, 32, 3)).astype(np.uint8)
    y = draw.randint(0, 50, size)
    with tempfile.TemporaryDirectory() as folder:
        if mine.folder:
            paths = [f"{folder}/{i}.png" for i in range(size)]
            for path, pixels in zip(paths, x):
                Image.fromarray(pixels).save(path)
            x = np.array(paths, dtype=np.dtypes.StringDType())
        measure(args, utils.ImageSet(utils.hold(x, True, args), y, args), utils.ImageSet(x, y, args),
                size, mine)


def measure(args, images, as_they_come, size, mine):
    trainer = template.CilTrainer(args)
    trainer.expand_model(50, images)
    trainer.parallel_model, trainer.task, trainer.epoch = trainer.model, 0, 0
    silent = SimpleNamespace(begin_epoch=lambda trainer: None, due=lambda: False)
    trainer.run = SimpleNamespace(increments=[50], progress=silent,
                                  scaler=torch.amp.GradScaler("cpu", enabled=False))
    loader = utils.train_loader(images, args)
    plain_loader = torch.utils.data.DataLoader(as_they_come, 128, shuffle=True, drop_last=True,
                                               num_workers=mine.num_workers)
    optimizer, _ = trainer.make_optimizer(trainer.model.parameters(), 1, 0.01)
    batch = next(utils.to_device(loader, args))

    plain_args = argparse.Namespace(**{**vars(args), "amp": "none"})
    plain_model = template.CilModel(timm.create_model("resnet32", num_classes=0))
    plain_model.fc.expand(50)
    plain_model.to(args.device)
    plain_optimizer = torch.optim.SGD(plain_model.parameters(), 0.01, 0.9)

    def plain_step(x, y):
        logits, _ = plain_model(x)
        loss = F.cross_entropy(logits, y)
        plain_optimizer.zero_grad()
        loss.backward()
        plain_optimizer.step()
        return loss.item()

    def plain_epoch():
        plain_model.train()
        for x, y in plain_loader:
            plain_step(x.to(args.device), y.to(args.device))

    def compute():
        trainer.model.train()
        for _ in range(mine.steps):
            with utils.autocast(args):
                loss, _ = trainer.compute_loss(*batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def plain_compute():
        plain_model.train()
        x, y = batch[0].contiguous(), batch[1]
        for _ in range(mine.steps):
            plain_step(x, y)

    plain = SimpleNamespace(**vars(trainer))
    plain.args, plain.model = plain_args, plain_model
    plain.predict = lambda x: plain_model(x.contiguous())[0]

    def select(of):
        return utils.select_exemplars(of, images, 20, template.herding)

    def whole_pass(batches):
        for _ in batches:
            pass

    # evaluate() asks for the test images of all tasks so far. (plain has the same run.)
    trainer.run.test_scenario = SimpleNamespace(images=lambda tasks: images)
    rows = [
        ("loading and augmenting", lambda: whole_pass(loader), lambda: whole_pass(plain_loader)),
        ("training, data included", lambda: trainer.train_epoch(loader, optimizer), plain_epoch),
        ("training, compute alone", compute, plain_compute),
        ("evaluation", lambda: utils.evaluate(trainer), lambda: utils.evaluate(plain)),
        ("herding, 20 per class", lambda: select(trainer), lambda: select(plain)),
    ]
    threads = torch.get_num_threads()
    print(f"{args.device.type}, {threads} threads, {args.num_workers} workers, torch "
          f"{torch.__version__}, ResNet-32, batch 128, images per second (median of {mine.rounds})")
    print(f"{'':26}{'here: bf16 + channels_last':>28}{'plain float32 NCHW':>22}{'ratio':>8}")
    for name, ours, theirs in rows:
        pairs = [(rate(ours, size, 1, args), rate(theirs, size, 1, args)) for _ in range(mine.rounds)]
        a, b = np.median(pairs, axis=0)
        ratio = np.median([ours / theirs for ours, theirs in pairs])
        print(f"{name:26}{a:28.0f}{b:22.0f}{ratio:8.2f}", flush=True)


if __name__ == "__main__":
    main()
