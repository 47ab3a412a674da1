"""What a run says: its first line, progress, the last words when it is stopped, hints, --help."""
import argparse
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, Launch, read_results, run_file
from tqdm import tqdm

import template
import utils

LINE = re.compile(
    r"task (\d)/3 epoch (\d)/2: loss \d+\.\d{3}, accuracy \d+\.\d %, \d+ images/s, "
    r"(\d+):(\d\d):(\d\d) left")


def run(*flags, Trainer=template.CilTrainer, Run=utils.Run):
    template.main(utils.get_parser().parse_args([*SHORT, *map(str, flags)]), Trainer, Run)


def test_the_first_line_names_the_folder_and_what_is_not_preset(tmp_path, capsys):
    run("--lambda_kd=0.2", "--stop_after_task=1", f"--output_dir={tmp_path / 'a'}")
    first = capsys.readouterr().out.splitlines()[0]
    assert first == (f"{tmp_path / 'a'}: WA on digits, 3 tasks, 10 classes, 2 epochs a task, 1 "
                     "process on cpu, --increment 3 --num_epochs 2 --lambda_kd 0.2")
    run("--stop_after_task=2", "--lambda_kd=0.2", f"--output_dir={tmp_path / 'a'}", "--resume")
    assert capsys.readouterr().out.splitlines()[1] == (
        f"saved to {tmp_path / 'a'} up to task 1, epoch 2; go on with --resume")


