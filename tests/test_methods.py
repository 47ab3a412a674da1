"""The methods of the tutorial: losses against independent formulas, what must stay frozen, runs."""
import ast
import copy
import functools
import json
import math
import os
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, SHORT, SILENT, kill_after, quarter_digits, read_results, run_file
from test_core import lines_of_code
from test_resume import log_lines, same_model
from torch.nn import functional as F

import utils
from template import CilModel, CilTrainer
from tutorial.methods import (
    aanets, bal_ft, der, frozen, itaml, itaml_inference, lucir, patience, podnet, tiny_clip)

# The flags of a short run of each method.
METHODS = {"icarl": [], "lucir": ["--num_epochs_ft=2", "--batch_size=16"],
           "podnet": ["--num_epochs_ft=2", "--batch_size=16", "--backbone=resnet20"],
           "aanets": ["--baseline=lucir", "--fusion_lr=0.1"],
           "bal_ft": ["--loss=own", "--num_epochs_ft=2", "--batch_size=16", "--reinit_heads",
                      "--herding_method=entropy", "--patience=1"],
           "itaml": ["--inner_steps=2", "--milestones", "0.5"],
           "der": ["--num_epochs_ft=2", "--batch_size=16"],
           "frozen": ["--adapt", "--head=ridge", "--projection=100"]}

TRAINERS = {"bal_ft": (bal_ft.get_parser, bal_ft.BalFT), "itaml": (itaml.get_parser, itaml.ITAML),
            "der": (der.get_parser, der.DER), "frozen": (frozen.get_parser, frozen.Frozen),
            "patience": (bal_ft.get_parser, patience.Patience)}
for name, (module, Baseline) in aanets.BASELINES.items():
    TRAINERS[name] = module.get_parser, Baseline
    TRAINERS[f"aanets_{name}"] = (functools.partial(aanets.get_parser, name),
                                  type("Dual", (aanets.AANets, Baseline), {}))


def make(name, *flags, known=4, new=2):
    """A trainer in its second task, whose model has moved away from its teacher."""
    get_parser, Trainer = TRAINERS[name]
    args = utils.setup(get_parser().parse_args(list(flags)))
    trainer = Trainer(args)
    trainer.run = SimpleNamespace(
        increments=[known, new], results={"gammas": []}, scaler=torch.amp.GradScaler(enabled=False),
        restore_fit=lambda *_: 0, end_epoch=lambda *_: None, progress=SILENT)
    trainer.task_of = utils.task_of_class([known, new])  # of BAL_FT
    trainer.task, trainer.nb_new, trainer.stage, trainer.epoch = 0, known, 0, 0
    trainer.expand_model(known, images_of(range(known), args))
    trainer.teacher = utils.frozen_copy(trainer.model, args)
    trainer.task, trainer.nb_new, trainer.known_classes = 1, new, known
    trainer.expand_model(new, images_of(range(known, known + new), args, each=40))
    trainer.parallel_model = trainer.model.eval()
    generator = torch.Generator().manual_seed(0)
    for weight in trainer.model.backbone.parameters():
        if weight.requires_grad:
            weight.data += 0.03 * torch.randn(weight.shape, generator=generator)
    return trainer


def images_of(classes, args, each=12):
    draw = np.random.RandomState(0)
    y = np.repeat(np.array(list(classes)), each)
    return utils.ImageSet(draw.randint(0, 256, (len(y), 8, 8, 3)).astype(np.uint8), y, args)


BATCH = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([0, 1, 2, 3, 4, 5, 0, 4])


def outputs(model):
    with torch.no_grad():
        return [x.double().numpy() for x in model(BATCH)[:2]]


def state_of(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def changed_since(before, model):
    return {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def cosine(a, b):
    return a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)[None]


def run_method(name, flags, die_after=None):
    """A run on a quarter of the training images, or until its epoch with this number, counted from
    the first of the first task: then it writes a checkpoint and is killed."""
    quarter_digits()
    if die_after:
        kill_after(die_after)
    run_file(ROOT, f"tutorial.methods.{name}", flags)


@pytest.fixture
def run(launch, tmp_path):
    """run(name, flags…): a short run of a method. Returns (its folder, what it printed)."""
    def to_the_end(name, *flags, folder="out", die_after=None, processes=1):
        flags = [*SHORT, f"--output_dir={folder}", *flags]
        started = launch(function=run_method, arguments=(name, flags, die_after), processes=processes)
        expected = [-9] if die_after else [0] * processes
        assert started.wait() == expected, started.stderr()
        # No warning either, but for what comes from starting a module that is imported already.
        assert re.sub("<frozen runpy>.*\n", "", started.stderr()) == ""
        return tmp_path / folder, started.stdout()
    return to_the_end


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def write_of_rank(folder, trainer, value):
    with open(f"{folder}/{trainer.args.world_size}_{trainer.args.rank}.json", "w") as file:
        json.dump(value, file)


def on_one_and_two_ranks(function, launch, folder):
    """What `function` leaves with `write_of_rank`: on one process, and on each of two."""
    for processes in (1, 2):
        started = launch(function=function, arguments=(str(folder),), processes=processes)
        assert started.wait() == [0] * processes, started.stderr()
    return [json.loads((folder / f"{name}.json").read_text()) for name in ("1_0", "2_0", "2_1")]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# ---- the losses ----------------------------------------------------------------------------

def cross_entropy(z, targets):
    return -np.log(softmax(z)[range(len(z)), targets]).mean()


# Each by its formula in numpy, from the targets and the outputs of network and teacher: logits z,
# features f; old_z and old_f are None in the first task.

def icarl_sigmoid(trainer, targets, z, f, old_z, old_f):
    goal, p = np.eye(6)[targets], 1 / (1 + np.exp(-z))
    if old_z is not None:
        goal[:, :4] = 1 / (1 + np.exp(-old_z))
    return -(goal * np.log(p) + (1 - goal) * np.log(1 - p)).mean()


def icarl_softmax(trainer, targets, z, f, old_z, old_f):
    if old_z is None:
        return cross_entropy(z, targets)
    q, p = softmax(old_z / 2), softmax(z[:, :4] / 2)
    return cross_entropy(z, targets) + (q * np.log(q / p)).sum(axis=1).mean()


def lucir_loss(trainer, targets, z, f, old_z, old_f):
    weights = torch.cat([head.weight for head in trainer.model.fc.heads]).detach().double().numpy()
    sigma, args, new = float(trainer.model.fc.sigma.detach()), trainer.args, z.shape[1] - 4
    cosines, terms = cosine(f, weights), []
    np.testing.assert_allclose(z, sigma * cosines, atol=1e-5)
    if old_z is None:
        return cross_entropy(z, targets)
    for row, y in zip(cosines, targets):
        if y < 4:
            rivals = sorted(row[4:])[::-1][:args.margin_k]
            terms += [max(0, 0.5 - row[y] + rival) for rival in rivals]
    return (cross_entropy(sigma * cosines, targets) + (np.mean(terms) if terms else 0)
            + args.lambda_base * math.sqrt(4 / new) * (1 - np.diag(cosine(f, old_f))).mean())


def podnet_loss(trainer, targets, z, f, old_z, old_f):
    with torch.no_grad():
        maps, old_maps = (model(BATCH)[2] for model in (trainer.model, trainer.teacher or trainer.model))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 8, 8), (32, 4, 4), (64, 2, 2), (64, 2, 2)]
    margin = 0.6 * trainer.model.fc.eta.item() if trainer.args.nca == "paper" else None
    loss = podnet.nca(torch.from_numpy(z), torch.from_numpy(targets), margin).mean()
    if old_z is None:
        return loss
    flat = (1 - np.diag(cosine(f, old_f))).mean()
    return loss + math.sqrt(6 / 2) * (2 * podnet.pod_spatial(old_maps, maps) + 5 * flat)


def own_task_loss(trainer, targets, z, f, old_z, old_f):
    tasks = [range(0, 4) if y < 4 else range(4, 6) for y in targets]
    return np.mean([-z[i, y] + np.log(np.exp(z[i, list(own)]).sum())
                    for i, (y, own) in enumerate(zip(targets, tasks))])


def all_tasks_loss(trainer, targets, z, f, old_z, old_f):
    return cross_entropy(z, targets)


NEW = torch.tensor([4, 5, 4, 5, 5, 4, 5, 4])  # a batch without an exemplar


@pytest.mark.parametrize("first_task", [False, True])
@pytest.mark.parametrize("name, flags, new, targets, formula", [
    ("icarl", [], 2, TARGETS, icarl_sigmoid), ("icarl", ["--icarl_loss=softmax"], 2, TARGETS, icarl_softmax),
    ("lucir", ["--margin_k=2", "--lambda_base=3"], 2, TARGETS, lucir_loss),
    ("lucir", ["--margin_k=2", "--lambda_base=3"], 2, NEW, lucir_loss),
    ("lucir", ["--margin_k=2", "--lambda_base=3"], 1, TARGETS.clamp(max=4), lucir_loss),
    ("lucir", ["--margin_k=1", "--lambda_base=3"], 3, TARGETS.clamp(max=6), lucir_loss),
    ("podnet", ["--nca=paper", "--lambda_spatial=2", "--lambda_flat=5"], 2, TARGETS, podnet_loss),
    ("podnet", ["--nca=released", "--lambda_spatial=2", "--lambda_flat=5"], 2, TARGETS, podnet_loss),
    ("bal_ft", ["--loss=own"], 2, TARGETS, own_task_loss), ("bal_ft", ["--loss=own"], 2, NEW, own_task_loss),
    ("bal_ft", ["--loss=all"], 2, TARGETS, all_tasks_loss)])
