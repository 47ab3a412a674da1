"""The measurements behind the chapters that no plain run makes. Each writes one file of results/.

    python -m tutorial.tools.measure norms RUN       # chapter 8: prototypes before and after alignment
    python -m tutorial.tools.measure border RUN      # chapter 8: other factors in the place of gamma
    python -m tutorial.tools.measure exemplars RUN   # chapter 6: choices of exemplars in feature space
    python -m tutorial.tools.measure ranks RUN       # chapter 11: what each rank would choose alone
    python -m tutorial.tools.measure speed           # chapter 12: where the time goes (CPU, minutes)
    python -m tutorial.tools.measure adaptation RUN  # chapter 20: iTAML's, at other rates
    python -m tutorial.tools.measure alta            # chapter 21: tiny CLIP, speed of prompts, minutes

RUN is the output directory of a run of template.py (or itaml) with at least one task done. If its
data lie elsewhere now, as those of a run from another machine, say so with --data_path.
"""
import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import PCA

import utils
from template import CilTrainer, herding
from tutorial.tools.use import load

RESULTS = Path(__file__).resolve().parents[1] / "results"


def write(name, content):
    content["versions"] = {"torch": str(torch.__version__), "numpy": np.__version__}
    short = json.loads(json.dumps(content), parse_float=lambda text: round(float(text), 5))
    (RESULTS / f"{name}.json").write_text(json.dumps(short) + "\n")
    print(RESULTS / f"{name}.json")


def load_run(mine):
    """The arguments, results and trained model of a run, and its scenarios, train and test."""
    results = json.loads((mine.run / "results.json").read_text())
    args = argparse.Namespace(**results["args"])
    args.data_path, args.device = mine.data_path or args.data_path, "cpu"
    args = utils.setup(args)
    model, _, _ = load(mine.run / "model.pt")
    return args, results, model, utils.build_scenarios(args)


def norms(mine):
    """|w_c| of each class after the last task; before alignment the new were 1 / gamma longer."""
    args, results, model, _ = load_run(mine)
    after = torch.cat([head.weight for head in model.fc.heads]).norm(dim=1).tolist()
    nb_new, gamma = results["increments"][-1], results["gammas"][-1]
    before = after[:-nb_new] + [norm / gamma for norm in after[-nb_new:]]
    write(f"norms_{args.data_set}", {"data_set": args.data_set, "seed": args.seed, "gamma": gamma,
                                     "nb_new": nb_new, "before": before, "after": after})


def border(mine):
    """Test accuracy after the last task of a run of WA (--stop_after_task makes any task the last)
    if the new prototypes were as training left them, times a factor of one's choice. The file goes
    by the name of RUN, as reproduce.py names it."""
    args, results, model, (_, test) = load_run(mine)
    heads, gamma = model.fc.heads, results["gammas"][-1]
    images = test.images(slice(0, len(heads)))
    features, labels = utils.extract_features(model, images, args), torch.from_numpy(images.y)
    known = sum(len(head.bias) for head in heads[:-1])
    old = labels < known
    weights = torch.cat([head.weight for head in heads])
    weights[known:] /= gamma  # before alignment
    biases = torch.cat([head.bias for head in heads])
    # The new logits without their bias: what the factor multiplies.
    products = features @ weights.T
    rows = []
    for factor in np.arange(30, 151, 5) / 100:
        logits = products * torch.where(torch.arange(len(biases)) < known, 1, factor) + biases
        right = (logits.argmax(1) == labels).double() * 100
        rows.append({"factor": factor, "old": right[old].mean().item(),
                     "new": right[~old].mean().item(), "all": right.mean().item()})
    write(f"border_{mine.run.name}", {
        "data_set": args.data_set, "epochs": args.num_epochs, "task": len(heads), "gamma": gamma,
        "rows": rows,
        "logits_of_old_images": {  # their means, and what they are made of
            "old_products": products[old][:, :known].mean().item(),
            "new_products": products[old][:, known:].mean().item(),
            "old_biases": biases[:known].mean().item(),
            "new_biases": biases[known:].mean().item()}})


