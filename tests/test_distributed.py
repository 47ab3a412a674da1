"""The number of processes must not change the experiment."""
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, read_results, two_machines


def examine(flags, folder):
    """In each process: one trainer, its metrics and exemplars, written to folder/N_rank.json."""
    import template
    import utils
    args = utils.setup(utils.get_parser().parse_args(flags))
    train, test = utils.build_scenarios(args)
    trainer = template.CilTrainer(args)
    trainer.run = SimpleNamespace(increments=train.increments, test_scenario=test)
    trainer.task, trainer.nb_new = 0, train.increments[0]
    trainer.expand_model(trainer.nb_new, None)
    scores = utils.evaluate(trainer)
    new_data = train.images(0)
    features = utils.extract_features(trainer.model, new_data, args)
    torch.manual_seed(args.rank)  # even if the ranks drew different numbers
    trainer.update_memory(new_data)
    with open(f"{folder}/{args.world_size}_{args.rank}.json", "w") as file:
        json.dump({"scores": scores, "images": len(test.images(0)),
                   "features": features.numpy().tobytes().hex(), "shape": list(features.shape),
                   "exemplars": [e.rows.tolist() for e in trainer.exemplars]}, file)


@pytest.mark.parametrize("herding", ["barycenter", "random"])
def test_exact_evaluation_and_the_same_exemplars_on_every_rank(launch, tmp_path, herding):
    found = {}
    for world in (1, 2, 3):
        started = launch(function=examine, processes=world,
                         arguments=([f"--herding_method={herding}", "--batch_size=30"], str(tmp_path)))
        assert started.wait() == [0] * world, started.stderr()
        ranks = [json.loads((tmp_path / f"{world}_{rank}.json").read_text()) for rank in range(world)]
        assert all(rank == ranks[0] for rank in ranks)
        found[world] = ranks[0]
    images = found[1]["images"]
    assert images % 2 and images % 3  # the shards are of different sizes
    for world in (1, 2, 3):
        assert np.sum(found[world]["scores"]["confusion"]) == images
        assert found[world]["scores"] == found[1]["scores"]
        if herding == "barycenter":
            assert found[world]["exemplars"] == found[1]["exemplars"]

    def rows(world):
        data = np.frombuffer(bytes.fromhex(found[world]["features"]), np.float32)
        return data.reshape(found[world]["shape"])

    np.testing.assert_allclose(rows(2), rows(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows(3), rows(1), rtol=1e-4, atol=1e-5)


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)["state_dict"]


def test_one_and_two_processes_agree(finish, tmp_path):
    """With a backbone without BatchNorm both compute the same sums in another order.

    After 2 x 17 + 2 x 13 steps float32 rounding (1e-7 a step) has grown to about 1e-5 of a
    weight; 1e-3 leaves room for another processor. A wrong batch, a wrong scale of the gradient
    or another augmentation moves weights by more than 1e-2: the last assertion is the proof.
    """
    flags = ["--num_bases=4", "--increment=3", "--num_epochs=2", "--no_plots", "--input_size=32",
             "--backbone=test_vit", "--lr=0.01", "--num_workers=0", "--stop_after_task=2"]
    one = finish(*flags, "--output_dir=one")
    two = finish(*flags, "--output_dir=two", processes=2)
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("one", "two")]
    for alone, shared in zip(*logs, strict=True):  # what a rank has seen is added up
        assert alone["images"] == shared["images"]
        assert alone["loss"] == pytest.approx(shared["loss"], rel=1e-2)
        assert alone["train_accuracy"] == pytest.approx(shared["train_accuracy"], abs=1)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-3
    assert np.allclose(one["acc1s"], two["acc1s"], atol=1)
    finish(*flags, "--output_dir=other", "--seed=1", "--class_order=default")
    other = weights(tmp_path / "other")
    assert max((a[name] - other[name]).abs().max().item() for name in a) > 1e-2


def train_and_compare_ranks(flags, folder):
    """A short run; afterwards each rank writes what its model holds."""
    import template
    import utils

    class Watched(template.CilTrainer):
        def finish_task(self):
            super().finish_task()
            state = {name: tensor.tolist() for name, tensor in self.model.state_dict().items()}
            with open(f"{folder}/state_{self.task}_{self.args.rank}.json", "w") as file:
                json.dump(state, file)

    template.main(utils.get_parser().parse_args(flags), Watched)


def average_what_differs():
    import utils
    args = utils.setup(utils.get_parser().parse_args([]))
    norm = torch.nn.BatchNorm1d(3)
    norm.running_mean.fill_(args.rank)
    norm.running_var.fill_(1 + 4 * args.rank)
    utils.average_batchnorm(norm, args)
    assert (norm.running_mean == 0.5).all() and (norm.running_var == 3).all()


def test_running_averages_are_averaged(launch):
    started = launch(function=average_what_differs, arguments=(), processes=2)
    assert started.wait() == [0, 0], started.stderr()


def test_weights_and_batchnorm_buffers_are_equal_on_all_ranks(launch, tmp_path):
    started = launch(function=train_and_compare_ranks, processes=2,
                     arguments=([*SHORT, "--output_dir=run"], str(tmp_path)))
    assert started.wait() == [0, 0], started.stderr()
    for task in range(3):
        ranks = [json.loads((tmp_path / f"state_{task}_{rank}.json").read_text()) for rank in (0, 1)]
        assert ranks[0] == ranks[1]
        assert any("running_var" in name for name in ranks[0])
    assert json.loads((tmp_path / "run/results.json").read_text())["method"] == "Watched"


def test_torchrun_with_one_machine_leaves_its_files(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
         str(ROOT / "template.py"), "--num_epochs=2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    run, = (tmp_path / "runs").iterdir()
    assert run.name.startswith("WA_digits_b4_inc2_seed0_")
    names = {file.name for file in run.iterdir() if file.name[0] != "."}
    assert names == {"accuracy.png", "checkpoint.pt", "confusion.png", "log.jsonl", "model.pt",
                     "results.json"}
    for name in names:
        assert done.stdout.count(name) == 1  # rank 0 alone prints, and names each file
    results = json.loads((run / "results.json").read_text())
    assert results["finished"] and results["world_size"] == 2
    assert [len(row) for row in results["accuracy_matrix"]] == [1, 2, 3, 4]
    saved = torch.load(run / "model.pt", weights_only=True)["state_dict"]
    assert results["parameters"] == sum(  # all but BatchNorm's running averages
        x.numel() for name, x in saved.items() if not re.search("running|num_batches", name))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [(line["task"], line["epoch"]) for line in lines] == [
        (task, epoch) for task in range(1, 5) for epoch in (1, 2)]


def test_two_machines(tmp_path, finish):
    """Two torchrun agents on localhost, each with one process; both get all exemplars."""
    agents = two_machines(tmp_path, [], *SHORT, "--output_dir=run")
    outputs = [agent.communicate(timeout=150)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert read_results(tmp_path / "run") == finish(*SHORT, "--output_dir=spawned", processes=2)
