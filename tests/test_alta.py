"""ALTA on a tiny CLIP: prompts, the table of methods, the memory, the loss, loading of weights."""
import json
import os
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, read_results, run_file
from test_core import lines_of_code
from test_methods import cosine, on_one_and_two_ranks, softmax, write_of_rank
from test_resume import log_lines, same_model
from torch.nn import functional as F

import utils

open_clip = pytest.importorskip("open_clip")
from tutorial.methods import alta, clip_towers, tiny_clip  # noqa: E402

ALTA = "oritext_mlp2cprompt_oriimg"


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A file of the tiny CLIP after a short training."""
    path = tmp_path_factory.mktemp("clip") / "tiny.pt"
    args = utils.setup(utils.get_parser().parse_args([]))
    utils.write_tensors(path, tiny_clip.train(args, num_steps=30).state_dict())
    return path


def set_up(*flags, visual="tiny"):
    args = alta.get_parser().parse_args(list(flags))
    args.visual, args.lr = visual, 0.01
    return utils.setup(args)


def make(weights, *flags, tasks=2):
    """A trainer in its second task, whose context and adapter have moved since the first ended."""
    trainer = alta.ALTA(set_up(f"--clip_weights={weights}", *flags))
    trainer.train_scenario, test_scenario = utils.build_scenarios(trainer.args)
    trainer.run = SimpleNamespace(
        increments=[2] * 5, test_scenario=test_scenario, results={"class_names": test_scenario.class_names})
    for trainer.task in range(tasks):
        trainer.expand_model(2, None)
        move(trainer.model, trainer.task)
    trainer.known_classes, trainer.nb_new = 2 * tasks - 2, 2
    trainer.parallel_model, trainer.random = trainer.model, np.random.RandomState(0)
    return trainer


def move(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.train()


def batch(trainer, task=1, size=8):
    images = trainer.train_scenario.images(task)
    return torch.stack([images[i, None][0] for i in range(size)]), torch.tensor(images.y[:size])


def offer(trainer, task, size, columns="seen"):
    """Fill the memory with images of a task, as a step in that task would have done."""
    images, labels = batch(trainer, task, size)
    x = trainer.model.towers.encode_images(images)
    logits = torch.randn(size, 10 if columns == "all" else 2 * task + 2,
                         generator=torch.Generator().manual_seed(9))
    trainer.model.memory.offer(x, logits, labels, trainer.random)


# The towers and their prompts.

def test_a_short_prompt_has_the_features_of_a_long_one(weights):
    towers = make(weights).model.towers
    prompts = [f"a photo of a {name}" for name in [*clip_towers.DIGITS, "strange lawn mower"]]
    tokens = towers.tokenize(prompts)
    assert tokens.shape[1] < 16  # CLIP's own 77 here
    with torch.no_grad():
        long = F.normalize(towers.clip.encode_text(towers.tokenizer(prompts)), dim=1)
    assert torch.allclose(towers.encode_prompts(tokens), long, atol=1e-6)


def test_the_learnt_prompt_begins_as_the_written_one(weights):
    model = alta.ALTA(set_up(f"--clip_weights={weights}", "--clip_method=sprompt")).model
    names = ["seven", "lawn mower"]
    model.set_classes(names, 0)
    model.expand(2)
    written = model.towers.clip.encode_text(model.towers.tokenizer([f"a photo of a {n}." for n in names]))
    assert torch.allclose(model.text_side("u"), F.normalize(written, dim=1), atol=1e-6)
    assert model.context.shape == (4, 32)


def test_nothing_of_clip_learns_or_is_saved(weights):
    trainer = make(weights)
    before = {name: tensor.clone() for name, tensor in trainer.model.towers.clip.state_dict().items()}
    names = {name for name, _ in trainer.model.named_parameters()}
    assert names == {"context", "adapter.0.weight", "adapter.0.bias", "adapter.2.weight", "adapter.2.bias"}
    assert sum(tensor.numel() for tensor in trainer.model.state_dict().values()) < 60_000
    offer(trainer, 0, 4)
    loss, _ = trainer.compute_loss(*batch(trainer))
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in trainer.model.parameters())
    clip = trainer.model.train().towers.clip
    assert not clip.training and all(p.grad is None and not p.requires_grad for p in clip.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in clip.state_dict().items())
    assert utils.frozen_copy(trainer.model, trainer.args).towers is trainer.model.towers


def test_old_prompts_keep_the_context_of_the_end_of_their_task(weights):
    trainer = make(weights, tasks=3)
    model = trainer.model
    rows = model.text_side("u_t")
    assert rows.shape == (6, 128) and model.bank.shape == (2, 4, 32)
    for row in (0, 2):  # nothing of the old rows depends on the living context
        gradient, = torch.autograd.grad(rows[row].sum(), model.context, retain_graph=True, allow_unused=True)
        assert gradient is None or not gradient.any()
    assert torch.autograd.grad(rows[4].sum(), model.context)[0].any()
    old = rows[:4].detach().clone()
    move(model, 7)
    moved = model.text_side("u_t")
    assert torch.equal(moved[:4], old) and not torch.allclose(moved[4:], rows[4:], atol=1e-4)
    for t in (0, 1):
        fresh = model.towers.encode_prompts(model.tokens[2 * t:2 * t + 2], model.bank[t])
        assert torch.allclose(old[2 * t:2 * t + 2], fresh, atol=1e-6)
    assert not torch.allclose(model.bank[0], model.bank[1])
    # The one context of sprompt drifts for all classes.
    assert torch.allclose(model.text_side("u"),
                          model.towers.encode_prompts(model.tokens[:6], model.context), atol=1e-6)


def test_prompts_are_encoded_once_in_an_evaluation(weights, monkeypatch):
    trainer, calls = make(weights), []
    encode = clip_towers.ClipTowers.encode_prompts
    monkeypatch.setattr(clip_towers.ClipTowers, "encode_prompts",
                        lambda *a: calls.append(len(a[1])) or encode(*a))
    images, _ = batch(trainer)
    trainer.model.eval()
    with torch.no_grad():
        first = trainer.predict(images)
        for _ in range(3):
            assert torch.equal(trainer.predict(images), first)
    assert calls == [2, 2]  # the old task's rows, a constant, and those of the living context
    move(trainer.model, 5)
    trainer.model.eval()
    with torch.no_grad():
        assert not torch.allclose(trainer.predict(images), first, atol=1e-3)
    assert calls == [2, 2, 2]


def test_test_images_go_through_the_tower_once(weights, monkeypatch):
    """Their features are found again by the images' content; other images are encoded as they come."""
    trainer = make(weights)
    test_set = trainer.run.test_scenario.images(slice(1, 4))
    images = torch.stack([test_set[i, None][0] for i in range(40)])
    direct = trainer.model(trainer.model.towers.encode_images(images))[0]
    calls, encode = [], clip_towers.ClipTowers.encode_images
    monkeypatch.setattr(clip_towers.ClipTowers, "encode_images",
                        lambda *a: calls.append(len(a[1])) or encode(*a))
    for layout in (torch.contiguous_format, torch.channels_last):
        found = trainer.predict(images.to(memory_format=layout))
        assert torch.allclose(found, direct, atol=1e-4) and calls == []
    images[3, 0, 0, 0] += 1e-6
    assert torch.allclose(trainer.predict(images), direct, atol=1e-3) and calls == [40]


