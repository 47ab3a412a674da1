"""Runs that are stopped, killed or repeated must end as if nothing had happened, to the bit."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import (ROOT, SHORT, read_results, run_file, run_template, torchrun,
                      two_machines)

import template
import utils


def same_model(one, other):
    a, b = (torch.load(folder / "model.pt", weights_only=True) for folder in (one, other))
    for state in (a, b):
        weights = state.pop("state_dict")
        state.pop("args")  # names of folders
        state["weights"] = {name: tensor.numpy().tobytes() for name, tensor in weights.items()}
    return a == b


def log_lines(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds"), line.pop("images_per_second")
    return lines


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One run without interruption: (folder, results)."""
    from conftest import Launch
    folder = tmp_path_factory.mktemp("reference")
    started = Launch(folder, run_template, ([*SHORT, "--output_dir=run"],), 1, {})
    assert started.wait() == [0], started.stderr()
    return folder / "run", read_results(folder / "run")


def test_the_same_seed_gives_the_same_bits_and_another_does_not(finish, tmp_path, reference):
    assert finish(*SHORT, "--output_dir=again") == reference[1]
    assert same_model(tmp_path / "again", reference[0])
    assert log_lines(tmp_path / "again") == log_lines(reference[0])
    other = finish(*SHORT, "--output_dir=other", "--seed=1")
    assert other["acc5s"] + other["gammas"] != reference[1]["acc5s"] + reference[1]["gammas"]


def test_killed_at_any_moment(launch, finish, tmp_path, reference):
    """Ten SIGKILLs at seeded random moments: while starting, training, herding or saving.

    A run that ends before its next kill must have ended well; then a new one begins.
    """
    draw, kills, trained = random.Random(0), 0, 0
    begun = time.time()
    finish(*SHORT, "--output_dir=whole")
    longest = max(1.4, time.time() - begun)  # on a slow machine the first second is but the start
    for _ in range(60):
        # A checkpoint after every epoch, or as by default, which here is after every task.
        started = launch(*SHORT, "--output_dir=run", "--resume", seconds=draw.choice((0, 30)))
        time.sleep(draw.uniform(0.1, longest))
        if started.processes[0].is_alive():
            started.kill()
            kills += 1
            log = tmp_path / "run/log.jsonl"
            trained += log.exists() and log.stat().st_size > 0
        else:
            assert read_results(tmp_path / "run") == reference[1]
            shutil.rmtree(tmp_path / "run")
        if kills == 10:
            break
    assert kills == 10 and trained
    assert finish(*SHORT, "--output_dir=run", "--resume") == reference[1]
    assert same_model(tmp_path / "run", reference[0])
    assert log_lines(tmp_path / "run") == log_lines(reference[0])


def killed_run(flags, seconds, name, number):
    """A run that is killed at the end of the so many-th call of a method of `Run`."""
    method, calls = getattr(utils.Run, name), []

    def dying(self, *rest):
        method(self, *rest)
        calls.append(rest)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(utils.Run, name, dying)
    run_template(flags, seconds)


@pytest.mark.parametrize("seconds", [0, 30])
@pytest.mark.parametrize("name, number", [
    ("end_epoch", 1), ("end_epoch", 3), ("end_epoch", 6), ("end_task", 2)])
def test_killed_at_a_chosen_moment(launch, finish, tmp_path, reference, name, number, seconds):
    """In and after a task, with a checkpoint after every epoch and with the one of the task before
    (for epoch 1: with none); and between herding and the next checkpoint."""
    started = launch(function=killed_run, arguments=([*SHORT, "--output_dir=run"], seconds, name, number))
    assert started.wait() == [-signal.SIGKILL]
    with open(tmp_path / "run/log.jsonl", "a") as log:
        log.write('{"task": 1, "torn')  # as if killed while writing
    assert finish(*SHORT, "--output_dir=run", "--resume") == reference[1]
    assert same_model(tmp_path / "run", reference[0])


