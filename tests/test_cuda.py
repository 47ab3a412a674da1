"""What only a GPU can tell: `pytest -m cuda`. Skipped where there is none."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from test_methods import METHODS

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
TASKS = ["--num_bases=4", "--increment=3", "--num_epochs=12", "--no_plots", f"--device={DEVICE}"]


@pytest.fixture(scope="module")
def gpu():
    """The environment of a process that sees the GPUs (the other tests hide them)."""
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    count = subprocess.run([sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
                           capture_output=True, text=True, env=env).stdout
    if DEVICE == "cuda" and count.strip() in ("", "0"):
        pytest.skip("there is no GPU")
    return env


def start(folder, env, *command):
    """Run to the end, quietly: a warning on stderr is a bug."""
    done = subprocess.run([sys.executable, *command], cwd=folder, env=env, text=True, timeout=600,
                          capture_output=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


@pytest.mark.parametrize("flags", [[], ["--amp=bf16"], ["--amp=fp16"], ["--compile", "--amp=bf16"]],
                         ids=["float32", "bf16", "fp16", "compiled"])
def test_digits_stopped_and_resumed(tmp_path, gpu, flags):
    for step in ("--stop_after_task=2", "--resume"):
        start(tmp_path, gpu, str(ROOT / "template.py"), *TASKS, *flags, "--output_dir=run", step)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["finished"] and results["device"] != "cpu"
    assert results["acc1s"][0] > 90 and results["last_accuracy"] > 30
    assert len((tmp_path / "run/log.jsonl").read_text().splitlines()) == 36


@pytest.mark.parametrize("name, flags", [
    *((name, [f"--amp={amp}"]) for name in METHODS for amp in ("bf16", "fp16")),
    *((name, ["--compile"]) for name in ("icarl", "lucir", "bal_ft", "frozen"))],
    ids=lambda value: value if isinstance(value, str) else value[0])
def test_each_method(tmp_path, gpu, name, flags):
    start(tmp_path, {**gpu, "PYTHONPATH": str(ROOT)}, "-m", f"tutorial.methods.{name}", *TASKS,
          *METHODS[name], *flags, "--num_epochs=2", "--output_dir=run")
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["finished"] and len(results["acc1s"]) == 3
    assert results["device"] != "cpu"


def test_torchrun_on_each_gpu_and_an_error_without_a_warning(tmp_path, gpu):
    """(On one GPU this is one process, without NCCL: that takes two.)"""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=gpu",
              str(ROOT / "template.py"), *TASKS, "--batch_size=24"]
    subprocess.run([sys.executable, *launch, "--output_dir=run"], cwd=tmp_path, env=gpu, check=True)
    assert json.loads((tmp_path / "run/results.json").read_text())["finished"]
    done = subprocess.run([sys.executable, *launch, "--memory_size=9"], cwd=tmp_path, env=gpu, text=True,
                          capture_output=True)
    ours = done.stderr.split("torch.distributed.elastic")[0]  # then comes torchrun's own report
    assert done.returncode and ours.count("error: --memory_size 9") == 1
    assert "destroy_process_group" not in done.stderr and "Traceback" not in ours.split("error:")[0]


COMPARE = """
import json, torch, template, utils
found = []
for device in ("cpu", "DEVICE"):
    args = utils.setup(utils.get_parser().parse_args(["--device", device]))
    images = utils.build_scenarios(args)[0].images(0)
    loader = utils.train_loader(images, args)
    loader.sampler.seed = 3
    pictures = torch.cat([x.cpu() for x, _ in loader])
    trainer = template.CilTrainer(args)
    trainer.expand_model(4, images)
    features = utils.extract_features(trainer.model, images, args)
    chosen = [template.herding(features[images.y == c], 20) for c in range(4)]
    found.append((pictures, features, chosen))
(a, b, c), (d, e, f) = found
print(json.dumps({"pixels": (a - d).abs().max().item(), "scale": b.abs().max().item(),
                  "features": (b - e).abs().max().item(),
                  "exemplars": sum(len(set(x) & set(y)) for x, y in zip(c, f)) / 80}))
""".replace("DEVICE", DEVICE)


def test_cpu_and_gpu_see_the_same_pictures_and_choose_the_same_exemplars(tmp_path, gpu):
    found = json.loads(start(tmp_path, {**gpu, "PYTHONPATH": str(ROOT)}, "-c", COMPARE))
    assert found["pixels"] < 1e-5  # the same shifts and flips; normalised with the same numbers
    assert found["features"] < 1e-2 * found["scale"]  # TF32 has 10 bits
    assert found["exemplars"] >= 0.8