def test_one_step_encodes_the_prompts_of_its_task_once(weights, monkeypatch):
    trainer, calls = make(weights, tasks=3), []
    offer(trainer, 1, 6)
    encode = clip_towers.ClipTowers.encode_prompts
    monkeypatch.setattr(clip_towers.ClipTowers, "encode_prompts",
                        lambda *a: calls.append(len(a[1])) or encode(*a))
    for _ in range(3):
        trainer.compute_loss(*batch(trainer, 2))
    assert calls == [2, 2, 2, 2, 2]  # two old tasks, once; then this task's in each step


def test_names_become_words():
    assert clip_towers.readable([str(i) for i in (3, 0, 1, 2, 4, 5, 6, 7, 8, 9)])[:2] == ["three", "zero"]
    assert clip_towers.readable(["lawn_mower", "red"]) == ["lawn mower", "red"]
    assert clip_towers.readable(["0 - zero", "1 - one"]) == ["zero", "one"]  # MNIST's
    assert clip_towers.readable(["001.Black_footed_Albatross"]) == ["Black footed Albatross"]
    assert clip_towers.readable(["n01443537", "n02123045"]) == ["goldfish", "tabby cat"]
    assert clip_towers.readable(["n04371430"]) == ["swim trunks"]  # "swim trunks / shorts" there


