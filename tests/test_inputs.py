"""Bad input: one line on stderr, exit code 2, before any training, nothing overwritten."""
import json
import os
import pickle
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, run_template
from PIL import Image
from torch.distributed import TCPStore

import template
import utils

FOLDER = ["--data_set=image_folder", "--backbone=resnet20", "--input_size=16", "--num_bases=2",
          "--increment=1", "--batch_size=4", "--num_epochs=1", "--memory_size=8", "--aa=none",
          "--no_plots"]


@pytest.fixture
def refused(launch, tmp_path):
    """Start a run that must be refused; return its one line."""
    def run(*flags, **options):
        def files():
            return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()
                    and path.name not in ("stdout.txt", "stderr.txt", ".lock")}

        before = files()
        started = launch(*flags, **options)
        codes = started.wait()
        error = started.stderr()
        assert 2 in codes and set(codes) <= {2, -15}, (codes, error)
        assert error.count("\n") == 1 and error.startswith("error: "), error
        # (Of torch 2.8 each process says that it is connected.)
        assert re.sub(r"\[Gloo\] Rank \d+ is connected to .*\n", "", started.stdout()) == ""
        assert files() == before
        return error
    return run


@pytest.mark.parametrize("flags, words", [
    (["--data_set=cifar1000"], "--data_set cifar1000 cifar100"),
    (["--backbone=resnet33x"], "--backbone resnet33x timm.list_models()"),
    (["--herding_method=best"], "--herding_method best barycenter"),
    (["--aa=wild-m9"], "--aa wild-m9 rand-m9-mstd0.5-inc1-mmax9"),
    (["--aa=rand-m9-mstd0.5-inc1"], "--aa -mmax9"),
    (["--aa=rand-inc1-m10-mmax10"], "--aa -mmax9"),
    (["--aa=v0"], "--aa -mmax9"),
    (["--num_bases=11"], "--num_bases 11 10 classes"),
    (["--increment=11"], "--increment 11 10 classes"),
    (["--num_bases=-1"], "--num_bases -1"),
    (["--increment=0"], "--increment 0"),
    (["--increment=two"], "--increment two"),
    (["--memory_size=9"], "--memory_size 9 10 classes"),
    (["--memory_size=-1"], "--memory_size -1"),
    (["--batch_size=100000"], "--batch_size 100000"),
    (["--batch_size=0"], "--batch_size 0"),
    (["--lr=0"], "--lr 0"),
    (["--lr=nan"], "--lr nan"),
    (["--lr=inf"], "--lr inf"),
    (["--momentum=1"], "--momentum 1"),
    (["--weight_decay=-0.1"], "--weight_decay -0.1"),
    (["--lambda_kd=1.5"], "--lambda_kd 1.5"),
    (["--lambda_kd=nan"], "--lambda_kd nan"),
    (["--temperature=0"], "--temperature 0"),
    (["--input_size=4"], "--input_size 4 8x8"),
    (["--backbone=test_vit", "--input_size=8"], "--backbone test_vit --input_size 8"),
    (["--pretrained"], "--pretrained"),
    (["--device=cuda"], "--device cuda"),
    (["--class_order=nowhere.txt"], "--class_order nowhere.txt"),
    (["--epochs=3"], "--epochs"),
    (["--num_epoch=3"], "--num_epoch"),
    (["--data_set=image_folder", "--data_path=nowhere"], "nowhere train/<class>/*"),
    (["--data_set=imagenet100"], "data train/<class>/*"),
    (["--data_set=image_folder", f"--data_path={'x' * 300}"], "--data_path name too long"),
    (["--data_set=cifar10", f"--data_path={'x' * 300}"], "--data_path name too long"),
])
def test_flags_that_cannot_be(refused, flags, words):
    error = refused(*flags, "--output_dir=run")
    for word in words.split():
        assert word in error
    assert "Traceback" not in error


def problems_of_two_ranks(folder):
    """In each process: what `fail` is told, while the program goes on, and what comes back."""
    args, heard = utils.setup(utils.get_parser().parse_args([])), []
    utils.fail = heard.append

    def make(problem):
        if problem:
            raise utils.InputError(problem)
        return args.rank

    for problem in (None, "x" if args.rank == 1 else None, "y" if args.rank == 0 else None, f"z{args.rank}"):
        heard.append(utils.together(lambda: make(problem), args))
    Path(folder, f"rank{args.rank}").write_text(json.dumps(heard))