def test_the_loss_against_its_formula(name, flags, new, targets, formula, first_task):
    trainer = make(name, *flags, new=new)
    if name == "lucir":
        trainer.model.fc.sigma.data.fill_(2.5)
    old = outputs(trainer.teacher)
    if first_task:
        trainer.teacher, trainer.known_classes, old = None, 0, (None, None)
    z, f = outputs(trainer.model)
    loss, logits = trainer.compute_loss(BATCH, targets)
    assert float(loss.detach()) == pytest.approx(
        float(formula(trainer, targets.numpy(), z, f, *old)), rel=1e-4)
    np.testing.assert_allclose(logits.detach(), z, rtol=1e-4, atol=1e-6)  # for the accuracy shown
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.model.parameters())


# ---- iCaRL ---------------------------------------------------------------------------------

@pytest.mark.parametrize("data_set, mirrored", [("digits", False), ("image_folder", True)])
def test_nearest_mean_of_exemplars(monkeypatch, data_set, mirrored):
    flags = [] if data_set == "digits" else [
        "--data_set=image_folder", "--input_size=8", "--backbone=resnet20", "--num_workers=0"]
    trainer = make("icarl", *flags)
    trainer.exemplars = [images_of([c], trainer.args, each=5) for c in range(6)]
    monkeypatch.setattr(utils, "evaluate", lambda trainer, predict: {"acc1": 0.0})
    trainer.finish_task()
    means = []
    for images in trainer.exemplars:
        x = torch.stack([images[i, None][0] for i in range(5)])
        views = [x, x.flip(3)] if mirrored else [x]
        with torch.no_grad():
            f = np.concatenate([trainer.model(view)[1].double().numpy() for view in views])
        mean = (f / np.linalg.norm(f, axis=1, keepdims=True)).mean(axis=0)
        means.append(mean / np.linalg.norm(mean))
    np.testing.assert_allclose(trainer.means, means, atol=1e-5)
    features = outputs(trainer.model)[1]
    d = features / np.linalg.norm(features, axis=1, keepdims=True)
    distances = ((d[:, None] - np.array(means)[None]) ** 2).sum(axis=2)
    with torch.no_grad():
        scores = trainer.predict(BATCH)
    np.testing.assert_allclose(2 - 2 * scores, distances, atol=1e-5)  # largest score: nearest mean
    model = trainer.model
    trainer.model = lambda images: (model(images)[0], 7 * model(images)[1])  # only scaled features
    with torch.no_grad():
        torch.testing.assert_close(trainer.predict(BATCH), scores)
    trainer.means = trainer.means[:4]  # before the end of a task: the network's own answer
    trainer.model = model
    with torch.no_grad():
        assert torch.equal(trainer.predict(BATCH), model(BATCH)[0])


# ---- LUCIR ---------------------------------------------------------------------------------