# The table of methods.

def expected(trainer, method, x):
    """The logits of a method by numpy, from the towers' outputs, for classes of tasks 0 and 1."""
    model = trainer.model
    adapter = [p.detach().double().numpy() for p in getattr(model, "adapter", torch.nn.Module()).parameters()]
    x = x.double().numpy()
    if adapter:
        w1, b1, w2, b2 = adapter
        a = np.maximum(x @ w1.T + b1, 0) @ w2.T + b2
    towers = model.towers
    with torch.no_grad():
        hand = towers.clip.encode_text(towers.tokenizer(
            [f"a photo of a {name}" for name in clip_towers.DIGITS[:4]])).double().numpy()
        if hasattr(model, "context"):
            single = towers.encode_prompts(model.tokens[:4], model.context).double().numpy()
            past = towers.encode_prompts(model.tokens[:2], model.bank[0]).double().numpy()
            own = np.concatenate([past, single[2:]])
    return float(towers.clip.logit_scale.exp()) * {
        "mlp": lambda: cosine(a, hand), "resmlp": lambda: cosine(x + a, hand),
        "sprompt": lambda: cosine(x, single), "cprompt": lambda: cosine(x, own),
        "cprompt_oriprompt": lambda: cosine(x, own) + cosine(x, hand),
        "cprompt_mlp": lambda: cosine(a, own), "cprompt_resmlp": lambda: cosine(x + a, own),
        "oriclip2cprompt_mlp": lambda: cosine(x, hand) + cosine(a, own),
        ALTA: lambda: cosine(x, own) + cosine(a, hand)}[method]()


@pytest.mark.parametrize("method", alta.METHODS)
def test_logits_of_each_method_against_numpy(method, weights):
    trainer = make(weights, f"--clip_method={method}")
    x = trainer.model.towers.encode_images(batch(trainer)[0])
    logits, _ = trainer.model(x)
    np.testing.assert_allclose(logits.detach().numpy(), expected(trainer, method, x), atol=1e-4)
    learnt = {name.split(".")[0] for name, _ in trainer.model.named_parameters()}
    assert learnt == {name for name, word in (("adapter", "mlp"), ("context", "prompt")) if word in method}
    # Replay belongs to the adapter: a context alone has none, whatever --memory_size says.
    assert len(trainer.model.memory.labels) == (200 if "mlp" in method else 0)


def test_the_two_pairs_cross(weights):
    """Frozen images with learnt prompts, learnt images with frozen prompts: each part of what is
    learnt moves one of the two cosines, and not the other."""
    model = make(weights).model
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))

    def branches():
        both, terms, parts = model.terms, list(model.terms), []
        for term in terms:
            model.terms = [term]
            parts.append(model(x)[0].detach())
        model.terms = both
        assert torch.allclose(sum(parts), model(x)[0], atol=1e-4)
        return parts

    prompts, adapted = branches()
    model.context.data += torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    prompts_moved, adapted_same = branches()
    assert torch.equal(adapted, adapted_same) and not torch.allclose(prompts[:, 2:], prompts_moved[:, 2:])
    model.adapter[2].weight.data += 0.1
    prompts_same, adapted_moved = branches()
    assert torch.equal(prompts_moved, prompts_same) and not torch.allclose(adapted, adapted_moved)


# The memory.

def test_the_reservoir_keeps_each_sample_with_the_same_chance():
    kept = np.zeros(60)
    for seed in range(400):
        memory, random = alta.Reservoir(10, 1, 2), np.random.RandomState(seed)
        for start in range(0, 60, 6):
            number = torch.arange(start, start + 6.0)[:, None]
            memory.offer(number, torch.zeros(6, 2), torch.zeros(6, dtype=torch.int64), random)
        assert len(set(memory.features[:, 0].tolist())) == 10
        kept[memory.features[:, 0].long().numpy()] += 1
    # Each is kept 400 / 6 = 66.7 times on average, with a standard deviation of 7.5.
    assert kept.sum() == 4000 and abs(kept - 66.7).max() < 30
    assert abs(kept[:20].mean() - kept[40:].mean()) < 8