def test_checkpoints_are_written_at_the_end_of_a_fit_and_every_half_minute(finish, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seconds, expected in (("often", 0, [1, 2, 3] * 3), ("seldom", 30, [3] * 3)):
        written, write = [], utils.write_tensors
        with monkeypatch.context() as patch:
            patch.setattr(utils, "CHECKPOINT_SECONDS", seconds)
            patch.setattr(utils, "write_tensors", lambda path, content: (
                written.append(content.get("epoch")), write(path, content)))
            template.main(utils.get_parser().parse_args([
                *SHORT, "--num_epochs=3", "--device=cpu", f"--output_dir={name}"]))
        assert written == [*expected, None]  # the last one is model.pt
    assert log_lines(tmp_path / "often") == log_lines(tmp_path / "seldom")


def test_stop_after_task_and_resume(finish, tmp_path, reference):
    part = finish(*SHORT, "--output_dir=run", "--stop_after_task=2")
    assert not part["finished"] and len(part["acc1s"]) == 2
    assert part["average_incremental_accuracy"] == pytest.approx(np.mean(part["acc1s"]))
    assert part["last_accuracy"] == part["acc1s"][-1]
    (first,), (now, _) = part["accuracy_matrix"]
    assert part["forgetting"] == pytest.approx(first - now)
    assert finish(*SHORT, "--output_dir=run", "--resume") == reference[1]
    # a finished run can be resumed too: it only computes its last task's results again
    assert finish(*SHORT, "--output_dir=run", "--resume") == reference[1]
    assert same_model(tmp_path / "run", reference[0])


def test_a_look_at_the_test_images_after_each_epoch_changes_nothing(finish, tmp_path, reference):
    result = finish(*SHORT, "--output_dir=run", "--eval_every_epoch=1")
    assert result["args"].pop("eval_every_epoch") == 1
    before = {**reference[1], "args": dict(reference[1]["args"])}
    assert before["args"].pop("eval_every_epoch") == 0
    assert result == before and same_model(tmp_path / "run", reference[0])
    seen = [line["test_accuracy"] for line in log_lines(tmp_path / "run")]
    assert len(seen) == 6 and seen[1] == result["acc1s"][0]  # the first task is not aligned


def test_results_name_the_device_and_the_versions_of_the_last_start(finish, tmp_path):
    finish(*SHORT, "--output_dir=run", "--stop_after_task=1")
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    now = {key: saved["results"][key] for key in ("device", "versions")}
    saved["results"].update(device="an old GPU", versions={**now["versions"], "torch": "1.0"})
    torch.save(saved, tmp_path / "run/checkpoint.pt")
    results = finish(*SHORT, "--output_dir=run", "--resume", "--stop_after_task=2")
    assert {key: results[key] for key in now} == now


class NumpyTrainer(template.CilTrainer):
    """Its schedule, its log and its results hold numbers of numpy, its log tensors as well."""

    def make_optimizer(self, parameters, num_epochs, lr):
        optimizer, _ = super().make_optimizer(parameters, num_epochs, lr)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: 0.5 + 0.5 * np.cos(np.pi * epoch / num_epochs))

    def train_epoch(self, loader, optimizer):
        return {**super().train_epoch(loader, optimizer), "own": np.mean([0.5, np.nan]),
                "tensor": torch.tensor(0.5), "tensors": torch.tensor([1.0, 2.0]),
                "short": np.float32(0.25)}

    def finish_task(self):
        super().finish_task()
        self.run.results["norm"] = np.float64(0.5)


def test_numbers_of_numpy_in_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "CHECKPOINT_SECONDS", 0)
    for name, steps in ("whole", [[]]), ("run", [["--stop_after_task=2"], ["--resume"]]):
        for flags in steps:
            template.main(utils.get_parser().parse_args([
                *SHORT, "--device=cpu", f"--output_dir={tmp_path / name}", *flags]), NumpyTrainer)
    assert read_results(tmp_path / "run") == read_results(tmp_path / "whole")
    assert same_model(tmp_path / "run", tmp_path / "whole")
    for line in log_lines(tmp_path / "run"):
        assert (line["tensor"], line["tensors"], line["short"]) == (0.5, [1.0, 2.0], 0.25)


def test_resume_on_another_number_of_processes(finish, tmp_path, reference):
    finish(*SHORT, "--output_dir=run", "--stop_after_task=1")
    first = (tmp_path / "run/log.jsonl").read_text().splitlines()
    results = finish(*SHORT, "--output_dir=run", "--resume", processes=2)
    assert results["finished"] and results["acc1s"][0] == reference[1]["acc1s"][0]
    assert (tmp_path / "run/log.jsonl").read_text().splitlines()[:2] == first
    assert len(log_lines(tmp_path / "run")) == 6


@pytest.mark.parametrize("in_memory", [True, False])
def test_resume_of_folder_data(launch, finish, image_folder, tmp_path, in_memory):
    """A checkpoint holds the numbers of the exemplars, not their pixels, and knows its data set."""
    flags = ["--data_set=image_folder", f"--data_path={image_folder()}", "--backbone=resnet20",
             "--input_size=16", "--num_bases=2", "--increment=1", "--batch_size=4", "--num_epochs=2",
             "--memory_size=9", "--aa=none", "--no_plots", "--num_workers=0"]
    flags += [] if in_memory else ["--reprob=0.3"]  # augmented one by one
    whole = finish(*flags, "--output_dir=whole")
    finish(*flags, "--output_dir=run", "--stop_after_task=2")
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    # After the last checkpoint, at the end of the second fit, the third class was added.
    assert [len(rows) for rows in saved["exemplars"]] == [4, 4]
    assert finish(*flags, "--output_dir=run", "--resume") == whole
    image = tmp_path / "images/train/red/0.png"
    image.rename(image.with_name("another.png"))
    started = launch(*flags, "--output_dir=run", "--resume")
    assert started.wait() == [2] and "other images" in started.stderr()


