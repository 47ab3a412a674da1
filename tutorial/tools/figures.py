"""Draws tutorial/img/: results from tutorial/results/, ideas from the numbers below.

    python -m tutorial.tools.figures                  # all pictures but two
    python -m tutorial.tools.figures --data_path DIR  # and the two that show CIFAR-100 images

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
    ABLATION, BLUE, CIFAR_MEMORIES, CIFAR_METHODS, EPOCHS, GREEN, GREY, LONG, LOSSES, MEMORIES,
    ORANGE, PINK, RED, measured, poster, published_by_method)

IMAGES = ROOT / "tutorial/img"
WIDTH = 5  # of every picture, in inches: on a phone, 358 pixels wide, 9 points are 9 pixels high
SMALL = 9
matplotlib.rcParams.update({
    "font.size": 10, "axes.titlesize": 11, "legend.fontsize": SMALL, "figure.facecolor": "white",
    "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "savefig.dpi": 150,
    "figure.constrained_layout.h_pad": 0.08})


# ---------------------------------------------------------------------------------------------
# Pictures of results
# ---------------------------------------------------------------------------------------------

def new_figure(height=3.8, rows=1, columns=1, **options):
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


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
    axes.set(title=title, xlabel="classes learned so far",
             ylabel="test accuracy on all of them (%)")
    return figure, axes


def draw_ablation(data_set, title):
    """WA and its ablations."""
    rows = [(label, load(f"{data_set}_{name}"), colour, "-") for name, label, _, colour in ABLATION]
    rows = [row for row in rows if row[1]]  # CIFAR-100 has no run with alignment alone
    figure, axes = draw_curves(rows, title)
    axes.set(xticks=np.cumsum(rows[0][1][0]["increments"]), ylim=(0, 102))
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_digits():
    return draw_ablation("digits", "Digits, 4 + 2 + 2 + 2 classes, 30 exemplars, 10 seeds")


def draw_cifar100():
    return draw_ablation("cifar100", "CIFAR-100, 50 + 5 x 10 classes,\n2,000 exemplars, "
                         "20 epochs a task")


def draw_cifar100_methods():
    """Accuracy after each task, a line for each method."""
    notes = {"wa": " (memory shared out)", "podnet": " (its own network)", "der": " (six networks)"}
    rows = [(label + notes.get(name, ""), load(f"cifar100_{name}")[:1], colour, "-")
            for name, label, colour in CIFAR_METHODS]
    figure, axes = draw_curves(rows, "CIFAR-100, base 50, increment 10,\n20 epochs a task, "
                               "one seed")
    axes.set_ylim(30, 80)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_cifar100_60():
    """CIFAR-100 with 60 epochs a task: accuracy after each task, a line for each method. That of
    finetuning leaves the frame at once, so that the others have room."""
    rows = [(label, load(f"cifar100_{name}_60"), colour, "-") for name, label, colour in LONG]
    rows = [row for row in rows if row[1]]  # not all of them have been made
    figure, axes = draw_curves(rows, "CIFAR-100, 50 + 5 x 10 classes,\n60 epochs a task, one seed")
    figure.set_figheight(5)
    axes.set_ylim(37, 80)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_epochs():
    """Above: what epochs are worth to WA and to replay, and PyCIL's hollow. Below: WA's gammas."""
    figure, (accuracy, gamma) = new_figure(7, 2)
    others = published_by_method()
    for name, other, colour in (("WA", "WA (PyCIL)", GREEN), ("replay", "replay", RED)):
        runs = [load(f"cifar100_{name.lower()}{end}")[0] for _, end in EPOCHS]
        for key, field, style in (("average", "average_incremental_accuracy", "o-"),
                                  ("last", "last_accuracy", "s--")):
            accuracy.plot([n for n, _ in EPOCHS], [run[field] for run in runs], style,
                          color=colour, label=f"{name}, {key}")
            accuracy.plot(others[other]["epochs"], others[other][key], style[0], color=colour,
                          mfc="white")
    shown = [n for n, _ in EPOCHS] + [others["WA (PyCIL)"]["epochs"]]
    accuracy.set(xscale="log", xticks=shown, xticklabels=shown, ylim=(15, 71),
                 xlabel="epochs a task (hollow: PyCIL's)", ylabel="accuracy (%)",
                 title="CIFAR-100, 50 + 5 x 10 classes, one seed")
    accuracy.minorticks_off()
    accuracy.legend(loc="lower right")
    for (n, end), colour in zip(EPOCHS, (ORANGE, BLUE, PINK)):
        found = load(f"cifar100_wa{end}")[0]["gammas"]
        gamma.plot(range(2, len(found) + 2), found, "o-", color=colour, label=f"{n} epochs a task")
    gamma.axhline(1, color="k", lw=0.8)
    gamma.set(xticks=range(2, len(found) + 2), xlabel="task", ylabel="γ of WA")
    gamma.legend()
    return figure


def draw_forgetting():
    """Finetuning: the accuracy on each task's test images falls to zero when the next one comes."""
    figure, both = new_figure(6, 2)
    for axes, data_set, title in zip(both, ("digits", "cifar100"), ("digits", "CIFAR-100")):
        run = load(f"{data_set}_finetune")[0]
        rows = run["accuracy_matrix"]
        for u in range(len(rows)):
            axes.plot(range(u + 1, len(rows) + 1), [row[u] for row in rows[u:]], "o-",
                      label=f"images of task {u + 1}")
        axes.plot(range(1, len(rows) + 1), run["acc1s"], "ks--", lw=2, ms=5, label="all images")
        axes.set(xlabel="tasks learned", xticks=range(1, len(rows) + 1), ylim=(-3, 103),
                 ylabel="test accuracy (%)", title=f"{title}, finetuned")
    figure.legend(*both[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_confusion():
    """What images of each class are taken for, after the last task; all seeds together."""
    figure, panels = new_figure(2.9, columns=3, sharey=True)
    names = [("finetune", "finetune"), ("replay", "replay"), ("wa", "WA")]
    for axes, (name, title) in zip(panels, names):
        found = load(f"digits_{name}")
        counts = np.sum([run["confusion"] for run in found], axis=0)
        share = 100 * counts / counts.sum(axis=1, keepdims=True)
        image = axes.imshow(share, cmap="magma", vmin=0, vmax=100)
        for border in np.cumsum(found[0]["increments"])[:-1] - 0.5:
            axes.axhline(border, color="w", lw=0.7)
            axes.axvline(border, color="w", lw=0.7)
        axes.set(title=title, xlabel="predicted class")
        axes.set_xticks(range(10), found[0]["class_names"], fontsize=SMALL)
        axes.set_yticks(range(10), found[0]["class_names"], fontsize=SMALL)
        axes.tick_params(length=2, pad=2)
        axes.grid(False)
    panels[0].set_ylabel("true class,\nin the order learned")
    figure.colorbar(image, ax=panels, label="percent of the true class", location="bottom",
                    shrink=0.7, aspect=30)
    return figure


def draw_exemplars():
    """Above: the features of one class, flattened, and herding's first choices. Below: the distance
    of the mean of m exemplars to the class mean."""
    figure, (flat, error) = new_figure(7, 2, height_ratios=(1.3, 1))
    found = measured("exemplars_digits")
    points, chosen = np.array(found["points"]), found["chosen"]["herding"]
    flat.scatter(*points.T, s=18, color=GREY, alpha=0.5, lw=0, label=f"image of a {found['class']}")
    flat.scatter(*points[chosen].T, s=26, color=GREEN, label="first ten of herding, in their order")
    # The numbers stand in a row above the points, from left to right as these do.
    (left, low), (right, high) = points.min(axis=0), points.max(axis=0)
    for place, k in zip(np.linspace(left, right, len(chosen)), np.argsort(points[chosen, 0])):
        flat.annotate(k + 1, points[chosen[k]], (place, high + 0.2 * (high - low)), ha="center",
                      color=GREEN, weight="bold",
                      arrowprops={"arrowstyle": "-", "color": GREEN, "lw": 0.8, "shrinkB": 2})
    flat.set_ylim(top=high + 0.27 * (high - low))
    flat.plot(*found["mean"], "k+", ms=13, mew=2, ls="", label="mean of the class")
    flat.set(xlabel="first principal component of the features",
             ylabel="second principal component",
             title=f"digits: {100 * found['explained']:.0f} % of the variance is visible")
    flat.legend(loc="lower right")
    found = measured("exemplars_cifar100")
    m = np.arange(1, 101)
    for name, colour, label in (("random", RED, "random"), ("herding", GREEN, "herding"),
                                ("cluster", ORANGE, "nearest to the mean")):
        error.plot(m, found["distance"][name][:100], color=colour, label=label)
    spread = np.array(found["random_std"][:100])
    middle = np.array(found["distance"]["random"][:100])
    error.fill_between(m, middle - spread, middle + spread, color=RED, alpha=0.15, lw=0)
    error.set(xlabel="number of exemplars m", ylabel="distance to the class mean", ylim=(0, None),
              title=f"CIFAR-100: a class of {found['images']} images")
    error.legend()
    return figure


def draw_norms():
    """Lengths of the prototypes before and after the last alignment."""
    figure, both = new_figure(6.2, 2)
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
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def draw_border():
    """Accuracy on old and new classes for other factors in the place of γ, and γ itself."""
    figure, panels = new_figure(5.6, 2, 2, sharex=True, sharey=True)
    panels = panels.flatten()
    for axes, run, title in zip(panels, (
            "digits_wa", "validation_dynamic", "validation_survey", "cifar100_wa_60"), (
            "digits,\nλ = 0.4", "CIFAR-100, 20 epochs,\ndynamic λ", "CIFAR-100, 20 epochs,\nCE + 2 KD",
            "CIFAR-100, 60 epochs,\ndynamic λ")):
        found = measured(f"border_{run}_seed0")
        for key, colour, label in (("old", BLUE, "old classes"), ("new", ORANGE, "new classes"),
                                   ("all", "black", "all")):
            axes.plot([row["factor"] for row in found["rows"]],
                      [row[key] for row in found["rows"]], color=colour, label=label)
        axes.axvline(found["gamma"], color=GREEN, ls="--", label="γ")
        axes.set(title=title, ylim=(0, 102), xlim=(0.3, 1.5), xticks=(0.5, 1, 1.5))
    for axes in panels[::2]:
        axes.set(ylabel="accuracy (%)")
    for axes in panels[2:]:
        axes.set(xlabel="factor (1: no alignment)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  columnspacing=1, handlelength=1.5)
    return figure


def draw_temperature():
    """One teacher's answer, softened."""
    logits = np.array([6.0, 4.0, 1.0, 0.0])
    figure, axes = new_figure(3.2)
    for i, (T, colour) in enumerate(zip((1, 2, 4), (BLUE, GREEN, ORANGE))):
        soft = np.exp(logits / T) / np.exp(logits / T).sum()
        bars = axes.bar(np.arange(4) + 0.27 * (i - 1), 100 * soft, 0.25, color=colour,
                        label=f"T = {T}")
        axes.bar_label(bars, fmt="%.0f", fontsize=SMALL)
    axes.set(xticks=range(4), xticklabels=[f"{logit:.0f}" for logit in logits], ylim=(0, 100),
             xlabel="logit of the class", ylabel="probability (%)", title="softmax(logits / T)")
    axes.grid(axis="x", visible=False)
    axes.legend()
    return figure


def draw_speed():
    """Images per second, one change at a time."""
    found = measured("speed")
    figure, axes = new_figure(3.2)
    rows = found["compute"][::-1]
    names = [row["what"].replace(", ", ",\n").replace(" +", "\n+") for row in rows]
    bars = axes.barh(names, [row["images_per_second"] for row in rows],
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

def canvas(height, width=WIDTH):
    """Axes without axes, one unit an inch (or width units in all): draw(box / arrow / text) at
    (x, y)."""
    figure = Figure(figsize=(WIDTH, WIDTH * height / width))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, height, text, colour=BLUE, size=10):
    axes.add_patch(FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0.02,rounding_size=0.08",
        facecolor=colour + "22", edgecolor=colour, lw=1.6))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def arrow(axes, start, end, colour="#333333", text="", style="-|>", bend=0, right=0.08, **line):
    """An arrow; its text begins so far to the right of the middle, or ends so far to the left."""
    axes.add_patch(FancyArrowPatch(
        start, end, arrowstyle=style, mutation_scale=12, color=colour,
        connectionstyle=f"arc3,rad={bend}", **{"lw": 1.4, **line}))
    axes.text((start[0] + end[0]) / 2 + right, (start[1] + end[1]) / 2, text, color=colour,
              ha="left" if right > 0 else "right", va="center", fontsize=SMALL)


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
    figure, axes = canvas(3.6)
    samples = digit_samples()
    columns = [(0.8, "learn these"), (2.65, "exemplars\nkept"), (3.7, "tested on\nall so far")]
    for x, title in columns:
        axes.text(x, 3.08, title, weight="bold")
    for stage in range(3):
        y = 2.1 - 1.0 * stage
        axes.text(0.12, y + 0.41, f"task {stage + 1}", weight="bold", va="center")
        for digit in range(1, 2 * stage + 3):  # in columns of two: each task's digits
            task, low = (digit - 1) // 2, y + 0.44 * (digit % 2)
            put(axes, samples[digit, 3], columns[2][0] + 0.42 * task, low, 0.36, BLUE)
            if task < stage:
                put(axes, samples[digit, 0], columns[1][0] + 0.42 * task, low, 0.36, GREEN)
            for k in range(4 if task == stage else 0):
                put(axes, samples[digit, k], columns[0][0] + 0.42 * k, low, 0.36, ORANGE)
    axes.text(columns[1][0], 2.51, "none yet", color=GREY, va="center")
    return figure


def draw_loop():
    """One task: what goes in, what learns, and what is handed on to the next."""
    figure, axes = canvas(6)
    box(axes, 0.1, 5.25, 1.5, 0.6, "exemplars\nof old classes", GREEN)
    box(axes, 1.75, 5.25, 1.5, 0.6, "1. new images\nof this task", ORANGE)
    box(axes, 3.4, 5.25, 1.5, 0.6, "teacher: the model\nof the task before", GREY, SMALL)
    box(axes, 1.0, 4.4, 1.5, 0.4, "training set", GREY)
    arrow(axes, (1.1, 5.2), (1.45, 4.85))
    arrow(axes, (2.35, 5.2), (2.05, 4.85))
    box(axes, 1.0, 3.35, 3.0, 0.6, "model, one head more\n2. expand   3. train")
    arrow(axes, (1.75, 4.35), (1.75, 4.0), text="CE")
    arrow(axes, (3.7, 5.2), (3.7, 4.0), text="KD")
    steps = (("4. choose exemplars", GREEN), ("5. align the new head", PINK),
             ("6. test on all classes", ORANGE), ("7. become the teacher", GREY))
    for i, (text, colour) in enumerate(steps):
        arrow(axes, (2.5, 3.3 - 0.73 * i), (2.5, 3.05 - 0.73 * i))
        box(axes, 1.4, 2.6 - 0.73 * i, 2.2, 0.4, text, colour)
    for x, y, edge in ((1.35, 2.8, 0.4), (3.65, 0.61, 4.6)):  # from steps 4 and 7, back to the top
        axes.plot([x, edge], [y, y], color=GREEN, lw=1.4)
        arrow(axes, (edge, y - 0.01), (edge, 5.2), GREEN)
    axes.text(2.5, 0.12, "green arrows: to the next task", ha="center", fontsize=SMALL, color=GREEN)
    return figure


def draw_model():
    """A backbone, and a classifier that gets one more head with each task."""
    figure, axes = canvas(4.5)
    put(axes, digit_samples()[3, 0], 0.35, 3.55, 0.8)
    axes.text(0.75, 3.2, "image x\n(batch, 3, H, W)", ha="center", va="center", fontsize=SMALL)
    arrow(axes, (1.3, 3.95), (1.85, 3.95))
    box(axes, 1.9, 3.5, 2.9, 0.9, "backbone φ\n\nResNet or any of timm", BLUE)
    axes.plot([3.35, 3.35], [3.45, 2.9], color="#333333", lw=1.4)
    axes.text(3.45, 3.18, "features φ(x)\n(batch, 64)", va="center", fontsize=SMALL)
    for i, (rows, name) in enumerate(((4, "task 1"), (2, "task 2"), (2, "task 3"))):
        x = 0.1 + 1.65 * i
        arrow(axes, (3.35, 2.9), (x + 0.75, 2.35))
        box(axes, x, 1.7, 1.5, 0.6, f"head of {name}\n{rows} prototypes", (BLUE, BLUE, ORANGE)[i])
        arrow(axes, (x + 0.75, 1.65), (x + 0.75, 1.3))
        axes.text(x + 0.75, 1.15, f"{rows} logits", ha="center", va="center")
    axes.plot([0.1, 0.1, 4.9, 4.9], [1.0, 0.9, 0.9, 1.0], color="#333333", lw=1.4)
    axes.text(2.5, 0.7, "side by side", ha="center", va="center")
    axes.text(2.5, 0.25, "expand() adds the next head", ha="center", va="center", color=ORANGE)
    return figure


def draw_teacher():
    """Replay and distillation in one picture."""
    figure, axes = canvas(4.9)
    box(axes, 0.2, 4.15, 2.1, 0.6, "new images\nmany", ORANGE)
    box(axes, 2.7, 4.15, 2.1, 0.6, "exemplars\nfew of each class", GREEN)
    axes.text(2.5, 3.6, "batch", ha="center", va="center")
    for side in (-1, 1):
        arrow(axes, (2.5 + 0.8 * side, 4.1), (2.5 + 0.3 * side, 3.7))
        arrow(axes, (2.5 + 0.3 * side, 3.5), (2.5 + 0.8 * side, 3.1))
    box(axes, 0.2, 2.3, 2.1, 0.75, "student\nthe model in training", BLUE)
    box(axes, 2.7, 2.3, 2.1, 0.75, "teacher\nits frozen copy\nof the task before", GREY)
    arrow(axes, (0.9, 2.25), (0.9, 1.35), text="all\nlogits", right=-0.08)
    arrow(axes, (1.6, 2.25), (3.1, 1.35), text="old logits", right=0.2)
    arrow(axes, (4.1, 2.25), (4.1, 1.35), text="old\nlogits")
    box(axes, 0.2, 0.7, 2.1, 0.6, "cross-entropy (CE)\nwith the labels", RED)
    box(axes, 2.7, 0.7, 2.1, 0.6, "KL divergence (KD)\nat temperature T", PINK)
    axes.text(2.5, 0.3, "loss = (1 − λ) CE + λ KD", ha="center", va="center", weight="bold")
    return figure


def draw_prototypes():
    """Long prototypes win: a feature between an old and a new class, before and after alignment."""
    figure, both = new_figure(6.7, 2)
    feature, old = np.array([0.78, 0.92]), np.array([0.35, 1.15])
    new = np.array([1.75, 0.75])
    gamma = np.linalg.norm(old) / np.linalg.norm(new)
    for axes, scale, title in zip(both, (1, gamma),
                                  ("after training", f"aligned: γ = {gamma:.2f}")):
        for vector, colour, name in ((old, BLUE, "old class"), (scale * new, ORANGE, "new class")):
            arrow(axes, (0, 0), vector, colour, lw=2.5)
            axes.text(*(vector + (0.05, 0.04)), f"{name}\nlogit {vector @ feature:.2f}",
                      color=colour)
        arrow(axes, (0, 0), feature, "k", lw=1, ls="--")
        axes.text(*(feature + (0.03, 0.03)), "φ(x)")
        axes.set(xlim=(0, 2.3), ylim=(0, 1.45), title=title, xlabel="first feature",
                 ylabel="second feature", aspect="equal")
    return figure


def draw_ddp():
    """Who holds what on three ranks."""
    figure, axes = canvas(4.6)
    rows = [("the whole model,\nsame weights", BLUE), ("all exemplars,\nthe same", GREEN),
            ("images\n{}", ORANGE), ("gradients\nof that share", RED)]
    for rank, share in enumerate(("0, 3, 6, …", "1, 4, 7, …", "2, 5, 8, …")):
        x = 0.1 + 1.65 * rank
        axes.text(x + 0.75, 4.4, f"rank {rank}", ha="center", va="center", weight="bold")
        for i, (text, colour) in enumerate(rows):
            box(axes, x, 3.65 - 0.72 * i, 1.5, 0.55, text.format(share), colour)
        arrow(axes, (x + 0.75, 1.44), (x + 0.75, 0.9))
    box(axes, 0.1, 0.2, 4.8, 0.65, "all-reduce: the mean of the gradients,\n"
        "the same on every rank, so the same step", PINK)
    return figure


def draw_icarl():
    """Nearest mean of exemplars: on the circle an image goes to the class of the nearest mean."""
    figure, axes = new_figure(4)
    angle, draw = np.radians(np.linspace(0, 90, 200)), np.random.RandomState(2)
    axes.plot(np.cos(angle), np.sin(angle), color=GREY, lw=1)
    test = np.array([np.cos(np.radians(33)), np.sin(np.radians(33))])
    for colour, degrees, name in ((BLUE, 72, "old class"), (GREEN, 45, "old class"),
                                  (ORANGE, 14, "new class")):
        around = np.radians(degrees + 5 * draw.randn(6))
        points = np.stack([np.cos(around), np.sin(around)], axis=1)
        star = points.mean(axis=0) / np.linalg.norm(points.mean(axis=0))
        axes.scatter(*points.T, color=colour, s=40, alpha=0.6, lw=0)
        axes.plot(*star, marker="*", color=colour, ms=20, mec="k", ls="")
        axes.text(*(1.09 * star - (0, 0.02)), f"{name}: cos {star @ test:.2f}", color=colour)
        axes.plot(*np.stack([star, test]).T, "k:", lw=1.3)
    arrow(axes, (0, 0), 0.57 * test, "k")
    axes.plot(*np.stack([0.57 * test, test]).T, "k--", lw=1)
    axes.text(*(0.4 * test + (0.12, -0.13)), "features of\na test image")
    axes.plot(*test, "kX", ms=12)
    axes.set(xlabel="first feature", ylabel="second feature", xlim=(0, 1.62), ylim=(0, 1.15),
             aspect="equal", title="divided by their length: to the nearest star")
    return figure


def draw_lucir():
    """Cosines: prototypes on a circle, and the margin between an exemplar's class and new ones."""
    figure, (circle, line) = new_figure(5.6, 2, height_ratios=(1.5, 1))
    own, rivals = 0.85, (0.60, 0.20)
    image = 80
    angle = np.radians(np.linspace(-2, 182, 200))
    circle.plot(np.cos(angle), np.sin(angle), color=GREY, lw=1)
    for cosine, side, colour, name in ((own, 1, BLUE, "own, old class"),
                                       (rivals[0], -1, ORANGE, "new class"),
                                       (rivals[1], -1, ORANGE, "new class")):
        at = np.radians(image + side * np.degrees(np.arccos(cosine)))
        end = np.array([np.cos(at), np.sin(at)])
        arrow(circle, (0, 0), end, colour, lw=2.5)
        circle.text(*(end * 1.06 + (0, 0.02)), f"{name}\ncos {cosine:.2f}", color=colour,
                    ha="right" if side > 0 else "left")
    end = np.array([np.cos(np.radians(image)), np.sin(np.radians(image))])
    arrow(circle, (0, 0), end, "k", lw=1, ls="--")
    circle.text(*(1.07 * end), "φ(x) of an exemplar")
    circle.set(xlim=(-1.15, 1.7), ylim=(-0.08, 1.3), aspect="equal", xlabel="first feature",
               ylabel="second feature", title="only angles count, not lengths")
    line.axvspan(own - 0.5, own, color=RED, alpha=0.15, lw=0)
    arrow(line, (own, 1.1), (own - 0.5, 1.1), RED, style="<|-|>")
    line.text(own - 0.25, 1.2, "margin 0.5", color=RED, ha="center")
    arrow(line, (rivals[0], 0.35), (own - 0.5, 0.35), RED, lw=2.5)
    line.text(own - 0.48, 0.08, f"loss {0.5 - own + rivals[0]:.2f}: push", color=RED)
    for cosine, colour, name in ((own, BLUE, "own"), (rivals[0], ORANGE, "new"),
                                 (rivals[1], ORANGE, "new: loss 0")):
        line.plot(cosine, 0.6, "o", color=colour, ms=13)
        line.text(cosine, 0.76, name, color=colour, ha="center")
    line.set(xlim=(0, 1), ylim=(0, 1.45), yticks=[], xlabel="cosine with φ(x)",
             title="margin ranking: no new class in the shaded band")
    line.grid(False)
    return figure


def draw_podnet():
    """One squared feature map of old and new model, and its sums over width and over height: a bar
    moved along its rows leaves the one strip as it was, and changes the other."""
    figure, axes = canvas(4.5, 7)
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
    for x, name, image, colour in ((0.25, "teacher", teacher, GREY),
                                   (4.0, "student", student, BLUE)):
        axes.text(x + 1, 4.15, name, color=colour, weight="bold", ha="center")
        axes.imshow(image, extent=(x, x + 2, 2, 4), vmax=1, **options)
        axes.imshow(strips[name][:8, None], extent=(x + 2.12, x + 2.37, 2, 4), vmax=top, **options)
        axes.imshow(strips[name][None, 8:], extent=(x, x + 2, 1.63, 1.88), vmax=top, **options)
    arrow(axes, (2.75, 3), (3.95, 3), RED, style="<|-|>")
    axes.text(3.33, 3.1, "sums over\nthe width:\nequal", fontsize=SMALL, color=RED, ha="center")
    arrow(axes, (1.25, 1.55), (5.0, 1.55), RED, style="<|-|>", bend=0.22)
    axes.text(3.12, 0.62, "sums over the height: not equal", color=RED, ha="center")
    axes.text(3.5, 0.15, "one channel of one level; the same is done in all of them", ha="center")
    return figure


def draw_aanets():
    """Two branches, mixed after each level by one number."""
    figure, axes = canvas(5.3)
    axes.text(2.5, 5.05, "image", ha="center")
    for level in range(1, 4):
        y = 5.45 - 1.5 * level
        box(axes, 0.5, y, 1.5, 0.5, f"stable {level}", GREY)
        box(axes, 3.0, y, 1.5, 0.5, f"plastic {level}", ORANGE)
        for x, side, share in ((1.25, -1, ""), (3.75, 1, "1-")):
            arrow(axes, (2.5 + 0.12 * side, y + 1), (x, y + 0.55))
            arrow(axes, (x, y - 0.05), (2.5 + 0.12 * side, y - 0.42))
            axes.text(x, y - 0.42, f"${share}\\alpha_{level}$", fontsize=12, ha="center")
        axes.text(2.5, y - 0.45, "+", fontsize=15, weight="bold", ha="center", va="center")
    arrow(axes, (2.5, 0.42), (2.5, 0.08), text="features")
    return figure


def draw_alphas():
    """What the fusion weights become, task by task: the mean over the seeds, and one long run."""
    figure, both = new_figure(6, 2)
    for axes, data_set, title in zip(both, ("digits", "cifar100"),
                                     ("digits, {} seeds", "CIFAR-100, one seed")):
        found = load(f"{data_set}_aanets_lucir")
        values = np.array([run["alphas"] for run in found])  # (seeds, tasks - 1, levels)
        tasks = np.arange(2, values.shape[1] + 2)
        for level in range(values.shape[2]):
            spread = values[:, :, level].std(axis=0, ddof=1) if len(found) > 1 else None
            axes.errorbar(tasks + 0.06 * (level - 1), values[:, :, level].mean(axis=0), spread,
                          marker="o", capsize=3, label=f"level {level + 1}",
                          color=(BLUE, GREEN, ORANGE, PINK)[level])
        axes.axhline(0.5, color="k", ls="--", lw=1)
        axes.set(xlabel="tasks learned", xticks=tasks, ylabel="α, the stable branch's share",
                 title=title.format(len(found)), ylim=(-0.05, 1.15))
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_itaml():
    """Three inner loops from one start, their mean, and the outer step."""
    figure, axes = canvas(3.7)
    start, ends = np.array([0.6, 0.6]), np.array([[0.75, 3.2], [3.3, 3.1], [3.35, 0.5]])
    mean, look = ends.mean(axis=0), {"fontsize": 11.5, "va": "center"}
    looks = zip(ends, (-0.15, -0.25, -0.15), (BLUE, GREEN, ORANGE))
    for i, (end, bend, colour) in enumerate(looks, 1):
        arrow(axes, start, end, colour, bend=bend)
        axes.plot(*end, "o", color=colour)
        axes.text(end[0] + 0.12, end[1], f"$\\theta_{i}$: after $r$ steps\non task {i}",
                  color=colour, **look)
    axes.plot(*mean, "s", color=GREY)
    axes.text(mean[0] + 0.12, mean[1], "their mean", color=GREY, **look)
    axes.plot([start[0], mean[0]], [start[1], mean[1]], "--", color=GREY, lw=1, zorder=0)
    new = start + 0.6 * (mean - start)
    arrow(axes, start, new, RED)
    axes.text(new[0] + 0.1, new[1] - 0.13, "outer step: $\\eta$ of the way", color=RED, **look)
    axes.plot(*start, "ko")
    axes.text(start[0] - 0.1, start[1] - 0.3, "$\\theta$: where the batch begins", **look)
    return figure


def draw_continuum():
    """What iTAML scores on the digits, by the number of images that are known to share a task."""
    figure, axes = new_figure()
    for meta, colour, shift, dots in (("paper", BLUE, -0.02, 0), ("released", ORANGE, 0.02, 3)):
        runs = load(f"digits_itaml_{meta}")
        values = np.array([[run[f"continuum_{p}"][-1] for p in (1, 5, 20)] for run in runs])
        axes.errorbar(np.arange(3) + shift, values.mean(axis=0), values.std(axis=0, ddof=1),
                      fmt="o-", color=colour, capsize=3, label=f"continuum(p), --meta {meta}")
        axes.axhline(np.mean([run["oracle"][-1] for run in runs]), color=colour, lw=1.5,
                     ls=(dots, (2, 4)),  # the dots of one between those of the other
                     label=f"oracle, --meta {meta}")
    axes.set(xticks=range(3), xlabel="images of one task that are asked together, p",
             ylabel="accuracy after the last task (%)", ylim=(0, 102),
             title=f"iTAML on the digits, {len(runs)} seeds")
    axes.set_xticklabels((1, 5, 20))
    axes.legend(loc="lower right")
    return figure


def draw_cross_task_loss():
    """Which logits the two losses compare, for a batch of images and the classes of three tasks."""
    figure, axes = canvas(5.1)
    tasks, images = np.repeat([0, 1, 2], (4, 2, 2)), [2, 0, 1, 2, 1, 0]
    for top, title, own in ((4.9, "+CTF: over all classes", False),
                            (2.35, "-CTF: over those of the image's own task", True)):
        axes.text(0.9, top, title, weight="bold", va="center")
        axes.text(0.8, top - 0.3, "image of", ha="right", va="center")
        for t, centre in enumerate((1.85, 3.4, 4.46)):
            axes.text(centre, top - 0.3, f"head {t + 1}", ha="center", va="center")
        for i, task in enumerate(images):
            y = top - 0.7 - 0.27 * i
            for c in range(8):
                used = tasks[c] == task or not own
                axes.add_patch(FancyBboxPatch(
                    (0.9 + 0.48 * c + 0.1 * tasks[c], y), 0.42, 0.21, boxstyle="square,pad=0",
                    fc=(BLUE, GREEN, ORANGE)[tasks[c]] if used else "none", ec=GREY, lw=0.8))
            axes.text(0.8, y + 0.1, f"task {task + 1}", ha="right", va="center")
    return figure


def draw_cross_task():
    """Above: last accuracy with each memory. Below: cumulative accuracy, 3 exemplars a class."""
    figure, (bars, lines) = new_figure(6.8, 2)
    shown = [memory for memory in MEMORIES if memory[0] != "fixed"]
    for k, (loss, name, colour) in enumerate(LOSSES):
        values = np.array([[run["last_accuracy"] for run in load(f"digits_bal_ft_{loss}_{memory}")]
                           for memory, _, _ in shown])
        bars.bar(np.arange(len(shown)) + 0.38 * (k - 0.5), values.mean(axis=1), 0.36, color=colour,
                 label=name, yerr=values.std(axis=1, ddof=1), capsize=4)
        runs = load(f"digits_bal_ft_{loss}_growing")
        tasks = len(runs[0]["increments"])
        for u in range(tasks - 1):
            curves = np.array([[row[u] for row in run["cumulative_matrix"][u:]] for run in runs])
            lines.errorbar(np.arange(u + 1, tasks + 1) + 0.05 * (2 * u - 2 + k),
                           curves.mean(axis=0), curves.std(axis=0, ddof=1), capsize=2, elinewidth=1,
                           fmt="os^"[u] + ("-" if loss == "all" else "--"), color=colour,
                           label=f"{name}, tasks 1 to {u + 1}" if u else f"{name}, task 1")
    bars.set(xticks=range(len(shown)), ylabel="accuracy after\nthe last task (%)", ylim=(0, 102),
             xlabel="exemplars", title="digits, ten seeds")
    bars.set_xticklabels([label for _, label, _ in shown])
    bars.legend(loc="upper left")
    lines.set(xlabel="tasks learned", ylabel="cumulative accuracy (%)", xticks=range(1, tasks + 1),
              ylim=(0, 102), title="3 exemplars per class")
    figure.legend(*lines.get_legend_handles_labels(), ncols=2, loc="outside lower center")
    return figure


def draw_cross_task_cifar100():
    """Accuracy after each task, with two memories and losses; the poster's last ones as stars."""
    kinds = [(*memory, *loss) for memory in reversed(CIFAR_MEMORIES) for loss in LOSSES]
    figure, axes = draw_curves(
        [(f"{label}, {name}", load(f"cifar100_bal_ft_{loss}_{memory}")[:1], colour, style)
         for memory, label, _, style, loss, name, colour in kinds], "CIFAR-100, 10 tasks, seed 0")
    for _, _, column, _, _, name, colour in kinds:
        axes.plot(103, poster(name, column)[0], "*", color=colour, ms=12)
    axes.plot([], [], "*", color=GREY, ms=12, label="the paper's, after the last task")
    axes.set(xticks=range(10, 101, 10), ylim=(0, 102))
    figure.legend(ncols=2, loc="outside lower center")
    return figure


def draw_alta():
    """Which of the four vectors learn, and which are compared."""
    figure, axes = canvas(4.9)
    axes.text(2.5, 4.72, "grey: frozen, orange: learns", ha="center", va="center")
    put(axes, digit_samples()[7, 0], 0.87, 3.75, 0.75)
    box(axes, 2.6, 3.85, 1.1, 0.6, "a photo of\na seven", GREY)
    box(axes, 3.8, 3.85, 1.1, 0.6, "[v1 v2 v3 v4]\nseven.", ORANGE)
    box(axes, 0.1, 2.9, 2.3, 0.45, "image tower", GREY)
    box(axes, 2.6, 2.9, 2.3, 0.45, "text tower", GREY)
    arrow(axes, (1.25, 3.72), (1.25, 3.4))
    for x, text, colour in ((0.1, "x", GREY), (1.3, "A(x):\nadapter", ORANGE), (2.6, "w", GREY),
                            (3.8, "u", ORANGE)):
        box(axes, x, 1.9, 1.1, 0.55, text, colour)
        arrow(axes, (x + 0.55, 2.85), (x + 0.55, 2.5))
        if x > 2:
            arrow(axes, (x + 0.55, 3.8), (x + 0.55, 3.4))
    for start, end, y, text, colour in ((0.65, 4.35, 0.85, "cos(x, u)", BLUE),
                                        (1.85, 3.15, 1.4, "cos(A(x), w)", PINK)):
        axes.plot([start, start, end, end], [1.85, y, y, 1.85], color=colour, lw=1.8)
        axes.text(2.5, y - 0.2, text, ha="center", va="center", color=colour)
    axes.text(2.5, 0.25, "their sum, times s, is the logit", ha="center", va="center")
    return figure


def draw_alta_digits():
    """What replay and separate contexts bring, task after task."""
    figure, axes = new_figure(4)
    for name, label, colour in (("sgd", "ALTA without a memory", GREY),
                                ("mlp", "adapter and memory", PINK),
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
    axes.legend(loc="lower left")
    return figure


def draw_der():
    """Three branches, the newest learns; the classifier sees all, an auxiliary head the newest."""
    figure, axes = canvas(5.1)
    put(axes, digit_samples()[5, 0], 2.13, 4.25, 0.75)
    axes.text(4.15, 4.65, "one more\nwith each task", ha="center", va="center", color=ORANGE)
    for task in (1, 2, 3):
        colour, state = (ORANGE, "learns") if task == 3 else (GREY, "frozen")
        x = 1.65 * task - 0.8
        arrow(axes, (2.5, 4.2), (x, 3.8))
        box(axes, x - 0.75, 3.15, 1.5, 0.6, f"branch $F_{task}$\n{state}", colour, 11.5)
        arrow(axes, (x, 3.1), (x, 2.75))
        box(axes, x - 0.75, 2.3, 1.5, 0.4, f"features $F_{task}(x)$", colour, 11.5)
        arrow(axes, (x, 2.25), (min(x, 2.9), 1.7))
    arrow(axes, (4.15, 2.25), (4.15, 1.7), PINK)
    box(axes, 0.1, 0.15, 3.15, 1.5, "classifier: known + new,\non all features, side by side\n\n"
        "stage 1: with the branch\nstage 2: from scratch, alone,\non a balanced set", ORANGE)
    box(axes, 3.4, 0.15, 1.5, 1.5, "auxiliary head:\n1 + new\n\n(in stage 1;\n"
        "not for answers)", PINK)
    return figure


def draw_frozen():
    """A frozen backbone, random features, sums that grow, heads that are computed."""
    figure, axes = canvas(5.0)
    for k, digit in enumerate((1, 5, 8)):
        put(axes, digit_samples()[digit, 0], 1.4 + 0.8 * k, 4.25, 0.6)
    axes.text(0.65, 4.55, "each image\nonce", ha="center", va="center")
    box(axes, 0.9, 3.4, 3.2, 0.5, "backbone $\\phi(x)$, frozen", GREY, 11)
    box(axes, 0.9, 2.55, 3.2, 0.5, "$h = $ relu$(\\phi R)$, drawn once", GREY, 11)
    box(axes, 0.2, 1.35, 2.2, 0.85, "$G$ += $h^T h$\nfeatures × features", GREEN)
    box(axes, 2.6, 1.35, 2.2, 0.85, "$C$ += $h^T y$\nfeatures × classes", GREEN)
    box(axes, 0.9, 0.4, 3.2, 0.6, "all heads: $(G + \\lambda g I)^{-1} C$\nsolved anew", ORANGE)
    for start, end in (((2.5, 4.2), (2.5, 3.95)), ((2.5, 3.35), (2.5, 3.1)),
                       ((1.9, 2.5), (1.3, 2.25)), ((3.1, 2.5), (3.7, 2.25)),
                       ((1.3, 1.3), (1.9, 1.05)), ((3.7, 1.3), (3.1, 1.05))):
        arrow(axes, start, end)
    axes.text(2.5, 0.15, "green: summed over all tasks; a new class is a new column of $C$",
              ha="center", va="center", fontsize=SMALL, color=GREEN)
    return figure


def cifar_images(data_path, per_class=1):
    """{class name: [images]} from CIFAR-100 as a folder."""
    from PIL import Image
    classes = sorted(path for path in (Path(data_path) / "train").iterdir() if path.is_dir())
    return {path.name: [Image.open(image).convert("RGB")
                        for image in sorted(path.iterdir())[:per_class]] for path in classes}


def draw_data_sets(data_path):
    """The digits, and one image from each of thirty classes of CIFAR-100."""
    figure, axes = canvas(6.9)
    axes.text(0.1, 6.65, "digits: 8 x 8 pixels, 10 classes, 1,797 images", weight="bold")
    for digit, images in enumerate(digit_samples()):
        for k in range(2):
            put(axes, images[k], 0.1 + 0.485 * digit, 6.08 - 0.48 * k, 0.43)
    axes.text(0.1, 5.2, "CIFAR-100: 32 x 32 pixels, 100 classes, 60,000 images", weight="bold")
    found = list(cifar_images(data_path).items())[::3][:30]
    for i, (name, (image,)) in enumerate(found):
        x, y = 0.1 + 0.82 * (i % 6), 4.38 - 1.03 * (i // 6)
        put(axes, image, x, y, 0.7)
        axes.text(x + 0.35, y - 0.17, name.replace("_", " "), ha="center", fontsize=8.5)
    return figure


def draw_transforms(data_path):
    """What each training transform does to one image of CIFAR-100."""
    import timm.data
    import timm.utils
    from torchvision import transforms
    image = cifar_images(data_path, 8)["fox"][3]
    to_tensor = transforms.ToTensor()
    kinds = [("crop after\npadding", [transforms.RandomCrop(32, 4)]),
             ("flip", [transforms.RandomHorizontalFlip(1.0)]),
             ("RandAugment", [timm.data.auto_augment.rand_augment_transform(
                 "rand-m9-mstd0.5-inc1-mmax9", {})]),
             ("random\nerasing", [to_tensor, timm.data.random_erasing.RandomErasing(
                 1.0, mode="pixel", device="cpu")])]
    figure, axes = canvas(4.9)
    put(axes, image, 1.2, 3.95, 0.88)
    axes.text(0.1, 4.39, "the image", va="center")
    for row, (name, steps) in enumerate(kinds):
        y = 2.9 - 0.94 * row
        axes.text(0.1, y + 0.44, name, va="center")
        for k in range(4):
            timm.utils.random_seed(k + 20)
            done = transforms.Compose(steps)(image)
            pixels = done.permute(1, 2, 0).clamp(0, 1).numpy() if hasattr(done, "permute") else done
            put(axes, pixels, 1.2 + 0.94 * k, y, 0.88)
    return figure


PICTURES = [draw_digits, draw_cifar100, draw_cifar100_60, draw_epochs, draw_cifar100_methods,
            draw_forgetting, draw_confusion, draw_exemplars, draw_norms, draw_border,
            draw_temperature, draw_speed, draw_stages, draw_loop, draw_model, draw_teacher,
            draw_prototypes, draw_ddp, draw_icarl, draw_lucir, draw_podnet, draw_aanets,
            draw_alphas, draw_cross_task_loss, draw_cross_task, draw_cross_task_cifar100,
            draw_itaml, draw_continuum, draw_alta, draw_alta_digits, draw_der, draw_frozen]
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