@pytest.mark.parametrize("targets", [TARGETS, NEW, NEW - 4])
def test_lucir_masks_the_rows_that_it_could_choose(targets):
    """The same loss and gradient as with only the exemplars' rows in the margin ranking loss."""
    trainer = make("lucir", "--lambda_base=0")
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    logits = trainer.model(BATCH)[0]
    chosen, old = F.cross_entropy(logits, targets), targets < 4
    if old.any():
        cosines = logits[old] / trainer.model.fc.sigma
        own = cosines[range(len(cosines)), targets[old]]
        margins = 0.5 - own[:, None] + cosines[:, 4:].topk(2).values
        chosen = chosen + margins.relu().mean()
    masked, _ = trainer.compute_loss(BATCH, targets)
    torch.testing.assert_close(masked, chosen)
    for one, other in zip(torch.autograd.grad(masked, parameters), torch.autograd.grad(chosen, parameters)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_lucir_imprints_new_rows():
    trainer = make("lucir")
    images = images_of((4, 5), trainer.args, each=40)
    start = trainer.teacher  # the weights before anything moved: features are those of imprinting
    features = F.normalize(utils.extract_features(start, images, trainer.args), dim=1)
    length = start.fc.heads[0].weight.norm(dim=1).mean()
    for row, c in zip(trainer.model.fc.heads[1].weight, (4, 5)):
        mean = features[torch.from_numpy(images.y == c)].mean(dim=0)
        torch.testing.assert_close(row.detach(), length * F.normalize(mean, dim=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name, scale", [("lucir", "sigma"), ("podnet", "eta")])
def test_old_rows_are_frozen_and_new_ones_learn(name, scale):
    trainer = make(name)
    trainer.compute_loss(BATCH, TARGETS)[0].backward()
    old, new = trainer.model.fc.heads
    assert old.weight.grad is None and new.weight.grad.abs().sum() > 0
    assert getattr(trainer.model.fc, scale).grad.abs() > 0


def test_lucir_features_can_be_negative():
    for backbone in ("resnet32", "resnet18", "resnet50"):
        model = lucir.LUCIRModel(timm.create_model(backbone, num_classes=0)).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # timm starts the last ones at 0
                torch.nn.init.ones_(module.weight)
        with torch.no_grad():
            assert model.backbone(torch.randn(4, 3, 64, 64)).min() < 0, backbone


# ---- PODNet --------------------------------------------------------------------------------

def test_pod_spatial_against_its_formula():
    a, b = ([torch.randn(2, c, s, s, generator=torch.Generator().manual_seed(seed + c))
             for c, s in ((3, 8), (5, 4))] for seed in (0, 10))
    terms = []
    for x, y in zip(a, b):
        distances = []
        for i in range(2):
            pooled = []
            for z in (x[i].double().numpy() ** 2, y[i].double().numpy() ** 2):
                u = np.concatenate([z.sum(axis=2).ravel(), z.sum(axis=1).ravel()])
                pooled.append(u / np.linalg.norm(u))
            distances.append(np.linalg.norm(pooled[0] - pooled[1]))
        terms.append(np.mean(distances))
    assert float(podnet.pod_spatial(a, b)) == pytest.approx(np.mean(terms), rel=1e-5)


def test_nca_in_both_forms():
    z = torch.randn(8, 6, generator=torch.Generator().manual_seed(3)) * 3
    q, y = z.double().numpy(), TARGETS.numpy()
    others = np.exp(q).sum(axis=1) - np.exp(q)[range(8), y]
    paper = np.maximum(0, np.log(others) - (q[range(8), y] - 0.6))
    np.testing.assert_allclose(podnet.nca(z, TARGETS, 0.6), paper, rtol=1e-4, atol=1e-6)
    for margin in (0, 0.6, 5):  # as the released code computes it: any margin, the same loss
        shifted = q - margin
        shifted = shifted - shifted.max(axis=1, keepdims=True)
        denominator = np.exp(np.where(np.eye(6)[y] == 1, 0, shifted)).sum(axis=1)
        released = -shifted[range(8), y] + np.log(denominator)
        np.testing.assert_allclose(podnet.nca(z, TARGETS), released, rtol=1e-4)


def test_podnet_classifier_against_its_formula():
    torch.manual_seed(0)
    classifier = podnet.LocalSimilarityClassifier(5)
    classifier.expand(3)
    classifier.eta.data.fill_(1.7)
    features = torch.randn(4, 5)
    f = features.double().numpy()
    w = classifier.heads[0].weight.detach().double().numpy().reshape(3, podnet.PROXIES, 5)
    expected = np.empty((4, 3))
    for i in range(4):
        for k in range(3):
            r = np.array([-((f[i] / np.linalg.norm(f[i]) - p / np.linalg.norm(p)) ** 2).sum()
                          for p in w[k]])
            share = np.exp(r) / np.exp(r).sum()
            expected[i, k] = 1.7 * (share * r).sum()
    np.testing.assert_allclose(classifier(features).detach(), expected, rtol=1e-4)


def test_podnet_new_proxies_are_cluster_centres():
    trainer = make("podnet")
    old, new = trainer.model.fc.heads
    length = old.weight.norm(dim=1).mean().item()
    images = images_of((4, 5), trainer.args, each=40)
    features = F.normalize(utils.extract_features(trainer.teacher, images, trainer.args), dim=1)
    for k, c in enumerate((4, 5)):
        centres = new.weight.detach()[10 * k:10 * (k + 1)] / length
        own = features[torch.from_numpy(images.y == c)]
        nearest = torch.cdist(own, centres).argmin(dim=1)
        for p in range(10):  # a centre is the mean of the features that are nearest to it
            torch.testing.assert_close(own[nearest == p].mean(dim=0), centres[p], rtol=1e-4, atol=1e-5)


# ---- AANets --------------------------------------------------------------------------------

@pytest.mark.parametrize("baseline", aanets.BASELINES)
def test_two_equal_branches_are_one_network_for_any_alpha(baseline):
    get_parser, Trainer = TRAINERS[f"aanets_{baseline}"]
    args = utils.setup(get_parser().parse_args([]))
    trainer = Trainer(args)
    trainer.task, trainer.nb_new = 0, 4
    trainer.expand_model(4, None)
    before = outputs(trainer.model.eval())
    trainer.task, trainer.known_classes = 1, 4
    trainer.expand_model(2, images_of((4, 5), args))
    trainer.model.eval()
    for values in ((0.5, 0.5, 0.5, 0.5), (0.1, 0.9, 0.3, 1.2)):
        for alpha, value in zip(trainer.model.backbone.alphas, values):
            alpha.data.fill_(value)
        after = outputs(trainer.model)
        np.testing.assert_allclose(after[0][:, :4], before[0], atol=2e-4)
        np.testing.assert_allclose(after[1], before[1], atol=2e-4)


def test_parameter_counts_of_the_published_networks():
    def build(Model, backbone, sizes):
        model = Model(timm.create_model(backbone, num_classes=0))
        for size in sizes:
            model.fc.expand(size)
        return model
    assert parameters(build(lucir.LUCIRModel, "resnet32", [50])) == 469_457
    assert parameters(build(lucir.LUCIRModel, "resnet32", [50, 50])) == 472_657
    assert parameters(build(podnet.PODModel, "resnet32_signed", [100])) == 527_505
    assert parameters(build(lucir.LUCIRModel, "resnet18", [100])) == 11_176_512 + 51_201
    model = build(lucir.LUCIRModel, "resnet32", [100])
    model.backbone = aanets.DualBackbone(model.backbone, ("ss", "free"), 0.5)
    assert parameters(model) == 992_721 + 3
    stable = model.backbone.stable
    assert sum(p.numel() for p in stable.parameters() if p.requires_grad) == 56_272
    model = build(lucir.LUCIRModel, "resnet18", [100])
    model.backbone = aanets.DualBackbone(model.backbone, ("ss", "free"), 0.5)
    assert parameters(model) == 23_797_057 + 4


def alpha_pass(trainer):
    """Balanced data and an optimizer; the baseline's own pass is left out."""
    trainer.exemplars = [images_of([c], trainer.args, each=3) for c in range(4)]
    trainer.run.results = {}
    trainer.fit = lambda train_set, *_: None
    trainer.train_task(images_of(range(4, 6), trainer.args))
    assert sorted(trainer.balanced.targets.tolist()) == sorted(list(range(6)) * 3)
    optimizer = torch.optim.SGD(trainer.model.parameters(), 0.1)
    loader, trainer.stage = SimpleNamespace(sampler=SimpleNamespace(seed=3)), 0
    return loader, optimizer


def test_alpha_moves_by_its_own_gradient_in_its_own_pass(monkeypatch):
    trainer = make("aanets_lucir", "--fusion_lr=0.5")
    loader, optimizer = alpha_pass(trainer)
    alphas = trainer.model.backbone.alphas
    assert trainer.run.results["alphas"] == [[0.5] * 3]
    trainer.compute_loss(BATCH, TARGETS)[0].backward()  # the baseline's pass leaves alpha alone
    assert all(alpha.grad is None for alpha in alphas)
    monkeypatch.setattr(lucir.LUCIR, "train_epoch", lambda self, loader, optimizer: {}, raising=False)
    batches = list(utils.to_device(trainer.balanced, trainer.args))
    before, seen = state_of(trainer.model), []

    def one_batch(*_):
        seen.append(1)
        return iter(batches[:1])
    monkeypatch.setattr(utils, "to_device", one_batch)
    trainer.stage = 1  # a second stage, such as PODNet's, leaves alpha alone
    trainer.train_epoch(loader, optimizer)
    assert not seen
    trainer.stage = 0
    trainer.train_epoch(loader, optimizer)
    x, y = batches[0]
    assert seen and len(y) == 18
    assert changed_since(before, trainer.model) == {f"backbone.alphas.{k}" for k in range(3)}
    after = state_of(trainer.model)
    trainer.model.load_state_dict(before)
    for k in range(3):  # against finite differences of the cross-entropy in eval mode
        losses = []
        for step in (1e-3, -1e-3):
            alphas[k].data += step
            with torch.no_grad():
                losses.append(float(F.cross_entropy(trainer.model(x)[0].double(), y)))
            alphas[k].data -= step
        slope = (losses[0] - losses[1]) / 2e-3
        moved = float(after[f"backbone.alphas.{k}"] - before[f"backbone.alphas.{k}"])
        assert moved == pytest.approx(-0.5 * slope, rel=0.1, abs=1e-4)  # ReLUs have corners


@pytest.mark.parametrize("flags", [["--fusion_lr=0"], ["--branch_mode=single"]])
def test_alpha_can_stay_where_it_is(flags):
    trainer = make("aanets_lucir", *flags)
    trainer.exemplars, trainer.run.results = [], {}
    trainer.fit = lambda *_: None
    trainer.train_task(images_of(range(4, 6), trainer.args))
    assert trainer.balanced is None
    start = 1.0 if "single" in flags[0] else 0.5
    assert trainer.run.results["alphas"] == [[start] * 3]
    if start == 1:
        assert not any(p.requires_grad for p in trainer.model.backbone.plastic.parameters())


@pytest.mark.parametrize("kind", ["ss", "fixed", "free"])
def test_what_a_branch_learns(kind):
    torch.manual_seed(0)
    branch = aanets.make_branch(timm.create_model("resnet20", num_classes=0), kind)
    before = state_of(branch)
    if kind != "fixed":
        optimizer = torch.optim.SGD([p for p in branch.parameters() if p.requires_grad], 0.1)
        branch(BATCH).pow(2).sum().backward()
        optimizer.step()
    else:
        branch(BATCH)
    changed = changed_since(before, branch)
    convolutions = {name for name, x in before.items() if x.ndim == 4 and x.shape[-1] == 3}
    assert not kind == "ss" or not changed & convolutions  # bit-identical
    assert any("running_mean" in name for name in changed)  # BatchNorm goes on averaging
    assert any(".bn1.weight" in name for name in changed) == (kind != "fixed")
    assert any(name.endswith(".scale") for name in changed) == (kind == "ss")
    assert any(p.requires_grad for p in branch.parameters()) == (kind != "fixed")


# ---- BAL_FT and its schedule ---------------------------------------------------------------

@pytest.mark.parametrize("targets", [TARGETS, NEW])
def test_the_own_task_loss_is_of_stage_1_only(targets):
    trainer = make("bal_ft", "--loss=own")
    trainer.stage = 1
    expected = cross_entropy(outputs(trainer.model)[0], targets)
    assert float(trainer.compute_loss(BATCH, targets)[0].detach()) == pytest.approx(expected, rel=1e-4)


def test_the_own_task_loss_leaves_the_other_heads_alone():
    for targets, moved in ((torch.tensor([0, 1, 2, 3, 3, 2, 1, 0]), 0), (NEW, 1)):
        trainer = make("bal_ft", "--loss=own")
        trainer.compute_loss(BATCH, targets)[0].backward()
        heads = trainer.model.fc.heads
        assert heads[moved].weight.grad.abs().min() > 0
        assert not heads[1 - moved].weight.grad.any() and not heads[1 - moved].bias.grad.any()


def test_with_one_task_both_losses_are_the_same():
    losses = []
    for kind in ("all", "own"):
        trainer = make("bal_ft", f"--loss={kind}")
        trainer.task_of = utils.task_of_class([6])
        losses.append(trainer.compute_loss(BATCH, TARGETS)[0].detach())
    assert torch.equal(*losses)


def reference_schedule(losses, lr, patience, factor, lr_min):
    """FACIL's loop in plain python: the rate of each epoch, and which epoch's weights come out."""
    rates, best, best_epoch, left = [], math.inf, None, patience
    for epoch, loss in enumerate(losses):
        rates.append(lr)
        if loss < best:
            best, best_epoch, left = loss, epoch, patience
        else:
            left -= 1
            if left <= 0:
                lr, left = lr / factor, patience
                if lr < lr_min:
                    break
    return rates, best_epoch


@pytest.mark.parametrize("patience_", [1, 2, 3])
def test_the_schedule_against_a_plain_loop(patience_, monkeypatch):
    losses = [3.0, 2.0, 2.5, 2.0, 2.1, 1.9, 2.2, 2.2, 2.2, 1.8, 1.8, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    trainer = make("patience", f"--patience={patience_}", "--lr_min=0.02")
    served, seen = iter(losses), []
    monkeypatch.setattr(patience, "validation_loss", lambda trainer: next(served))
    weight = trainer.model.fc.heads[0].bias.data

    def train_epoch(trainer, loader, optimizer):
        seen.append((optimizer.param_groups[0]["lr"], float(weight[0])))
        weight.fill_(trainer.epoch)  # the weights of an epoch are known by its number
        return {}
    monkeypatch.setattr(CilTrainer, "train_epoch", train_epoch)
    trainer.fit(images_of(range(4), trainer.args), trainer.model.parameters(), len(losses), 0.1)
    rates, best = reference_schedule(losses, 0.1, patience_, 3, 0.02)
    assert [lr for lr, _ in seen] == pytest.approx(rates)
    assert len(seen) < len(losses) and float(weight[0]) == best
    # A lower rate starts from the best weights.
    for epoch, ((before, _), (lr, start)) in enumerate(zip(seen, seen[1:]), 1):
        expected = int(np.argmin(losses[:epoch])) if lr < before else epoch - 1
        assert start == expected


def contents(images):
    return {image.numpy().tobytes() for image in images.x}


def test_validation_images_are_in_no_training_set_and_no_memory():
    trainers = [make("patience", "--patience=3", "--validation_share=0.2") for _ in range(2)]
    trainer = trainers[0]
    new_data = images_of(range(6, 8), trainer.args, each=40)
    before = contents(new_data)
    trainer.task, trainer.nb_new, trainer.known_classes = 2, 2, 6
    trainer.expand_model(2, new_data)
    held = trainer.validation[-1]
    assert np.bincount(held.y)[6:].tolist() == [8, 8] and np.bincount(new_data.y)[6:].tolist() == [32, 32]
    assert contents(held) | contents(new_data) == before and not contents(held) & contents(new_data)
    # The same split for the same seed and task, so a resumed run and every rank have it too.
    again = images_of(range(6, 8), trainer.args, each=40)
    trainers[1].task = 2
    trainers[1].expand_model(2, again)
    assert torch.equal(again.x, new_data.x) and len(trainers[1].validation) == len(trainer.validation)


@pytest.mark.parametrize("which", ["new", "seen"])
def test_the_validation_loss_is_that_of_its_images(which):
    trainer = make("bal_ft", "--patience=1", f"--validation={which}")
    trainer.validation = [images_of(range(4), trainer.args, 80), images_of([4, 5], trainer.args)]
    sets = trainer.validation[which == "new":]
    images = [sets[0].join(sets[1:])[i, None] for i in range(sum(map(len, sets)))]
    with torch.no_grad():
        z = trainer.model(torch.stack([image for image, _ in images]))[0].double().numpy()
    expected = -np.log(softmax(z)[range(len(z)), [y for _, y in images]]).mean()
    assert patience.validation_loss(trainer) == pytest.approx(expected, rel=1e-4)


def test_a_rate_below_the_smallest_still_trains_and_a_nan_does_not_crash():
    trainer = make("patience", "--patience=1")
    trainer.validation_loss = math.nan
    optimizer, scheduler = trainer.make_optimizer(trainer.model.parameters(), 5, 0.1)
    optimizer.step()
    scheduler.step()  # the run ends with a line of its own: see `Run.end_epoch`
    assert scheduler.weights is not None
    seen, trainer.validation_loss = [], 1.0
    trainer.train_epoch = lambda loader, optimizer: seen.append(1) or {}
    trainer.fit(images_of(range(4), trainer.args), trainer.model.parameters(), 1, trainer.args.lr_min / 2)
    assert seen == [1]


def test_a_class_with_one_image_keeps_it():
    trainer = make("patience", "--patience=1")
    new_data = images_of([6], trainer.args, each=1).join([images_of([7], trainer.args, each=3)])
    trainer.expand_model(2, new_data)
    assert new_data.y.tolist() == [6, 7, 7] and trainer.validation[-1].y.tolist() == [7]


def test_bal_joint_learns_from_all_images_so_far(run):
    folder, _ = run("bal_ft", "--upper_bound=joint", "--num_epochs_ft=1", "--memory_size=0", "--batch_size=7",
                    "--num_epochs=1", "--increment=6")
    sizes = np.bincount(utils.load_digits()[0][1][::4])
    order = results_of(folder)["class_order"]
    full = [sum(sizes[order[:n]]) // 7 * 7 for n in (4, 10, 10)]  # the last batch is left out
    assert [line["images"] for line in log_lines(folder)] == full


# The first epoch without a better loss is a fit's last.
EARLY = ["--patience=1", "--num_epochs=30", "--num_epochs_ft=3", "--lr_factor=100", "--lr_min=0.05"]


def test_patience_ends_a_fit_early_with_the_best_weights(run):
    folder, _ = run("bal_ft", *EARLY, "--stop_after_task=1")
    losses = [line["validation_loss"] for line in log_lines(folder)]
    assert 1 < len(losses) < 30 and losses[-1] >= losses[-2] == min(losses)
    args = utils.setup(bal_ft.get_parser().parse_args([*SHORT, *EARLY]))
    (x, y), _ = utils.load_digits()
    x, y = x[::4], np.argsort(results_of(folder)["class_order"])[y[::4]]
    trainer = bal_ft.BalFT(args)
    trainer.task, trainer.stage, trainer.task_of = 0, 0, utils.task_of_class([4])
    trainer.expand_model(4, utils.ImageSet(x[y < 4], y[y < 4], args))  # holds the same images out
    trainer.model.load_state_dict(torch.load(folder / "model.pt", weights_only=True)["state_dict"])
    trainer.parallel_model = trainer.model
    assert patience.validation_loss(trainer) == pytest.approx(min(losses), rel=1e-4)


def test_a_fit_that_ended_early_is_resumed_as_ended(run):
    """Killed at the early end of the first task's fit, and of the second task's first stage."""
    whole, _ = run("bal_ft", *EARLY, folder="whole")
    lines = log_lines(whole)
    for task in (1, 2):
        last = max(i for i, line in enumerate(lines, 1) if (line["task"], line["stage"]) == (task, 1))
        assert lines[last - 1]["epoch"] < 30
        run("bal_ft", *EARLY, "--resume", die_after=last)
    again, _ = run("bal_ft", *EARLY, "--resume")
    assert read_results(again) == read_results(whole)
    assert same_model(again, whole) and log_lines(again) == lines


# ---- iTAML ---------------------------------------------------------------------------------

def test_the_outer_rate():
    assert itaml.outer_rate(0, 10, 1.0) == 1
    for task, nb_tasks, beta, rate in ((9, 10, 1.0, 0.407), (4, 5, 0.5, 0.670), (4, 5, 1.0, 0.449)):
        assert itaml.outer_rate(task, nb_tasks, beta) == pytest.approx(rate, abs=5e-4)


class Linear(torch.nn.Module):
    """A backbone that numpy can differentiate: features = A x."""
    num_features = 5

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3 * 8 * 8, 5, bias=False)

    def forward(self, images):
        return self.layer(images.flatten(1))


def make_itaml(*flags, increments=(4, 2), task=1):
    trainer = make("itaml", *flags)
    torch.manual_seed(0)
    trainer.model = CilModel(Linear())
    for size in increments:
        trainer.model.fc.expand(size)
    trainer.model.double()
    trainer.task = task
    trainer.run.increments = [*increments, 2]  # one more task is to come: T counts it
    return trainer


def test_itaml_loss_against_its_formula_and_its_gradient():
    trainer = make_itaml()
    z = trainer.model(BATCH.double())[0]
    z.retain_grad()
    task_of = itaml_inference.tasks_of(trainer)
    assert task_of.tolist() == [0, 0, 0, 0, 1, 1]
    losses, masked = itaml_inference.task_losses(lambda images: (z, None), BATCH, TARGETS, task_of)
    losses.sum().backward()
    p = 1 / (1 + np.exp(-z.detach().numpy()))
    for i, y in enumerate(TARGETS.tolist()):
        own = range(4) if y < 4 else range(4, 6)
        expected = np.mean([-np.log(p[i, k] if k == y else 1 - p[i, k]) for k in own])
        assert losses[i].item() == pytest.approx(expected, rel=1e-5)
        others = [k for k in range(6) if k not in own]
        assert not z.grad[i, others].any() and z.grad[i, list(own)].all()
        assert torch.isneginf(masked[i, others]).all()


def itaml_in_numpy(A, heads, x, y, borders, rate, lr, steps, paper):
    """One batch: for each task some steps of gradient descent on its own outputs, then the outer step."""
    start, ends, heads = A.copy(), [], [(W.copy(), b.copy()) for W, b in heads]
    for task, (low, high) in enumerate(borders):
        own = (y >= low) & (y < high)
        if not own.any():
            continue
        A = start.copy() if paper else A
        W, b = heads[task]
        for _ in range(steps):
            features = x[own] @ A.T
            z = features @ W.T + b
            d = (1 / (1 + np.exp(-z)) - np.eye(high - low)[y[own] - low]) / z.size
            A, W, b = A - lr * W.T @ d.T @ x[own], W - lr * d.T @ features, b - lr * d.sum(axis=0)
        ends.append(A)
        heads[task] = tuple((1 - rate) * old + rate * new for old, new in zip(heads[task], (W, b)))
    end = np.mean(ends, axis=0) if paper else ends[-1]
    return (1 - rate) * start + rate * end, heads


@pytest.mark.parametrize("meta", ["paper", "released"])
@pytest.mark.parametrize("targets", [[0, 1, 2, 3, 4, 5, 0, 4], [0, 1, 2, 3, 3, 2, 1, 0]])
def test_the_outer_step_against_numpy(meta, targets):
    trainer = make_itaml(f"--meta={meta}", "--beta=0.7", "--inner_steps=3")
    A = trainer.model.backbone.layer.weight.detach().numpy().copy()
    heads = [[p.detach().numpy().copy() for p in (head.weight, head.bias)] for head in trainer.model.fc.heads]
    x, y = BATCH.double(), torch.tensor(targets)
    expected, expected_heads = itaml_in_numpy(
        A, heads, x.flatten(1).numpy(), y.numpy(), borders=[(0, 4), (4, 6)], rate=math.exp(-0.7 / 3),
        lr=0.3, steps=3, paper=meta == "paper")
    trainer.train_epoch([(x, y)], torch.optim.SGD(trainer.model.parameters(), 0.3))
    tolerance = dict(rtol=1e-4, atol=1e-6)  # the loss is computed in 32 bits
    np.testing.assert_allclose(trainer.model.backbone.layer.weight.detach(), expected, **tolerance)
    assert np.abs(expected - A).max() > 1e-3
    for head, (W, b) in zip(trainer.model.fc.heads, expected_heads):
        np.testing.assert_allclose(head.weight.detach(), W, **tolerance)
        np.testing.assert_allclose(head.bias.detach(), b, **tolerance)


def test_a_head_whose_task_is_not_in_the_batch_stays():
    """Also with momentum and weight decay, which act without a gradient."""
    trainer = make_itaml("--beta=0")
    optimizer = torch.optim.SGD(trainer.model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    trainer.train_epoch([(BATCH.double(), TARGETS)], optimizer)
    before = trainer.model.fc.heads[1].weight.detach().clone()
    trainer.train_epoch([(BATCH.double(), torch.tensor([0, 1, 2, 3, 3, 2, 1, 0]))], optimizer)
    assert torch.equal(trainer.model.fc.heads[1].weight, before)


def test_a_single_image_of_a_task_has_no_batch_statistics():
    trainer = make("itaml", "--backbone=resnet18")
    optimizer = torch.optim.SGD(trainer.model.parameters(), 0.01)
    targets = torch.tensor([0, 1, 2, 3, 0, 1, 2, 4])  # of 8 pixels resnet18 leaves 1 x 1
    trainer.train_epoch([(BATCH, targets)], optimizer)
    assert all(x.isfinite().all() for x in trainer.model.state_dict().values())


def test_the_rate_falls_after_the_first_epoch_at_the_earliest():
    trainer = make("itaml")
    rates = []

    def train_epoch(loader, optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
    trainer.train_epoch = train_epoch
    trainer.fit(images_of(range(4), trainer.args), trainer.model.parameters(), 8, 0.1)
    assert rates == pytest.approx([0.1] * 2 + [0.02] * 2 + [0.004] * 2 + [0.0008] * 2)
    trainer.fit(images_of(range(4), trainer.args), trainer.model.parameters(), 1, 0.1)
    assert rates[-1] == 0.1


def test_one_task_and_one_step_is_plain_training():
    for meta in ("paper", "released"):
        trainer = make_itaml(f"--meta={meta}", increments=(6,), task=0)
        other = copy.deepcopy(trainer.model)
        trainer.train_epoch([(BATCH.double(), TARGETS)], torch.optim.RAdam(trainer.model.parameters(), 0.01))
        optimizer = torch.optim.RAdam(other.parameters(), 0.01)
        goal = F.one_hot(TARGETS, 6).double()
        F.binary_cross_entropy_with_logits(other(BATCH.double())[0], goal).backward()
        optimizer.step()
        for a, b in zip(trainer.model.parameters(), other.parameters()):
            torch.testing.assert_close(a, b)


def test_a_continuum_by_hand():
    # Four images of task 0, then three of task 1. Scores of both tasks; class right if told.
    best = np.array([[2, 1], [0, 3], [5, 1], [1, 2], [0, 1], [9, 1], [0, 4.0]])
    told = np.array([True, True, False, True, True, False, True])
    right, found = itaml_inference.continuum(best, told, np.array([0] * 4 + [1] * 3), 1)
    assert found.tolist() == [True, False, True, False, True, False, True]
    assert right.tolist() == [True, False, False, False, True, False, True]
    # In twos: (0, 1) sums to 2 against 4, (2, 3) to 6 against 3; the last continuum is mixed.
    right, found = itaml_inference.continuum(best[:4], told[:4], np.zeros(4), 2)
    assert found.tolist() == [False, False, True, True] and right.tolist() == [False, False, False, True]
    # Three images in twos: a rest of one, which is judged alone.
    assert itaml_inference.continuum(best[4:], told[4:], np.ones(3), 2)[1].tolist() == [False, False, True]
    # As long as the task, with the right task: the oracle.
    right, found = itaml_inference.continuum(best[:4] + [[9, 0]], told[:4], np.zeros(4), 4)
    assert found.all() and np.array_equal(right, told[:4])


def test_a_mixed_continuum_is_at_most_half_right():
    """The assumption: one task at a time. Of an even mixture one half is always of the wrong task."""
    draw = np.random.RandomState(0)
    tasks = np.tile([0, 1], 100)
    best = draw.randn(200, 2) + 5 * np.eye(2)[tasks]  # alone, nearly every image's task is found
    told = np.ones(200, dtype=bool)
    assert itaml_inference.continuum(best, told, tasks, 1)[0].mean() > 0.95
    for p in (2, 10, 20, 50):
        assert itaml_inference.continuum(best, told, tasks, p)[0].mean() <= 0.5
        apart = np.argsort(tasks, kind="stable")
        assert itaml_inference.continuum(best[apart], told, tasks[apart], p)[0].mean() > 0.95


def test_adaptation_is_one_epoch_of_adam_over_the_exemplars_of_the_task(monkeypatch):
    trainer = make("itaml")
    trainer.exemplars = [images_of([c], trainer.args, each=40) for c in range(6)]
    losses, adam, seen, optimizers = itaml_inference.task_losses, torch.optim.Adam, [], []

    def record(model, images, targets, task_of):
        seen.append((images.clone(), targets.clone(), model.training))
        return losses(model, images, targets, task_of)
    monkeypatch.setattr(itaml_inference, "task_losses", record)
    monkeypatch.setattr(
        torch.optim, "Adam", lambda parameters, lr: optimizers.append(lr) or adam(parameters, lr))
    itaml_inference.adapt(trainer, 1)
    assert optimizers == [1e-3] and all(training for _, _, training in seen)
    assert [len(targets) for _, targets, _ in seen] == [64, 16]
    targets = torch.cat([targets for _, targets, _ in seen])
    assert targets.bincount().tolist() == [0, 0, 0, 0, 40, 40]  # each exemplar of this task once
    assert targets[:40].unique().tolist() == [4, 5]  # in a random order
    clean = torch.stack([images[i, None][0] for images in trainer.exemplars[4:] for i in range(40)])
    images = torch.cat([images for images, _, _ in seen])
    same = sum(bool((image == clean).flatten(1).all(1).any()) for image in images)
    assert same < 40  # augmented: most are shifted
    seen.clear()
    for trainer.task, trainer.exemplars in ((0, trainer.exemplars), (1, [])):
        model = itaml_inference.adapt(trainer, 0)
        assert not seen and not changed_since(state_of(model), trainer.model)


def test_adapted_copies_leave_the_model_alone():
    trainer = make("itaml")
    trainer.exemplars = [images_of([c], trainer.args, each=5) for c in range(6)]
    _, trainer.run.test_scenario = utils.build_scenarios(trainer.args)
    before = state_of(trainer.model)
    adapted = itaml_inference.adapt(trainer, 1).state_dict()
    assert any(not torch.equal(adapted[name], x) for name, x in before.items())
    again = itaml_inference.adapt(trainer, 1).state_dict()
    assert all(torch.equal(adapted[name], again[name]) for name in adapted)
    itaml_inference.report(trainer)
    assert not changed_since(before, trainer.model)


def test_the_four_numbers_against_a_plain_loop():
    trainer = make("itaml", new=2)
    trainer.exemplars = [images_of([c], trainer.args, each=5) for c in range(6)]
    _, trainer.run.test_scenario = utils.build_scenarios(trainer.args)
    scores = itaml_inference.report(trainer)
    base, oracle, found, right = [], [], [], []
    for task, (low, high) in enumerate([(0, 4), (4, 6)]):
        test_set = trainer.run.test_scenario.images(task)
        x, y = torch.stack([test_set[i, None][0] for i in range(len(test_set))]), test_set.y
        adapted = itaml_inference.adapt(trainer, task).eval()
        with torch.no_grad():
            z, other = trainer.model.eval()(x)[0].numpy(), adapted(x)[0].numpy()
        base += (z.argmax(axis=1) == y).tolist()
        told = other[:, low:high].argmax(axis=1) + low == y
        oracle += told.tolist()
        order = np.random.RandomState([0, task]).permutation(len(y))
        for start in range(0, len(y), 5):
            chunk = order[start:start + 5]
            guess = int(np.mean([[max(row[:4]), max(row[4:6])] for row in z[chunk]], axis=0).argmax())
            found += [guess == task] * len(chunk)
            right += [guess == task and bool(told[i]) for i in chunk]
    assert scores["base"] == pytest.approx(100 * np.mean(base))
    assert scores["oracle"] == pytest.approx(100 * np.mean(oracle))
    assert scores["task_accuracy_5"] == pytest.approx(100 * np.mean(found))
    assert scores["continuum_5"] == pytest.approx(100 * np.mean(right))


@pytest.mark.parametrize("meta", ["paper", "released"])
def test_itaml_on_two_processes_is_itaml_on_one(meta, run):
    """Batches of 16 over ten classes: a rank often has no image of a task that the other has. A
    network without BatchNorm; what is left is the order of sums."""
    one, two = (run("itaml", "--backbone=mlp400", "--batch_size=16", "--optimizer=sgd", f"--meta={meta}",
                    folder=f"run{processes}", processes=processes)[0] for processes in (1, 2))
    models = [torch.load(folder / "model.pt", weights_only=True)["state_dict"] for folder in (one, two)]
    for name, weights in models[0].items():
        torch.testing.assert_close(models[1][name], weights, rtol=1e-3, atol=1e-5)
    one, two = results_of(one), results_of(two)
    for name in ("base", "continuum_1", "continuum_20", "task_accuracy_5", "oracle"):
        assert two[name] == pytest.approx(one[name], abs=0.5)  # an image in 200 may tip over


@pytest.mark.parametrize("flags", [
    ["--memory_size=0"], ["--num_bases=8", "--increment=1", "--amp=bf16"],
    ["--amp=fp16", "--backbone=mlp400"]])
def test_itaml_at_its_edges(flags, run):
    """No exemplars, a task of one class, mixed precision, on two processes; stopped and resumed."""
    for stop in ("--stop_after_task=1", "--resume"):
        folder, _ = run("itaml", *flags, "--batch_size=16", "--num_epochs=1", stop, processes=2)
    results = results_of(folder)
    assert results["finished"] and all(map(math.isfinite, results["oracle"]))
    if "--num_bases=8" in flags:
        assert results["increments"] == [8, 1, 1]


def test_itaml_networks():
    thin = timm.create_model("thin_resnet18", num_classes=0)
    assert parameters(thin) == 1_233_236  # and 17,000 of 100 classes: 1.25 M as released
    assert thin(torch.zeros(2, 3, 32, 32)).shape == (2, 170)
    maps = thin.stages(thin.stem(BATCH)).double()
    assert maps.shape == (8, 170, 2, 2)
    expected = maps.clamp(min=1e-6).pow(3).mean(dim=(2, 3)) ** (1 / 3)
    torch.testing.assert_close(thin(BATCH).double(), expected, rtol=1e-4, atol=1e-6)
    mlp = timm.create_model("mlp400", num_classes=0, img_size=28)
    assert parameters(mlp) == 784 * 400 + 400 + 400 * 400 + 400  # and 4,000 of ten classes: 0.478 M
    assert mlp(torch.zeros(2, 3, 28, 28)).shape == (2, 400)


# ---- DER -----------------------------------------------------------------------------------

def test_der_aux_targets_and_loss_against_their_formulas():
    """Old classes are 0, new ones 1 to |new|; in stage 2 a temperature, and no auxiliary loss."""
    trainer = make("der", "--lambda_aux=0.5", "--temperature_ft=3")
    y = TARGETS.numpy()
    with torch.no_grad():
        z, features, aux = (x.double().numpy() for x in trainer.model(BATCH))
    assert z.shape == (8, 6) and features.shape == (8, 128) and aux.shape == (8, 3)
    head = trainer.model.backbone.aux
    own = features[:, 64:] @ head.weight.detach().double().numpy().T + head.bias.detach().double().numpy()
    np.testing.assert_allclose(aux, own, atol=1e-5)  # it sees the newest branch alone
    expected = cross_entropy(z, y) + 0.5 * cross_entropy(aux, [0, 0, 0, 0, 1, 2, 0, 1])
    for stage, value in ((0, expected), (1, cross_entropy(z / 3, y))):
        trainer.stage = stage
        loss, logits = trainer.compute_loss(BATCH, TARGETS)
        assert float(loss.detach()) == pytest.approx(float(value), rel=1e-5)
        np.testing.assert_allclose(logits.detach(), z, rtol=1e-4, atol=1e-6)
    first = make("der").model.backbone.branches[0]
    single = der.DERModel(first)
    single.fc.expand(4)
    trainer.parallel_model, trainer.known_classes, trainer.stage = single.eval(), 0, 0
    with torch.no_grad():  # in the first task plain cross-entropy
        z = single(BATCH)[0].double().numpy()
        loss, _ = trainer.compute_loss(BATCH, TARGETS.clamp(max=3))
    assert float(loss) == pytest.approx(cross_entropy(z, np.minimum(y, 3)), rel=1e-5)


def test_der_grows_by_one_backbone_and_keeps_the_old_weights_of_the_classifier():
    args = utils.setup(der.get_parser().parse_args([]))
    trainer, counts = der.DER(args), []
    trainer.model.fc.heads.append(torch.nn.Linear(64, 4))  # of the first task, biases not 0
    trainer.known_classes, d = 4, 64
    backbone = parameters(trainer.model.backbone)
    for task, known in ((1, 4), (2, 6), (3, 8)):
        old = copy.deepcopy(trainer.model)
        trainer.teacher = old
        trainer.task, trainer.known_classes = task, known
        trainer.expand_model(2, None)
        assert trainer.teacher is None
        *frozen, newest = trainer.model.backbone.branches
        assert len(frozen) == task and not any(p.requires_grad for p in torch.nn.ModuleList(frozen).parameters())
        assert all(p.requires_grad for p in newest.parameters())
        assert not changed_since(state_of(frozen[-1]), newest)  # it starts as a copy
        heads = trainer.model.fc.heads
        assert [head.weight.shape for head in heads[1:]] == [(2, d * (task + 1))] * task
        for before, head in zip(old.fc.heads, heads):
            assert torch.equal(head.weight[:, :d * task], before.weight) and torch.equal(head.bias, before.bias)
            assert head.weight[:, d * task:].abs().min() > 0
            head.weight.data[:, d * task:] = 0  # without the new features nothing has changed
        with torch.no_grad():
            z, features, _ = trainer.model.eval()(BATCH)
            torch.testing.assert_close(z[:, :known], old.eval()(BATCH)[0])
        assert features.shape == (8, d * (task + 1))
        counts.append(parameters(trainer.model))
    new_heads = [(known + 2) * (d * (task + 1) + 1) + 3 * (d + 1) for task, known in ((1, 4), (2, 6), (3, 8))]
    assert counts == [(t + 1) * backbone + heads for t, heads in zip((1, 2, 3), new_heads)]
    assert counts[-1] == 1_090_061 and backbone == 271_824
    model = der.DERModel(timm.create_model("resnet32", num_classes=0))
    for size in [50] + 5 * [10]:
        if len(model.fc.heads):
            model.widen(size)
        model.fc.expand(size)
    assert parameters(model) == 2_836_751 and parameters(model.backbone.branches[0]) == 466_256


def test_der_old_branches_keep_still_in_both_stages():
    """Also if the whole model is put into training mode, and with weight decay and momentum."""
    trainer = make("der", "--num_epochs_ft=1", "--memory_size=30", "--batch_size=8", "--weight_decay=0.1")
    trainer.exemplars = [images_of([c], trainer.args, each=6) for c in range(4)]
    every, stages = set(trainer.model.state_dict()), []

    def fit(train_set, parameters, num_epochs, lr):
        trainer.stage, before = len(stages), state_of(trainer.model)
        optimizer, _ = trainer.make_optimizer(parameters, 2, 0.1)
        for _ in range(2):
            trainer.train_epoch(trainer.make_loader(train_set), optimizer)
        stages.append((changed_since(before, trainer.model), sorted(np.bincount(train_set.y))))
    trainer.fit = fit
    trainer.train_task(images_of(range(4, 6), trainer.args).join(trainer.exemplars))
    old = {name for name in every if name.startswith("backbone.branches.0.")}
    heads = {name for name in every if name.startswith("fc.heads.")}
    assert any("running_mean" in name for name in old)
    assert stages == [(every - old, [6, 6, 6, 6, 12, 12]), (heads, [5] * 6)]
    old_branch, newest = trainer.model.train().backbone.branches
    assert not any(module.training for module in old_branch.modules()) and newest.training
    assert all(p.requires_grad for p in newest.parameters())  # again, for the next fit


@pytest.mark.parametrize("processes", [1, 2])
def test_der_a_finished_branch_never_changes_in_a_run(run, processes):
    """To the bit, from one task to the next; and checkpoints hold no teacher."""
    before = {}
    for task, stop in enumerate(("--stop_after_task=1", "--stop_after_task=2", "--stop_after_task=3")):
        folder, _ = run("der", *METHODS["der"], "--amp=bf16", "--resume", stop, processes=processes)
        weights = torch.load(folder / "model.pt", weights_only=True)["state_dict"]
        assert {name.split(".")[2] for name in weights if "branches" in name} == {*map(str, range(task + 1))}
        assert all(torch.equal(weights[name], x) for name, x in before.items())
        before = {name: x for name, x in weights.items() if "branches" in name}
    assert len(before) > 300 and results_of(folder)["finished"]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["teacher"] is None


# ---- a frozen backbone ---------------------------------------------------------------------

def learn_frozen(order, increments, *flags, every=4):
    """The method without its loop, over a part of the digits in this order of the classes. Returns
    (trainer, its images, their classes as columns in the natural order)."""
    args = utils.setup(frozen.get_parser().parse_args([*flags, "--projection=40"]))
    (x, y), _ = utils.load_digits()
    labels = np.argsort(order)[y]
    images = utils.ImageSet(x, labels, args, np.arange(len(y))).select(slice(0, None, every))
    trainer = frozen.Frozen(args)
    trainer.run = SimpleNamespace(results={}, increments=increments)
    for trainer.task, trainer.nb_new in enumerate(increments):
        utils.set_seed(args, trainer.task)
        known = trainer.known_classes
        mine = images.select((images.y >= known) & (images.y < known + trainer.nb_new))
        trainer.expand_model(trainer.nb_new, mine)
        trainer.train_task(mine)
        trainer.update_memory(mine)
        trainer.finish_task()
        trainer.known_classes += trainer.nb_new
    return trainer, images


def h_of(trainer, images):
    """h(x) of all images in float64, (n, width), by an independent formula."""
    with torch.no_grad():
        phi = torch.cat([trainer.model.backbone.eval()(batch) for batch, _ in
                         utils.clean_batches(images, trainer.args)]).double().numpy()
    R = trainer.model.R
    return phi if R is None else np.maximum(phi @ R.double().numpy(), 0)


def rows_of(trainer):
    return torch.cat([head.weight for head in trainer.model.fc.heads]).detach().double().numpy()


ORDERS = [(range(10), [4, 2, 2, 2]), ([7, 3, 9, 0, 1, 8, 4, 2, 6, 5], [1] * 10)]


@pytest.mark.parametrize("flags", [["--ridge=0.01"], [], ["--projection=0", "--ridge=0.01"]])
def test_the_ridge_is_the_joint_solution_for_every_order_of_the_classes(flags):
    """Against numpy's solution for all images at once; in ten tasks it is the same, and the ridge
    that is chosen, too."""
    found = []
    for order, increments in ORDERS:
        trainer, images = learn_frozen(order, increments, "--head=ridge", *flags)
        H, Y = h_of(trainer, images), np.eye(10)[images.y]
        ridge = trainer.run.results["ridges"][-1] * (H ** 2).sum(axis=0).mean()
        expected = np.linalg.solve(H.T @ H + ridge * np.eye(H.shape[1]), H.T @ Y).T
        np.testing.assert_allclose(rows_of(trainer), expected, rtol=1e-3, atol=1e-4 * abs(expected).max())
        found.append((trainer.run.results["ridges"][-1], rows_of(trainer)[np.argsort(order)]))
        with torch.no_grad():  # and the answers are H W
            logits = trainer.predict(next(utils.clean_batches(images, trainer.args))[0])
        np.testing.assert_allclose(logits, (H @ expected.T)[:len(logits)], atol=1e-3)
    (ridge, one), (same, other) = found
    assert ridge == same
    np.testing.assert_allclose(one, other, atol=1e-4 * abs(one).max())


def test_the_ridge_is_chosen_on_the_images_that_are_held_out():
    """By the squared errors on each fifth image of the data set, computed from the images."""
    trainer, images = learn_frozen(*ORDERS[0], "--head=ridge")
    H, Y, held = h_of(trainer, images), np.eye(10)[images.y], images.rows % 5 == 0
    errors = {}
    for ridge in 10.0 ** np.arange(-8, 3):
        A = H[~held].T @ H[~held]
        A += ridge * A.diagonal().mean() * np.eye(len(A))
        W = np.linalg.solve(A, H[~held].T @ Y[~held])
        errors[ridge] = ((H[held] @ W - Y[held]) ** 2).sum()
    best = min(errors, key=errors.get)
    assert trainer.run.results["ridges"][-1] == pytest.approx(best) and 1e-8 < best < 100


def test_class_means_are_those_of_all_images_and_the_answer_is_the_largest_cosine():
    found = []
    for order, increments in ORDERS:
        trainer, images = learn_frozen(order, increments)
        phi = h_of(trainer, images)
        means = np.stack([phi[images.y == c].mean(axis=0) for c in range(10)])
        np.testing.assert_allclose(rows_of(trainer), means / np.linalg.norm(means, axis=1, keepdims=True),
                                   atol=1e-6)
        batch = next(utils.clean_batches(images, trainer.args))[0]
        with torch.no_grad():
            answers = trainer.predict(batch).argmax(dim=1).numpy()
        assert (answers == cosine(phi[:len(batch)], means).argmax(axis=1)).all()
        found.append(np.array(order)[answers])  # digits
    assert (found[0] == found[1]).mean() > 0.999  # the same rounding aside


def test_nothing_but_the_heads_changes_after_the_first_task(run):
    """To the bit, with BatchNorm's averages; nothing but the first task is in the log."""
    before = {}
    for stop in ("--stop_after_task=1", "--stop_after_task=3"):
        folder, _ = run("frozen", *METHODS["frozen"], "--resume", stop)
        weights = torch.load(folder / "model.pt", weights_only=True)["state_dict"]
        assert all(torch.equal(weights[name], x) for name, x in before.items())
        before = {name: x for name, x in weights.items() if not name.startswith("fc.")}
    assert "R" in before and weights["fc.heads.0.weight"].shape == (4, 100)
    assert {line["task"] for line in log_lines(folder)} == {1}
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["teacher"] is None


def frozen_sums(folder):
    trainer, _ = learn_frozen(range(10), [6, 3, 1], "--head=ridge", "--batch_size=30", every=13)
    write_of_rank(folder, trainer, [trainer.sums.flatten().tolist(), rows_of(trainer).tolist()])


def test_the_sums_are_the_same_on_one_two_and_three_ranks(launch, tmp_path):
    """104 images in three tasks, so that not all ranks have the same number."""
    for processes in (1, 2, 3):
        started = launch(function=frozen_sums, arguments=(str(tmp_path),), processes=processes)
        assert started.wait() == [0] * processes, started.stderr()
    one, *others = (json.loads((tmp_path / f"{name}.json").read_text())
                    for name in ("1_0", "2_0", "2_1", "3_0", "3_1", "3_2"))
    assert others[0] == others[1] and others[2] == others[3] == others[4]  # to the bit
    for other in (others[0], others[2]):
        for x, y in zip(one, other):
            np.testing.assert_allclose(y, x, rtol=1e-3, atol=1e-4 * np.abs(x).max())


def run_frozen_until(flags, task):
    """A run that is killed when so many tasks are done: in the next there is no checkpoint."""
    end_task = utils.Run.end_task

    def dying(self, trainer, scores):
        end_task(self, trainer, scores)
        if trainer.task + 1 == task:
            os.kill(os.getpid(), signal.SIGKILL)
    utils.Run.end_task = dying
    run_method("frozen", flags)


@pytest.mark.parametrize("flags", [["--adapt", "--head=ridge"], []])
def test_a_frozen_run_that_was_killed_adds_up_again(flags, run, launch, tmp_path):
    """Killed after the second task. Without --adapt there is no checkpoint at all."""
    flags = [*flags, "--projection=100"]
    whole, _ = run("frozen", *flags, folder="whole")
    started = launch(function=run_frozen_until, arguments=(
        [*SHORT, "--output_dir=out", "--resume", *flags], 2))
    assert started.wait() == [-signal.SIGKILL], started.stderr()
    again, _ = run("frozen", *flags, "--resume")
    assert read_results(again) == read_results(whole)
    assert same_model(again, whole) and log_lines(again) == log_lines(whole)
    assert len(results_of(again).get("ridges", [0] * 3)) == 3
    assert (again / "checkpoint.pt").exists() == ("--adapt" in flags)


BRIEF = (10, 8)  # steps and groups of the tiny CLIP's training, in the place of (200, 32)


def run_frozen_clip(flags):
    tiny_clip.train.__defaults__ = BRIEF
    run_file(ROOT, "tutorial.methods.frozen_clip", flags)


def test_the_tower_of_the_tiny_clip_stays_as_it_was_pre_trained(launch, tmp_path, monkeypatch):
    """On one process and two, which compute the same, and train nothing."""
    pytest.importorskip("open_clip")
    for n in (1, 2):
        started = launch(function=run_frozen_clip, processes=n, arguments=([
            "--head=ridge", "--projection=100", "--no_plots", f"--output_dir={n}"],))
        assert started.wait() == [0] * n, started.stderr()
    monkeypatch.setattr(tiny_clip.train, "__defaults__", BRIEF)
    tower = tiny_clip.train(utils.setup(utils.get_parser().parse_args([]))).visual.state_dict()
    for folder in (tmp_path / "1", tmp_path / "2"):
        weights = torch.load(folder / "model.pt", weights_only=True)["state_dict"]
        assert tower and all(torch.equal(weights[f"backbone.{name}"], x) for name, x in tower.items())
    one, two = (results_of(tmp_path / name) for name in "12")
    np.testing.assert_allclose(one["acc1s"], two["acc1s"], atol=1)
    assert one["increments"] == [2] * 5 and one["class_order"] == list(range(10))
    assert one["last_accuracy"] > 50 and not log_lines(tmp_path / "1")


def run_pretrained(weights, flags):
    """A run whose --pretrained finds its weights in a file, as timm would after a download."""
    create = timm.create_model

    def local(name, pretrained=False, **options):
        overlay = dict(pretrained_cfg_overlay=dict(file=weights)) if pretrained else {}
        return create(name, pretrained=pretrained, **overlay, **options)
    timm.create_model = local
    run_method("frozen", flags)


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_pretrained_weights_of_timm_are_used_as_they_are(backbone, run, launch, tmp_path):
    torch.manual_seed(5)
    made = timm.create_model(backbone)
    torch.save(made.state_dict(), tmp_path / "weights.pth")
    flags = [*SHORT, f"--backbone={backbone}", "--input_size=32", "--num_workers=0", "--pretrained",
             "--head=ridge", "--projection=100", "--output_dir=out"]
    started = launch(function=run_pretrained, arguments=(str(tmp_path / "weights.pth"), flags))
    assert started.wait() == [0], started.stderr()
    found = torch.load(tmp_path / "out/model.pt", weights_only=True)["state_dict"]
    names = [name for name, _ in made.named_parameters() if f"backbone.{name}" in found]
    names = [name for name in names if "pos_embed" not in name]  # resampled for 32 pixels
    assert len(names) > 10 and results_of(tmp_path / "out")["finished"]
    assert all(torch.equal(found[f"backbone.{name}"], made.state_dict()[name]) for name in names)


# ---- runs ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", METHODS)
def test_each_method_runs_on_two_processes(name, run):
    folder, printed = run(name, *METHODS[name], processes=2)
    results = results_of(folder)
    assert results["finished"] and results["gammas"] == []
    if name == "icarl":
        assert len(results["network_acc1s"]) == 3
    if name == "aanets":
        assert results["method"] == "LUCIR+AANets" and len(results["alphas"]) == 2
        assert all(abs(a - 0.5) > 1e-5 for row in results["alphas"] for a in row)
    if name == "itaml":
        scores = [results[key] for key in (
            "base", "continuum_1", "continuum_5", "continuum_20", "task_accuracy_20", "oracle")]
        assert all(len(score) == 3 for score in scores) and "oracle" in printed
        assert results["base"] == pytest.approx(results["acc1s"])  # the same, found in two ways
    stages = {line["stage"] for line in log_lines(folder)}
    assert stages == ({1, 2} if "--num_epochs_ft=2" in METHODS[name] else {1})
    for t, row in enumerate(results["cumulative_matrix"]):  # the metrics of every method
        assert len(row) == t + 1 and row[-1] == results["acc1s"][t]
        assert results["acc1s"][t] <= results["task_inference"][t]


def means_on_two_ranks(folder):
    import torch.distributed as dist
    args = utils.setup(utils.get_parser().parse_args([]))
    weight = torch.tensor(2.0, requires_grad=True)
    mask = torch.arange(6) < (5 if args.rank == 0 else 0)
    mean = utils.global_mean(weight * torch.arange(6.0), mask, args)
    mean.backward()
    gradient = weight.grad
    dist.all_reduce(gradient)
    if args.rank == 0:
        torch.save([mean.detach(), gradient / args.world_size], f"{folder}/mean.pt")
    dist.destroy_process_group()


def test_the_mean_over_ranks_with_unequal_shares(launch, tmp_path):
    """Five values on one rank, none on the other: DDP's gradient must be that of their mean."""
    started = launch(function=means_on_two_ranks, arguments=(str(tmp_path),), processes=2)
    assert started.wait() == [0, 0], started.stderr()
    mean, gradient = torch.load(tmp_path / "mean.pt", weights_only=True)
    assert float(gradient) == pytest.approx(2.0)  # d/dw of mean(w * [0, 1, 2, 3, 4])
    assert float(mean) / 2 == pytest.approx(4.0)  # DDP divides by the two ranks


def one_alpha_pass(folder):
    trainer = make("aanets_lucir", "--fusion_lr=0.5", "--batch_size=18")
    loader, optimizer = alpha_pass(trainer)
    lucir.LUCIR.train_epoch = lambda self, loader, optimizer: {}
    trainer.train_epoch(loader, optimizer)
    alphas = [float(alpha) for alpha in trainer.model.backbone.alphas]
    assert all(abs(alpha - 0.5) > 1e-4 for alpha in alphas)
    write_of_rank(folder, trainer, alphas)


def one_validation_loss(folder):
    trainer = make("bal_ft", "--loss=own", "--patience=1", "--validation=seen")
    trainer.validation = [images_of(range(4), trainer.args, 128), images_of([4], trainer.args, 1)]
    write_of_rank(folder, trainer, patience.validation_loss(trainer))


@pytest.mark.parametrize("function", [one_alpha_pass, one_validation_loss])
def test_two_ranks_find_what_one_finds(function, launch, tmp_path):
    """The step of alpha, on one batch of 18 images; and the loss of 513 images, which is two batches
    on one rank, and one on the other."""
    one, first, second = on_one_and_two_ranks(function, launch, tmp_path)
    assert first == second
    np.testing.assert_allclose(first, one, rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_each_method_can_be_killed_and_resumed(name, run, tmp_path):
    """Two epochs of the first task, two (and two of a second stage) of each further one: killed in
    the middle of the second task's first stage, after it, and in the middle of its second stage."""
    flags = METHODS[name]
    whole, _ = run(name, *flags, folder="whole")
    # (A frozen network has the first task's two epochs only; more of it below.)
    for epoch in (1, 2) if name == "frozen" else (3, 4, 5)[:2 + ("--num_epochs_ft=2" in flags)]:
        run(name, *flags, "--resume", die_after=epoch)
    again, _ = run(name, *flags, "--resume")
    assert read_results(again) == read_results(whole)
    assert same_model(again, whole) and log_lines(again) == log_lines(whole)


@pytest.mark.parametrize("name, flags", [
    ("aanets", ["--baseline=icarl"]), ("aanets", ["--baseline=podnet", "--backbone=resnet20"]),
    ("icarl", ["--memory_size=0"])])
def test_other_runs_come_to_an_end(name, flags, run):
    folder, _ = run(name, *flags, "--batch_size=16")
    assert results_of(folder)["finished"]
    # Without exemplars iCaRL's network answers itself.
    assert ("network_acc1s" in results_of(folder)) == ("--baseline=icarl" in flags)


@pytest.mark.parametrize("name", ["lucir", "podnet", "bal_ft"])
def test_the_second_stage_moves_nothing_but_the_classifier(name):
    trainer = make(name, "--num_epochs_ft=1", "--memory_size=30", "--batch_size=8")
    trainer.exemplars = [images_of([c], trainer.args, each=6) for c in range(4)]
    stages = []

    def fit(train_set, parameters, num_epochs, lr):
        trainer.stage = len(stages)
        stages.append(sorted(set(train_set.y)))
        if trainer.stage == 1:
            before = state_of(trainer.model)
            trainer.teacher = lambda images: pytest.fail("what rests needs no teacher")
            trainer.train_epoch(trainer.make_loader(train_set), torch.optim.SGD(parameters, 0.1))
            assert changed_since(before, trainer.model) == {
                name for name in before if name.startswith("fc.heads")}
    trainer.fit = fit
    trainer.train_task(images_of(range(4, 6), trainer.args).join(trainer.exemplars))
    assert stages[1] == list(range(6))
    assert all(p.requires_grad for p in trainer.model.backbone.parameters())
    utils.train_mode(trainer.model, trainer.resting)
    assert trainer.model.backbone.training  # everything learns again in the next task


@pytest.mark.parametrize("flags, fresh", [([], False), (["--reinit_heads"], True)])
def test_the_second_stage_starts_from_the_heads_or_from_new_ones(flags, fresh):
    trainer = make("bal_ft", "--num_epochs_ft=1", "--memory_size=30", *flags)
    trainer.exemplars = [images_of([c], trainer.args, each=6) for c in range(4)]
    heads, starts = trainer.model.fc.heads, []
    for head in heads:
        head.weight.data *= 5
        head.bias.data += 1
    trainer.fit = lambda *_: starts.append(state_of(heads))
    trainer.train_task(images_of(range(4, 6), trainer.args).join(trainer.exemplars))
    first, second = starts
    for head in ("0", "1"):
        weight, bias = second[f"{head}.weight"], second[f"{head}.bias"]
        if fresh:
            assert ((weight.norm(dim=1) - 1).abs() < 0.3).all() and not bias.any()
        else:
            assert torch.equal(weight, first[f"{head}.weight"]) and (bias == 1).all()
            assert weight.norm(dim=1).min() > 3


class Blocks(torch.nn.Module):
    num_features = 8

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Sequential(
            torch.nn.Conv2d(channels, 8, 3), torch.nn.BatchNorm2d(8)) for channels in (3, 8, 8))

    def forward(self, images):
        for block in self.blocks:
            images = block(images).relu()
        return images.mean(dim=(2, 3))


def test_frozen_modules_rest_and_learn_again():
    """Of three blocks two are frozen, as a slice of a ModuleList, which is a list of its own."""
    trainer = make("bal_ft", "--weight_decay=0.1")
    trainer.model = trainer.parallel_model = CilModel(Blocks())
    trainer.model.fc.expand(6)
    blocks = trainer.model.backbone.blocks
    blocks[0][0].bias.requires_grad_(False)  # by someone else: it stays so
    loader = utils.train_loader(images_of(range(6), trainer.args), trainer.args)
    optimizer, _ = trainer.make_optimizer(trainer.model.parameters(), 2, 0.1)
    every = set(trainer.model.state_dict())
    resting = {name for name in every if name.startswith(("backbone.blocks.0", "backbone.blocks.1"))}

    def changes():
        before = state_of(trainer.model)
        trainer.train_epoch(loader, optimizer)
        return changed_since(before, trainer.model)

    learning = every - {"backbone.blocks.0.0.bias"}
    assert changes() == learning  # so the optimizer has momentum for all of them
    for modules in (blocks[:2], [blocks[:2]]):
        with utils.frozen(trainer, modules):
            assert changes() == every - resting
        assert changes() == learning
    with pytest.raises(ZeroDivisionError), utils.frozen(trainer, blocks):
        1 / 0
    assert changes() == learning and not trainer.resting


@pytest.mark.parametrize("name, flags, message", [
    ("icarl", ["--icarl_loss=hinge"], "--icarl_loss"),
    ("lucir", ["--backbone=mixer_s32_224", "--input_size=224"], "needs a ResNet"),
    ("lucir", ["--backbone=hrnet_w18_small", "--input_size=64"], "needs a ResNet"),
    ("aanets", ["--baseline=icarl", "--backbone=ghostnet_050", "--input_size=32"], "needs a ResNet"),
    ("aanets", ["--baseline=icarl", "--backbone=hrnet_w18_small", "--input_size=64"], "needs a ResNet"),
    ("lucir", ["--margin_k=0"], "--margin_k"),
    ("podnet", ["--lambda_flat=-1"], "--lambda_flat"),
    ("aanets", ["--baseline=wa"], "--baseline"),
    ("aanets", ["--fusion_lr=-1"], "--fusion_lr"),
    ("aanets", ["--fusion_lr=nan"], "--fusion_lr"),
    ("aanets", ["--memory_size=0", "--num_epochs=1"], "alpha learns from exemplars"),
    ("bal_ft", ["--loss=none"], "--loss"),
    ("bal_ft", ["--upper_bound=icarl"], "--upper_bound"),
    ("bal_ft", ["--memory_size=0"], "stage 2 learns from exemplars"),
    ("bal_ft", ["--patience=-1"], "--patience"),
    ("bal_ft", ["--patience=5", "--validation_share=0.9"], "--validation_share"),
    ("bal_ft", ["--patience=5", "--lr_factor=1"], "--lr_factor"),
    ("itaml", ["--meta=first_order"], "--meta"),
    ("itaml", ["--beta=-1"], "--beta"),
    ("itaml", ["--inner_steps=0"], "--inner_steps"),
    ("itaml", ["--milestones", "20"], "--milestones"),
    ("itaml", ["--backbone=mlp400", "--pretrained"], "no pretrained weights"),
    ("itaml", ["--beta=inf"], "--beta"),
    ("der", ["--lambda_aux=-1"], "--lambda_aux"),
    ("der", ["--temperature_ft=0"], "--temperature_ft"),
    ("der", ["--memory_size=0"], "stage 2 learns from exemplars"),
    ("frozen", ["--ridge=0"], "--ridge"),
    ("frozen", ["--head=ridge", "--ridge=-1"], "--ridge"),
    ("frozen", ["--head=ridge", "--projection=1000000"], "--projection 1000000 takes 40000.0 GB"),
    ("frozen", ["--head=nearest"], "--head"),
    ("frozen", ["--pretrained"], "--pretrained"),
    *((name, ["--memory_size=30"], "keeps no image") for name in ("frozen", "frozen_clip")),
    ("frozen_clip", ["--input_size=32"], "takes 8"),
    *((name, ["--compile"], "--compile: ") for name in ("podnet", "aanets", "itaml", "der"))])
def test_bad_input_of_the_methods_is_one_line(name, flags, message, launch):
    started = launch(function=run_file, arguments=(ROOT, f"tutorial.methods.{name}", [
        "--no_plots", *flags, "--output_dir=out"]))
    assert started.wait() == [2]
    assert message in started.stderr() and started.stderr().count("\n") == 1, started.stderr()
    assert "task 1" not in started.stdout()  # before any training


def test_the_second_stage_of_a_small_memory_takes_one_small_batch(run):
    folder, _ = run("podnet", "--batch_size=64", "--num_epochs_ft=1")
    images = [line["images"] for line in log_lines(folder) if line["stage"] == 2]
    assert images == [28, 30]  # 4 of 7, 3 of 10


# ---- the rules of the house ----------------------------------------------------------------

STEPS = {"expand_model", "train_task", "make_loader", "make_optimizer", "train_epoch", "compute_loss",
         "update_memory", "finish_task", "predict"}
# Lines of code at most. Those above 60 bring a network or a schedule along; their chapters say so.
LIMITS = {"icarl": 60, "lucir": 85, "podnet": 100, "aanets": 120, "bal_ft": 60, "patience": 70,
          "itaml": 120, "itaml_inference": 60, "itaml_networks": 60, "der": 90, "frozen": 80, "frozen_clip": 60,
          "feature_kd": 60, "wa_variants": 60, "grow": 60}


@pytest.mark.parametrize("name", LIMITS)
def test_methods_are_small_and_override_at_most_three_steps(name):
    path = ROOT / f"tutorial/{'tools' if name == 'grow' else 'methods'}/{name}.py"
    assert lines_of_code(path)[0] <= LIMITS[name]
    trainers = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)
                and any(getattr(base, "id", "") in ("CilTrainer", "Patience") for base in node.bases)]
    assert len(trainers) == {"itaml_inference": 0, "itaml_networks": 0, "frozen_clip": 0, "wa_variants": 2}.get(name, 1)
    for trainer in trainers:
        defined = {node.name for node in trainer.body if isinstance(node, ast.FunctionDef)}
        assert defined <= STEPS and 1 <= len(defined) <= 3


@pytest.mark.parametrize("path", sorted(ROOT.glob("tutorial/*/*.py")), ids=lambda path: path.stem)
def test_nobody_has_a_training_loop_of_epochs_of_its_own(path):
    assert "fit" not in {node.name for node in ast.walk(ast.parse(path.read_text()))
                         if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", ["icarl", "lucir", "podnet", "frozen"])
def test_cosines_are_computed_in_32_bits(name):
    trainer = make(name)
    trainer.means = torch.randn(6, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert trainer.predict(BATCH).dtype == torch.float32