def test_the_reservoir_fills_in_order_and_draws_without_repeats():
    memory, random = alta.Reservoir(4, 2, 5), np.random.RandomState(0)
    assert len(memory.draw(3, random)) == 0
    memory.offer(torch.ones(3, 2) * torch.arange(3)[:, None], torch.ones(3, 2), torch.arange(3), random)
    assert memory.labels.tolist() == [0, 1, 2, 0] and memory.logits[0, :2].tolist() == [1, 1]
    assert memory.logits[0, 2:].isnan().all() and memory.logits[3].isnan().all()
    assert sorted(memory.draw(9, random)) == [0, 1, 2] and len(memory.draw(2, random)) == 2
    none = alta.Reservoir(0, 2, 5)
    none.offer(torch.ones(3, 2), torch.ones(3, 2), torch.arange(3), random)
    assert len(none.draw(3, random)) == 0


@pytest.mark.parametrize("columns", ["seen", "all"])
def test_the_loss_against_numpy(columns, weights):
    trainer = make(weights, f"--columns={columns}", "--alpha=0.3", "--beta=0.7")
    memory, (images, targets) = trainer.model.memory, batch(trainer)
    offer(trainer, 0, 5, columns)
    offer(trainer, 1, 4, columns)
    slots = memory.draw(8, np.random.RandomState(4))
    x, labels = memory.features[slots].clone(), memory.labels[slots].clone()
    then = memory.logits[slots].double().numpy()
    now, z = (trainer.model(features)[0].detach().double().numpy()
              for features in (x, trainer.model.towers.encode_images(images)))
    assert now.shape[1] == (10 if columns == "all" else 4)

    def ce(z, y):
        return -np.log(softmax(z)[range(len(y)), y]).mean()

    # Where the classes so far compete, a sample of task 0 had two logits and one of task 1 four.
    squares = [(now[i, c] - then[i, c]) ** 2 for i, label in enumerate(labels.tolist())
               for c in range(10 if columns == "all" else 2 if label < 2 else 4)]
    mse = np.mean(squares)
    assert set(labels.tolist()) == {0, 1, 2, 3}
    trainer.random = np.random.RandomState(4)
    loss, logits = trainer.compute_loss(images, targets)
    assert loss.item() == pytest.approx(ce(z, targets) + 0.3 * ce(now, labels) + 0.7 * mse, rel=1e-4)
    # What was offered: the batch, with the logits from before the step.
    assert memory.offered == 9 + 8 and torch.equal(memory.labels[9:17], targets)
    assert torch.equal(memory.logits[9:17, :logits.shape[1]], logits)
    assert memory.logits[9:17, logits.shape[1]:].isnan().all()


