"""Help for all tests: start runs in processes of their own, without the seconds of imports.

A fork server imports the project once; every process that a test starts is a fresh fork of it,
so it can be killed, and has its own process group, generators and current folder.
"""
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # equal to the bit is a promise for the CPU
for name in list(os.environ):  # the tests may be started inside of a launch, such as sbatch
    if name.startswith(("SLURM_", "PMI_", "MPI_", "OMPI_")) or name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores, and the same sums in every run

# In place of utils.Progress, for a trainer that has no whole run.
SILENT = SimpleNamespace(begin_epoch=lambda trainer: None, due=lambda: False)

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["template", "continuum", "timm.data", "timm.utils", "sklearn.datasets"])

# A whole run in about two seconds: 4 + 3 + 3 classes of digits, two epochs for each.
SHORT = ["--num_bases=4", "--increment=3", "--num_epochs=2", "--no_plots"]


def child(function, arguments, folder, env, out, err):
    os.chdir(folder)
    os.environ.update(env)
    for stream, number in ((out, 1), (err, 2)):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    try:
        function(*arguments)
        sys.stdout.flush()
    except Exception:
        sys.excepthook(*sys.exc_info())  # as python would, at the end of a program
        sys.stderr.flush()
        os._exit(1)


def run_template(flags, seconds=30):
    """A run of template.py that writes a checkpoint at the end of an epoch if the last one is
    older than so many seconds."""
    import template
    import utils
    utils.CHECKPOINT_SECONDS = seconds
    template.main(utils.get_parser().parse_args(flags))


def run_file(folder, name, arguments):
    """What `python NAME ARGUMENTS` does, inside an already started process."""
    import runpy
    sys.path.insert(0, str(folder))
    sys.argv = [name, *arguments]
    if name.endswith(".py"):
        runpy.run_path(str(Path(folder) / name), run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__")


def kill_after(epochs):
    """Let this process, if it is rank 0, write a checkpoint and be killed after so many epochs of
    its run, counted from the first of the first task."""
    import utils
    end_epoch = utils.Run.end_epoch

    def dying(self, trainer, *rest):
        end_epoch(self, trainer, *rest)
        if trainer.args.rank == 0 and len(self.log) == epochs:
            os.kill(os.getpid(), signal.SIGKILL)
    utils.Run.end_epoch, utils.CHECKPOINT_SECONDS = dying, 0


def quarter_digits():
    """Let this process see a quarter of the digits' training images."""
    import utils
    (x, y), test = utils.load_digits()
    utils.load_digits = lambda: [(x[::4], y[::4]), test]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(folder, launcher, *flags):
    """A started `torchrun LAUNCHER template.py FLAGS`, in a folder; its output in one pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launcher, str(ROOT / "template.py"), *flags],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def two_machines(folder, launcher, *flags):
    """Two such agents, as on two machines with a process each; they meet at a free port."""
    launcher = [*launcher, "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
                "--local_addr=127.0.0.1", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    return [torchrun(folder, launcher, *flags) for _ in range(2)]


class Launch:
    """One or more started processes with their output. `wait` returns the list of exit codes."""

    def __init__(self, folder, function, arguments, processes, env):
        port = free_port()
        self.folder = Path(folder)
        self.out, self.err = self.folder / "stdout.txt", self.folder / "stderr.txt"
        self.out.unlink(missing_ok=True)
        self.err.unlink(missing_ok=True)
        self.processes = []
        for rank in range(processes):
            ranks = {} if processes == 1 else dict(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            process = CONTEXT.Process(target=child, args=(
                function, arguments, str(folder), {**ranks, **env}, str(self.out), str(self.err)))
            process.start()
            self.processes.append(process)

    def wait(self, seconds=120):
        """The exit codes. As under torchrun, the first bad end of one process ends the others."""
        end = time.time() + seconds
        while any(process.is_alive() for process in self.processes):
            if any(process.exitcode for process in self.processes):
                for process in self.processes:
                    process.terminate()
            if time.time() > end:
                self.kill()
                pytest.fail(f"still running after {seconds} s:\n{self.stderr()}")
            multiprocessing.connection.wait([p.sentinel for p in self.processes if p.is_alive()], 0.1)
        return [process.exitcode for process in self.processes]

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()

    def stdout(self):
        return self.out.read_text() if self.out.exists() else ""

    def stderr(self):
        return self.err.read_text() if self.err.exists() else ""


@pytest.fixture
def launch(tmp_path):
    """launch(flags…, processes=N): a run of template.py. launch(function=f, arguments=…): of f."""
    started = []

    def start(*flags, processes=1, function=run_template, arguments=None, env={}, folder=tmp_path,
              seconds=30):
        if arguments is None:
            arguments = ([str(flag) for flag in flags],)
            arguments += (seconds,) if function is run_template else ()
        started.append(Launch(folder, function, arguments, processes, env))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture
def finish(launch):
    """Like `launch`, but waits for a good end and returns the results of --output_dir."""
    def run(*flags, **options):
        started = launch(*flags, **options)
        codes = started.wait()
        assert codes == [0] * len(codes), started.stderr()
        folder = [flag for flag in map(str, flags) if flag.startswith("--output_dir=")]
        return read_results(started.folder / folder[0].split("=")[1]) if folder else None
    return run


def read_results(folder):
    """results.json without what may differ between two equal runs: times and the machine."""
    results = json.loads((Path(folder) / "results.json").read_text())
    for name in ("seconds", "images_per_second", "world_size"):
        results.pop(name)
    for name in ("output_dir", "resume", "stop_after_task"):
        results["args"].pop(name)
    return results


@pytest.fixture
def image_folder(tmp_path):
    """image_folder(classes, …): DIR with train/ and test/ of small images that can be told apart."""
    def make(classes=("red", "green", "blue", "grey"), train=12, test=3, size=16, name="images"):
        draw = np.random.RandomState(0)
        for split, count in (("train", train), ("test", test)):
            for number, label in enumerate(classes):
                folder = tmp_path / name / split / label
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = draw.randint(0, 60, (size, size, 3)) + [40 * number, 0, 90]
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        return tmp_path / name
    return make
