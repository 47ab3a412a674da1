"""More than a hundred kinds of bad input: each must end with one line on stderr and exit code 2,
and leave all files as they were. Not part of the test suite, which has a few of each kind.

    python tests/bad_inputs.py
"""
import json
import os
import shutil
import socket
import tempfile
from pathlib import Path

import numpy as np
from conftest import ROOT, SHORT, Launch, run_file
from PIL import Image

RUN = ["--output_dir=run", "--resume"]
RANK_0 = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
FOLDER = ["--data_set=image_folder", "--data_path=images", "--backbone=resnet20",
          "--input_size=16", "--num_bases=2", "--increment=1", "--batch_size=4", "--num_epochs=1",
          "--memory_size=8", "--aa=none", "--no_plots"]


def command(name, flags):
    run_file(ROOT, name, flags)


def write_images(split="train", classes=("a", "b", "c"), count=6):
    for label in classes:
        folder = Path("images") / split / label
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.random.RandomState(i).randint(0, 255, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")


def both():
    write_images("train")
    write_images("test")


def folder(change):
    """A good folder of images, and then this change."""
    def prepare():
        both()
        change()
    return prepare


def finished(change):
    """A short finished run in `run`, and then this change."""
    def prepare():
        shutil.copytree(GOOD / "run", "run")
        change()
    return prepare


def text(path, content):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content)


def cut(path, size):
    Path(path).write_bytes(Path(path).read_bytes()[:size])


def saved(change):
    """The checkpoint with a change of its content."""
    def act():
        import torch
        content = torch.load("run/checkpoint.pt", weights_only=True)
        change(content)
        torch.save(content, "run/checkpoint.pt")
    return finished(act)