def steps_of_rank(weights, folder):
    """Some steps on shares of the same batches: the memory and context that a rank ends with."""
    trainer = make(weights, "--memory_size=20")
    args = trainer.args
    for task in (0, 1):  # three of each: shares of the ranks are unequal, also in their columns
        offer(trainer, task, 3)
    trainer.parallel_model = utils.distribute(trainer.model, args)
    optimizer = torch.optim.SGD(trainer.model.parameters(), 0.01)
    images = trainer.train_scenario.images(1)
    for step in range(6):  # the first draw is of 6 samples, 3 for each of two ranks; then of 7 or 8
        trainer.model.memory.draw = lambda count, random: alta.Reservoir.draw(
            trainer.model.memory, 7 - 2 * (step == 0), random)  # an odd number
        rows = range(8 * step, 8 * step + 8)[args.rank::args.world_size]
        loss, _ = trainer.compute_loss(torch.stack([images[i, None][0] for i in rows]),
                                       torch.tensor(images.y[list(rows)]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    memory = trainer.model.memory
    write_of_rank(folder, trainer, [memory.labels.tolist(), memory.features.tolist(),
                                    memory.logits.nan_to_num(-1).tolist(), trainer.model.context.tolist()])


def test_two_processes_hold_the_memory_of_one(weights, launch, tmp_path):
    def start(**options):
        options["arguments"] = (str(weights), *options["arguments"])
        return launch(**options)
    alone, first, second = on_one_and_two_ranks(steps_of_rank, start, tmp_path)
    assert first == second and alone[0] == first[0]
    for one, other in zip(alone[1:], first[1:]):
        np.testing.assert_allclose(one, other, atol=2e-4)


# Whole runs.

def run_and_tell(folder, name, flags):
    """A run in which each rank writes down what it holds after each task."""
    end_task = utils.Run.end_task

    def telling(self, trainer, scores):
        state = {name: tensor.tolist() for name, tensor in trainer.model.state_dict().items()}
        with open(f"rank{trainer.args.rank}", "a") as file:
            print(str(state), file=file)
        end_task(self, trainer, scores)
    utils.Run.end_task = telling
    run_file(folder, name, flags)


def short(weights, folder, *flags):
    """The flags of a run of three tasks."""
    return [*SHORT, f"--clip_weights={weights}", f"--output_dir={folder}", *flags]


def run(launch, weights, *flags, processes=1, folder="out", main=run_file):
    started = launch(function=main, processes=processes, arguments=(
        ROOT, "tutorial.methods.alta", short(weights, folder, *flags)))
    assert started.wait() == [0] * processes, started.stderr()
    return read_results(started.folder / folder)


@pytest.mark.parametrize("method", alta.METHODS)
def test_each_method_runs(method, weights, launch, tmp_path):
    results = run(launch, weights, f"--clip_method={method}", "--num_epochs=1", "--memory_size=40")
    assert results["finished"] and results["class_order"] == list(range(10))
    for row, aware in zip(results["accuracy_matrix"], results["task_aware_matrix"]):
        assert all(a <= b for a, b in zip(row, aware))  # class-IL and task-IL, from one run
    assert results["args"]["clip"]  # a number for the towers: see the next test
    assert [line["task"] for line in log_lines(tmp_path / "out")] == [1, 2, 3]


def test_half_precision(weights, launch, tmp_path):
    """The towers compute in 16 bits, and the loss is scaled: nearly the losses of 32 bits."""
    losses = []
    for amp in ("none", "fp16"):
        run(launch, weights, f"--amp={amp}", "--stop_after_task=2", folder=amp)
        losses.append([line["loss"] for line in log_lines(tmp_path / amp)])
        scaler = torch.load(tmp_path / amp / "checkpoint.pt", weights_only=True)["scaler"]
        assert bool(scaler) == (amp == "fp16")
    assert losses[0] != losses[1] and np.allclose(*losses, rtol=0.02)


def test_two_processes_and_classes_to_come(weights, launch, tmp_path):
    """In a whole run, too, both ranks end with one memory: a hash of it is taken on each."""
    results = run(launch, weights, "--columns=all", "--amp=bf16", processes=2, main=run_and_tell)
    assert results["finished"] and len(results["acc1s"]) == 3
    told = [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1]
    saved = torch.load(tmp_path / "out/model.pt", weights_only=True)["state_dict"]
    assert saved["memory.logits"].shape == (200, 10) and saved["memory.logits"].isfinite().all()
    # Also with classes to come among the answers, the last task has none left to come.
    assert np.array(results["confusion"]).shape == (10, 10)


def test_the_schedule(weights, launch, tmp_path):
    for schedule, first, second in (("constant", 1e-5, 1e-5), ("cosine", 0.002, 0.001)):
        run(launch, weights, f"--schedule={schedule}", "--stop_after_task=2", folder=schedule)
        rates = [line["lr"] for line in log_lines(tmp_path / schedule)]
        assert rates == pytest.approx([first, second] * 2)


def test_joint_is_plain_training_on_one_task(weights, launch, tmp_path):
    run(launch, weights, "--num_bases=10", "--memory_size=0", "--lr=0.02")
    saved = torch.load(tmp_path / "out/model.pt", weights_only=True)["state_dict"]
    trainer = make(weights, "--num_bases=10", tasks=0)
    args, model = trainer.args, trainer.model
    trainer.task = 0
    trainer.run.increments = [10]
    trainer.expand_model(10, None)
    loader = utils.train_loader(trainer.train_scenario.images(0), args)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, 0.9, weight_decay=5e-4)
    for epoch in range(2):
        loader.sampler.seed = utils.set_seed(args, 0, 0, epoch)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 + np.cos(np.pi * epoch / 2)) / 2
        for images, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(model.towers.encode_images(images))[0], targets).backward()
            optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, saved[name], atol=1e-5), name


