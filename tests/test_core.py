"""The model, the loss, the memory, the metrics and the data against independent references."""
import ast
import copy
import io
import json
import math
import random
import tokenize
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, SHORT, SILENT
from PIL import Image
from sklearn.metrics import confusion_matrix, top_k_accuracy_score
from torch.nn import functional as F
from torchvision import transforms
from torchvision.transforms import functional

import resnet
import template
import utils


def make_args(*flags):
    return utils.setup(utils.get_parser().parse_args(list(flags)))


def make_trainer(*flags, increments=(4, 2, 2, 2)):
    trainer = template.CilTrainer(make_args(*flags))
    trainer.run = SimpleNamespace(increments=list(increments), results={"gammas": []},
                                  scaler=torch.amp.GradScaler("cpu", enabled=False),
                                  progress=SILENT)
    return trainer


# ---- model ---------------------------------------------------------------------------------

def make_model(*sizes, seed=0):
    torch.manual_seed(seed)
    model = template.CilModel(timm.create_model("resnet20", num_classes=0))
    for size in sizes:
        model.fc.expand(size)
    return model.eval()


def test_old_logits_do_not_change_when_the_model_expands():
    model, images = make_model(4, 2), torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        before, features = model(images)
        model.fc.expand(3)
        after, same_features = model(images)
    assert before.shape == (5, 6) and after.shape == (5, 9) and features.shape == (5, 64)
    assert torch.equal(after[:, :6], before) and torch.equal(features, same_features)


def test_a_new_head_has_prototypes_of_length_one_and_no_bias():
    head = make_model(50, 200).fc.heads[1]
    lengths = head.weight.detach().norm(dim=1)
    assert lengths.mean().item() == pytest.approx(1, abs=0.02) and lengths.std() < 0.1
    assert (head.bias == 0).all()
    default = torch.nn.Linear(64, 200).weight.detach().norm(dim=1).mean().item()
    assert default == pytest.approx(3 ** -0.5, abs=0.02)  # the 0.58 that the comment names


def test_a_frozen_copy_learns_nothing():
    model = make_model(4)
    copy = utils.frozen_copy(model, make_args())
    model.fc.heads[0].weight.data += 1
    assert not torch.equal(copy.fc.heads[0].weight, model.fc.heads[0].weight)
    assert not copy.training and not any(p.requires_grad for p in copy.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_alignment_makes_the_mean_norms_equal():
    model = make_model(4, 3, 2)
    model.fc.heads[-1].weight.data *= 5
    before = [head.weight.detach().clone().numpy() for head in model.fc.heads]
    bias = model.fc.heads[-1].bias.clone()
    gamma = model.align_weights(2)
    old = np.linalg.norm(np.concatenate(before[:2]), axis=1)
    new = np.linalg.norm(before[2], axis=1)
    assert gamma == pytest.approx(old.mean() / new.mean(), rel=1e-6)
    assert gamma < 1
    np.testing.assert_allclose(model.fc.heads[2].weight.detach(), gamma * before[2], rtol=1e-6)
    for head, weight in zip(model.fc.heads[:2], before):
        assert np.array_equal(head.weight.detach(), weight)
    assert torch.equal(model.fc.heads[-1].bias, bias)
    assert model.fc.heads[2].weight.norm(dim=1).mean().item() == pytest.approx(old.mean(), rel=1e-6)
    assert model.align_weights(2) == pytest.approx(1, abs=1e-6)  # a second time changes nothing


@pytest.mark.parametrize("name, size, features", [
    ("resnet20", 8, 64), ("resnet32", 32, 64), ("resnet18", 32, 512), ("test_vit", 32, 64),
    ("mobilenetv3_small_050", 32, 1024)])
def test_any_timm_backbone_learns(name, size, features):
    trainer = make_trainer(f"--backbone={name}", f"--input_size={size}")
    assert trainer.model.fc.embed_dim == features
    trainer.model.fc.expand(3)
    logits, phi = trainer.model.train()(torch.randn(4, 3, size, size))
    assert logits.shape == (4, 3) and phi.shape == (4, features)
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
    assert all(p.grad is not None for p in trainer.model.parameters())


@pytest.mark.parametrize("depth, million", [(20, 0.27), (32, 0.47), (44, 0.66), (56, 0.86)])
def test_cifar_resnets(depth, million):
    model = timm.create_model(f"resnet{depth}", num_classes=0)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(million, abs=0.005)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)
                    and m.kernel_size == (3, 3)]
    assert len(convolutions) == depth - 1  # and the classifier
    assert timm.create_model(f"resnet{depth}", num_classes=7)(torch.zeros(1, 3, 8, 8)).shape == (1, 7)


