"""Draws tutorial/img/ and fills in the tables of the texts, from tutorial/results/*.json alone.

    python -m tutorial.figures

A table stands between the two comments <!-- table NAME --> and <!-- end -->. The tests render it
again and compare, so no number in a text can differ from its results file.
"""
import json
import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["README.md"]
# WA's ablations: file name, label, flags on top of the defaults, colour.
ABLATION = [("finetune", "finetune", "--memory_size 0 --lambda_kd 0 --no_align", "#999999"),
            ("replay", "replay", "--lambda_kd 0 --no_align", "#d55e00"),
            ("replay_kd", "replay + KD", "--no_align", "#0072b2"),
            ("replay_align", "replay + alignment", "--lambda_kd 0", "#cc79a7"),
            ("wa", "WA: replay + KD + alignment", "", "#009e73")]


def load(pattern):
    """The results files that match, as a list of dictionaries in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted((ROOT / "tutorial/results").glob(pattern))]


def ablation_table(data_set, seeds):
    """A row for each method: mean ± standard deviation over the seeds, first task included."""
    head = ["method", "flags", "average incremental accuracy (%)", "last (%)", "forgetting (points)"]
    rows = [head, ["---"] * 2 + ["---:"] * 3]
    for name, label, flags, _ in ABLATION:
        runs = load(f"{data_set}_{name}_seed*.json")
        if not runs:
            continue
        cells = []
        for key in ("average_incremental_accuracy", "last_accuracy", "forgetting"):
            values = [run[key] for run in runs]
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{spread}")
        assert len(runs) == seeds and all(run["finished"] for run in runs), (data_set, name)
        rows.append([label, f"`{flags}`" if flags else "none", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cifar_steps():
    """Accuracy after each task on CIFAR-100, a row for each method, with WA's gammas below."""
    runs = [(label, load(f"cifar100_{name}_seed0.json")) for name, label, _, _ in ABLATION]
    runs = [(label, found[0]) for label, found in runs if found]
    rows = [["method", *[f"{sum(runs[0][1]['increments'][:t + 1])} classes" for t in range(6)],
             "average"], ["---"] + ["---:"] * 7]
    for label, run in runs:
        rows.append([label, *[f"{a:.1f}" for a in run["acc1s"]],
                     f"{run['average_incremental_accuracy']:.1f}"])
        if run["gammas"]:
            rows.append([f"γ of {label.split(':')[0]}", "", *[f"{g:.2f}" for g in run["gammas"]], ""])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


TABLES = {"digits": lambda: ablation_table("digits", 10), "cifar100": cifar_steps}


def fill(text):
    """The text with each of its tables rendered anew."""
    return re.sub(r"(<!-- table (\w+) -->\n)(?:[^\n]+\n)*(<!-- end -->)",
                  lambda match: match[1] + TABLES[match[2]]() + "\n" + match[3], text)


def draw_ablation(data_set, title, path):
    """Accuracy on all classes so far after each task; the band is ± one standard deviation."""
    figure = Figure(figsize=(7, 4.2), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for name, label, _, colour in ABLATION:
        runs = load(f"{data_set}_{name}_seed*.json")
        if not runs:
            continue
        curves = np.array([run["acc1s"] for run in runs])
        classes = np.cumsum(runs[0]["increments"])
        mean, spread = curves.mean(axis=0), curves.std(axis=0, ddof=min(1, len(curves) - 1))
        axes.plot(classes, mean, "o-", color=colour, label=label)
        axes.fill_between(classes, mean - spread, mean + spread, color=colour, alpha=0.15, lw=0)
    axes.set(xlabel="classes learned so far", ylabel="test accuracy on all of them (%)",
             xticks=classes, ylim=(0, 102), title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def main():
    images = ROOT / "tutorial/img"
    images.mkdir(exist_ok=True)
    draw_ablation("digits", "Digits, 4 + 2 + 2 + 2 classes, 30 exemplars, 10 seeds",
                  images / "digits.png")
    draw_ablation("cifar100", "CIFAR-100, 50 + 5 x 10 classes, 2,000 exemplars, 20 epochs a task",
                  images / "cifar100.png")
    for name in TEXTS:
        path = ROOT / name
        path.write_text(fill(path.read_text()))


if __name__ == "__main__":
    main()