@pytest.mark.parametrize("processes", [1, 2])
def test_kill_and_resume(processes, weights, launch, tmp_path):
    """Killed at the end of the first task, resumed, killed in the middle of the last one."""
    whole = run(launch, weights, processes=processes, folder="whole")
    for task, epoch in (1, 2), (3, 1):
        started = launch(function=run_and_die, processes=processes,
                         arguments=(task, epoch, short(weights, "killed", "--resume")))
        assert started.wait()[0] == -9, started.stderr()
    assert run(launch, weights, "--resume", processes=processes, folder="killed") == whole
    assert same_model(tmp_path / "whole", tmp_path / "killed")


def test_a_run_is_not_resumed_on_other_towers(weights, launch, tmp_path):
    run(launch, weights, "--stop_after_task=1", "--num_epochs=1")
    changed = torch.load(weights, weights_only=True)
    changed["ln_final.weight"][0] += 1e-6
    other = tmp_path / "same_name" / weights.name
    other.parent.mkdir()
    torch.save(changed, other)
    checkpoint = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)
    checkpoint["results"]["args"]["clip_weights"] = str(other)
    torch.save(checkpoint, tmp_path / "out/checkpoint.pt")
    started = launch(function=run_file, arguments=(
        ROOT, "tutorial.methods.alta", short(other, "out", "--num_epochs=1", "--resume")))
    assert started.wait() == [2] and "was made with --clip " in started.stderr()


def run_and_die(task, epoch, flags):
    """A run whose rank 0 is killed right after it wrote this checkpoint."""
    end_epoch = utils.Run.end_epoch

    def dying(self, trainer, *rest):
        end_epoch(self, trainer, *rest)
        if (trainer.args.rank, trainer.task + 1, trainer.epoch) == (0, task, epoch):
            os.kill(os.getpid(), signal.SIGKILL)
    utils.Run.end_epoch, utils.CHECKPOINT_SECONDS = dying, 0
    run_file(ROOT, "tutorial.methods.alta", flags)


def test_the_files_are_small():
    for name, limit in (("alta", 185), ("clip_towers", 100), ("tiny_clip", 75)):
        assert lines_of_code(ROOT / f"tutorial/methods/{name}.py")[0] <= limit, name


def test_the_tiny_clip_can_be_kept_in_a_file(launch, tmp_path):
    """The file holds what a run would train for itself, and is never overwritten."""
    arguments = (ROOT, "tutorial.methods.tiny_clip", ["kept/tiny.pt", "--seed=3", "--num_steps=2"])
    assert launch(function=run_file, arguments=arguments).wait() == [0]
    saved = torch.load(tmp_path / "kept/tiny.pt", weights_only=True)
    again = launch(function=run_file, arguments=arguments)
    assert again.wait() == [2] and "is there already" in again.stderr()
    clip = tiny_clip.train(set_up("--seed=3"), num_steps=2)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in clip.state_dict().items())


# Weights from files and hubs.

SMALL = {"embed_dim": 32, "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16,
                                         "patch_size": 8},
         "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
         "quick_gelu": True}


