"""--compile: the backbone is compiled once for a whole run, and nothing else changes."""
import json
import re

import pytest
import torch
from conftest import SHORT, read_results, run_template

FLAGS = [*SHORT, "--backbone=two_layers", "--lr=0.01", "--num_epochs=3"]


def run(flags):
    """The template on a small network, which compiles in seconds."""
    import timm
    from torch import nn

    @timm.models.register_model
    def two_layers(pretrained=False, **options):
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3),
                             nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    run_template(flags)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    print(f"graphs: {graphs}\n", end="", flush=True)  # at once: two processes share the file


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    from conftest import Launch
    folder = tmp_path_factory.mktemp("eager")
    started = Launch(folder, run, ([*FLAGS, "--output_dir=run"],), 1, {})
    assert started.wait() == [0], started.stderr()
    assert "graphs: 0\n" in started.stdout()
    return folder / "run"


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_compiled_run_learns_the_same_and_can_be_resumed(launch, tmp_path, eager, processes):
    for step in ("--stop_after_task=2", "--resume"):
        started = launch(function=run, processes=processes, env={"TORCH_LOGS": "recompiles"},
                         arguments=([*FLAGS, "--compile", "--output_dir=run", step],))
        assert started.wait(300) == [0] * processes, started.stderr()
        graphs = re.findall(r"graphs: (\d+)", started.stdout())
        assert len(graphs) == processes and "0" not in graphs
        # Once to train, and once more for the teacher; not for each task, teacher or last batch.
        recompiled = re.findall(r"Recompiling function (\w+)", started.stderr())
        assert len(recompiled) <= processes, started.stderr()
    compiled, plain = read_results(tmp_path / "run"), read_results(eager)
    assert compiled["args"].pop("compile") and not plain["args"].pop("compile")
    assert compiled["finished"] and len(losses(tmp_path / "run")) == 9
    if processes == 1:  # (two share the batch for BatchNorm, so there even eager runs differ)
        assert losses(tmp_path / "run") == pytest.approx(losses(eager), rel=1e-3)
        assert compiled["acc1s"] == pytest.approx(plain["acc1s"], abs=2)
    names = torch.load(tmp_path / "run/model.pt", weights_only=True)["state_dict"]
    assert names.keys() == torch.load(eager / "model.pt", weights_only=True)["state_dict"].keys()