def exemplars(mine, draws=200):
    """How close the mean of m exemplars comes to the class mean, for the first class learned, and
    a flat picture (PCA) of its features with the first ten choices of herding."""
    args, results, model, (scenario, _) = load_run(mine)
    images = scenario.images(0)
    images = images.select(np.flatnonzero(images.y == 0))
    raw = utils.extract_features(model, images, args)
    features = torch.nn.functional.normalize(raw)
    mean, n = features.mean(0), len(features)
    order = {"herding": torch.tensor(herding(raw, n)),  # as utils.select_exemplars chooses
             "cluster": (raw - raw.mean(0)).norm(dim=1).argsort(stable=True)}

    def distances(rows):  # of the mean of the first 1, 2, ..., n rows to the class mean
        running = features[rows].cumsum(0) / torch.arange(1, n + 1)[:, None]
        return (running - mean).norm(dim=1)

    generator = torch.Generator().manual_seed(0)
    random = torch.stack([distances(torch.randperm(n, generator=generator)) for _ in range(draws)])
    flat = PCA(2, svd_solver="full").fit(features.numpy())
    write(f"exemplars_{args.data_set}", {
        "data_set": args.data_set, "class": results["class_names"][0], "images": n,
        "distance": {**{name: distances(rows).tolist() for name, rows in order.items()},
                     "random": random.mean(0).tolist()},
        "random_std": random.std(0).tolist(), "draws": draws,
        "points": flat.transform(features.numpy()).tolist(),
        "mean": flat.transform(mean[None].numpy())[0].tolist(),
        "explained": float(flat.explained_variance_ratio_.sum()),
        "chosen": {name: rows[:10].tolist() for name, rows in order.items()}})


def ranks(mine, m=20, processes=8):
    """The naive way: every rank herds from features of its own augmented images. One process
    plays all ranks, which differ in the seeds of their augmentations alone."""
    args, results, model, (scenario, _) = load_run(mine)
    new_data, rows = scenario.images(len(results["increments"]) - 1), []
    for aa in sorted({"none", args.aa, "rand-m9-mstd0.5-inc1-mmax9"}):
        args.aa = aa
        images = utils.ImageSet(new_data.x, new_data.y, args)
        chosen = []  # of each rank: a set of rows for each class
        for rank in range(processes):
            seeds = np.random.SeedSequence([rank]).generate_state(len(images)).tolist()
            sampler = list(zip(range(len(images)), seeds))
            loader = torch.utils.data.DataLoader(images, 256, sampler=sampler)
            with torch.no_grad(), utils.autocast(args):
                batches = [model(x)[1].float() for x, _ in utils.to_device(loader, args)]
            features = torch.cat(batches)
            classes = [np.flatnonzero(images.y == label) for label in np.unique(images.y)]
            chosen.append([set(c[herding(features[c], m)]) for c in classes])
        shared = [len(a & b) / m for one, other in itertools.combinations(chosen, 2)
                  for a, b in zip(one, other)]
        rows.append({"aa": aa, "shared_by_two": float(np.mean(shared)), "different_images": {
            n: float(np.mean([len(set().union(*sets)) for sets in zip(*chosen[:n])]))
            for n in (1, 2, 4, processes)}})
    write(f"ranks_{args.data_set}", {"data_set": args.data_set, "m": m, "rows": rows,
                                     "classes": results["increments"][-1]})