def test_all_ranks_hear_of_the_first_problem(launch, tmp_path):
    assert launch(function=problems_of_two_ranks, arguments=(str(tmp_path),), processes=2).wait() == [0, 0]
    heard = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
    assert heard == [[0, "rank 1: x", 0, "y", None, "z0", None], [1, "rank 1: x", None, "y", 1, "z0", None]]


@pytest.mark.parametrize("processes", [1, 2])
def test_data_set_that_cannot_be_downloaded(refused, tmp_path, processes):
    """Rank 0 alone tries it, and says it."""
    (tmp_path / "file").write_text("no folder")
    error = refused("--data_set=cifar10", f"--data_path={tmp_path / 'file'}", processes=processes)
    assert "cifar10 is not in" in error and "could not be downloaded" in error


@pytest.mark.parametrize("order", ["0 1 2", "0 1 2 3 4 5 6 7 8 8", "1 2 3 4 5 6 7 8 9 10", "a b c"])
def test_class_order_that_is_no_permutation(refused, tmp_path, order):
    (tmp_path / "order.txt").write_text(order)
    assert "--class_order order.txt" in refused("--class_order=order.txt")


def test_once_for_all_processes(refused):
    assert "multiple of their number, 3" in refused("--batch_size=32", processes=3)
    assert "--num_bases 11" in refused("--num_bases=11", processes=2)


def run_that_does_not_wait(flags):
    """(For torchrun, which would end it.)"""
    utils.time.sleep = lambda seconds: os._exit(7)
    run_template(flags)