def test_progress_without_a_terminal(tmp_path, monkeypatch, capsys):
    """As if a minute had passed at every step."""
    monkeypatch.setattr(utils.Progress, "due", lambda self: True)
    run("--batch_size=64", f"--output_dir={tmp_path / 'a'}")
    lines = [line for line in capsys.readouterr().out.splitlines() if " epoch " in line]
    found = [LINE.fullmatch(line) for line in lines]
    assert all(found), lines
    places = [tuple(map(int, match.groups()[:2])) for match in found]
    log = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert places == [(line["task"], line["epoch"]) for line in log
                      for _ in range(line["images"] // 64)]
    assert lines[-1].endswith(" 0:00:00 left")
    # The accuracy of the whole epoch stands at its last step.
    for line in log:
        last = lines[max(i for i, p in enumerate(places) if p == (line["task"], line["epoch"]))]
        assert f"accuracy {line['train_accuracy']:.1f} %" in last
        assert f"loss {line['loss']:.3f}," in last


def test_a_line_every_minute(monkeypatch):
    args = argparse.Namespace(rank=0, stop_after_task=None, memory_size=0)
    now = [1000.0]
    monkeypatch.setattr(utils.time, "time", lambda: now[0])
    progress = utils.Progress(args, [2, 2], np.array([0, 1, 2, 3]))
    progress.bar = None
    now[0] += 59
    assert not progress.due()
    now[0] += 2
    assert progress.due()
    other = utils.Progress(argparse.Namespace(rank=1, stop_after_task=None, memory_size=0), [2, 2],
                           np.array([0, 1, 2, 3]))
    now[0] += 1000
    assert not other.due()


def test_time_left(monkeypatch, capsys):
    """Tasks of 30, 10 + 10 and 10 + 10 images, 4 epochs each: the work is 120 + 80 + 80."""
    labels = np.repeat(np.arange(6), [15, 15, 5, 5, 5, 5])
    args = argparse.Namespace(rank=0, stop_after_task=None, memory_size=10)
    progress = utils.Progress(args, [2, 2, 2], labels)
    progress.bar = None
    trainer = argparse.Namespace(task=0, stage=0, epoch=0, run=argparse.Namespace(num_epochs=4))
    assert progress.done(trainer, 0.5) == pytest.approx(15 / 280)
    trainer.task, trainer.epoch = 1, 2
    assert progress.done(trainer, 0.5) == pytest.approx((120 + 50) / 280)
    trainer.stage, trainer.epoch = 1, 3  # a second fit: no one knows how long
    assert progress.done(trainer, 0.5) == pytest.approx((120 + 80) / 280)
    # A run that is resumed after task 1, with 80 of the remaining 160 done in 20 seconds.
    trainer.task, trainer.stage, trainer.epoch = 1, 0, 0
    now = [0.0]
    monkeypatch.setattr(utils.time, "time", lambda: now[0])
    progress.begin_epoch(trainer)
    trainer.epoch, now[0] = 3, 20.0
    progress.show(trainer, 1, {"loss": 1, "train_accuracy": 50, "images_per_second": 9})
    assert capsys.readouterr().out == ("task 2/3 epoch 4/4: loss 1.000, accuracy 50.0 %, 9 images/s, "
                                       "0:00:20 left\n")
    trainer.stage = 1
    progress.show(trainer, 1, {"loss": 1, "train_accuracy": 50, "images_per_second": 9})
    assert capsys.readouterr().out.startswith("task 2/3 stage 2 epoch 4/4: ")
    trainer.task = 2  # the end of this one is not known
    progress.show(trainer, 1, {"loss": 1, "train_accuracy": 50, "images_per_second": 9})
    assert capsys.readouterr().out.endswith("9 images/s, the last stage\n")
    # Nor is it after a resume in the second stage of an earlier task, which is not in the work.
    trainer.task, trainer.epoch = 1, 0
    progress.start = None
    progress.begin_epoch(trainer)
    now[0] += 1e5
    progress.show(trainer, 1, {"loss": 1, "train_accuracy": 50, "images_per_second": 9})
    assert capsys.readouterr().out.endswith("9 images/s, the last stage\n")
    trainer.task = 1
    stopped = utils.Progress(argparse.Namespace(rank=0, stop_after_task=2, memory_size=10),
                             [2, 2, 2], labels)
    trainer.task, trainer.epoch = 1, 3
    assert stopped.done(trainer, 1) == 1


def test_progress_on_a_terminal(tmp_path, monkeypatch, capsys):
    """One bar for the whole run, whose figures are those of the epoch so far."""
    monkeypatch.setattr(utils.sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(utils.Progress, "due", lambda self: True)
    run("--batch_size=64", f"--output_dir={tmp_path / 'a'}")
    shown = capsys.readouterr()
    texts = re.findall(r"task \d/3 epoch [^|\r]*left", shown.err)
    assert len(set(texts)) > 10 and all(LINE.fullmatch(text) for text in texts)
    assert " epoch " not in shown.out and "100 %" in shown.err


# ---- signals ---------------------------------------------------------------------------------

def command(flags, seconds):
    """The command line itself, which reacts to signals; a checkpoint after so many seconds."""
    utils.CHECKPOINT_SECONDS = seconds
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a runner in the background ignores it
    run_file(ROOT, "template.py", flags)


def command_that_ignores(flags):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_file(ROOT, "template.py", flags)


def wait_for(path, lines, started):
    end = time.time() + 60
    while not path.exists() or path.read_text().count("\n") < lines:
        assert time.time() < end, started.stderr()
        time.sleep(0.02)


FLAGS = [*SHORT, "--num_epochs=4"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The results of a run that no signal ends, by the number of its processes."""
    folder = tmp_path_factory.mktemp("whole")
    for processes in (1, 2):
        started = Launch(folder, command, ([*FLAGS, f"--output_dir={processes}"], 30), processes, {})
        assert started.wait() == [0] * processes, started.stderr()
    return {processes: read_results(folder / str(processes)) for processes in (1, 2)}


@pytest.mark.parametrize("processes, number", [(1, signal.SIGINT), (1, signal.SIGTERM),
                                               (2, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_signal_ends_a_run_with_one_line(launch, finish, tmp_path, whole, processes, number):
    started = launch(function=command, arguments=([*FLAGS, "--output_dir=a"], 0),
                     processes=processes)
    wait_for(tmp_path / "a/log.jsonl", 6, started)
    sent = time.time()
    for process in started.processes:
        os.kill(process.pid, number)
    assert started.wait() == [128 + number] * processes
    assert time.time() < sent + 3
    last = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()][-1]
    said = re.fullmatch(rf"ended by {number.name}: saved to a up to task (\d), epoch (\d); go on "
                        "with --resume\n", started.stderr())
    assert said, started.stderr()
    task, epoch = map(int, said.groups())
    assert 0 <= 4 * (last["task"] - task) + last["epoch"] - epoch <= 1
    assert finish(*FLAGS, "--output_dir=a", "--resume", processes=processes) == whole[processes]


def test_a_signal_ends_a_process_that_waits_for_another(launch, tmp_path):
    """Rank 1 stands still, so rank 0 waits for its gradients, inside of torch."""
    started = launch(function=command, arguments=([*SHORT, "--num_epochs=50", "--output_dir=a"], 0),
                     processes=2)
    wait_for(tmp_path / "a/log.jsonl", 2, started)
    first, second = started.processes
    os.kill(second.pid, signal.SIGSTOP)
    time.sleep(0.5)
    sent = time.time()
    os.kill(first.pid, signal.SIGTERM)
    first.join(10)
    assert time.time() < sent + 3 and first.exitcode == 128 + signal.SIGTERM
    assert started.stderr().startswith("ended by SIGTERM: saved to a up to task 1, epoch ")


def test_a_signal_that_is_ignored_stays_ignored(launch, tmp_path):
    started = launch(function=command_that_ignores, arguments=([*SHORT, "--output_dir=a"],))
    wait_for(tmp_path / "a/log.jsonl", 1, started)
    os.kill(started.processes[0].pid, signal.SIGINT)
    assert started.wait() == [0] and read_results(tmp_path / "a")["finished"]


def test_a_signal_before_anything_is_saved(launch, tmp_path):
    started = launch(function=command, processes=1,
                     arguments=([*SHORT, "--num_epochs=500", "--output_dir=a"], 1000))
    wait_for(tmp_path / "a/log.jsonl", 1, started)
    os.kill(started.processes[0].pid, signal.SIGINT)
    assert started.wait() == [130]
    assert started.stderr() == "ended by SIGINT: nothing is saved yet\n"


def test_loading_processes_may_end(launch, image_folder, tmp_path):
    """Their end is a signal, too, which is not meant for the run."""
    flags = ["--data_set=image_folder", f"--data_path={image_folder()}", "--backbone=resnet20",
             "--input_size=16", "--num_bases=2", "--increment=1", "--batch_size=4", "--num_epochs=1",
             "--memory_size=8", "--reprob=0.1", "--aa=none", "--num_workers=1", "--no_plots",
             "--output_dir=run"]
    started = launch(function=run_file, arguments=(ROOT, "template.py", flags))
    assert started.wait() == [0], started.stderr()
    assert read_results(tmp_path / "run")["finished"]


def test_a_run_from_python_leaves_the_signals_alone(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run("--stop_after_task=1", f"--output_dir={tmp_path / 'a'}")
    assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


# ---- hints at the end --------------------------------------------------------------------------

def test_a_run_that_stops_early_says_how_to_go_on(tmp_path, capsys):
    run("--stop_after_task=2", f"--output_dir={tmp_path / 'a'}")
    hint = ("stopped after task 2 of 3 (--stop_after_task): without this flag, and with "
            f"--output_dir {tmp_path / 'a'} --resume, the run goes on\n")
    assert hint in capsys.readouterr().out
    run(f"--output_dir={tmp_path / 'a'}", "--resume")
    assert "stopped" not in capsys.readouterr().out


def test_a_run_that_learns_nothing_says_so(tmp_path, capsys):
    run("--lr=1e-9", f"--output_dir={tmp_path / 'a'}")
    said = capsys.readouterr().out
    assert re.search(r"note: in task 3 not even the training images were learned \(\d+\.\d % right "
                     r"at best\): try a smaller --lr", said)
    run("--stop_after_task=1", f"--output_dir={tmp_path / 'b'}")
    assert "note:" not in capsys.readouterr().out
    # A second stage on few images, where chance is high, hides nothing.
    run("--lr=1e-9", "--stop_after_task=2", f"--output_dir={tmp_path / 'c'}", Trainer=TwoStages)
    assert "note: in task 2 not even" in capsys.readouterr().out


class TwoStages(template.CilTrainer):
    def train_task(self, train_set):
        super().train_task(train_set)
        if self.task:
            few = self.exemplars[0].join(self.exemplars[1:])
            self.fit(few.join([few, few]), self.model.parameters(), 1, 1e-9)


def test_two_runs_that_begin_in_the_same_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20261122-120000")
    for process in (1000, 1001):
        monkeypatch.setattr(os, "getpid", lambda: process)
        run("--stop_after_task=1")
    assert {file.parent.name for file in (tmp_path / "runs").glob("*/results.json")} == {
        f"WA_digits_b4_inc3_seed0_20261122-120000-{process}" for process in (1000, 1001)}


# ---- a trainer and a network of one's own -------------------------------------------------------

class Bias(template.CilModel):
    """As in BiC: a pair of numbers for each task, none at first."""

    def __init__(self, backbone):
        super().__init__(backbone)
        self.pairs = torch.nn.Parameter(torch.zeros(0, 2))


class Own(template.CilTrainer):
    model_class = Bias

    def make_optimizer(self, parameters, num_epochs, lr):
        used = [weight for weight in parameters if weight.numel()]
        return super().make_optimizer(used, num_epochs, lr)

    def train_epoch(self, loader, optimizer):
        averages = super().train_epoch(loader, optimizer)
        return {**averages, "rates": [group["lr"] for group in optimizer.param_groups], "note": "x"}


class OwnRun(utils.Run):
    def end_task(self, trainer, scores):
        super().end_task(trainer, scores)
        self.results.setdefault("inference", []).append(scores["task_inference"])


def test_empty_weights_own_averages_and_an_own_run(tmp_path):
    run(f"--output_dir={tmp_path / 'a'}", Trainer=Own, Run=OwnRun)
    log = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert [line["rates"] for line in log[:2]] == [[0.1], [pytest.approx(0.05)]]
    assert {line["note"] for line in log} == {"x"}
    results = read_results(tmp_path / "a")
    assert len(results["accuracy_matrix"]) == 3
    assert results["inference"] == results["task_inference"]  # that of the last task, too


class Unused(template.CilModel):
    def __init__(self, backbone):
        super().__init__(backbone)
        self.auxiliary = torch.nn.Linear(3, 2)


class UnusedTrainer(template.CilTrainer):
    model_class = Unused


def run_unused(flags):
    template.main(utils.get_parser().parse_args(flags), UnusedTrainer)


def test_weights_without_gradient_are_named(launch):
    started = launch(function=run_unused, arguments=([*SHORT, "--output_dir=a"],), processes=2)
    assert all(started.wait())
    assert started.stderr().count("\n") == 1, started.stderr()
    assert re.match("error: the loss does not depend on these weights, .*: auxiliary.bias, "
                    r"auxiliary.weight\. While they rest", started.stderr())


@pytest.mark.parametrize("error, says", [
    ("Connection closed by peer [127.0.0.1]:1", "lost another process of this launch"),
    ("parameters which did not receive grad for rank 0: x.bias", "the loss does not depend")])
def test_a_last_word_does_not_stand_behind_the_bar(monkeypatch, error, says):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(utils.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(utils.dist, "get_rank", lambda: 0)
    with tqdm(total=2):
        utils.report_unless_left(RuntimeError, RuntimeError(error), None)
        lines = re.split("[\r\n]", sys.stderr.getvalue())
    assert any(line.startswith(f"error: {says}") for line in lines), lines


# ---- --help --------------------------------------------------------------------------------------

METHODS = ["template.py", "lucir", "alta", "bal_ft"]


def get_parser(name):
    if name == "template.py":
        return utils.get_parser()
    return __import__(f"tutorial.methods.{name}", fromlist=["x"]).get_parser()


def test_a_wrong_flag_is_answered_before_the_slow_imports():
    code = ("import runpy, sys; sys.argv = ['template.py', '--lamda', '1']\n"
            "try: runpy.run_path('template.py', run_name='__main__')\n"
            "except SystemExit as end: assert end.code == 2\n"
            "print(sys.modules.keys() & {'torch', 'timm', 'torchvision', 'continuum'})")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "{'torch'}\n" and "unrecognized arguments: --lamda 1" in done.stderr


@pytest.mark.parametrize("variables, expected", [
    ({}, (0, 0, 1)),
    (dict(LOCAL_RANK=1, RANK=3, WORLD_SIZE=4, SLURM_PROCID=0, SLURM_NTASKS=2), (1, 3, 4)),
    (dict(RANK=1, WORLD_SIZE=2), (0, 1, 2)),
    (dict(SLURM_LOCALID=2, SLURM_PROCID=6, SLURM_NTASKS=8), (2, 6, 8)),
    (dict(SLURM_NTASKS=8), (0, 0, 1)),  # inside an allocation, but not started by srun
    (dict(MPI_LOCALRANKID=1, PMI_RANK=3, PMI_SIZE=4), (1, 3, 4)),
    (dict(OMPI_COMM_WORLD_LOCAL_RANK=0, OMPI_COMM_WORLD_RANK=2, OMPI_COMM_WORLD_SIZE=4), (0, 2, 4)),
])
def test_what_the_launch_says(monkeypatch, variables, expected):
    monkeypatch.setattr(os, "environ", {name: str(value) for name, value in variables.items()})
    assert utils.launched_as() == expected


@pytest.mark.parametrize("name", METHODS)
def test_help_shows_the_defaults_of_every_data_set(name):
    parser = get_parser(name)
    rows = parser.format_help().split("data set differ:\n")[1].splitlines()
    common = shlex.split(rows[0])
    assert [row.split()[0] for row in rows[1:]] == list(utils.PRESETS)
    for row in rows[1:]:
        data_set, *flags = shlex.split(row)
        values = dict(zip(common[::2], common[1::2])) | dict(zip(flags[::2], flags[1::2]))
        filled = utils.fill_in(parser.parse_args(["--data_set", data_set]))
        assert {flag: str(getattr(filled, flag[2:])) for flag in values} == values


def test_the_help_of_a_tool_has_no_defaults_of_a_training():
    parser = utils.Parser()
    parser.add_argument("--data_set", default="image_folder", help="as in tools/hold_out.py")
    assert "--num_epochs" not in parser.format_help()


@pytest.mark.parametrize("name", METHODS + ["icarl", "podnet", "itaml", "aanets", "feature_kd"])
def test_every_flag_has_a_help_text(name):
    for action in get_parser(name)._actions:
        assert action.help, action.option_strings


def test_the_examples_of_help_parse():
    examples = re.findall(r"(?m)^  (?:python|torchrun) .*", utils.get_parser().format_help())
    assert len(examples) == 3
    for example in examples:
        words = shlex.split(example)
        if "template.py" in words:
            utils.get_parser().parse_args(words[words.index("template.py") + 1:])
        else:  # python -m tutorial.methods.NAME
            name = words[words.index("-m") + 1].split(".")[-1]
            get_parser(name).parse_args(words[words.index("-m") + 2:])
