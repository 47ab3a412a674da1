"""Draws tutorial/img/ from tutorial/results/ alone.

    python -m tutorial.tools.figures                            # all pictures but two
    python -m tutorial.tools.figures --data_path DIR            # and the two that show CIFAR-100 images

DIR is CIFAR-100 as a folder of images.
"""
import argparse
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from tutorial.tools.reproduce import ROOT, load
from tutorial.tools.tables import (
    ABLATION, BLUE, CIFAR_MEMORIES, CIFAR_METHODS, GREEN, GREY, LOSSES, MEMORIES, ORANGE, PINK, RED,
    measured, poster)

IMAGES = ROOT / "tutorial/img"
matplotlib.rcParams.update({
    "font.size": 11, "figure.facecolor": "white", "axes.grid": True, "grid.alpha": 0.3,
    "axes.axisbelow": True, "savefig.dpi": 110})


# ---------------------------------------------------------------------------------------------
# Pictures of results
# ---------------------------------------------------------------------------------------------

def new_figure(width=7.0, height=4.2, columns=1, **options):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, **options)


def draw_curves(rows, title):
    """Accuracy on all classes so far after each task, a line for each (label, runs, colour, line
    style); the band is ± one standard deviation. Returns (figure, axes)."""
    figure, axes = new_figure()
    for label, runs, colour, style in rows:
        curves = np.array([run["acc1s"] for run in runs])
        classes = np.cumsum(runs[0]["increments"])
        mean, spread = curves.mean(axis=0), curves.std(axis=0, ddof=min(1, len(curves) - 1))
        axes.plot(classes, mean, "o" + style, color=colour, label=label)
        axes.fill_between(classes, mean - spread, mean + spread, color=colour, alpha=0.15, lw=0)
    axes.set(xlabel="classes learned so far", ylabel="test accuracy on all of them (%)", title=title)
    return figure, axes


def draw_ablation(data_set, title):
    """WA and its ablations."""
    rows = [(label, load(f"{data_set}_{name}"), colour, "-") for name, label, _, colour in ABLATION]
    rows = [row for row in rows if row[1]]  # CIFAR-100 has no run with alignment alone
    figure, axes = draw_curves(rows, title)
    axes.set(xticks=np.cumsum(rows[0][1][0]["increments"]), ylim=(0, 102))
    figure.legend(loc="outside lower center", ncols=3, fontsize=10)
    return figure


def draw_digits():
    return draw_ablation("digits", "Digits, 4 + 2 + 2 + 2 classes, 30 exemplars, 10 seeds")


def draw_cifar100():
    return draw_ablation("cifar100", "CIFAR-100, 50 + 5 x 10 classes, 2,000 exemplars, 20 epochs a task")


def draw_cifar100_methods():
    """Accuracy after each task, a line for each method."""
    figure, axes = new_figure(7, 4)
    for name, label, colour in CIFAR_METHODS:
        run = load(f"cifar100_{name}")[0]
        label += {"wa": " (2,000 exemplars from the start)", "podnet": " (its own network)"}.get(name, "")
        axes.plot(np.cumsum(run["increments"]), run["acc1s"], "o-", label=label, color=colour)
    axes.set(xlabel="classes learned", ylabel="test accuracy on all classes so far (%)", ylim=(0, 102),
             title="CIFAR-100, base 50, increment 10, 20 epochs a task, one seed")
    axes.legend(fontsize=9, loc="lower left")
    return figure