def speed(mine, steps=20, rounds=3):
    """Images per second of ResNet-32 on batches of 128 images of 32 x 32, one change at a time,
    and the parts of a step. Alternating rounds, the median of each: the ratios are what counts."""
    torch.manual_seed(0)
    args = utils.setup(utils.get_parser().parse_args(
        ["--data_set=cifar100", "--num_workers=0", "--device=cpu"]))
    cores = utils.available_cores()
    torch.set_num_threads(cores)
    pixels = np.random.RandomState(0).randint(0, 256, (128 * steps, 32, 32, 3)).astype(np.uint8)
    y = np.random.RandomState(1).randint(0, 50, len(pixels))

    def make_step(layout, amp, compiled):
        """One training step on a fixed batch, and the seconds of its parts."""
        one = SimpleNamespace(**{**vars(args), "amp": amp, "compile": compiled})
        trainer = CilTrainer(one)
        trainer.model.fc.expand(50)
        trainer.model.to(memory_format=layout)
        optimizer, _ = trainer.make_optimizer(trainer.model.parameters(), 1, 0.01)
        trainer.parallel_model = utils.distribute(trainer.model, one)
        images = torch.randn(128, 3, 32, 32).to(memory_format=layout)
        targets = torch.from_numpy(y[:128])
        trainer.model.train()

        def step():
            marks = [time.perf_counter()]
            with utils.autocast(one):
                loss, _ = trainer.compute_loss(images, targets)
            marks.append(time.perf_counter())
            optimizer.zero_grad()
            loss.backward()
            marks.append(time.perf_counter())
            optimizer.step()
            marks.append(time.perf_counter())
            return np.diff(marks)
        return step

    nchw, nhwc = torch.contiguous_format, torch.channels_last
    stages = {"float32, NCHW": make_step(nchw, "none", False),
              "channels_last": make_step(nhwc, "none", False),
              "channels_last + bf16": make_step(nhwc, "bf16", False),
              "channels_last + bf16 + compile": make_step(nhwc, "bf16", True)}
    parts, compile_seconds = {name: [] for name in stages}, 0
    for name, step in stages.items():  # warm-up
        before = time.perf_counter()
        step(), step()
        compile_seconds = time.perf_counter() - before  # of the last one, the compiled
    for _ in range(rounds):
        for name, step in stages.items():
            parts[name].append(np.sum([step() for _ in range(steps)], axis=0) / steps)
    compute = [{"what": name, "images_per_second": 128 / float(np.median([p.sum() for p in found])),
                **dict(zip(("forward", "backward", "optimizer"),
                           np.median(found, axis=0).tolist()))} for name, found in parts.items()]
    loading = []
    strong = "rand-m9-mstd0.5-inc1-mmax9"
    for aa, workers in (("none", 0), (strong, 0), (strong, 1), (strong, 2)):  # none: in batches
        one = argparse.Namespace(**{**vars(args), "aa": aa, "num_workers": workers})
        loader = utils.train_loader(utils.ImageSet(pixels, y, one), one)
        times = []
        for _ in range(rounds):
            for batch in loader:  # the workers' start is not counted: they persist
                pass
            begin = time.perf_counter()
            for batch in loader:
                pass
            times.append(time.perf_counter() - begin)
        loading.append({"aa": aa, "num_workers": workers,
                        "images_per_second": len(pixels) / float(np.median(times))})
    with tempfile.TemporaryDirectory() as folder:
        for i, image in enumerate(pixels):
            path = Path(folder, "test" if i % 10 == 0 else "train", str(i // 10 % 10), f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
        rates = {1: [], 2: []}
        for turn, processes in enumerate((1, 2) * rounds):
            threads, out = max(1, cores // processes), f"{folder}/run{turn}"
            subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                 "template.py", "--data_set=image_folder", f"--data_path={folder}", "--device=cpu",
                 "--input_size=32", "--backbone=resnet32", "--num_epochs=3", "--memory_size=0",
                 "--amp=bf16", "--num_workers=0", "--no_plots", f"--output_dir={out}"], check=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)}, stdout=subprocess.DEVNULL)
            log = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
            rates[processes] += [line["images_per_second"] for line in log[1:]]  # 1: warm-up
        launches = [{"processes": n, "threads": max(1, cores // n),
                     "images_per_second": float(np.median(found))} for n, found in rates.items()]
    write("speed", {"machine": platform.machine(), "cores": cores, "batch_size": 128,
                    "compute": compute, "compile_seconds": compile_seconds, "loading": loading,
                    "launches": launches})


def adaptation(mine):
    """The oracle of a run of iTAML (with --herding_method first, its default) if the copies of its
    network adapt at other rates. At a rate of 0 BatchNorm's averages move, and no weight."""
    from tutorial.methods.itaml import ITAML  # makes its networks known to timm, too
    from tutorial.methods.itaml_inference import RATE, answer
    args, results, model, (train, test) = load_run(mine)
    trainer, tasks = ITAML(args), range(len(model.fc.heads))
    trainer.model = model.requires_grad_(True)
    trainer.run = SimpleNamespace(increments=results["increments"], test_scenario=test)
    for task in tasks:
        trainer.task, trainer.nb_new = task, results["increments"][task]
        trainer.update_memory(train.images(task))
        trainer.known_classes += trainer.nb_new
    rows = []
    for rate in (RATE, 3e-4, 1e-4, 0):
        told = np.concatenate([answer(trainer, task, rate)[2] for task in tasks])
        rows.append({"rate": rate, "oracle": 100 * told.mean()})
    write(f"adaptation_{mine.run.name}", {"data_set": args.data_set, "rows": rows})


def alta(mine, rounds=3):
    """Zero-shot accuracy of the tiny CLIP of ten seeds; seconds for the prompts of a training step
    with a ViT-B/32 of random weights, and for a test image, in the naive way and in ours."""
    import open_clip
    from tutorial.methods import alta, clip_towers, tiny_clip
    args = alta.get_parser().parse_args(["--device=cpu"])
    args.visual, args.lr = "tiny", 0.002
    args = utils.setup(args)
    torch.set_num_threads(1)
    accuracy = {"zero_shot": [], "zero_shot_even": []}
    test_set = utils.ImageSet(*utils.load_digits()[1], args)
    for args.seed in range(10):
        towers = clip_towers.ClipTowers(tiny_clip.train(args), args)
        with torch.no_grad():
            prompts = towers.encode_prompts(towers.tokenize(
                [f"a photo of a {name}" for name in clip_towers.DIGITS]))
            images = torch.cat([images for images, _ in utils.clean_batches(test_set, args)])
            logits = towers.encode_images(images) @ prompts.T
        right, even = logits.argmax(dim=1).numpy() == test_set.y, test_set.y % 2 == 0
        accuracy["zero_shot"].append(100 * right.mean())
        accuracy["zero_shot_even"].append(100 * right[even].mean())

    clip = open_clip.create_model("ViT-B-32-quickgelu", pretrained=None)
    model = alta.CrossModalModel(clip_towers.ClipTowers(clip, args), "cprompt", False)
    model.set_classes(open_clip.IMAGENET_CLASSNAMES[:100], 0)
    for _ in range(10):
        model.expand(10)
    towers, short = model.towers, model.tokens
    long = towers.tokenizer([f"a photo of a {n}." for n in open_clip.IMAGENET_CLASSNAMES[:100]])

    def seconds(step):
        step()  # warm-up; also fills the rows that are kept
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        return float(np.median(times))

    def twice(tokens):
        for _ in range(2):  # for the images, and for the memory
            towers.encode_prompts(tokens, model.context).sum().backward()
    prompts = [("all 100, 77 tokens, twice (as released)", lambda: twice(long)),
               (f"all 100, cut to {short.shape[1]} tokens, twice", lambda: twice(short)),
               (f"all 100, cut to {short.shape[1]} tokens, once",
                lambda: towers.encode_prompts(short, model.context).sum().backward()),
               ("and those of old tasks kept (as here)",
                lambda: model.text_side("u_t").sum().backward())]
    images = torch.randn(16, 3, 224, 224)
    write("alta", {
        "zero_shot": float(np.mean(accuracy["zero_shot"])),
        "zero_shot_even": float(np.mean(accuracy["zero_shot_even"])),
        "seeds": accuracy, "machine": platform.machine(),
        "prompts": [{"what": what, "seconds": seconds(step)} for what, step in prompts],
        "milliseconds_per_test_image": {
            "tower": 1000 * seconds(lambda: towers.encode_images(images)) / 16,
            "fingerprint": 1000 * seconds(lambda: alta.fingerprints(images)) / 16}})


def main():
    measures = {f.__name__: f for f in (
        norms, border, exemplars, ranks, speed, adaptation, alta)}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=measures)
    parser.add_argument("run", nargs="?", type=Path, help="output directory of a finished run")
    parser.add_argument("--data_path", help="where the data of that run lie now")
    mine = parser.parse_args()
    if mine.what not in ("speed", "alta") and mine.run is None:
        parser.error(f"{mine.what} needs the output directory of a finished run")
    measures[mine.what](mine)


if __name__ == "__main__":
    main()