@pytest.fixture
def small(tmp_path, monkeypatch, request):
    """A CLIP that open_clip knows by name like RN50, and the arguments that ask for it."""
    config = dict(SMALL, vision_cfg=SMALL["vision_cfg"] if request.param == "transformer" else {
        "image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None})
    (tmp_path / f"{request.param}-quickgelu.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{request.param}-quickgelu.json")
    monkeypatch.setitem(clip_towers.VISUALS, request.param, 32)
    torch.manual_seed(5)
    clip = open_clip.create_model(f"{request.param}-quickgelu", pretrained=None)
    return clip, set_up("--input_size=32", "--data_set=cifar10", visual=request.param)


def program(clip):
    """What OpenAI gives out: weights in half precision inside a program, and three numbers."""
    class Archive(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, tensor in clip.state_dict().items():
                at, *path = name.split(".")[::-1]
                module = self
                for part in path[::-1]:
                    if not hasattr(module, part):
                        module.add_module(part, torch.nn.Module())
                    module = getattr(module, part)
                half = tensor.detach().half() if tensor.is_floating_point() else tensor
                module.register_buffer(at, half)
            numbers = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
            for name, number in numbers.items():
                self.register_buffer(name, torch.tensor(number))

        def forward(self, x):
            return x
    return torch.jit.script(Archive())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("small", ["transformer", "resnet"], indirect=True)
@pytest.mark.parametrize("kind", ["pt", "safetensors", "archive"])
def test_weights_from_a_file(kind, small, tmp_path):
    clip, args = small
    args.clip_weights = str(tmp_path / f"weights.{'pt' if kind == 'archive' else kind}")
    if kind == "archive":
        torch.jit.save(program(clip), args.clip_weights)
    elif kind == "pt":
        torch.save(clip.state_dict(), args.clip_weights)
    else:
        from safetensors.torch import save_file
        state = {name: tensor.contiguous() for name, tensor in clip.state_dict().items()}
        save_file(state, args.clip_weights)
    towers = clip_towers.load(args)
    for name, tensor in clip.state_dict().items():
        assert torch.allclose(towers.clip.state_dict()[name], tensor, atol=2e-3), name
    assert not towers.clip.training
    # Images come with the pixel statistics of the data set and go in with OpenAI's.
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(x)[:, None, None] for x in utils.get_statistics(args)[:2])
    images = (pixels - mean) / std
    mean, std = (torch.tensor(x)[:, None, None] for x in (open_clip.OPENAI_DATASET_MEAN,
                                                          open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        direct = towers.clip.encode_image((pixels - mean) / std)
    assert torch.allclose(towers.encode_images(images), direct, atol=1e-5)


def test_the_six_towers_have_the_published_sizes():
    sizes = {"RN50": (1024, 512), "RN101": (512, 512), "RN50x4": (640, 640), "RN50x16": (768, 768),
             "ViT-B/32": (512, 512), "ViT-B/16": (512, 512)}
    for visual, (image_dim, width) in sizes.items():
        config = open_clip.get_model_config(f"{visual.replace('/', '-')}-quickgelu")
        assert config["vision_cfg"]["image_size"] == clip_towers.VISUALS[visual]
        assert (config["embed_dim"], config["text_cfg"]["width"]) == (image_dim, width)
        assert config["quick_gelu"]
        assert f"{visual.replace('/', '-')}-quickgelu" in dict.fromkeys(
            name for name, tag in open_clip.list_pretrained() if tag == "openai")


@pytest.mark.parametrize("flags, message", [
    (["--clip_weights=nowhere.pt"], "--clip_weights nowhere.pt: not written by tutorial.methods.tiny_clip"),
    (["--visual=RN50", "--clip_weights=nowhere.pt"], "without a network pass a file of OpenAI's weights"),
    (["--visual=RN50x4", "--input_size=224"], "the image tower RN50x4 takes 288"),
    (["--visual=VGG"], "--visual"), (["--alpha=-1"], "--alpha"), (["--clip_method=coop"], "--clip_method")])
def test_bad_input_is_one_line(flags, message, launch):
    started = launch(function=run_file, arguments=(ROOT, "tutorial.methods.alta", flags))
    assert started.wait() == [2]
    assert started.stderr().startswith("error: ") and started.stderr().count("\n") == 1
    assert message in started.stderr()


def run_offline(*arguments):
    """A run as with HF_HUB_OFFLINE=1 and an empty HF_HOME, which an import has read already."""
    from huggingface_hub import constants
    constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE = True, "empty"
    del sys.modules["tutorial.methods.alta"]  # imported by this file, of which runpy would warn
    run_file(*arguments)


def test_without_a_network_the_error_says_what_to_pass(launch):
    started = launch(function=run_offline, arguments=(ROOT, "tutorial.methods.alta", ["--visual=RN50"]))
    assert started.wait() == [2] and started.stderr().count("\n") == 1, started.stderr()
    assert started.stderr().startswith("error: --visual RN50 --clip_weights openai: ")
    assert "without a network pass a file" in started.stderr()


def test_without_open_clip_the_error_names_the_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(SystemExit) as end:
        clip_towers.import_open_clip()
    assert end.value.code == 2 and "pip install open_clip_torch" in capsys.readouterr().err


def test_a_class_name_that_is_too_long(weights, capsys):
    towers = make(weights).model.towers
    with pytest.raises(SystemExit):
        towers.tokenize(["a photo of a " + "very " * 12 + "long name"])
    assert "too long" in capsys.readouterr().err