def draw_forgetting():
    """Finetuning: the accuracy on each task's test images falls to zero when the next one comes."""
    figure, both = new_figure(8, 4, 2, sharey=True)
    for axes, data_set, title in zip(both, ("digits", "cifar100"), ("digits", "CIFAR-100")):
        run = load(f"{data_set}_finetune")[0]
        rows = run["accuracy_matrix"]
        for u in range(len(rows)):
            axes.plot(range(u + 1, len(rows) + 1), [row[u] for row in rows[u:]], "o-",
                      label=f"images of task {u + 1}")
        axes.plot(range(1, len(rows) + 1), run["acc1s"], "ks--", lw=2, ms=5, label="all images")
        axes.set(xlabel="tasks learned", xticks=range(1, len(rows) + 1), ylim=(-3, 103),
                 title=f"{title}, finetuned")
    both[0].set_ylabel("test accuracy (%)")
    figure.legend(*both[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def draw_confusion():
    """What images of each class are taken for, after the last task; all seeds together."""
    figure, panels = new_figure(9, 3.6, 3, sharey=True)
    names = [("finetune", "finetune"), ("replay", "replay"), ("wa", "WA")]
    for axes, (name, title) in zip(panels, names):
        found = load(f"digits_{name}")
        counts = np.sum([run["confusion"] for run in found], axis=0)
        share = 100 * counts / counts.sum(axis=1, keepdims=True)
        image = axes.imshow(share, cmap="magma", vmin=0, vmax=100)
        for border in np.cumsum(found[0]["increments"])[:-1] - 0.5:
            axes.axhline(border, color="w", lw=0.7)
            axes.axvline(border, color="w", lw=0.7)
        axes.set(title=title, xlabel="predicted class", xticks=range(10), yticks=range(10))
        axes.set_xticklabels(found[0]["class_names"])
        axes.set_yticklabels(found[0]["class_names"])
        axes.grid(False)
    panels[0].set_ylabel("true class, in the order learned")
    figure.colorbar(image, ax=panels, label="percent of the true class", shrink=0.85)
    return figure


def draw_exemplars():
    """Left: the features of one class, flattened, and herding's first choices. Right: the distance
    of the mean of m exemplars to the class mean."""
    figure, (flat, error) = new_figure(9, 4.2, 2)
    found = measured("exemplars_digits")
    points, chosen = np.array(found["points"]), found["chosen"]["herding"]
    flat.scatter(*points.T, s=18, color=GREY, alpha=0.5, lw=0, label=f"image of a {found['class']}")
    flat.scatter(*points[chosen].T, s=26, color=GREEN, label="first ten of herding, in their order")
    # The numbers stand in a row above the points, from left to right as these do.
    (left, low), (right, high) = points.min(axis=0), points.max(axis=0)
    for place, k in zip(np.linspace(left, right, len(chosen)), np.argsort(points[chosen, 0])):
        flat.annotate(k + 1, points[chosen[k]], (place, high + 0.2 * (high - low)), fontsize=10, ha="center", color=GREEN,
                      weight="bold", arrowprops={"arrowstyle": "-", "color": GREEN, "lw": 0.8, "shrinkB": 2})
    flat.set_ylim(top=high + 0.27 * (high - low))
    flat.plot(*found["mean"], "k+", ms=13, mew=2, ls="", label="mean of the class")
    flat.set(xlabel="first principal component of the features", ylabel="second",
             title=f"digits: {100 * found['explained']:.0f} % of the variance is visible")
    flat.legend(fontsize=9, loc="lower right")
    found = measured("exemplars_cifar100")
    m = np.arange(1, 101)
    for name, colour, label in (("random", RED, "random"), ("cluster", ORANGE, "nearest to the mean"),
                                ("herding", GREEN, "herding")):
        error.plot(m, found["distance"][name][:100], color=colour, label=label)
    spread = np.array(found["random_std"][:100])
    middle = np.array(found["distance"]["random"][:100])
    error.fill_between(m, middle - spread, middle + spread, color=RED, alpha=0.15, lw=0)
    error.set(xlabel="number of exemplars m", ylabel="distance to the class mean", ylim=(0, None),
              title=f"CIFAR-100: a class of {found['images']} images")
    error.legend(fontsize=9)
    return figure


def draw_norms():
    """Lengths of the prototypes before and after the last alignment."""
    figure, both = new_figure(9, 4, 2)
    for axes, data_set, title in zip(both, ("digits", "cifar100"), ("digits", "CIFAR-100")):
        found = measured(f"norms_{data_set}")
        before, after, nb_new = map(np.array, (found["before"], found["after"], found["nb_new"]))
        classes, old = np.arange(1, len(before) + 1), len(before) - nb_new
        axes.bar(classes[:old], before[:old], color=BLUE, label="old classes")
        axes.bar(classes[old:], before[old:], color=ORANGE, label="new classes, before")
        axes.bar(classes[old:], after[old:], color=GREEN, label="new classes, aligned")
        axes.axhline(before[:old].mean(), color="k", ls="--", lw=1.2, label="mean of the old")
        axes.set(xlabel="class, in the order learned", ylabel="length of the prototype, |w|",
                 title=f"{title}, last task: γ = {found['gamma']:.2f}")
        axes.grid(axis="x", visible=False)
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return figure


def draw_temperature():
    """One teacher's answer, softened."""
    logits = np.array([6.0, 4.0, 1.0, 0.0])
    figure, axes = new_figure(7, 3.4)
    for i, (T, colour) in enumerate(zip((1, 2, 4), (BLUE, GREEN, ORANGE))):
        soft = np.exp(logits / T) / np.exp(logits / T).sum()
        bars = axes.bar(np.arange(4) + 0.27 * (i - 1), 100 * soft, 0.25, color=colour, label=f"T = {T}")
        axes.bar_label(bars, fmt="%.0f", fontsize=9)
    axes.set(xticks=range(4), xticklabels=[f"logit {logit:.0f}" for logit in logits], ylim=(0, 100),
             ylabel="probability (%)", title="softmax(logits / T)")
    axes.grid(axis="x", visible=False)
    axes.legend()
    return figure


def draw_speed():
    """Images per second, one change at a time."""
    found = measured("speed")
    figure, axes = new_figure(7, 3)
    rows = found["compute"][::-1]
    bars = axes.barh([row["what"] for row in rows], [row["images_per_second"] for row in rows],
                     color=[GREEN, BLUE, ORANGE, GREY][:len(rows)])
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set(xlabel="images per second, compute alone", title="ResNet-32, batch 128, "
             f"{found['cores']} CPU cores")
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    return figure


# ---------------------------------------------------------------------------------------------
# Drawings of ideas
# ---------------------------------------------------------------------------------------------

def canvas(width, height):
    """Axes without axes, one unit an inch: draw(box / arrow / text) at (x, y)."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, height, text, colour=BLUE, size=10):
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.08",
                                  facecolor=colour + "22", edgecolor=colour, lw=1.6))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def arrow(axes, start, end, colour="#333333", text="", style="-|>", bend=0.0, above=0.12):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=14, color=colour, lw=1.6,
                                   connectionstyle=f"arc3,rad={bend}"))
    if text:
        axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + above, text, ha="center",
                  fontsize=9, color=colour)


def digit_samples():
    """Five images of each digit, (10, 5, 8, 8)."""
    from sklearn.datasets import load_digits
    data = load_digits()
    return np.stack([data.images[data.target == digit][:5] for digit in range(10)])


def put(axes, image, x, y, size, colour=None):
    """An image with its lower left corner at (x, y)."""
    axes.imshow(image, extent=(x, x + size, y, y + size), cmap="gray_r", interpolation="nearest")
    if colour:
        axes.add_patch(FancyBboxPatch((x, y), size, size, boxstyle="square,pad=0", fill=False,
                                      edgecolor=colour, lw=2))


def draw_stages():
    """Learn 1 and 2; then 3 and 4; then 5 and 6; test on all so far."""
    figure, axes = canvas(8, 4.1)
    samples = digit_samples()
    for x, title in ((0.95, "learn these"), (2.85, "exemplars kept"), (5.0, "tested on all so far")):
        axes.text(x, 3.78, title, fontsize=12, weight="bold")
    for stage in range(3):
        y = 2.7 - 1.25 * stage
        axes.text(0.1, y + 0.35, f"task {stage + 1}", fontsize=12, weight="bold")
        new = (2 * stage + 1, 2 * stage + 2)
        for i, digit in enumerate(new):
            for k in range(4):
                put(axes, samples[digit, k], 0.95 + 0.4 * k, y + 0.42 - 0.44 * i, 0.36, ORANGE)
        for i in range(2 * stage):
            put(axes, samples[i + 1, 0], 2.85 + 0.45 * i, y + 0.2, 0.38, GREEN)
        if stage == 0:
            axes.text(2.85, y + 0.33, "none yet", fontsize=10, color=GREY)
        for i in range(2 * stage + 2):
            put(axes, samples[i + 1, 3], 5.0 + 0.48 * i, y + 0.2, 0.42, BLUE)
    axes.set(xlim=(0, 8), ylim=(0, 4.1))
    return figure


def draw_loop():
    """One task: what goes in, what learns, and what is handed on to the next."""
    figure, axes = canvas(9, 4.3)
    box(axes, 0.1, 2.5, 1.75, 0.8, "new images\nof this task", ORANGE)
    box(axes, 0.1, 1.1, 1.75, 0.8, "exemplars\nof old classes", GREEN)
    box(axes, 2.35, 1.8, 1.35, 0.8, "training set", GREY)
    arrow(axes, (1.9, 2.8), (2.45, 2.65))
    arrow(axes, (1.9, 1.5), (2.45, 1.75))
    box(axes, 4.2, 3.15, 1.7, 0.8, "teacher: the model\nof the task before", GREY)
    box(axes, 4.2, 1.6, 1.7, 1.2, "model\none head more", BLUE)
    arrow(axes, (3.75, 2.2), (4.15, 2.2), text="CE", above=0.1)
    arrow(axes, (5.05, 3.1), (5.05, 2.85))
    axes.text(5.15, 2.92, "KD", fontsize=9, va="center")
    for number, (y, text, colour) in enumerate(((3.15, "choose exemplars", GREEN), (2.3, "align the new head", PINK),
                                               (1.45, "test on all classes", ORANGE)), 4):
        box(axes, 6.6, y, 2.15, 0.55, f"{number}. {text}", colour)
    arrow(axes, (5.95, 2.2), (6.5, 3.4))
    arrow(axes, (7.67, 3.1), (7.67, 2.9))
    arrow(axes, (7.67, 2.25), (7.67, 2.05))
    arrow(axes, (7.67, 1.4), (7.67, 1.05))
    box(axes, 6.6, 0.45, 2.15, 0.55, "7. become the teacher", GREY)
    arrow(axes, (6.55, 0.72), (1.0, 1.05), GREEN, bend=-0.14)
    axes.text(3.6, 0.12, "the next task gets the exemplars and the teacher", ha="center", fontsize=9, color=GREEN)
    axes.text(0.98, 3.45, "1.", ha="center", fontsize=9)
    axes.text(5.05, 1.42, "2. expand   3. train", ha="center", fontsize=9, va="center")
    axes.set(xlim=(0, 8.9), ylim=(0, 4.1))
    return figure


def draw_model():
    """A backbone, and a classifier that gets one more head with each task."""
    figure, axes = canvas(8, 3)
    put(axes, digit_samples()[3, 0], 0.15, 1.1, 0.8)
    axes.text(0.55, 0.75, "image x", ha="center", fontsize=10)
    axes.text(0.55, 0.5, "(batch, 3, H, W)", ha="center", fontsize=8)
    arrow(axes, (1.05, 1.5), (1.6, 1.5))
    box(axes, 1.65, 0.75, 1.7, 1.5, "backbone φ\n\nResNet\nor any of timm", BLUE)
    arrow(axes, (3.4, 1.5), (4.6, 1.5), text="features φ(x)")
    axes.text(4.0, 1.22, "(batch, 64)", ha="center", fontsize=8)
    for i, (rows, name) in enumerate(((4, "task 1"), (2, "task 2"), (2, "task 3"))):
        y = 2.15 - 0.85 * i
        box(axes, 4.7, y, 1.5, 0.62, f"head of {name}\n{rows} prototypes", (BLUE, BLUE, ORANGE)[i], 9)
        arrow(axes, (6.25, y + 0.31), (6.75, y + 0.31))
        axes.text(6.82, y + 0.25, f"{rows} logits", fontsize=9)
    axes.plot([7.6, 7.7, 7.7, 7.6], [2.75, 2.75, 0.5, 0.5], color="#333333", lw=1.4)
    axes.text(7.85, 1.62, "side by side", rotation=90, va="center", ha="center", fontsize=9)
    axes.text(5.45, 0.14, "expand() adds the next head", ha="center", fontsize=9, color=ORANGE)
    return figure


def draw_teacher():
    """Replay and distillation in one picture."""
    figure, axes = canvas(8, 3.6)
    box(axes, 0.1, 2.3, 1.7, 0.8, "new images\nmany", ORANGE)
    box(axes, 0.1, 0.6, 1.7, 0.8, "exemplars\nfew of each class", GREEN)
    arrow(axes, (1.85, 2.65), (2.75, 2.0))
    arrow(axes, (1.85, 1.0), (2.75, 1.65))
    axes.text(2.3, 1.8, "batch", ha="center", fontsize=9)
    box(axes, 2.8, 2.1, 1.8, 0.95, "student\nthe model in training", BLUE)
    box(axes, 2.8, 0.6, 1.8, 0.95, "teacher\nits frozen copy\nof the task before", GREY)
    arrow(axes, (4.65, 2.75), (6.0, 2.75), text="all logits")
    arrow(axes, (4.65, 2.3), (6.0, 1.55), text="old logits", above=0.18)
    arrow(axes, (4.65, 1.05), (6.0, 1.15), text="old logits", above=-0.25)
    box(axes, 6.05, 2.4, 1.8, 0.7, "cross-entropy\nwith the labels", RED)
    box(axes, 6.05, 1.0, 1.8, 0.75, "KL divergence\nat temperature T", PINK)
    axes.text(6.95, 0.45, "loss = (1 − λ) CE + λ KD", ha="center", fontsize=10, weight="bold")
    return figure


def draw_prototypes():
    """Long prototypes win: a feature between an old and a new class, before and after alignment."""
    figure, both = new_figure(8, 3.3, 2, sharex=True, sharey=True)
    feature, old = np.array([0.78, 0.92]), np.array([0.35, 1.15])
    new = np.array([1.75, 0.75])
    gamma = np.linalg.norm(old) / np.linalg.norm(new)
    for axes, scale, title in zip(both, (1, gamma), ("after training", f"aligned: γ = {gamma:.2f}")):
        for vector, colour, name in ((old, BLUE, "old class"), (scale * new, ORANGE, "new class")):
            axes.annotate("", vector, (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2.5})
            axes.text(*(vector + (0.05, 0.04)), f"{name}\nlogit {vector @ feature:.2f}", color=colour,
                      fontsize=10)
        axes.annotate("", feature, (0, 0), arrowprops={"arrowstyle": "-|>", "color": "k", "ls": "--"})
        axes.text(*(feature + (0.03, 0.03)), "φ(x)", fontsize=11)
        axes.set(xlim=(0, 2.5), ylim=(0, 1.6), title=title, xlabel="first feature", aspect="equal")
    both[0].set_ylabel("second feature")
    return figure


def draw_ddp():
    """Who holds what on three ranks."""
    figure, axes = canvas(8, 4.4)
    rows = [("the whole model, same weights", BLUE, 3.3), ("all exemplars, the same", GREEN, 2.6),
            ("{}", ORANGE, 1.9), ("gradients of that share", RED, 1.2)]
    for rank in range(3):
        x = 0.15 + 2.6 * rank
        axes.text(x + 1.2, 4.1, f"rank {rank}", ha="center", fontsize=12, weight="bold")
        for text, colour, y in rows:
            share = ("images 0, 3, 6, …", "images 1, 4, 7, …", "images 2, 5, 8, …")[rank]
            box(axes, x, y, 2.35, 0.52, text.format(share), colour)
        arrow(axes, (x + 1.17, 1.15), (x + 1.17, 0.78))
    box(axes, 0.15, 0.22, 7.55, 0.5, "all-reduce: the mean of the gradients, the same on every rank, so the "
        "same step", PINK)
    return figure


def draw_icarl():
    """Nearest mean of exemplars: on the unit circle an image belongs to the class whose mean is nearest."""
    figure, axes = new_figure(6, 4.6)
    angle, draw = np.radians(np.linspace(0, 90, 200)), np.random.RandomState(2)
    axes.plot(np.cos(angle), np.sin(angle), color=GREY, lw=1)
    test = np.array([np.cos(np.radians(33)), np.sin(np.radians(33))])
    for colour, degrees, name in ((BLUE, 72, "old class"), (GREEN, 45, "old class"), (ORANGE, 14, "new class")):
        around = np.radians(degrees + 5 * draw.randn(6))
        points = np.stack([np.cos(around), np.sin(around)], axis=1)
        star = points.mean(axis=0) / np.linalg.norm(points.mean(axis=0))
        axes.scatter(*points.T, color=colour, s=40, alpha=0.6, lw=0)
        axes.plot(*star, marker="*", color=colour, ms=20, mec="k", ls="")
        axes.text(*(1.09 * star - (0, 0.02)), f"{name}: cos {star @ test:.2f}", color=colour, fontsize=12)
        axes.plot(*np.stack([star, test]).T, "k:", lw=1.3)
    axes.annotate("", 0.57 * test, (0, 0), arrowprops={"arrowstyle": "-|>", "color": "k", "lw": 1.6})
    axes.plot(*np.stack([0.57 * test, test]).T, "k--", lw=1)
    axes.text(*(0.4 * test + (0.02, -0.1)), "features of a test image", fontsize=12)
    axes.plot(*test, "kX", ms=12)
    axes.set(xlabel="first feature", ylabel="second feature", xlim=(0, 1.62), ylim=(0, 1.15), aspect="equal",
             title="divided by their length: to the nearest star")
    return figure


def draw_lucir():
    """Cosines: prototypes on a circle, and the margin between an exemplar's class and new ones."""
    figure = Figure(figsize=(6, 6.6), layout="constrained")
    circle, line = figure.subplots(2, 1, height_ratios=(1.5, 1))
    own, rivals = 0.85, (0.60, 0.20)
    image = 80
    angle = np.radians(np.linspace(-2, 182, 200))
    circle.plot(np.cos(angle), np.sin(angle), color=GREY, lw=1)
    for cosine, side, colour, name in ((own, 1, BLUE, "own, old class"), (rivals[0], -1, ORANGE, "new class"),
                                       (rivals[1], -1, ORANGE, "new class")):
        at = np.radians(image + side * np.degrees(np.arccos(cosine)))
        end = np.array([np.cos(at), np.sin(at)])
        circle.annotate("", end, (0, 0), arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2.5})
        circle.text(*(end * 1.06 + (0, 0.02)), f"{name}\ncos {cosine:.2f}", color=colour, fontsize=11,
                    ha="right" if side > 0 else "left")
    end = np.array([np.cos(np.radians(image)), np.sin(np.radians(image))])
    circle.annotate("", end, (0, 0), arrowprops={"arrowstyle": "-|>", "color": "k", "ls": "--"})
    circle.text(*(1.05 * end), "φ(x) of an exemplar", fontsize=11)
    circle.set(xlim=(-1.15, 1.6), ylim=(-0.08, 1.3), aspect="equal", title="only angles count, not lengths")
    line.axvspan(own - 0.5, own, color=RED, alpha=0.15, lw=0)
    line.annotate("", (own - 0.5, 1.1), (own, 1.1), arrowprops={"arrowstyle": "<|-|>", "color": RED, "lw": 1.6})
    line.text(own - 0.25, 1.2, "margin 0.5", color=RED, ha="center", fontsize=11)
    line.annotate("", (own - 0.5, 0.35), (rivals[0], 0.35), arrowprops={"arrowstyle": "-|>", "color": RED, "lw": 2.5})
    line.text(own - 0.48, 0.08, f"loss {0.5 - own + rivals[0]:.2f}: push", color=RED, fontsize=11)
    for cosine, colour, name in ((own, BLUE, "own"), (rivals[0], ORANGE, "new"), (rivals[1], ORANGE, "new: loss 0")):
        line.plot(cosine, 0.6, "o", color=colour, ms=13)
        line.text(cosine, 0.76, name, color=colour, fontsize=11, ha="center")
    line.set(xlim=(0, 1), ylim=(0, 1.45), yticks=[], xlabel="cosine with φ(x)",
             title="margin ranking: no new class in the red band")
    return figure


def draw_podnet():
    """One squared feature map of old and new model, and its sums over width and over height: a bar moved
    along its rows leaves the one strip as it was, and changes the other."""
    figure, axes = canvas(7, 4.5)
    teacher = 0.08 * np.random.RandomState(1).rand(8, 8)
    teacher[:, 4] = teacher[:, 2]  # so that the sums of rows are exactly equal
    student = teacher.copy()
    for image, column in ((teacher, 2), (student, 4)):
        image[1:5, column] = 1
        image[6, 5:7] = 0.7
    strips = {}
    for name, image in (("teacher", teacher), ("student", student)):
        sums = np.concatenate([image.sum(axis=1), image.sum(axis=0)])
        strips[name] = sums / np.linalg.norm(sums)
    top = max(strip.max() for strip in strips.values())
    options = dict(cmap="viridis", interpolation="nearest", vmin=0)
    for x, name, image, colour in ((0.25, "teacher", teacher, GREY), (4.0, "student", student, BLUE)):
        axes.text(x + 1, 4.15, name, fontsize=14, color=colour, weight="bold", ha="center")
        axes.imshow(image, extent=(x, x + 2, 2, 4), vmax=1, **options)
        axes.imshow(strips[name][:8, None], extent=(x + 2.12, x + 2.37, 2, 4), vmax=top, **options)
        axes.imshow(strips[name][None, 8:], extent=(x, x + 2, 1.63, 1.88), vmax=top, **options)
    arrow(axes, (2.75, 3), (3.95, 3), RED, style="<|-|>")
    axes.text(3.33, 3.1, "sums over\nthe width:\nequal", fontsize=11, color=RED, ha="center")
    arrow(axes, (1.25, 1.55), (5.0, 1.55), RED, style="<|-|>", bend=0.22)
    axes.text(3.12, 0.62, "sums over the height: not equal", fontsize=12, color=RED, ha="center")
    axes.text(3.5, 0.15, "one channel of one level; the same is done in all of them", fontsize=12, ha="center")
    axes.set(xlim=(0, 7), ylim=(0, 4.5))
    return figure


def draw_aanets():
    """Two branches, mixed after each level by one number."""
    figure, axes = canvas(8, 3)
    axes.text(0.1, 1.45, "image", fontsize=11)
    for level in range(3):
        x = 1.05 + 2.15 * level
        box(axes, x, 1.9, 1.05, 0.75, f"stable {level + 1}", GREY)
        box(axes, x, 0.35, 1.05, 0.75, f"plastic {level + 1}", ORANGE)
        arrow(axes, (x - 0.35, 1.5), (x, 2.2))
        arrow(axes, (x - 0.35, 1.5), (x, 0.8))
        arrow(axes, (x + 1.1, 2.2), (x + 1.55, 1.6))
        arrow(axes, (x + 1.1, 0.8), (x + 1.55, 1.4))
        axes.text(x + 1.38, 2.1, f"$\\alpha_{level + 1}$", fontsize=11)
        axes.text(x + 1.3, 0.75, f"$1-\\alpha_{level + 1}$", fontsize=11)
        axes.text(x + 1.62, 1.43, "+", fontsize=15, weight="bold", ha="center")
    arrow(axes, (7.1, 1.5), (7.5, 1.5))
    axes.text(7.05, 1.75, "features", fontsize=10)
    return figure


def draw_alphas():
    """What the fusion weights become, task after task: the mean over the seeds, and one long run."""
    figure, both = new_figure(8, 4.2, 2, sharey=True)
    for axes, data_set, title in zip(both, ("digits", "cifar100"), ("digits, {} seeds", "CIFAR-100, one seed")):
        found = load(f"{data_set}_aanets_lucir")
        values = np.array([run["alphas"] for run in found])  # (seeds, tasks - 1, levels)
        tasks = np.arange(2, values.shape[1] + 2)
        for level in range(values.shape[2]):
            spread = values[:, :, level].std(axis=0, ddof=1) if len(found) > 1 else None
            axes.errorbar(tasks + 0.06 * (level - 1), values[:, :, level].mean(axis=0), spread, marker="o", capsize=3,
                          label=f"level {level + 1}", color=(BLUE, GREEN, ORANGE, PINK)[level])
        axes.axhline(0.5, color="k", ls="--", lw=1)
        axes.set(xlabel="tasks learned", xticks=tasks, title=title.format(len(found)), ylim=(-0.05, 1.15))
    both[0].set_ylabel("α, the share of the stable branch")
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_itaml():
    """Three inner loops from one start, their mean, and the outer step."""
    figure, axes = canvas(7, 3.4)
    start, ends = np.array([0.9, 0.7]), np.array([[1.5, 3.0], [3.9, 2.9], [4.8, 0.5]])
    mean = ends.mean(axis=0)
    for i, (end, bend, colour) in enumerate(zip(ends, (0.2, -0.25, -0.15), (BLUE, GREEN, ORANGE)), 1):
        arrow(axes, start, end, colour, bend=bend)
        axes.plot(*end, "o", color=colour)
        axes.text(end[0] + 0.12, end[1] - 0.05, f"$\\theta_{i}$: after $r$ steps on task {i}", fontsize=10, color=colour)
    axes.plot(*mean, "s", color=GREY)
    axes.text(mean[0] + 0.12, mean[1] - 0.18, "their mean", fontsize=10, color=GREY)
    axes.plot([start[0], mean[0]], [start[1], mean[1]], "--", color=GREY, lw=1)
    new = start + 0.6 * (mean - start)
    arrow(axes, start, new, RED)
    axes.text(new[0] + 0.1, new[1] - 0.25, "outer step: $\\eta$ of the way", fontsize=10, color=RED)
    axes.plot(*start, "ko")
    axes.text(start[0] - 0.1, start[1] - 0.32, "$\\theta_0$: where the batch begins", fontsize=10)
    return figure


def draw_continuum():
    """What iTAML scores on the digits, by the number of images that are known to share a task."""
    figure, axes = new_figure(7, 3.8)
    for meta, colour, shift in (("paper", BLUE, -0.02), ("released", ORANGE, 0.02)):
        runs = load(f"digits_itaml_{meta}")
        values = np.array([[run[f"continuum_{p}"][-1] for p in (1, 5, 20)] for run in runs])
        axes.errorbar(np.arange(3) + shift, values.mean(axis=0), values.std(axis=0, ddof=1), fmt="o-",
                      color=colour, capsize=3, label=f"continuum(p), --meta {meta}")
        axes.axhline(np.mean([run["oracle"][-1] for run in runs]), color=colour, lw=1.5, ls=":",
                     label=f"oracle, --meta {meta}")
    axes.set(xticks=range(3), xlabel="images of one task that are asked together, p",
             ylabel="accuracy after the last task (%)", ylim=(0, 102),
             title=f"iTAML on the digits, {len(runs)} seeds")
    axes.set_xticklabels((1, 5, 20))
    axes.legend(fontsize=9, ncols=2, loc="lower right")
    return figure


def draw_cross_task_loss():
    """Which logits the two losses compare, for a batch of images and the classes of three tasks."""
    figure, axes = canvas(8, 3.2)
    tasks, images = np.repeat([0, 1, 2], (4, 2, 2)), [2, 0, 1, 2, 1, 0]
    for x, title, own in ((0.9, "+CTF: over all classes", False), (4.9, "-CTF: over the own task's", True)):
        for i, task in enumerate(images):
            y = 2.25 - 0.32 * i
            for c in range(8):
                used = tasks[c] == task or not own
                axes.add_patch(FancyBboxPatch((x + 0.32 * c + 0.1 * tasks[c], y), 0.26, 0.26, boxstyle="square,pad=0",
                                              fc=(BLUE, GREEN, ORANGE)[tasks[c]] if used else "none", ec=GREY, lw=0.8))
            axes.text(x - 0.1, y + 0.13, f"task {task + 1}", ha="right", va="center", fontsize=9)
        for t, start in enumerate((0, 4, 6)):
            axes.text(x + 0.32 * start + 0.1 * t, 2.65, f"head {t + 1}", fontsize=9)
        axes.text(x, 0.25, title, fontsize=11, weight="bold")
    axes.text(0.05, 2.65, "image of", fontsize=9)
    axes.set(xlim=(0, 8), ylim=(0.1, 3))
    return figure


def draw_cross_task():
    """Left: the last accuracy with each memory. Right: cumulative accuracy of 3 exemplars a class."""
    figure, (bars, lines) = new_figure(9, 4.4, 2)
    shown = [memory for memory in MEMORIES if memory[0] != "fixed"]
    for k, (loss, name, colour) in enumerate(LOSSES):
        values = np.array([[run["last_accuracy"] for run in load(f"digits_bal_ft_{loss}_{memory}")]
                           for memory, _, _ in shown])
        bars.bar(np.arange(len(shown)) + 0.38 * (k - 0.5), values.mean(axis=1), 0.36, color=colour, label=name,
                 yerr=values.std(axis=1, ddof=1), capsize=4)
        runs = load(f"digits_bal_ft_{loss}_growing")
        tasks = len(runs[0]["increments"])
        for u in range(tasks - 1):
            curves = np.array([[row[u] for row in run["cumulative_matrix"][u:]] for run in runs])
            lines.errorbar(np.arange(u + 1, tasks + 1) + 0.05 * (2 * u - 2 + k), curves.mean(axis=0),
                           curves.std(axis=0, ddof=1), fmt="os^"[u] + ("-" if loss == "all" else "--"), color=colour,
                           capsize=2, elinewidth=1, label=f"{name}, tasks 1 to {u + 1}" if u else f"{name}, task 1")
    bars.set(xticks=range(len(shown)), ylabel="accuracy after the last task (%)", ylim=(0, 102),
             xlabel="exemplars", title="digits, ten seeds")
    bars.set_xticklabels([label for _, label, _ in shown])
    bars.legend(loc="upper left")
    lines.set(xlabel="tasks learned", ylabel="cumulative accuracy (%)", xticks=range(1, tasks + 1),
              ylim=(0, 102), title="3 exemplars per class")
    figure.legend(*lines.get_legend_handles_labels(), fontsize=9, ncols=2, loc="outside lower right")
    return figure


def draw_cross_task_cifar100():
    """Accuracy after each task, with the two memories and losses; the poster's last ones as stars."""
    figure, axes = new_figure(7, 4)
    for memory, label, column, style in reversed(CIFAR_MEMORIES):
        for loss, name, colour in LOSSES:
            run = load(f"cifar100_bal_ft_{loss}_{memory}")[0]
            classes = np.cumsum(run["increments"])
            axes.plot(classes, run["acc1s"], "o" + style, color=colour, label=f"{label}, {name}")
            axes.plot(103, poster(name, column)[0], "*", color=colour, ms=12)
    axes.plot([], [], "*", color=GREY, ms=12, label="the paper's, after the last task")
    axes.set(xlabel="classes learned", ylabel="test accuracy on all classes so far (%)", xticks=classes,
             ylim=(0, 102), title="CIFAR-100, 10 tasks, seed 0")
    axes.legend(fontsize=9, ncols=2, loc="lower left")
    return figure


def draw_alta():
    """Which of the four vectors learn, and which are compared."""
    figure, axes = canvas(8, 3.7)
    put(axes, digit_samples()[7, 0], 0.75, 2.35, 0.75)
    box(axes, 0.1, 1.2, 1.75, 0.45, "a photo of a seven", GREY, 9)
    box(axes, 0.1, 0.25, 1.75, 0.45, "[v₁ v₂ v₃ v₄] seven.", ORANGE, 9)
    box(axes, 2.3, 2.35, 1.25, 0.75, "image tower", GREY)
    box(axes, 2.3, 0.25, 1.25, 1.4, "text tower", GREY)
    arrow(axes, (1.55, 2.72), (2.25, 2.72))
    for y, text, colour in ((2.95, "x", GREY), (2.05, "A(x): adapter", ORANGE), (1.2, "w", GREY), (0.25, "u", ORANGE)):
        box(axes, 4.1, y, 1.5, 0.45, text, colour)
        arrow(axes, (3.6, 2.72 if y > 2 else y + 0.22), (4.05, y + 0.22))
        if y < 2:
            arrow(axes, (1.9, y + 0.22), (2.25, y + 0.22))
    for start, end, x, y, text, colour in ((3.17, 0.47, 6.3, 2.3, "cos(x, u)", BLUE),
                                           (2.27, 1.42, 5.95, 1.8, "cos(A(x), w)", PINK)):
        axes.plot([5.65, x, x, 5.65], [start, start, end, end], color=colour, lw=1.8)
        axes.text(6.4, y, text, fontsize=11, color=colour)
    axes.text(6.4, 1.15, "their sum, times s,\nis the logit", fontsize=10)
    axes.text(0.1, 3.4, "grey: frozen, orange: learns", fontsize=9, color="#333333", va="center")
    return figure


def draw_alta_digits():
    """What replay and separate contexts bring, task after task."""
    figure, axes = new_figure(7, 4)
    for name, label, colour in (("sgd", "ALTA without a memory", GREY), ("mlp", "adapter and memory", PINK),
                                ("cprompt", "a context for each task, no memory", BLUE),
                                ("oritext_mlp2cprompt_oriimg", "ALTA", GREEN)):
        values = np.array([run["acc1s"] for run in load(f"digits_alta_{name}")])
        tasks = np.arange(1, values.shape[1] + 1)
        axes.errorbar(tasks, values.mean(axis=0), values.std(axis=0, ddof=1), marker="o", capsize=3,
                      label=label, color=colour)
    joint = [run["last_accuracy"] for run in load("digits_alta_joint")]
    axes.plot(5, np.mean(joint), "k*", ms=12, ls="", label="all classes at once")
    axes.set(xlabel="tasks learned", ylabel="test accuracy on all classes so far (%)", xticks=tasks,
             ylim=(0, 102), title=f"Digits on a tiny frozen CLIP, seeds 0 to {len(joint) - 1}")
    axes.legend(fontsize=9, loc="lower left")
    return figure


def draw_der():
    """Three branches, of which the newest learns; the classifier sees all, an auxiliary head the newest."""
    figure, axes = canvas(8, 3.6)
    put(axes, digit_samples()[5, 0], 0.15, 1.6, 0.75)
    for task, (y, colour, state) in enumerate(((2.65, GREY, "frozen"), (1.6, GREY, "frozen"),
                                               (0.55, ORANGE, "learns")), 1):
        arrow(axes, (1.0, 1.97), (1.65, y + 0.38))
        box(axes, 1.7, y, 1.5, 0.75, f"branch $F_{task}$\n{state}", colour)
        box(axes, 3.85, y, 0.45, 0.75, f"$F_{task}(x)$", colour, 7)
        arrow(axes, (3.25, y + 0.38), (3.8, y + 0.38))
    axes.text(4.08, 3.48, "features, side by side", ha="center", fontsize=9)
    box(axes, 5.3, 1.55, 2.5, 1.5, "classifier: known + new\n\nstage 1: with the branch\nstage 2: from scratch, alone,\n"
        "on a balanced set", ORANGE, 9)
    for y in (3.02, 1.98, 0.93):
        arrow(axes, (4.35, y), (5.25, 2.3))
    box(axes, 5.3, 0.3, 2.5, 0.7, "auxiliary head: 1 + new\n(in stage 1; not for answers)", PINK, 9)
    arrow(axes, (4.35, 0.85), (5.25, 0.65), PINK)
    axes.text(2.45, 0.2, "one more with each task", ha="center", fontsize=9, color=ORANGE)
    axes.set(xlim=(0, 8), ylim=(0, 3.7))
    return figure


def draw_frozen():
    """A frozen backbone and random features, sums that grow with the tasks, heads that are computed."""
    figure, axes = canvas(8, 3.3)
    for k, digit in enumerate((1, 5, 8)):
        put(axes, digit_samples()[digit, 0], 0.15, 2.15 - 0.8 * k, 0.62)
    axes.text(0.46, 2.95, "each image\nonce", ha="center", fontsize=9)
    box(axes, 1.25, 1.1, 1.2, 1.1, "backbone\n$\\phi(x)$\nfrozen", GREY)
    box(axes, 2.95, 1.1, 1.2, 1.1, "$h = $ relu$(\\phi R)$\ndrawn once,\nnever trained", GREY, 9)
    box(axes, 4.65, 1.75, 1.35, 0.95, "$G$ += $h\\,h^T$\nfeatures ×\nfeatures", GREEN, 9)
    box(axes, 4.65, 0.55, 1.35, 0.95, "$C$ += $h\\,y^T$\nfeatures ×\nclasses", GREEN, 9)
    box(axes, 6.5, 1.1, 1.35, 1.1, "all heads\n$(G + \\lambda g I)^{-1} C$\nsolved anew", ORANGE, 9)
    for start, end in (((0.85, 1.65), (1.2, 1.65)), ((2.5, 1.65), (2.9, 1.65)), ((4.2, 1.8), (4.6, 2.2)),
                       ((4.2, 1.5), (4.6, 1.05)), ((6.05, 2.2), (6.45, 1.8)), ((6.05, 1.05), (6.45, 1.5))):
        arrow(axes, start, end)
    axes.text(5.32, 0.2, "sums over all tasks; a new class is a new column of $C$", ha="center", fontsize=9,
              color=GREEN)
    axes.set(xlim=(0, 8), ylim=(0, 3.3))
    return figure


def cifar_images(data_path, per_class=1):
    """{class name: [images]} from CIFAR-100 as a folder."""
    from PIL import Image
    classes = sorted(path for path in (Path(data_path) / "train").iterdir() if path.is_dir())
    return {path.name: [Image.open(image).convert("RGB") for image in sorted(path.iterdir())[:per_class]]
            for path in classes}


def draw_data_sets(data_path):
    """The digits, and one image from each of thirty classes of CIFAR-100."""
    figure, axes = canvas(8, 5.3)
    for digit, images in enumerate(digit_samples()):
        for k in range(2):
            put(axes, images[k], 0.1 + 0.79 * digit, 4.05 - 0.48 * k, 0.44)
    axes.text(0.1, 4.85, "digits: 8 x 8 pixels, 10 classes, 1,797 images", fontsize=12, weight="bold")
    axes.text(0.1, 3.2, "CIFAR-100: 32 x 32 pixels, 100 classes, 60,000 images", fontsize=12, weight="bold")
    found = list(cifar_images(data_path).items())[::3][:30]
    for i, (name, (image,)) in enumerate(found):
        x, y = 0.1 + 0.79 * (i % 10), 2.35 - 1.05 * (i // 10)
        put(axes, image, x, y, 0.68)
        axes.text(x + 0.34, y - 0.19, name.replace("_", " "), ha="center", fontsize=7.5)
    axes.set(xlim=(0, 8), ylim=(0, 5.3))
    return figure


def draw_transforms(data_path):
    """What each training transform does to one image of CIFAR-100."""
    import timm.data
    import timm.utils
    from torchvision import transforms
    image = cifar_images(data_path, 8)["fox"][3]
    to_tensor = transforms.ToTensor()
    kinds = [("crop after padding", [transforms.RandomCrop(32, 4)]),
             ("flip", [transforms.RandomHorizontalFlip(1.0)]),
             ("RandAugment", [timm.data.auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1-mmax9", {})]),
             ("random erasing", [to_tensor, timm.data.random_erasing.RandomErasing(1.0, mode="pixel",
                                                                                 device="cpu")])]
    figure, axes = canvas(8, 5)
    put(axes, image, 0.1, 2.05, 1.2)
    axes.text(0.7, 1.8, "the image", ha="center", fontsize=11)
    for row, (name, steps) in enumerate(kinds):
        y = 3.8 - 1.24 * row
        axes.text(1.75, y + 0.5, name, fontsize=11, va="center")
        for k in range(4):
            timm.utils.random_seed(k + 20)
            done = transforms.Compose(steps)(image)
            pixels = done.permute(1, 2, 0).clamp(0, 1).numpy() if hasattr(done, "permute") else done
            put(axes, pixels, 3.3 + 1.18 * k, y, 1.1)
    axes.set(xlim=(0, 8), ylim=(0, 5))
    return figure


PICTURES = [draw_digits, draw_cifar100, draw_cifar100_methods, draw_forgetting, draw_confusion, draw_exemplars,
            draw_norms, draw_temperature, draw_speed, draw_stages, draw_loop, draw_model, draw_teacher, draw_prototypes, draw_ddp,
            draw_icarl, draw_lucir, draw_podnet, draw_aanets, draw_alphas, draw_cross_task_loss, draw_cross_task,
            draw_cross_task_cifar100, draw_itaml, draw_continuum, draw_alta, draw_alta_digits, draw_der,
            draw_frozen]
PICTURES_OF_CIFAR = [draw_data_sets, draw_transforms]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_path", help="CIFAR-100 as a folder of images, for two pictures")
    given = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    for draw in PICTURES:
        draw().savefig(IMAGES / f"{draw.__name__[5:]}.png")
    for draw in PICTURES_OF_CIFAR if given.data_path else ():
        draw(given.data_path).savefig(IMAGES / f"{draw.__name__[5:]}.png")


if __name__ == "__main__":
    main()