def test_cifar_resnet_feature_maps_and_last_relu():
    torch.manual_seed(0)
    model = timm.create_model("resnet32", num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    last, maps = model.forward_intermediates(images)
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert torch.equal(last, maps[-1]) and torch.equal(last, model.forward_features(images))
    assert torch.equal(model(images), last.mean(dim=(2, 3)))
    first, = model.forward_intermediates(images, indices=[0], intermediates_only=True)
    assert torch.equal(first, maps[0])
    signed = timm.create_model("resnet32", num_classes=0, last_relu=False).eval()
    signed.load_state_dict(model.state_dict())
    assert (last >= 0).all() and (signed.forward_features(images) < 0).any()
    assert torch.equal(signed.forward_features(images).relu(), last)
    assert sum(p.numel() for p in model.parameters()) == 466_256
    with pytest.raises(ValueError, match="8x8"):
        model(torch.zeros(1, 3, 7, 7))
    with pytest.raises(ValueError, match="6n"):
        resnet.CifarResNet(30)
    with pytest.raises(RuntimeError, match="no pretrained"):
        timm.create_model("resnet32", pretrained=True)


@pytest.mark.parametrize("name", ["resnet20", "resnet32_signed"])
def test_gradients_keep_the_layout_of_the_images(name):
    """Batch norm is several times slower where its input and its gradient have two layouts."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=0).double()
    model = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    images, layouts = torch.randn(4, 3, 32, 32, dtype=torch.double), []

    def watch(module, inputs, maps):
        maps.register_hook(lambda gradient: layouts.append(
            gradient.is_contiguous(memory_format=torch.channels_last)))

    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(watch)
    for network, memory in ((model, torch.channels_last), (plain, torch.contiguous_format)):
        _, maps = network.forward_intermediates(images.to(memory_format=memory))
        sum((m.mean(dim=(2, 3)) ** 2).sum() for m in maps).backward()
    assert len(layouts) >= 19 and all(layouts)
    for ours, reference in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, reference.grad)


# ---- loss ----------------------------------------------------------------------------------

def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def test_distillation_against_its_formula():
    draw = np.random.RandomState(0)
    student, teacher = draw.randn(6, 5), draw.randn(6, 5)
    for T in (1.0, 2.0, 4.0):
        p, q = softmax(teacher / T), softmax(student / T)
        expected = (p * np.log(p / q)).sum(axis=1).mean()
        kd = template.knowledge_distillation(torch.tensor(student), torch.tensor(teacher), T)
        assert kd.item() == pytest.approx(expected, rel=1e-10)
    same = template.knowledge_distillation(torch.tensor(teacher), torch.tensor(teacher), 2.0)
    assert same.item() == pytest.approx(0, abs=1e-12)


def test_distillation_has_the_gradient_of_the_cross_entropy_form():
    student = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 5, dtype=torch.float64)
    kd, = torch.autograd.grad(template.knowledge_distillation(student, teacher, 2.0), student)
    ce = -(F.softmax(teacher / 2, 1) * F.log_softmax(student / 2, 1)).sum(1).mean()
    assert torch.allclose(kd, torch.autograd.grad(ce, student)[0])


@pytest.mark.parametrize("flag, weight", [("dynamic", 4 / 6), ("0.3", 0.3), ("0", 0.0)])
def test_loss_is_the_weighted_sum(flag, weight):
    trainer = make_trainer("--lambda_kd", flag, "--smooth=0.1")
    trainer.model.fc.expand(4)
    trainer.teacher, trainer.known_classes = utils.frozen_copy(trainer.model, trainer.args), 4
    trainer.model.fc.expand(2)
    trainer.model.eval()
    for parameter in trainer.model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    trainer.parallel_model = trainer.model
    images, targets = torch.randn(5, 3, 8, 8), torch.tensor([0, 5, 4, 3, 1])
    loss, logits = trainer.compute_loss(images, targets)
    z, old = logits.detach().double().numpy(), trainer.teacher(images)[0].double().numpy()
    logs = np.log(softmax(z))
    ce = -(0.9 * logs[range(5), targets] + 0.1 * logs.mean(axis=1)).mean()
    p, q = softmax(old / 2), softmax(z[:, :4] / 2)
    kd = (p * np.log(p / q)).sum(axis=1).mean()
    assert loss.item() == pytest.approx((1 - weight) * ce + weight * kd, rel=1e-5)
    trainer.teacher, trainer.known_classes = None, 0  # the first task: the labels alone
    assert trainer.compute_loss(images, targets)[0].item() == pytest.approx(ce, rel=1e-5)


# ---- memory --------------------------------------------------------------------------------

def brute_force_herding(features, m):
    """Algorithm 4 of iCaRL word by word: try every image, keep the one that fits best."""
    x = features / np.linalg.norm(features, axis=1, keepdims=True)
    mean, chosen = x.mean(axis=0), []
    for k in range(1, min(m, len(x)) + 1):
        best, best_distance = None, math.inf
        for i in range(len(x)):
            if i not in chosen:
                picked = sum((x[j] for j in chosen), np.zeros(x.shape[1])) + x[i]
                distance = np.linalg.norm(mean - picked / k)
                if distance < best_distance:
                    best, best_distance = i, distance
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("seed, n, m", [(0, 40, 40), (1, 100, 20), (2, 7, 12), (3, 1, 1)])
def test_herding_against_brute_force(seed, n, m):
    features = np.random.RandomState(seed).randn(n, 8)
    order = template.herding(torch.tensor(features), m)
    assert order == brute_force_herding(features, m)
    assert len(set(order)) == min(m, n)
    assert template.herding(torch.tensor(features), m // 2) == order[:m // 2]  # a prefix


@pytest.mark.parametrize("method", ["barycenter", "cluster", "entropy", "first", "random"])
@pytest.mark.parametrize("fixed", [False, True])
def test_memory_never_exceeds_its_size(method, fixed):
    trainer = make_trainer("--memory_size=33", f"--herding_method={method}", *["--fixed_memory"] * fixed)
    scenario, _ = utils.build_scenarios(trainer.args)
    assert scenario.increments == [4, 2, 2, 2]
    before = []
    for task, trainer.nb_new in enumerate([4, 2, 2, 2]):
        new_data = scenario.images(task)
        trainer.expand_model(trainer.nb_new, new_data)
        trainer.update_memory(new_data)
        seen = trainer.known_classes + trainer.nb_new
        quota = 33 // 10 if fixed else 33 // seen
        assert [len(images) for images in trainer.exemplars] == [quota] * seen
        assert sum(map(len, trainer.exemplars)) <= 33
        for label, images in enumerate(trainer.exemplars):
            assert (images.y == label).all()
            assert len(set(images.rows)) == quota  # no image twice
            if method == "first" and label >= trainer.known_classes:
                assert np.array_equal(images.rows, new_data.rows[new_data.y == label][:quota])
        for old, now in zip(before, trainer.exemplars):  # the most important ones stay, in order
            assert np.array_equal(old.rows[:quota], now.rows)
        before, trainer.known_classes = list(trainer.exemplars), seen
    trainer.known_classes, trainer.nb_new = 8, 2  # chosen once a task, also if asked again
    trainer.update_memory(new_data)
    assert len(trainer.exemplars) == 10
    assert all(np.array_equal(a.rows, b.rows) for a, b in zip(before, trainer.exemplars))


@pytest.mark.parametrize("method", ["barycenter", "cluster", "entropy"])
def test_exemplars_against_their_formula(method):
    trainer = make_trainer(f"--herding_method={method}")
    new_data = utils.build_scenarios(trainer.args)[0].images(0)
    trainer.model.fc.expand(4)
    for label, images in enumerate(utils.select_exemplars(trainer, new_data, 5, template.herding)):
        own = new_data.select(new_data.y == label)
        with torch.no_grad():
            logits, features = (x.double().numpy() for x in trainer.model.eval()(clean(own)))
        if method == "barycenter":
            best = brute_force_herding(features, 5)
        elif method == "cluster":
            best = np.linalg.norm(features - features.mean(axis=0), axis=1).argsort(kind="stable")[:5]
        else:
            p = softmax(logits)
            best = (p * np.log(p)).sum(axis=1).argsort(kind="stable")[:5]
        assert np.array_equal(images.rows, own.rows[best])


def test_exemplars_of_each_class_in_both_kinds_of_memory(monkeypatch):
    """2,000 images, ten tasks of ten classes: never above the budget. Some codes divide and round up,
    which is one image of a class more, and up to 70 in all."""
    monkeypatch.setattr(utils, "select_exemplars", lambda trainer, data, m, herding: [
        data.select(np.flatnonzero(data.y == c)[:m]) for c in np.unique(data.y)])
    for fixed in (False, True):
        trainer = make_trainer("--memory_size=2000", *["--fixed_memory"] * fixed, increments=[10] * 10)
        trainer.nb_new, counts = 10, []
        for trainer.known_classes in range(0, 100, 10):
            y = np.repeat(np.arange(trainer.known_classes, trainer.known_classes + 10), 250)
            trainer.update_memory(utils.ImageSet(np.zeros((2500, 1, 1, 3), np.uint8), y, trainer.args))
            sizes = {len(images) for images in trainer.exemplars}
            assert len(sizes) == 1 and len(trainer.exemplars) == trainer.known_classes + 10
            counts.append(sizes.pop())
        if fixed:
            assert counts == [20] * 10
        else:
            assert counts == [200, 100, 66, 50, 40, 33, 28, 25, 22, 20]
            assert all(0 <= math.ceil(2000 / n) - m <= 1 for n, m in zip(range(10, 101, 10), counts))


def test_no_memory():
    trainer = make_trainer("--memory_size=0")
    trainer.nb_new = 4
    trainer.expand_model(4, None)
    trainer.update_memory(utils.build_scenarios(trainer.args)[0].images(0))
    assert trainer.exemplars == []


# ---- metrics -------------------------------------------------------------------------------

def test_forgetting_of_hand_computed_matrices():
    assert utils.forgetting([[90.0]]) == 0
    assert utils.forgetting([[90.0], [60.0, 80.0]]) == pytest.approx(30)
    # task 1 fell from 90 to 50, task 2 from 80 to 60
    assert utils.forgetting([[90.0], [60.0, 80.0], [50.0, 60.0, 90.0]]) == pytest.approx(30)
    # the best is not the first, and a rise counts as negative forgetting
    assert utils.forgetting([[40.0], [70.0, 50.0], [60.0, 55.0, 9.0]]) == pytest.approx((10 - 5) / 2)


def test_evaluation_against_scikit_learn():
    increments, draw = [4, 2, 2, 2], np.random.RandomState(0)
    trainer = make_trainer(increments=increments)
    _, trainer.run.test_scenario = utils.build_scenarios(trainer.args)
    trainer.task = 2
    test_set = trainer.run.test_scenario.images(slice(0, 3))
    scores = draw.randn(len(test_set), 8) + 1.5 * np.eye(8)[test_set.y]
    served = iter(torch.tensor(scores).split(500))
    trainer.predict = lambda images: next(served)
    trainer.model.train()  # as the last epoch leaves it
    result = utils.evaluate(trainer)
    assert not any(module.training for module in trainer.model.modules())
    prediction = scores.argmax(axis=1)
    assert result["confusion"] == confusion_matrix(test_set.y, prediction).tolist()
    assert result["acc1"] == pytest.approx(100 * (prediction == test_set.y).mean())
    assert result["acc5"] == pytest.approx(100 * top_k_accuracy_score(test_set.y, scores, k=5))
    borders = [0, 4, 6, 8]
    for u, (low, high) in enumerate(zip(borders, borders[1:])):
        mine = (test_set.y >= low) & (test_set.y < high)
        assert result["accuracy"][u] == pytest.approx(
            100 * (prediction[mine] == test_set.y[mine]).mean())
        aware = scores[mine][:, low:high].argmax(axis=1) + low
        assert result["task_aware"][u] == pytest.approx(100 * (aware == test_set.y[mine]).mean())
        so_far = test_set.y < high
        answers = scores[so_far][:, :high].argmax(axis=1)
        assert result["cumulative"][u] == pytest.approx(100 * (answers == test_set.y[so_far]).mean())
    task_of = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    assert result["task_inference"] == pytest.approx(
        100 * (task_of[prediction] == task_of[test_set.y]).mean())
    assert result["cumulative"][-1] == result["acc1"] <= result["task_inference"]


def test_classes_to_come_can_compete():
    """A method may give them scores, too: then an answer among them is wrong for every image."""
    trainer = make_trainer(increments=[4, 2, 4])
    _, trainer.run.test_scenario = utils.build_scenarios(
        make_args("--num_bases=4", "--increment=2"))  # the tasks 0 and 1 are the same
    trainer.task = 1
    y = trainer.run.test_scenario.images(slice(0, 2)).y
    scores = 2.0 * np.eye(10)[y]
    scores[:7, 9] = 3
    served = iter(torch.tensor(scores).split(500))
    trainer.predict = lambda images: next(served)
    result = utils.evaluate(trainer)
    assert result["acc1"] == pytest.approx(100 * (1 - 7 / len(y)))
    assert result["task_inference"] == result["acc1"] and result["task_aware"] == [100, 100]
    assert result["cumulative"] == [100, 100] and result["acc5"] == 100
    confusion = np.array(result["confusion"])
    assert confusion.shape == (6, 10) and confusion.sum() == len(y) and confusion[:, 9].sum() == 7


# ---- data ----------------------------------------------------------------------------------

def test_digits_are_split_once_and_for_all():
    (train_x, train_y), (test_x, test_y) = utils.load_digits()
    assert len(train_y) + len(test_y) == 1797 and train_x.shape[1:] == (8, 8, 3)
    assert (np.bincount(test_y) >= 43).all()
    assert zlib.crc32(np.ascontiguousarray(test_x).tobytes()) == 4002014113
    mean, std = train_x.mean() / 255, train_x.std() / 255
    assert utils.STATISTICS["digits"][0][0] == pytest.approx(mean, abs=0.002)
    assert utils.STATISTICS["digits"][1][0] == pytest.approx(std, abs=0.002)


@pytest.mark.parametrize("bases, increment, expected", [
    (4, 2, [4, 2, 2, 2]), (0, 5, [5, 5]), (0, 3, [3, 3, 3, 1]), (7, 2, [7, 2, 1]), (10, 1, [10])])
def test_increments(bases, increment, expected):
    args = make_args(f"--num_bases={bases}", f"--increment={increment}")
    train, test = utils.build_scenarios(args)
    assert train.increments == test.increments == expected
    for t, size in enumerate(expected):
        low = sum(expected[:t])
        for scenario in (train, test):
            assert sorted(set(scenario.images(t).y)) == list(range(low, low + size))
            # as continuum itself relabels
            assert np.array_equal(scenario.images(t).y, scenario.tasks[t].get_raw_samples()[1])


def test_class_order(tmp_path):
    args = make_args()
    assert utils.get_class_order(args, 100)[:10] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]
    args.class_order = "seed"
    orders = []
    for args.seed in (0, 1, 0):
        orders.append(utils.get_class_order(args, 100))
    assert orders[0] == orders[2] != orders[1]
    args.class_order = "natural"
    assert utils.get_class_order(args, 5) == [0, 1, 2, 3, 4]
    file = tmp_path / "order.json"
    file.write_text(json.dumps([3, 1, 4, 0, 5, 9, 2, 6, 8, 7]))
    args.class_order = str(file)
    train, _ = utils.build_scenarios(args)
    (images, labels), _ = utils.load_digits()
    taskset = train.images(0)  # labels are positions in the order
    assert np.array_equal(taskset.x[taskset.y == 0], images[labels == 3])
    assert train.class_names == list("3140592687")


@pytest.mark.parametrize("size, crop, whole", [
    (32, None, True), (32, "shift", True), (32, "zoom", False), (96, None, False), (96, "shift", True)])
def test_crops(size, crop, whole):
    """A picture whose red counts rows: after a shift most rows are still there, after a zoom few."""
    flags = ["--data_set=cifar100", f"--input_size={size}", "--aa=none"] + [f"--crop={crop}"] * bool(crop)
    args = make_args(*flags, "--backbone=resnet20")
    picture = np.zeros((1, size, size, 3), np.uint8)
    picture[0, :, :, 0] = (np.arange(size) * 255 // size)[:, None]
    images, spans = utils.ImageSet(picture, np.array([0]), args), []
    mean, std, _ = utils.get_statistics(args)
    for seed in range(60):
        image = images[0, seed][0]
        assert image.shape == (3, size, size)
        red = image[0] * std[0] + mean[0]
        spans.append(float(red.max() - red.min()))
    assert min(spans) > 0.8 if whole else min(spans) < 0.7
    clean = images[0, None][0][0] * std[0] + mean[0]
    assert clean.shape == (size, size) and float(clean.max() - clean.min()) > 0.8  # a test image is whole


@pytest.mark.parametrize("share", [0.5, 0.875, 1])
def test_a_test_image_of_many_pixels_keeps_this_share_of_its_side(share):
    args = make_args("--data_set=cifar100", "--input_size=96", "--aa=none", f"--crop_pct={share}")
    picture = np.zeros((1, 32, 32, 3), np.uint8)
    picture[0, :, :, 0] = (np.arange(32) * 8)[:, None]
    mean, std, _ = utils.get_statistics(args)
    red = utils.ImageSet(picture, np.array([0]), args)[0, None][0][0] * std[0] + mean[0]
    assert red.shape == (96, 96)
    assert float(red.max() - red.min()) == pytest.approx(share * 31 * 8 / 255, abs=0.06)


def random_images(args, n, size=32):
    draw = np.random.RandomState(0)
    return utils.ImageSet(draw.randint(0, 256, (n, size, size, 3)).astype(np.uint8), np.arange(n), args)


def clean(images):
    return torch.cat([x for x, _ in utils.clean_batches(images, images.args)])


@pytest.mark.parametrize("data_set, size", [("cifar100", 32), ("digits", 8)])
def test_a_batch_is_torchvisions_pad_crop_and_flip_to_the_bit(data_set, size):
    args = make_args(f"--data_set={data_set}", "--aa=none", "--batch_size=30")
    images, margin = random_images(args, 100, size), size // 8
    loader = utils.train_loader(images, args)
    loader.sampler.seed = 7
    rows, seeds = loader.sampler.draw()
    mean, std, mirror = utils.get_statistics(args)
    to_tensor = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    done, flips = 0, 0
    for batch, targets in loader:
        assert batch.shape == (30, 3, size, size) and batch.dtype == torch.float32
        assert batch.is_contiguous(memory_format=torch.channels_last)
        for image, target in zip(batch, targets):
            row, seed = int(rows[done]), int(seeds[done])
            top, left = seed % (2 * margin + 1), seed // (2 * margin + 1) % (2 * margin + 1)
            picture = functional.pad(Image.fromarray(images.x[row].numpy()), margin)
            picture = functional.crop(picture, top, left, size, size)
            if mirror and seed // (2 * margin + 1) ** 2 % 2:
                picture, flips = functional.hflip(picture), flips + 1
            assert torch.equal(image, to_tensor(picture)) and target == row
            done += 1
    assert done == 90 and (30 < flips < 60 if mirror else flips == 0)


def test_every_shift_and_flip_is_as_likely_as_any_other():
    args = make_args("--data_set=cifar100", "--aa=none")
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    pixels[0, 16, 16] = 255
    images = utils.ImageSet(np.repeat(pixels, 20_000, axis=0), np.zeros(20_000, int), args)
    places = torch.zeros(32, 32)
    for batch, _ in utils.train_loader(images, args):
        places += (batch[:, 0] > 0).sum(dim=0)
    assert (places > 0).sum() == 9 * 10  # 9 columns from the middle, 9 from one beside it
    assert places.sum() == 19_968 and places.max() < 19_968 / 81 * 1.4


def pictures(images, args, **options):
    """The global batches of an epoch, whatever the number of processes: their images, in order."""
    found = []
    for args.rank in range(args.world_size):
        loader = utils.train_loader(images, args, **options)
        loader.sampler.seed = 11
        found.append([(x, y) for x, y in utils.to_device(loader, args)])
        assert len(loader) == len(found[-1])
    args.rank = 0
    return [tuple(torch.stack(parts, dim=1).flatten(0, 1) for parts in zip(*batch))
            for batch in zip(*found)]


@pytest.mark.parametrize("size", [96, 101])
@pytest.mark.parametrize("flags", [["--aa=none"], ["--aa=none", "--reprob=0.5", "--num_workers=0"]])
def test_every_number_of_processes_sees_the_same_pictures_to_the_pixel(size, flags):
    args = make_args("--data_set=cifar100", "--batch_size=24", *flags)
    images, seen = random_images(args, size), {}
    for args.world_size in (1, 2, 3, 4, 8):
        seen[args.world_size] = pictures(images, args)
    assert len(seen[1]) == 4 and len({int(y) for _, ys in seen[1] for y in ys}) == 96
    for world_size in (2, 3, 4, 8):
        for (x, y), (x2, y2) in zip(seen[1], seen[world_size]):
            assert torch.equal(x, x2) and torch.equal(y, y2)


@pytest.mark.parametrize("flags", [["--aa=none"], ["--aa=none", "--reprob=0.5", "--num_workers=0"]])
def test_a_sampler_of_ones_own(flags):
    """An image that it draws twice is augmented twice, and the ranks share the draws."""
    args = make_args("--data_set=cifar100", "--batch_size=24", *flags)
    images = random_images(args, 100)
    sampler = torch.utils.data.WeightedRandomSampler([1.0] + [0.01] * 99, 48)
    (one, y), (_, more) = pictures(images, args, sampler=sampler)
    zeros = one[y == 0]
    assert len(zeros) > 5 and len(torch.unique(zeros, dim=0)) > len(zeros) / 2
    args.world_size = 3
    (again, y2), _ = pictures(images, args, sampler=sampler)
    assert torch.equal(one, again) and torch.equal(y, y2) and len(more) == 24


class Drawn:
    """A sampler that asks this function for its numbers."""

    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return 100

    def __iter__(self):
        return iter(self.draw(100))


@pytest.mark.parametrize("draw", [np.random.permutation, lambda n: random.sample(range(n), n)])
def test_a_sampler_may_draw_from_numpy_and_python(draw):
    args = make_args("--data_set=cifar100", "--aa=none", "--batch_size=25")
    images = random_images(args, 100)
    np.random.seed(4), random.seed(4)
    expected = np.random.rand(), random.random()
    np.random.seed(4), random.seed(4)
    one = pictures(images, args, sampler=Drawn(draw))
    assert (np.random.rand(), random.random()) == expected  # other draws do not notice
    args.world_size = 5
    for (x, y), (x2, y2) in zip(one, pictures(images, args, sampler=Drawn(draw)), strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    assert len({int(label) for _, y in one for label in y}) == 100


def test_a_sampler_of_batches_is_refused(capsys):
    args = make_args("--data_set=cifar100", "--aa=none", "--batch_size=25")
    sampler = Drawn(lambda n: [[i, i + 1] for i in range(n)])
    with pytest.raises(SystemExit):
        pictures(random_images(args, 101), args, sampler=sampler)
    assert "no batches of them" in capsys.readouterr().err


def test_augmentation_depends_on_the_seed_alone():
    args = make_args("--data_set=cifar100", "--reprob=0.5", "--batch_size=8")
    images, batches, drawn = random_images(args, 40), {}, {}
    for args.num_workers in (0, 2):
        loader = utils.train_loader(images, args)
        loader.sampler.seed = 5
        torch.manual_seed(args.num_workers)
        batches[args.num_workers] = list(loader)
        utils.set_seed(args)  # what a method draws does not depend on the workers either
        drawn[args.num_workers] = [(random.random(), np.random.rand(), torch.rand(()).item())
                                   for _ in loader]
    for (x, y), (x2, y2) in zip(batches[0], batches[2]):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    assert drawn[0] == drawn[2] and len(set(drawn[0])) == 5
    assert torch.equal(images[3, 7][0], images[3, 7][0])
    assert not torch.equal(images[3, 7][0], images[3, 8][0])
    assert not torch.equal(images[3][0], images[3][0])  # a plain index: any augmentation
    assert torch.equal(images[3, None][0], images[3, None][0])  # the clean image
    torch.testing.assert_close(clean(images)[3], images[3, None][0], rtol=0, atol=0)


@pytest.mark.parametrize("aa", [
    "rand-m1", "rand-m2-mstd0.5", "rand-m9-mstd0.5", "rand-m9-mstd101", "rand-inc1", "rand-m15-inc1",
    "rand-m9-inc1", "rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5-inc1-mmax9", "rand-m9-mstd101-inc1", "v0",
    "v0r", "original", "3a", "augmix-m10", "augmix-m11", "none"])
def test_augmentations_that_fail_on_some_images_are_found(aa):
    """Pillow 13 refuses to posterize to 0 bits; compared with what Pillow is asked for."""
    args = make_args("--data_set=cifar100", "--aa=none")
    args.aa, asked = aa, []

    def posterize(image, bits):
        asked.append(bits)
        if not bits:
            raise ValueError("bits must be between 1 and 8")
        return image

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("PIL.ImageOps.posterize", posterize)
        try:
            utils.try_transform(args)
            found = False
        except ValueError:
            found = True
        utils.set_seed(args, 1)  # other draws, which shall not find more
        step = utils.build_transform(args, train=True).transforms[2]
        for _ in range(1500 * (aa != "none")):
            try:
                step(Image.new("RGB", (32, 32)))
            except ValueError:
                assert found
    assert found == (0 in asked) and bool(asked) == (aa not in ("none", "3a"))


def test_loading_leaves_the_generator_of_dropout_alone():
    images = random_images(make_args("--data_set=cifar100", "--aa=none", "--batch_size=2"), 4)
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    images[0, 1], images[2, 9], images[1, None]
    assert len(list(utils.train_loader(images, images.args))) == 2
    assert torch.equal(torch.rand(5), expected)


def test_images_of_a_folder_are_read_once_if_they_are_small(image_folder, monkeypatch):
    folder = image_folder(size=20)  # not the size that is asked for
    wide = np.random.RandomState(3).randint(0, 256, (20, 31, 3)).astype(np.uint8)
    for label in ("red", "green", "blue", "grey"):
        Image.fromarray(wide).save(folder / "train" / label / "0.png")
    flags = ["--data_set=image_folder", f"--data_path={folder}", "--input_size=16", "--aa=none",
             "--backbone=resnet20", "--num_bases=2", "--increment=1", "--batch_size=4", "--memory_size=0",
             "--num_workers=0"]
    train, _ = utils.build_scenarios(make_args(*flags))
    images = train.images(0)
    assert images.x.shape == (24, 16, 16, 3) and images.x.dtype == torch.uint8
    assert [Path(train.files[row]).parent.name for row in images.rows[[0, -1]]] == train.class_names[:2]
    assert isinstance(utils.train_loader(images, images.args), utils.BatchLoader)
    monkeypatch.setattr(utils, "MEMORY_LIMIT", 60 * 16 * 16 * 3 - 1)  # one byte too few
    train, _ = utils.build_scenarios(make_args(*flags))
    on_disk = train.images(0)
    assert on_disk.x.shape == (24,) and not on_disk.in_memory()
    assert isinstance(utils.train_loader(on_disk, images.args), torch.utils.data.DataLoader)
    assert torch.equal(clean(images), clean(on_disk))


def test_the_hundred_classes_of_imagenet100(tmp_path):
    for split in ("train", "test"):
        for c in range(1000):
            (tmp_path / split / f"{c:03}").mkdir(parents=True)
            (tmp_path / split / f"{c:03}/x.png").touch()
    args = SimpleNamespace(data_set="imagenet100", data_path=str(tmp_path))
    splits, names = utils.load_folder(args)
    # The field's choice, and 100 of them a class number each, in the order of their names.
    chosen = sorted(np.random.RandomState(1993).choice(1000, 100, replace=False))
    assert names == [f"{c:03}" for c in chosen]
    for files, labels in splits:
        assert labels.tolist() == list(range(100))
        assert [Path(file).parent.name for file in files] == names


def test_transforms_of_small_images():
    white = np.full((1, 32, 32, 3), 255, np.uint8)
    args = make_args("--data_set=cifar100", "--aa=none")
    mean, std, _ = utils.STATISTICS["cifar100"]
    images = utils.ImageSet(white, np.array([0]), args)
    for image in (images[0, None][0], clean(images)[0]):
        for channel in range(3):
            assert image[channel].unique().item() == pytest.approx((1 - mean[channel]) / std[channel], 1e-5)
    names = [type(t).__name__ for t in utils.build_transform(args, train=True).transforms]
    assert names[:4] == ["Resize", "CenterCrop", "RandomCrop", "RandomHorizontalFlip"]
    assert utils.build_transform(args, train=True).transforms[2].padding == 4
    digits = [type(t).__name__ for t in utils.build_transform(make_args(), train=True).transforms]
    assert "RandomHorizontalFlip" not in digits and "RandomCrop" in digits
    erased = make_args("--data_set=cifar100", "--reprob=0.25")
    names = [type(t).__name__ for t in utils.build_transform(erased, train=True).transforms]
    assert names.count("Normalize") == 1 and names[-1] == "RandomErasing"


def test_the_default_augmentation_fails_on_no_image():
    args = make_args("--data_set=cifar100")
    images = random_images(args, 100)
    for seed in range(4000):
        images[seed % 100, seed]


def test_the_loading_workers_use_the_cores_that_there_are(monkeypatch):
    monkeypatch.setattr(utils, "available_cores", lambda: 64)
    assert make_args("--data_set=cifar100").num_workers == 32
    assert make_args("--data_set=digits").num_workers == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert make_args("--data_set=cifar100").num_workers == 16


def test_ddp_is_told_the_gpu_that_the_model_is_on(monkeypatch):
    """srun may let each process see its own GPU only, which is number 0 for all of them."""
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model, **options: options)
    args = SimpleNamespace(distributed=True, device=torch.device("cuda", 0), local_rank=3)
    assert utils.distribute(None, args)["device_ids"] == [args.device]


def test_a_first_step_that_overflows_under_fp16_leaves_no_trace():
    """GradScaler skips it; the momentum begins with the next step, as if it had not been."""
    weights = {}
    for first in ([math.inf, 1.0], []):
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = utils.SGD([weight], 0.1, make_args("--amp=fp16"))
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        for gradient in [first, [1.0, 2.0], [1.0, 2.0]] if first else [[1.0, 2.0], [1.0, 2.0]]:
            utils.step((weight * torch.tensor(gradient)).sum(), optimizer, scaler)
        weights[bool(first)] = weight.detach()
    torch.testing.assert_close(weights[True], weights[False])
    assert optimizer.defaults["fused"] is None  # then torch takes its second fastest form on a GPU
    assert utils.SGD([weight], 0.1, make_args()).defaults["fused"] is True


def test_fewer_images_than_ranks():
    args = make_args("--batch_size=12")
    images = random_images(args, 3, 8)
    args.world_size, seen = 4, []
    for args.rank in range(4):
        for _, targets in utils.clean_batches(images, args):
            assert len(targets)
            seen += targets.tolist()
    assert sorted(seen) == [0, 1, 2]


@pytest.mark.parametrize("amp", ["bf16", "none"])
def test_an_epoch_in_mixed_precision_moves_weights_in_float32(amp):
    trainer, seen = make_trainer(f"--amp={amp}"), []
    trainer.task = trainer.stage = trainer.epoch = 0
    trainer.model.fc.expand(4)
    trainer.parallel_model, compute_loss = trainer.model, trainer.compute_loss

    def watched(images, targets):
        loss, logits = compute_loss(images, targets)
        seen.append(logits.dtype)
        return loss, logits

    trainer.compute_loss = watched
    before = [p.detach().clone() for p in trainer.model.parameters()]
    loader = trainer.make_loader(utils.build_scenarios(trainer.args)[0].images(0))
    loader.sampler.seed = 0
    optimizer, _ = trainer.make_optimizer(trainer.model.parameters(), 1, 0.1)
    trainer.train_epoch(loader, optimizer)
    assert set(seen) == {torch.bfloat16 if amp == "bf16" else torch.float32}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert not any(torch.equal(x, y) for x, y in zip(before, trainer.model.parameters()))


def test_an_epoch_has_one_order_for_all_ranks_and_dropout_for_each():
    drawn = {}
    for rank in (0, 1):
        trainer = SimpleNamespace(args=make_args(), task=1, stage=0, epoch=3)
        trainer.args.rank = rank
        drawn[rank] = utils.seed_epoch(trainer), torch.rand(1).item()
    assert drawn[0][0] == drawn[1][0] and drawn[0][1] != drawn[1][1]


# ---- the whole loop ------------------------------------------------------------------------

class Watched(template.CilTrainer):
    """Looks at what each task begins and ends with."""

    def state(self, model):
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def train_task(self, train_set):
        counts = np.bincount(train_set.y, minlength=self.known_classes + self.nb_new)
        assert counts[:self.known_classes].tolist() == [len(images) for images in self.exemplars]
        new = self.run.scenario.images(self.task)
        assert np.array_equal(counts[self.known_classes:], np.bincount(new.y)[self.known_classes:])
        before, teacher = self.state(self.model), self.teacher and self.state(self.teacher)
        super().train_task(train_set)
        after = self.state(self.model)
        assert not any(torch.equal(before[name], after[name]) for name in before
                       if name.endswith(("weight", "running_var")))
        if self.task:  # it is the model at the end of the task before, and learns nothing
            for now in (teacher, self.state(self.teacher)):
                assert now.keys() == self.end.keys()
                assert all(torch.equal(now[name], self.end[name]) for name in now)

    def finish_task(self):
        assert len(self.exemplars) == self.known_classes + self.nb_new
        super().finish_task()
        self.end = self.state(self.model)


def test_each_task_learns_from_what_it_should_and_the_teacher_stays(tmp_path):
    flags = [*SHORT, "--num_epochs=12", "--device=cpu", f"--output_dir={tmp_path / 'run'}"]
    template.main(utils.get_parser().parse_args(flags), Watched)
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["acc1s"][0] > 90 and results["last_accuracy"] > 50
    assert len(results["gammas"]) == 2 and max(results["gammas"]) < 1


# ---- size and shape of the code ------------------------------------------------------------

def lines_of_code(path):
    """(lines of code, comment lines, docstring lines): no blank line counts."""
    source = path.read_text()
    documentation, code, comments = set(), set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            documentation |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
                                tokenize.ENDMARKER):
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - documentation), len(comments), len(documentation)


def test_size_and_comments_of_the_template():
    code, comments, documentation = lines_of_code(ROOT / "template.py")
    assert code <= 115
    assert 0.5 <= comments / code and (comments + documentation) / code <= 0.8
    for file in ("template.py", "utils.py", "resnet.py"):
        assert max(map(len, (ROOT / file).read_text().splitlines())) <= 100, file
    assert f"in {code} commented lines of code" in (ROOT / "README.md").read_text()
    utils_code = lines_of_code(ROOT / "utils.py")[0]
    assert f"about {round(utils_code, -1)} lines of code" in (ROOT / "README.md").read_text()


def test_the_template_is_complete_and_names_no_other_method():
    source = (ROOT / "template.py").read_text()
    tree = ast.parse(source)
    modules = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
               for alias in node.names}
    modules |= {node.module.split(".")[0] for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom)}
    assert modules <= {"copy", "torch", "timm", "continuum", "utils", "resnet"}
    for name in ("iCaRL", "LUCIR", "PODNet", "AANet", "iTAML", "ALTA", "BAL_"):
        assert name.lower() not in source.lower()
    trainer = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "CilTrainer")
    steps = [n for n in trainer.body if isinstance(n, ast.FunctionDef)]
    assert {n.name for n in steps} == {
        "__init__", "expand_model", "train_task", "fit", "make_loader", "make_optimizer", "train_epoch",
        "compute_loss", "update_memory", "finish_task", "predict"}
    for node in ast.walk(tree):  # plain loops: over a name, not over an attribute that they set
        assert not (isinstance(node, ast.For) and any(
            isinstance(part, ast.Attribute) for part in ast.walk(node.target)))
    for step in steps:  # a step does real work and says what
        assert ast.get_docstring(step) or step.name == "__init__"
        assert len(step.body) > 1 and not isinstance(step.body[-1], ast.Pass)


def test_digits_show_what_each_ingredient_does():
    """Over ten recorded seeds each step of WA adds more than a standard error."""
    from tutorial.tools.reproduce import load
    runs = [load(f"digits_{name}") for name in ("finetune", "replay", "replay_kd", "wa")]
    scores = np.array([[run["average_incremental_accuracy"] for run in method] for method in runs])
    assert scores.shape == (4, 10)
    errors = scores.std(axis=1, ddof=1) / np.sqrt(10)
    for less, more, e, e2 in zip(scores, scores[1:], errors, errors[1:]):
        assert more.mean() - less.mean() > max(e, e2)
    assert runs[3][0]["args"]["memory_size"] <= 50
    for method in runs:
        assert [run["args"]["seed"] for run in method] == list(range(10))


def test_the_output_in_the_readme_is_that_of_a_recorded_run():
    text = (ROOT / "README.md").read_text()
    run = json.loads((ROOT / "tutorial/results/digits_default_2processes.json").read_text())
    assert run["world_size"] == 2 and run["finished"]
    for t, (row, acc1) in enumerate(zip(run["accuracy_matrix"], run["acc1s"])):
        line = f"{t + 1:>10}" + "".join(f"{a:8.2f}" for a in row) + " " * 8 * (3 - t) + f"{acc1:8.2f}"
        assert line in text
    assert (f"average incremental accuracy {run['average_incremental_accuracy']:.2f} %, last "
            f"{run['last_accuracy']:.2f} %, forgetting {run['forgetting']:.2f} points, {run['seconds']:.0f} s") in text