def test_a_second_machine_without_gpus_speaks_for_itself(launch):
    """Rank 0 is elsewhere, and may have its GPUs."""
    for local_rank, code in ((0, 2), (1, 7)):
        started = launch(function=run_that_does_not_wait, arguments=(["--device=cuda"],), env=dict(
            RANK=str(2 + local_rank), LOCAL_RANK=str(local_rank), WORLD_SIZE="4", LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", MASTER_PORT="1"))
        assert started.wait() == [code]
        assert started.stderr().count("error: --device cuda") == (code == 2)


def test_a_second_machine_that_lost_a_gpu_does_not_wait_for_ever(launch):
    """Rank 0 has its GPUs, and would wait for nccl."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("device", "cuda")
    for local_rank, code in ((0, 2), (1, 7)):
        started = launch(function=run_that_does_not_wait, arguments=([],), env=dict(
            RANK=str(2 + local_rank), LOCAL_RANK=str(local_rank), WORLD_SIZE="4", LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port)))
        assert started.wait() == [code]
        assert started.stderr().count("error: these processes would compute on the cpu, those of rank 0 on "
                                      "the cuda") == (code == 2)


def test_one_line_of_ours_under_torchrun(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(ROOT / "template.py"), "--lr=-1"], cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert done.returncode != 0 and done.stderr.count("error: argument --lr") == 1
    assert "exitcode  : 2" in done.stderr


# ---- folders of images ---------------------------------------------------------------------

def test_empty_folder(refused, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "images" / split).mkdir(parents=True)
    assert "train" in refused(*FOLDER, f"--data_path={tmp_path / 'images'}")


def test_train_without_test(refused, image_folder):
    folder = image_folder()
    (folder / "test").rename(folder / "tset")
    assert "no folder test or val" in refused(*FOLDER, f"--data_path={folder}")


def test_class_missing_in_test(refused, image_folder):
    folder = image_folder()
    for file in (folder / "test/blue").iterdir():
        file.unlink()
    assert "blue" in refused(*FOLDER, f"--data_path={folder}")
    (folder / "test/blue").rmdir()
    assert "blue" in refused(*FOLDER, f"--data_path={folder}")


def test_class_without_images(refused, image_folder):
    folder = image_folder()
    (folder / "train/empty").mkdir()
    (folder / "test/empty").mkdir()
    assert "empty" in refused(*FOLDER, f"--data_path={folder}")


def test_a_file_name_that_is_not_utf_8(refused, image_folder):
    folder = image_folder()
    os.link(folder / "train/red/0.png", os.fsencode(folder / "train/red") + b"/caf\xe9.png")
    assert "caf\\udce9.png': a name that is not UTF-8" in refused(*FOLDER, f"--data_path={folder}")


def run_on_own_machine(flags):
    os.chdir(f"machine{os.environ['RANK']}")
    run_template(flags)


@pytest.mark.parametrize("size", [16, 72])  # held in memory, and not
def test_machines_with_other_copies_of_the_data(refused, launch, image_folder, size):
    own = dict(function=run_on_own_machine, processes=2, arguments=(
        [*FOLDER, f"--input_size={size}", "--data_path=images", "--stop_after_task=1"],))
    folders = [image_folder(size=size, name=f"machine{rank}/images") for rank in (0, 1)]
    file = folders[1] / "train/red/3.png"
    file.rename(folders[1] / "train/red/30.png")
    assert "rank 1: other files in images than rank 0 has" in refused(**own)
    (folders[1] / "train/red/30.png").rename(file)
    assert launch(**own).wait() == [0, 0]


def test_a_machine_without_the_folder_that_rank_0_has(refused, image_folder, tmp_path):
    """It would download the data set by itself, and the two would wait for each other."""
    image_folder(name="machine0/images")
    (tmp_path / "machine1").mkdir()
    error = refused(function=run_on_own_machine, processes=2,
                    arguments=(["--data_set=cifar100", "--data_path=images"],))
    assert "rank 1: images has no folder train" in error


def classes_on_own_machine():
    os.chdir(f"machine{os.environ['RANK']}")
    args = utils.setup(utils.get_parser().parse_args(["--class_order=order.txt"]))
    order = utils.build_scenarios(args)[0].class_order
    print(f"{order}\n", end="", flush=True)  # at once: two processes share the file


def test_machines_with_other_class_orders(launch, tmp_path):
    """All learn the classes in the order of rank 0."""
    for rank, order in enumerate(("3 1 4 0 5 9 2 6 8 7", "2 7 1 8 0 4 5 9 3 6")):
        (tmp_path / f"machine{rank}").mkdir()
        (tmp_path / f"machine{rank}/order.txt").write_text(order)
    started = launch(function=classes_on_own_machine, arguments=(), processes=2)
    assert started.wait() == [0, 0], started.stderr()
    assert started.stdout() == "[3, 1, 4, 0, 5, 9, 2, 6, 8, 7]\n" * 2


def test_file_that_is_no_image(refused, image_folder):
    folder = image_folder()
    (folder / "train/red/note.png").write_text("not an image")
    error = refused(*FOLDER, f"--data_path={folder}", processes=2)
    assert str(folder / "train/red/note.png") in error


@pytest.mark.parametrize("processes", [1, 2])
def test_a_truncated_small_image_is_named_before_training(refused, image_folder, processes):
    folder = image_folder(size=64)
    file = folder / "test/red/1.png"
    file.write_bytes(file.read_bytes()[:3000])
    assert f"{file}: no image (OSError" in refused(*FOLDER, f"--data_path={folder}", processes=processes)


@pytest.mark.parametrize("processes, workers", [(1, 0), (1, 1), (2, 0)])
def test_a_truncated_large_image_is_named_when_its_turn_comes(launch, image_folder, processes, workers):
    """By the rank that meets it; the other, which loses it in the middle of a step, is silent."""
    folder = image_folder(size=72)
    file = folder / "train/red/3.png"
    file.write_bytes(file.read_bytes()[:3000])
    started = launch(*FOLDER, "--input_size=72", f"--data_path={folder}", f"--num_workers={workers}",
                     processes=processes)
    assert 2 in started.wait()
    assert started.stderr().startswith(f"error: {file}: OSError: "), started.stderr()
    assert started.stderr().count("\n") == 1, started.stderr()


def test_test_folder_without_classes_beside_val(finish, image_folder, tmp_path):
    folder = image_folder()
    (folder / "test").rename(folder / "val")
    (folder / "test").mkdir()
    (folder / "test/1.png").write_bytes((folder / "val/red/0.png").read_bytes())
    assert finish(*FOLDER, f"--data_path={folder}", "--output_dir=run")["finished"]


def test_unusual_images_and_paths_work(finish, image_folder, tmp_path):
    """Grey, RGBA, palette and 16-bit images; folders with spaces, umlauts and very long names."""
    long = "x" * 200
    folder = image_folder(classes=("grün", "日本 語", long, "plain"), name="bilder öäü " + "y" * 150)
    draw = np.random.RandomState(1)
    for split in ("train", "test"):
        target = folder / split / "plain"
        grey = draw.randint(0, 256, (20, 24)).astype(np.uint8)
        Image.fromarray(grey).save(target / "grey.png")
        Image.fromarray(grey).convert("P").save(target / "palette.png")
        Image.fromarray(np.repeat(grey[..., None], 4, 2), "RGBA").save(target / "rgba.png")
        Image.fromarray((grey.astype(np.uint16) * 257)).save(target / "deep.png")
        Image.fromarray(grey).save(target / "photo.JPEG")
    import utils
    deep = np.asarray(utils.open_image(str(target / "deep.png")))
    assert np.array_equal(deep[..., 0], grey) and deep.shape == (20, 24, 3)
    assert len(str(folder / "train" / long / "0.png")) > 255
    (folder / "test").rename(folder / "val")
    results = finish(*FOLDER, f"--data_path={folder}", "--output_dir=run")
    assert results["finished"] and set(results["class_names"]) == {"grün", "日本 語", long, "plain"}


def test_grey_arrays_from_a_package_work(finish, tmp_path):
    """MNIST's own files, made here: continuum gives (n, 28, 28) arrays."""
    from torchvision.datasets import MNIST
    folder = tmp_path / "files/MNIST/raw"
    folder.mkdir(parents=True)
    draw = np.random.RandomState(0)
    for prefix, count in (("train", 80), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = draw.randint(0, 256, (count, 28, 28)).astype(np.uint8)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
            (2049).to_bytes(4, "big") + count.to_bytes(4, "big") + labels.tobytes())
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(
            (2051).to_bytes(4, "big") + count.to_bytes(4, "big") + (28).to_bytes(4, "big") * 2
            + images.tobytes())
    assert MNIST(str(tmp_path / "files"), train=True).data.shape == (80, 28, 28)
    for processes in (1, 2):
        results = finish("--data_set=mnist", f"--data_path={tmp_path / 'files'}", "--num_epochs=1",
                         "--backbone=resnet20", "--batch_size=40", "--num_bases=5", "--increment=5",
                         "--no_plots", "--num_workers=0", f"--output_dir=run{processes}", processes=processes)
        assert results["finished"] and results["increments"] == [5, 5]
        assert sorted(results["class_names"])[0] == "0 - zero"  # torchvision's names


# ---- the output directory ------------------------------------------------------------------

def test_output_dir_that_is_a_file(refused, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert "--output_dir run" in refused(*SHORT, "--output_dir=run")
    assert "--output_dir run/deeper" in refused(*SHORT, "--output_dir=run/deeper")
    assert (tmp_path / "run").read_text() == "mine"


def test_output_dir_that_cannot_be_written(refused):
    assert "--output_dir /proc/nothing" in refused(*SHORT, "--output_dir=/proc/nothing")


def test_output_dir_with_another_run(refused, finish):
    finish(*SHORT, "--output_dir=run", "--stop_after_task=1")
    assert "--resume" in refused(*SHORT, "--output_dir=run")
    error = refused(*SHORT, "--output_dir=run", "--resume", "--lr=0.05", "--memory_size=20")
    assert "--lr 0.1 (now 0.05)" in error and "--memory_size 30 (now 20)" in error


def test_failures_that_only_rank_0_sees(refused, finish):
    """The other rank, which waits for it, must not answer with a traceback."""
    finish(*SHORT, "--output_dir=run", "--stop_after_task=1")
    assert "--resume" in refused(*SHORT, "--output_dir=run", processes=2)


def test_resume_of_less_than_there_is(refused, finish):
    finish(*SHORT, "--output_dir=run", "--stop_after_task=2")
    error = refused(*SHORT, "--output_dir=run", "--resume", "--stop_after_task=1")
    assert "--stop_after_task 1" in error and "task 2 already" in error


def test_output_dir_in_use(launch, refused, tmp_path):
    first = launch("--output_dir=run", folder=tmp_path, env={"RANK": "0"})
    while first.processes[0].is_alive() and not (tmp_path / "run/log.jsonl").exists():
        time.sleep(0.05)
    second = tmp_path / "second"
    second.mkdir()
    started = launch(*SHORT, f"--output_dir={tmp_path / 'run'}", "--resume", folder=second)
    assert started.wait() == [2]
    assert "another run is writing there" in started.stderr() and started.stderr().count("\n") == 1
    assert first.processes[0].is_alive()


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("kind", ["truncated", "foreign", "malicious", "empty"])
def test_bad_checkpoints(refused, finish, tmp_path, kind):
    finish(*SHORT, "--output_dir=run", "--stop_after_task=1")
    file = tmp_path / "run/checkpoint.pt"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:20_000])
    elif kind == "foreign":
        torch.save({"state_dict": {"weight": torch.zeros(3)}}, file)
    elif kind == "malicious":
        file.write_bytes(pickle.dumps(Malicious()))
    else:
        file.write_bytes(b"")
    assert "run/checkpoint.pt" in refused(*SHORT, "--output_dir=run", "--resume")
    assert not (tmp_path / "harm").exists()


def test_loss_that_becomes_nan(launch, tmp_path):
    started = launch(*SHORT, "--output_dir=run", "--lr=1e12", "--num_epochs=9")
    assert started.wait() == [2]
    error = started.stderr()
    assert error.count("\n") == 1 and "task 1, epoch" in error and "--lr 1000000000000.0" in error
    assert (tmp_path / "run/log.jsonl").read_text() == ""


class Exploding(template.CilTrainer):
    def train_epoch(self, loader, optimizer):
        averages = super().train_epoch(loader, optimizer)
        if self.epoch == 3:
            self.model.fc.heads[0].bias.data[1] = torch.inf
        return averages


def explode():
    utils.CHECKPOINT_SECONDS = 0
    template.main(utils.get_parser().parse_args([*SHORT, "--num_epochs=9", "--output_dir=run"]),
                  Exploding)


def test_the_checkpoint_before_a_weight_becomes_infinite_is_kept(launch, tmp_path):
    started = launch(function=explode, arguments=())
    assert started.wait() == [2] and "task 1, epoch 4" in started.stderr()
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 3
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert saved["epoch"] == 3
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


def limited(flags, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # what a full disk looks like
    run_template(flags)


def test_disk_full(launch, finish, tmp_path):
    finish(*SHORT, "--output_dir=run", "--stop_after_task=1")
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    flags = [*SHORT, "--output_dir=run", "--resume"]
    started = launch(function=limited, arguments=(flags, 300_000))
    assert started.wait() == [2]
    assert "checkpoint.pt could not be written" in started.stderr()
    assert started.stderr().count("\n") == 1
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.part"))
    results = finish(*SHORT, "--output_dir=run", "--resume")  # with room again it goes on
    assert results["finished"]


@pytest.mark.parametrize("processes", [1, 3])
def test_a_small_folder_is_told_all_at_once_and_what_would_work(
        launch, finish, image_folder, processes):
    data = image_folder(("red", "green", "blue"), train=30)
    flags = ["--data_set=image_folder", f"--data_path={data}", "--input_size=16",
             "--backbone=resnet20", "--aa=none", "--num_epochs=1", "--no_plots"]
    started = launch(*flags, "--memory_size=2", "--batch_size=126", processes=processes)
    assert set(started.wait()) <= {2, -15}
    error = started.stderr()
    assert error.startswith("error: image_folder has 3 classes with 30 to 30 training images each: ")
    assert error.count("\n") == 1 and len(re.findall(r"\(try ", error)) == 3, error
    tried = " ".join(re.findall(r"\(try (?:0, or )?([^)]*)\)", error)).split()
    assert tried[:6] == ["--num_bases", "2", "--increment", "1", "--memory_size", "60"]
    finish(*flags, *tried, "--output_dir=run", processes=processes)