# Each: flags, then perhaps preparation, environment, program, number of processes.
FLAGS = [[flag] for flag in """
--data_set=cifar1000 --data_set= --num_bases=-1 --num_bases=11 --num_bases=1.5 --num_bases=x
--increment=0 --increment=-2 --increment=11 --increment=two --class_order=nowhere.txt --class_order=
--class_order=. --input_size=0 --input_size=-8 --input_size=4 --input_size=8.5 --input_size=1
--crop=best --crop_pct=0 --crop_pct=1.1 --color_jitter=-1 --color_jitter=2 --color_jitter=nan
--aa=wild-m9 --aa=rand-m9-mstd0.5-inc1 --aa=v0 --reprob=-0.1 --reprob=1.5 --remode=blur
--recount=0 --recount=x --backbone=resnet33x --backbone= --backbone=test_vit --memory_size=9
--memory_size=-1 --memory_size=2e3 --herding_method=best --batch_size=0 --batch_size=-32
--batch_size=100000 --batch_size=32.0 --num_epochs=0 --num_epochs=-1 --num_epochs=1e2 --lr=0
--lr=-0.1 --lr=nan --lr=inf --lr=fast --lr=1e13 --momentum=1 --momentum=-0.1 --weight_decay=-1
--weight_decay=2 --smooth=1 --smooth=-0.1 --lambda_kd=1.5 --lambda_kd=-0.1 --lambda_kd=nan
--lambda_kd=static --temperature=0 --temperature=-2 --temperature=nan --seed=-1 --seed=4294967296
--seed=1.5 --amp=fp8 --device=tpu --device=cuda --num_workers=-1 --num_workers=x
--eval_every_epoch=-1 --stop_after_task=0 --stop_after_task=-1 --stop_after_task=x --pretrained
--epochs=3 --num_epoch=3 --lr extra --pretrained=yes
""".split()]
CASES = [
    *[(flags,) for flags in FLAGS],
    (["--no_plots", "--output_dir"],),
    (["--data_set=image_folder"],),
    (["--data_set=imagenet100", "--data_path=nowhere"],),
    (["--data_set=cifar10", "--data_path=file"], lambda: text("file", "x")),
    (["--data_set=cifar100", "--data_path=file"], lambda: text("file", "x"), {}, "template.py", 2),
    (["--batch_size=31"], None, {}, "template.py", 2),
    (["--num_bases=11"], None, {}, "template.py", 3),
    # class orders
    (["--class_order=order"], lambda: text("order", "")),
    (["--class_order=order"], lambda: text("order", "0 1 2")),
    (["--class_order=order"], lambda: text("order", "0 1 2 3 4 5 6 7 8 8")),
    (["--class_order=order"], lambda: text("order", "a b c")),
    (["--class_order=order"], lambda: Path("order").write_bytes(b"\xff\xfe\x00")),
    # folders
    (FOLDER,),
    (FOLDER, lambda: Path("images/train").mkdir(parents=True)),
    (FOLDER, lambda: write_images("train")),
    (FOLDER, lambda: write_images("test")),
    (FOLDER, lambda: text("images/train/a", "a file")),
    (FOLDER, folder(lambda: shutil.rmtree("images/test/b"))),
    (FOLDER, folder(lambda: shutil.rmtree("images/train/b"))),
    (FOLDER, folder(lambda: os.rename("images/test/b", "images/test/z"))),
    (FOLDER, folder(lambda: Path("images/train/d").mkdir())),
    (FOLDER, folder(lambda: text("images/train/a/1.png", "no image"))),
    (FOLDER, folder(lambda: text("images/train/a/1.png", "no image")), {}, "template.py", 2),
    (FOLDER, folder(lambda: text("images/test/c/1.png", ""))),
    (FOLDER, folder(lambda: cut("images/train/a/2.png", 400))),
    (FOLDER, folder(lambda: os.symlink("nowhere", "images/train/a/link.png"))),
    (FOLDER, folder(lambda: Path("images/train/a/dir.png").mkdir() or text(
        "images/train/a/dir.png/x.png", "x"))),
    ([*FOLDER, "--batch_size=64"], both),
    ([*FOLDER, "--num_bases=4"], both),
    ([*FOLDER, "--memory_size=2"], both),
    ([*FOLDER, "--input_size=70"], folder(lambda: text("images/train/a/1.png", "no image"))),
    # the output directory
    (["--output_dir=file"], lambda: text("file", "x")),
    (["--output_dir=file/deeper"], lambda: text("file", "x")),
    (["--output_dir=/proc/nothing"],),
    (["--output_dir=" + "x" * 300],),
    ([*SHORT, "--output_dir=run"], finished(lambda: None)),
    ([*SHORT, "--output_dir=run"], lambda: text("run/model.pt", "x")),
    ([*SHORT, *RUN], lambda: text("run/model.pt", "x")),
    ([*SHORT, *RUN], lambda: text("run/results.json", "{}")),
    ([*SHORT, *RUN], lambda: text("run/results.json", "")),
    ([*SHORT, *RUN], finished(lambda: os.remove("run/checkpoint.pt"))),
    ([*SHORT, *RUN, "--lr=0.05"], finished(lambda: None)),
    ([*SHORT, *RUN, "--seed=1"], finished(lambda: None)),
    ([*SHORT, *RUN, "--no_align"], finished(lambda: None)),
    ([*SHORT, *RUN, "--stop_after_task=1"], finished(lambda: None)),
    ([*SHORT, *RUN], finished(lambda: None), {}, "tutorial.methods.feature_kd"),
    ([*SHORT, "--output_dir=run"], finished(lambda: None), {}, "template.py", 2),
    # checkpoints
    *[([*SHORT, *RUN], finished(lambda size=size: cut("run/checkpoint.pt", size)))
      for size in (0, 10, 20_000, -1)],
    ([*SHORT, *RUN], finished(lambda: text("run/checkpoint.pt", "x" * 5000))),
    ([*SHORT, *RUN], finished(lambda: shutil.copy("run/model.pt", "run/checkpoint.pt"))),
    ([*SHORT, *RUN], finished(lambda: os.remove("run/checkpoint.pt") or os.mkdir(
        "run/checkpoint.pt"))),
    ([*SHORT, *RUN], saved(lambda content: content.pop("results"))),
    ([*SHORT, *RUN], saved(lambda content: content["results"]["versions"].pop("trainer"))),
    ([*SHORT, *RUN], saved(lambda content: content["results"]["versions"].update(trainer="1"))),
    ([*SHORT, *RUN], saved(lambda content: content.update(data=1))),
    ([*SHORT, *RUN], saved(lambda content: content["results"].update(method="LUCIR"))),
    # the environment of torchrun and SLURM
    ([], None, {"RANK": "0", "WORLD_SIZE": "2"}),
    ([], None, {**RANK_0, "MASTER_PORT": "x"}),
    ([], None, {**RANK_0, "MASTER_PORT": "99999"}),
    ([], None, {**RANK_0, "MASTER_PORT": "TAKEN"}),
    ([], None, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}),
    # methods and tools
    (["--icarl_loss=mse"], None, {}, "tutorial.methods.icarl"),
    (["--margin=3"], None, {}, "tutorial.methods.lucir"),
    (["--compile"], None, {}, "tutorial.methods.podnet"),
    (["--compile"], None, {}, "tutorial.methods.itaml"),
    (["--branch_1=none"], None, {}, "tutorial.methods.aanets"),
    (["--baseline=wa"], None, {}, "tutorial.methods.aanets"),
    (["--patience=-1"], None, {}, "tutorial.methods.bal_ft"),
    (["--visual=huge"], None, {}, "tutorial.methods.alta"),
    ([], None, {}, "tutorial.methods.wa_variants"),
    (["--variant=none"], None, {}, "tutorial.methods.wa_variants"),
    (["nowhere.pt", "x.png"], None, {}, "tutorial.tools.use"),
    (["run/checkpoint.pt", "x.png"], finished(lambda: None), {}, "tutorial.tools.use"),
    (["run/model.pt", "x.png"], finished(lambda: None), {}, "tutorial.tools.use"),
    (["--model=nowhere.pt"], None, {}, "tutorial.tools.grow"),
    (["--model=run/model.pt", "--data_path=images"], finished(both), {}, "tutorial.tools.grow"),
    (["wa=nowhere*"], None, {}, "tutorial.tools.compare"),
]