def test_killed_with_loading_processes(launch, finish, image_folder, tmp_path):
    """Loading workers outlive a killed run for some seconds; the next start waits for them."""
    flags = ["--data_set=image_folder", f"--data_path={image_folder()}", "--backbone=resnet20",
             "--input_size=16", "--num_bases=2", "--increment=2", "--batch_size=4", "--num_epochs=3",
             "--memory_size=8", "--aa=none", "--no_plots", "--num_workers=1"]
    whole = finish(*flags, "--output_dir=whole")
    started = launch(*flags, "--output_dir=run")
    while started.processes[0].is_alive() and not (tmp_path / "run/log.jsonl").exists():
        time.sleep(0.005)
    started.kill()
    assert finish(*flags, "--output_dir=run", "--resume") == whole


def test_resume_without_output_dir_finds_the_newest_run(finish, tmp_path, reference):
    finish(*SHORT, "--stop_after_task=1")
    finish(*SHORT, "--resume")
    run, = (tmp_path / "runs").iterdir()
    assert read_results(run) == reference[1]


def kill_a_worker(agent, log, workers):
    """Kill the last of the processes that a torchrun started, once the run has ended its third epoch."""
    for _ in range(1200):
        if log.exists() and log.read_text().count("\n") >= 3:
            break
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
    assert len(found) == workers
    os.kill(int(found[-1]), signal.SIGKILL)


@pytest.mark.parametrize("machines", [1, 2])
def test_killed_worker_under_torchrun_max_restarts(finish, tmp_path, machines):
    """torchrun starts the same command again, which goes on from the checkpoint. On two machines
    each agent counts the restarts for itself, and their workers must find each other."""
    expected = finish(*SHORT, "--output_dir=expected", processes=2)
    flags = [*SHORT, "--output_dir=run", "--resume"]
    if machines == 1:
        agents = [torchrun(tmp_path, ["--max-restarts=2", "--nproc_per_node=2", "--standalone"], *flags)]
    else:
        agents = two_machines(tmp_path, ["--max-restarts=2"], *flags)
    kill_a_worker(agents[-1], tmp_path / "run/log.jsonl", 2 // machines)
    outputs = [agent.communicate(timeout=150)[0] for agent in agents]
    assert {agent.returncode for agent in agents} == {0}, outputs
    assert read_results(tmp_path / "run") == expected
    assert same_model(tmp_path / "run", tmp_path / "expected")


@pytest.mark.parametrize("flags", [["--output_dir=run"], ["--output_dir=run", "--resume"]])
def test_a_folder_whose_checkpoint_is_gone_is_left_alone(launch, finish, tmp_path, flags):
    finish(*SHORT, "--output_dir=run", "--stop_after_task=1")
    (tmp_path / "run/checkpoint.pt").unlink()
    for missing in ("none", "log.jsonl", "results.json"):  # in this order
        (tmp_path / "run" / missing).unlink(missing_ok=True)
        before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        started = launch(*SHORT, *flags)
        assert started.wait() == [2]
        assert ("no checkpoint.pt to go on" if "--resume" in flags else "pass --resume") in started.stderr()
        assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("changed", [
    ["tutorial.methods.frozen", "--seed=1"], ["tutorial.methods.frozen", "--head=ridge"], ["template.py"]])
def test_a_finished_run_without_checkpoint_is_left_alone(launch, tmp_path, changed):
    """A frozen network that nothing adapts never calls `fit`, so it writes none."""
    flags = ["--output_dir=run", "--no_plots"]
    first = launch(function=run_file, arguments=(ROOT, "tutorial.methods.frozen", flags))
    assert first.wait() == [0], first.stderr()
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    name, *other = changed
    again = launch(function=run_file, arguments=(ROOT, name, [*flags, "--resume", *other]))
    assert again.wait() == [2] and "--resume: run holds a run with " in again.stderr()
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_a_copy_goes_by_its_own_name(tmp_path):
    for name in ("template", "utils", "resnet"):
        target = "mine" if name == "template" else name
        (tmp_path / f"{target}.py").write_text((ROOT / f"{name}.py").read_text())
    done = subprocess.run([sys.executable, "mine.py", *SHORT, "--stop_after_task=1"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    run, = (tmp_path / "runs").iterdir()
    assert run.name.startswith("mine_digits_") and read_results(run)["method"] == "mine"