def listing():
    return {path: path.read_bytes() for path in Path().rglob("*")
            if path.is_file() and path.name not in ("stdout.txt", "stderr.txt", ".lock")}


def complaints(flags, prepare=None, env={}, name="template.py", processes=1):
    """What is wrong with the answer to this input, a list of texts."""
    place = Path(tempfile.mkdtemp())
    os.chdir(place)
    if prepare:
        prepare()
    before = listing()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        env = {key: port if value == "TAKEN" else value for key, value in env.items()}
        started = Launch(place, command, (name, flags), processes, env)
        codes = started.wait(100)
    error = started.stderr()
    if codes[0] != 2 or not set(codes) <= {2, -15, 143}:
        yield f"exit codes {codes}"
    if error.count("\n") != 1 or not error.startswith("error: "):
        yield error
    if listing() != before:
        yield f"files changed: {sorted(set(listing()) ^ set(before))}"
    os.chdir(ROOT)
    shutil.rmtree(place)


if __name__ == "__main__":
    GOOD = Path(tempfile.mkdtemp())
    good = Launch(GOOD, command, ("template.py", [*SHORT, "--output_dir=run"]), 1, {})
    assert good.wait() == [0], good.stderr()
    bad = 0
    for case in CASES:
        for complaint in complaints(*case):
            bad += 1
            print(json.dumps([case[0], *map(str, case[2:])]), complaint, sep="\n    ", flush=True)
    print(f"{len(CASES)} bad inputs, {bad} complaints")
    shutil.rmtree(GOOD)
    raise SystemExit(bad > 0)
