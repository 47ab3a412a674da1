"""Fills in every table and number of the texts, from tutorial/results/ and the flags of the code.

    python -m tutorial.tools.tables

A table stands between <!-- table NAME --> and <!-- end -->, a single number between
<!-- value GROUP KEY --> and <!-- end -->. The tests fill all of them in again and compare, so no
number in a text can differ from its file.
"""
import argparse
import importlib
import json
import re

import numpy as np

import utils
from tutorial.tools import reproduce
from tutorial.tools.reproduce import RESULTS, ROOT, load

TEXTS = [ROOT / "README.md", *sorted((ROOT / "tutorial").rglob("*.md"))]
# The colours of the pictures, which are told apart by everyone; the lists below name them.
GREY, RED, BLUE, PINK, GREEN, ORANGE, BLACK, SKY, WINE = (
    "#777777", "#d55e00", "#0072b2", "#cc79a7", "#009e73", "#e69f00", "#000000", "#56b4e9", "#882255")

# WA's ablations: name of the group, label, flags on top of the defaults, colour in the pictures.
ABLATION = [("finetune", "finetune", "--memory_size 0 --lambda_kd 0 --no_align", GREY),
            ("replay", "replay", "--lambda_kd 0 --no_align", RED),
            ("replay_kd", "replay + KD", "--no_align", BLUE),
            ("replay_align", "replay + alignment", "--lambda_kd 0", PINK),
            ("wa", "WA: replay + KD + alignment", "", GREEN)]
SUMMARY = [("average_incremental_accuracy", "average incremental accuracy (%)"),
           ("last_accuracy", "last (%)"), ("forgetting", "forgetting (points)")]


def measured(name):
    """One measurement: what a file of results/ holds that is no run."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head, rows, left=1):
    """A markdown table; the first `left` columns are text, the others numbers."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def mean_std(values):
    """95.3 ± 1.2 over several runs (n - 1 in the standard deviation), 95.3 of one."""
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def summary(label, runs):
    return [*label, *(mean_std([run[key] for run in runs]) for key, _ in SUMMARY)]


def summary_table(rows, head=("method", "flags"), above=()):
    """A row for each (label, flags, group): mean ± standard deviation over the seeds. above: rows
    that are ready, to stand before them."""
    lines = [summary((label, f"`{flags}`" if flags else "none"), load(group))
             for label, flags, group in rows]
    return table([*head, *(title for _, title in SUMMARY)], [*above, *lines], left=2)


def means(rows):
    """A row for each (name, runs): mean ± standard deviation over the seeds."""
    return table(["", "runs", *(title for _, title in SUMMARY)],
                 [summary((name, len(runs)), runs) for name, runs in rows])


def gain(first, runs):
    """By how much runs differ from `first`, over the seeds that both have: -0.4 ± 0.3 (3 of 10).
    The mean of the differences seed by seed, its standard error, and the seeds with a better run."""
    if not {run["args"]["seed"] for run in first} & {run["args"]["seed"] for run in runs}:
        return ["no common seeds", "", ""]
    return [paired(first, runs, lambda run: run[key], key == "forgetting") for key, _ in SUMMARY]


def paired(first, runs, number, less=False, subtract=None):
    """By how much a number of runs differs from that of `first` (or from the number `subtract` of these),
    over the seeds that both have. less: a run with a smaller number is the better one."""
    first, runs = ({run["args"]["seed"]: of(run) for run in found}
                   for found, of in ((first, subtract or number), (runs, number)))
    differences = np.round([runs[seed] - first[seed] for seed in sorted(first.keys() & runs.keys())], 9)
    n = len(differences)
    error = f" ± {differences.std(ddof=1) / n ** 0.5:.1f}" if n > 1 else ""
    better = differences < 0 if less else differences > 0
    return f"{differences.mean():+.1f}{error} ({better.sum()} of {n})"


def gains(rows):
    """A row for each further (name, runs): its difference to the first, seed by seed."""
    (name, first), *others = rows
    return differences([(other, runs, first) for other, runs in others], f"minus {name}")


def differences(rows, head="difference, seed by seed"):
    """A row for each (label, runs, first): by how much the runs differ from `first`, as in `gain`."""
    return table([head, *(re.sub(r" \(.*", " (points)", title) for _, title in SUMMARY)],
                 [[label, *gain(first, runs)] for label, runs, first in rows])


# Chapter 9's example of a comparison: name of the row, name of the group.
COMPARED = [("wa", "wa"), ("random", "random"), ("no_align", "replay_kd")]


def compared():
    return means([(name, load(f"digits_{group}")) for name, group in COMPARED])


def compared_by_seed():
    return gains([(name, load(f"digits_{group}")) for name, group in COMPARED])


def digits():
    return summary_table([(label, flags, f"digits_{name}") for name, label, flags, _ in ABLATION])


def orders():
    """The ablation with one order of the classes for all seeds, and with an order for each."""
    rows = []
    for name, label, _, _ in ABLATION:
        for title, group in (("one", name), ("ten", f"orders_{name}")):
            rows.append(summary((label, title), load(f"digits_{group}")))
    return table(["method", "class orders", *(title for _, title in SUMMARY)], rows, left=2)


def by_ingredient(orders):
    """What each ingredient brings: without the other, and with it. orders: how the groups' names begin."""
    added = [(f"{orders}{name}", label) for name, label, *_ in ABLATION[2:4]]
    return of_digits(*((f"{label} minus replay", name, f"{orders}replay") for name, label in added),
                     *((f"WA minus {label}", f"{orders}wa", name) for name, label in added))


def digits_by_seed():
    """With one order of the classes."""
    return by_ingredient("")


def orders_by_seed():
    """With ten orders."""
    return by_ingredient("orders_")


def loop():
    """A run of the digits, task by task: what is trained on, and what is left."""
    run, (train_y, _) = load("digits_wa")[0], [y for _, y in utils.load_digits()]
    args, lines, known, kept = run["args"], [], 0, 0
    for task, new in enumerate(run["increments"]):
        images = int(np.isin(train_y, run["class_order"][known:known + new]).sum())
        steps = (images + known * kept) // args["batch_size"]
        gamma = f"{run['gammas'][task - 1]:.2f}" if task else ""
        weight, old = args["lambda_kd"] if task else "", f"{known} x {kept}" if task else "none"
        known, kept = known + new, args["memory_size"] // (known + new)
        lines.append([task + 1, new, images, old, steps, weight, f"{known} x {kept}", gamma,
                      f"{run['acc1s'][task]:.1f}"])
    return table(["task", "new classes", "new images", "exemplars of old classes", "steps per epoch",
                  "λ", "exemplars afterwards", "γ", "accuracy on all classes so far (%)"], lines)


def settings():
    """The defaults of WA for the data sets of the book, and where each is explained."""
    rows = [("network", "backbone", 3), ("side of an image, pixels", "input_size", 2),
            ("classes of the first task (0: as many as in each further one)", "num_bases", 2),
            ("classes of each further task", "increment", 2),
            ("order of the classes", "class_order", 2), ("augmentation beside crop and flip", "aa", 2),
            ("images in a batch, over all processes", "batch_size", 11), ("epochs per task", "num_epochs", 4),
            ("learning rate at the start", "lr", 4), ("momentum", "momentum", 4), ("weight decay", "weight_decay", 4),
            ("label smoothing", "smooth", 4), ("weight λ of the distillation", "lambda_kd", 7),
            ("temperature T", "temperature", 7), ("exemplars in total", "memory_size", 6),
            ("the same number per class from the start", "fixed_memory", 6),
            ("choice of exemplars", "herding_method", 6), ("no weight alignment", "no_align", 8)]
    parser, names = utils.get_parser(), {path.name[:2]: path.name for path in TEXTS}
    presets = [vars(utils.fill_in(parser.parse_args(["--data_set", name])))
               for name in ("digits", "cifar100", "image_folder")]
    words = {True: "yes", False: "no"}
    return table(["setting", "flag", "digits", "CIFAR-100", "a folder of images", "chapter"], [
        [label, f"`--{flag}`", *(words.get(preset[flag], preset[flag]) if isinstance(preset[flag], bool)
                                 else preset[flag] for preset in presets),
         f"[{chapter}]({names[f'{chapter:02d}']})"] for label, flag, chapter in rows], left=2)


# Ways to choose exemplars, beside herding: name of the group, label, flags.
CHOICES = [("cluster", "nearest to the class mean", "--herding_method cluster"),
           ("random", "random", "--herding_method random"),
           ("entropy", "least certain", "--herding_method entropy"),
           ("fixed", "herding, fixed memory", "--fixed_memory")]


def memory():
    return summary_table([("herding", "", "digits_wa"), *((label, flags, f"digits_{name}") for name, label, flags in CHOICES)],
                         ("exemplars", "flags"))


def memory_by_seed():
    return of_digits(*((f"{label}, minus herding", name, "wa") for name, label, _ in CHOICES))


def distillation():
    return summary_table([
        ("no KD", "--lambda_kd 0", "digits_replay_align"),
        ("λ = 0.4", "", "digits_wa"),
        ("λ = 0.4, times T² = 4", "--variant t_squared", "digits_t2"),
        ("dynamic λ", "--lambda_kd dynamic", "digits_dynamic"),
        ("dynamic λ, divided by 1 - λ", "--variant unscaled --lambda_kd dynamic", "digits_unscaled_dynamic")],
        ("distillation", "flags"))


def clipping():
    return summary_table([("WA", "", "digits_wa"),
                          ("WA, weights clipped at 0", "--variant clipped", "digits_clipped")])


def ideas():
    return summary_table([
        ("WA, `template.py` as it is", "", "digits_wa"),
        ("1. balanced softmax, no alignment", "--no_align", "digits_balanced"),
        ("2. the hardest exemplars", "", "digits_hardest"),
        ("3. three convolutions", "--backbone tinynet", "digits_tiny"),
        ("`feature_kd.py`", "--feature_weight 1", "digits_feature")], ("idea", "flags"))


def cifar100():
    """Accuracy after each task on CIFAR-100, a row for each method, with WA's gammas below."""
    runs = [(label, load(f"cifar100_{name}")[:1]) for name, label, _, _ in ABLATION]
    runs = [(label, found[0]) for label, found in runs if found]
    rows = []
    for label, run in runs:
        rows.append([label, *[f"{a:.1f}" for a in run["acc1s"]],
                     f"{run['average_incremental_accuracy']:.1f}"])
        if run["gammas"]:
            rows.append([f"γ of {label.split(':')[0]}", "", *[f"{g:.2f}" for g in run["gammas"]], ""])
    classes = np.cumsum(runs[0][1]["increments"])
    return table(["method", *[f"{n} classes" for n in classes], "average"], rows)


# The runs with 60 epochs a task: name of the group, label, colour in the picture.
LONG = [*((name, label, colour) for name, label, _, colour in ABLATION), ("lucir", "LUCIR", SKY),
        ("podnet", "PODNet", WINE),
        ("frozen_means", "frozen backbone, class means", ORANGE), ("frozen_ridge", "frozen backbone, ridge", BLACK)]


def cifar100_60():
    """Accuracy after each task on CIFAR-100 with 60 epochs a task, and what it costs."""
    rows = []
    for name, label, _ in LONG:
        for run in load(f"cifar100_{name}_60"):  # (Not all of them have been made.)
            # An image has 32 x 32 pixels of three bytes.
            rows.append([label, *(f"{a:.1f}" for a in (*run["acc1s"], run["average_incremental_accuracy"], run["forgetting"])),
                         f"{run['seconds'] / 60:.0f}", f"{run['parameters'] / 1e6:.2f}",
                         f"{run['args']['memory_size'] * 3 * 32 ** 2 / 1e6:.1f}"])
            if run["gammas"]:
                rows.append([f"γ of {label.split(':')[0]}", "", *(f"{g:.2f}" for g in run["gammas"]), *[""] * 5])
    return table(["method", *(f"{n} classes" for n in np.cumsum(run["increments"])), "average (%)", "forgetting (points)",
                  "minutes", "million weights", "MB of images"], rows)


def published_by_method():
    """What others published for 50 + 5 x 10 classes: the row of each method."""
    return {row["method"]: row for row in measured("published")["rows"]
            if row["protocol"] == "base 50, increment 10"}


# WA and plain replay with more and more epochs a task: epochs, how the names of their groups end.
EPOCHS = [(5, "_5"), (20, ""), (60, "_60")]


def epochs():
    """What the number of epochs is worth to WA, and to replay without KD and alignment."""
    rows = []
    for n, end in EPOCHS:
        wa, replay = (load(f"cifar100_{name}{end}")[0] for name in ("wa", "replay"))
        rows.append([n, *(f"{run[key]:.1f}" for key in ("average_incremental_accuracy", "last_accuracy") for run in (replay, wa)),
                     f"{wa['last_accuracy'] - replay['last_accuracy']:+.1f}", f"{wa['gammas'][0]:.2f}", f"{wa['gammas'][-1]:.2f}"])
    found = published_by_method()
    wa, replay = found["WA (PyCIL)"], found["replay"]
    rows.append([f"PyCIL: {wa['epochs']} (replay: {replay['epochs']})", *(f"{row[key]:.1f}" for key in ("average", "last") for row in (replay, wa)),
                 f"{wa['last'] - replay['last']:+.1f}", "", ""])
    return table(["epochs a task", "replay: average (%)", "WA: average (%)", "replay: last (%)", "WA: last (%)",
                  "WA minus replay, last", "γ of task 2", "γ of task 6"], rows)


# What is told of a run after its second task: the column, and the number of a run.
SECOND = {"60 classes": lambda run: f"{run['acc1s'][1]:.1f}", "γ of task 2": lambda run: f"{run['gammas'][0]:.2f}",
          "old classes": lambda run: f"{run['accuracy_matrix'][1][0]:.1f}",
          "new classes": lambda run: f"{run['accuracy_matrix'][1][1]:.1f}",
          "old classes, task told": lambda run: f"{run['task_aware_matrix'][1][0]:.1f}"}


def more_epochs():
    """Two losses with 20 and with 60 epochs: after the second task."""
    rows = []
    for label, epochs, tested, name in (
            ("dynamic λ, as published", 20, "held-out", "validation_dynamic"),
            ("the same, divided by 1 - λ", 20, "held-out", "validation_unscaled_dynamic"),
            ("dynamic λ, as published", 60, "test", "cifar100_wa_60"),
            ("the same, divided by 1 - λ", 60, "test", "cifar100_unscaled_60")):
        run = load(name)[0]
        rows.append([label, tested, epochs, *(number(run) for number in SECOND.values())])
    return table(["loss", "images", "epochs", *SECOND], rows, left=2)


def validation():
    """CIFAR-100 with other weights of the distillation, on held-out training images."""
    rows = []
    for label, name in (("CE, no KD", "replay_align"), ("0.5 CE + 0.5 KD", "05"), ("0.33 CE + 0.67 KD", "067"),
                        ("dynamic λ: 0.17 CE + 0.83 KD", "dynamic"),
                        ("CE + KD", "unscaled_05"), ("CE + 2 KD", "survey"),
                        ("dynamic λ, divided: CE + 5 KD", "unscaled_dynamic")):
        run = load(f"validation_{name}")[0]
        third = len(run["acc1s"]) > 2  # some stop after the second task
        rows.append([label, *(number(run) for number in SECOND.values()), f"{run['acc1s'][2]:.1f}" if third else "",
                     f"{run['gammas'][1]:.2f}" if third else ""])
    return table(["loss", *SECOND, "70 classes", "γ of task 3"], rows)


def matrix():
    """The accuracy matrix of one run."""
    run = load("digits_wa")[0]
    tasks = range(len(run["increments"]))
    rows = [[f"after task {t + 1}", *[f"{a:.1f}" for a in row], *[""] * (len(tasks) - t - 1),
             f"{run['acc1s'][t]:.1f}"] for t, row in enumerate(run["accuracy_matrix"])]
    return table(["", *[f"images of task {u + 1}" for u in tasks], "all"], rows)


def two_averages():
    """Averages with and without the first task: of the WA paper, and of our runs."""
    curves = [(f"{row['method']}, {row['protocol']}", row["acc1s"])
              for row in measured("published")["rows"] if "acc1s" in row]
    curves.append(("WA (here, 60 epochs a task), base 50, increment 10", load("cifar100_wa_60")[0]["acc1s"]))
    return table(["method, protocol", "accuracy after each task", "average", "without the first"], [
        [name, ", ".join(f"{a:.1f}" for a in acc1s), f"{np.mean(acc1s):.1f}",
         f"{np.mean(acc1s[1:]):.1f}"] for name, acc1s in curves], left=2)


def wa_paper():
    """The ablation of the WA paper, on CIFAR-100."""
    return table(["method", "average without the first (%)", "last (%)"], [
        [row["method"], f"{row['without_first']:.1f}", f"{row['last']:.1f}"] for row in measured("published")["wa_paper"]])


def awareness():
    """The last row of both matrices: is a class found among all, or among its own task's?"""
    rows = []
    for name, label, _, _ in ABLATION:
        runs = load(f"digits_{name}")
        agnostic = [run["accuracy_matrix"][-1] for run in runs]
        aware = [run["task_aware_matrix"][-1] for run in runs]
        rows.append([label, *(mean_std([np.mean(row) for row in kind]) for kind in (agnostic, aware))])
    return table(["method", "task-agnostic (%)", "task-aware (%)"], rows)


def awareness_cifar100():
    """The same on CIFAR-100, one run each, with two methods of later chapters: task 1 and all tasks."""
    rows = []
    for name, label in (("replay", "replay"), ("replay_kd", "replay + KD"), ("wa", "WA"), ("icarl", "iCaRL"),
                        ("lucir", "LUCIR")):
        run = load(f"cifar100_{name}")[0]
        matrices = [run[key][-1] for key in ("accuracy_matrix", "task_aware_matrix")]
        rows.append([label, *(f"{found[0]:.1f}" for found in matrices), *(f"{np.mean(found):.1f}" for found in matrices)])
    return table(["method", "task 1, agnostic (%)", "task 1, aware (%)", "mean of the tasks, agnostic (%)",
                  "mean of the tasks, aware (%)"], rows)


def published():
    """The numbers of others beside ours, each with its schedule."""
    rows = [[row["method"].split(" (")[0], row["protocol"], row["source"], row.get("average", ""), row["last"]]
            for row in measured("published")["rows"]]
    for name, label, _, _ in ABLATION:
        for run in load(f"cifar100_{name}")[:1] + load(f"cifar100_{name}_60")[:1]:
            rows.append([label.split(":")[0], "base 50, increment 10", f"here, {run['args']['num_epochs']} "
                         "epochs a task, no RandAugment", f"{run['average_incremental_accuracy']:.1f}",
                         f"{run['last_accuracy']:.1f}"])
    rows.sort(key=lambda row: (row[1], row[0]))
    return table(["method", "protocol", "source", "average (%)", "last (%)"], rows, left=3)


def runs():
    """Every group of runs: its command, seeds, the minutes of one run, and the trainer's version."""
    rows = [[f"`{name}`", f"`{command}`", *rest] for name, command, *rest in reproduce.listing()]
    return table(["group", "command", "seeds", "minutes", "trainer"], rows, left=3)


# Every method on the digits: label, command, name of the group.
METHODS = [("WA", "template.py", "wa"), ("iCaRL", "-m tutorial.methods.icarl", "icarl"),
           ("LUCIR", "-m tutorial.methods.lucir", "lucir"), ("PODNet", "-m tutorial.methods.podnet", "podnet"),
           ("LUCIR + AANets", "-m tutorial.methods.aanets", "aanets_lucir"),
           ("BAL_FT", "-m tutorial.methods.bal_ft", "bal_ft_all_fixed"),
           ("iTAML, one image", "-m tutorial.methods.itaml", "itaml_paper"), ("DER", "-m tutorial.methods.der", "der"),
           ("frozen backbone, ridge", "-m tutorial.methods.frozen --adapt --head ridge", "frozen_ridge")]


def presets():
    """The defaults in which the methods differ, on two data sets."""
    rows = []
    for data_set, title, classes in (("digits", "digits", 10), ("cifar100", "CIFAR-100", 100)):
        for label, command, _ in METHODS:
            module = importlib.import_module(command.removeprefix("-m ").split()[0].removesuffix(".py"))
            parser = getattr(module, "get_parser", utils.get_parser)()
            found = vars(utils.fill_in(parser.parse_args(["--data_set", data_set])))
            size, second = found["memory_size"], found.get("num_epochs_ft")
            kept = "none" if not size else f"{size // classes} per class" if found["fixed_memory"] else f"{size} in all"
            tasks = " + ".join(map(str, [found["num_bases"] or found["increment"], found["increment"], "…"]))
            rows.append([title, label.split(",")[0], found["backbone"], tasks, found["num_epochs"],
                         f"{second} at {found['lr_ft']}" if second else "", found["lr"],
                         found["weight_decay"], kept, "no" if found["aa"] == "none" else "yes"])
    return table(["data", "method", "network", "classes", "epochs", "second stage", "learning rate", "weight decay",
                  "exemplars", "RandAugment"], rows, left=4)


def methods():
    """Every method on the digits; iCaRL has two answers."""
    rows = [summary((label, f"`{command}`"), load(f"digits_{name}")) for label, command, name in METHODS]
    found = [run["network_acc1s"] for run in load("digits_icarl")]
    rows.insert(2, ["iCaRL, the network's own answer", "the same runs", mean_std(np.mean(found, axis=1)),
                    mean_std([accuracies[-1] for accuracies in found]), ""])
    return table(["method", "command", *(title for _, title in SUMMARY)], rows, left=2)


def of_digits(*rows):
    """The differences of (label, group, first group) on the digits."""
    return differences([(label, load(f"digits_{name}"), load(f"digits_{first}")) for label, name, first in rows])


def ideas_by_seed():
    return of_digits(("balanced softmax minus WA", "balanced", "wa"), ("the hardest exemplars minus WA", "hardest", "wa"),
                     ("three convolutions minus WA", "tiny", "wa"), ("`feature_kd.py` minus WA", "feature", "wa"))


def icarl_by_seed():
    """The methods' table once more, against WA; and iCaRL's two answers against each other."""
    runs = load("digits_icarl")
    network = [run | {"average_incremental_accuracy": np.mean(run["network_acc1s"]),
                      "last_accuracy": run["network_acc1s"][-1]} for run in runs]
    rows = [(f"{label}{',' * (',' in label)} minus WA", load(f"digits_{name}"), load("digits_wa"))
            for label, _, name in METHODS[1:]]
    text = differences([*rows, ("iCaRL: nearest mean minus network", runs, network)])
    return text[:text.rindex("|", 0, -1)] + "|  |"  # (the network's own forgetting is not recorded)


def lucir_by_seed():
    return of_digits(("LUCIR minus WA", "lucir", "wa"), ("LUCIR minus iCaRL", "lucir", "icarl"))


def podnet_by_seed():
    return of_digits(("PODNet minus WA", "podnet", "wa"), ("PODNet minus iCaRL", "podnet", "icarl"),
                     ("PODNet minus LUCIR", "podnet", "lucir"))


def aanets_by_seed():
    return of_digits(("two equal branches minus LUCIR alone", "aanets_free", "lucir"),
                     ("stable and plastic, α one half, minus LUCIR alone", "aanets_half", "lucir"),
                     ("LUCIR + AANets minus LUCIR alone", "aanets_lucir", "lucir"),
                     ("α one half minus two equal branches", "aanets_half", "aanets_free"),
                     ("LUCIR + AANets minus two equal branches", "aanets_lucir", "aanets_free"),
                     ("LUCIR + AANets minus α one half", "aanets_lucir", "aanets_half"),
                     ("LUCIR + AANets minus WA", "aanets_lucir", "wa"))


def alta_by_seed():
    """Some rows of ALTA's table against others."""
    full = "alta_oritext_mlp2cprompt_oriimg"
    return of_digits(("ALTA minus ALTA without a memory", full, "alta_sgd"),
                     ("ALTA minus a context for each task", full, "alta_cprompt"),
                     ("ALTA minus two cosines, not crossed", full, "alta_oriclip2cprompt_mlp"),
                     ("a context for each task minus one context", "alta_cprompt", "alta_sprompt"),
                     ("ALTA, rate as released, minus ALTA", "alta_constant", full),
                     ("ALTA, classes to come compete, minus ALTA", "alta_all", full))


def der_by_seed():
    return of_digits(("DER minus WA", "der", "wa"),
                     ("without the auxiliary head minus DER", "der_no_aux", "der"),
                     ("without the second stage minus DER", "der_one_stage", "der"),
                     ("without the second stage minus WA", "der_one_stage", "wa"))


def aanets():
    """The ablations of AANets on the digits."""
    return summary_table([
        ("LUCIR alone, chapter 16", "", "digits_lucir"),
        ("one branch", "--branch_mode single --branch_1 free", "digits_aanets_single"),
        ("two equal branches", "--branch_1 free --branch_2 free --fusion_lr 0", "digits_aanets_free"),
        ("stable and plastic, α one half", "--fusion_lr 0", "digits_aanets_half"),
        ("LUCIR + AANets: α learned", "", "digits_aanets_lucir")])


# The methods on CIFAR-100: name of the group, label, colour.
CIFAR_METHODS = [("wa", "WA", GREY), ("icarl", "iCaRL", PINK), ("lucir", "LUCIR", BLUE),
                 ("podnet", "PODNet", ORANGE), ("aanets_lucir", "LUCIR + AANets", GREEN),
                 ("der", "DER", RED)]


def cifar100_methods():
    """Accuracy after each task; iCaRL has two answers."""
    rows = []
    for name, label, _ in CIFAR_METHODS:
        run = load(f"cifar100_{name}")[0]
        rows.append([label, *[f"{a:.1f}" for a in run["acc1s"]], f"{run['average_incremental_accuracy']:.1f}",
                     f"{run['forgetting']:.1f}"])
        if "network_acc1s" in run:
            found = run["network_acc1s"]
            rows.append([f"{label}, the network's own answer", *[f"{a:.1f}" for a in found],
                         f"{np.mean(found):.1f}", ""])
    return table(["method", *[f"{n} classes" for n in np.cumsum(run["increments"])], "average (%)",
                  "forgetting (points)"], rows)


def base_50():
    """Published averages of the methods; N further tasks after a base of half of the classes."""
    rows = []
    for row in measured("published")["base_50"]:
        numbers = [f"{a:.1f}" for key in ("cifar100", "imagenet100") for a in (*row[key], *[np.nan] * 3)[:3]]
        rows.append([row["method"], *(number.replace("nan", "") for number in numbers), row["source"]])
    return table(["method", *(f"{data}, N = {n}" for data in ("CIFAR-100", "ImageNet-Subset") for n in (5, 10, 25)),
                  "source"], rows)


# Memory of BAL_FT on the digits: name of the group, label, flags.
MEMORIES = [("growing", "3 per class", "--fixed_memory"),
            ("fixed", "30 in total", ""),
            ("growing20", "20 per class", "--fixed_memory --memory_size 200"),
            ("joint", "all images", "--upper_bound joint")]
LOSSES = [("all", "+CTF", BLUE), ("own", "-CTF", ORANGE)]


def class_weighted(accuracies, increments):
    """The mean of the tasks' accuracies, of which each counts by its number of classes."""
    return float(np.average(accuracies, weights=increments[:len(accuracies)]))


def cumulative_forgetting(matrix):
    """Mean over k < T of max_{t<=T} b[t][k] - b[T][k], percent points, at least 0 (Soutif et al.,
    2021, arXiv 2106.11930). matrix: b, the cumulative accuracies; row t has t + 1 entries."""
    last = len(matrix) - 1
    drops = [max(row[k] for row in matrix[k:]) - matrix[last][k] for k in range(last)]
    return sum(drops) / len(drops) if drops else 0.0


# Four numbers after the last task: accuracy, its two causes, and cumulative forgetting.
CAUSES = {"last (%)": lambda run: run["last_accuracy"],
          "task inference (%)": lambda run: run["task_inference"][-1],
          "task-aware (%)": lambda run: class_weighted(run["task_aware_matrix"][-1], run["increments"]),
          "cumulative forgetting (points)": lambda run: cumulative_forgetting(run["cumulative_matrix"])}


def causes(runs):
    return [mean_std([number(run) for run in runs]) for number in CAUSES.values()]


def causes_by_seed(rows):
    """A row for each (label, runs, first): the difference of the four numbers, seed by seed."""
    return table(["difference, seed by seed", *(title.replace("(%)", "(points)") for title in CAUSES)], [
        [label, *(paired(first, runs, number, "forgetting" in title) for title, number in CAUSES.items())]
        for label, runs, first in rows])


def cross_task():
    """With and without cross-task features, for each kind of memory."""
    rows = [[f"{label}, {name}", f"`--loss {loss} {flags}`".replace(" `", "`"),
             *causes(load(f"digits_bal_ft_{loss}_{memory}"))]
            for memory, label, flags in MEMORIES for loss, name, _ in LOSSES]
    return table(["memory, loss", "flags", *CAUSES], rows, left=2)


def cross_task_by_seed():
    return causes_by_seed([(f"{label}: +CTF minus -CTF", *(load(f"digits_bal_ft_{loss}_{memory}") for loss, _, _ in LOSSES))
                           for memory, label, _ in MEMORIES])


def cross_task_validation():
    """The choice of the validation images."""
    rows = [[f"{'of the newest task' if which == 'new' else 'of all tasks so far'}, {name}",
             f"`--loss {loss} --fixed_memory --patience 3 --validation {which}`",
             *causes(load(f"digits_bal_ft_{loss}_validate_{which}"))]
            for which in ("new", "seen") for loss, name, _ in LOSSES]
    return table(["validation images, loss", "flags", *CAUSES], rows, left=2)


def cross_task_validation_by_seed():
    """The same choice, and none at all, each against another."""
    runs = {(loss, which): load(f"digits_bal_ft_{loss}_{which}")
            for loss, _, _ in LOSSES for which in ("validate_new", "validate_seen", "growing")}
    return causes_by_seed([(f"{name}: {label}", runs[loss, one], runs[loss, other]) for loss, name, _ in LOSSES
                           for label, one, other in (
                               ("all tasks minus newest task", "validate_seen", "validate_new"),
                               ("all tasks minus no validation", "validate_seen", "growing"),
                               ("newest task minus no validation", "validate_new", "growing"))])


# Memory of BAL_FT on CIFAR-100: name of the group, label, column of the paper's poster, line.
CIFAR_MEMORIES = [("growing", "20 per class", "20", "-"), ("joint", "all images", "all", "--")]


def poster(name, column):
    """[mean, deviation] of the last accuracy with ten tasks and the loss +CTF or -CTF."""
    row, = (row for row in measured("published")["cross_task"] if (row["tasks"], row["loss"]) == (10, name))
    return row[column]


def cross_task_cifar100():
    """The same on CIFAR-100, one seed, and what the paper's poster says."""
    rows = []
    for memory, label, column, _ in CIFAR_MEMORIES:
        found = [load(f"cifar100_bal_ft_{loss}_{memory}")[:1] for loss, _, _ in LOSSES]
        theirs = [poster(name, column) for _, name, _ in LOSSES]
        for (_, name, _), runs, (mean, deviation) in zip(LOSSES, found, theirs):
            args = runs[0]["args"]
            rows.append([f"{label}, {name}", f"{args['num_epochs']} + {args['num_epochs_ft']}", *causes(runs),
                         f"{mean:g} ± {deviation:g}"])
        ours = [runs[0]["last_accuracy"] for runs in found]
        rows.append([f"{label}: +CTF minus -CTF", "", f"{ours[0] - ours[1]:.1f}", "", "", "",
                     f"{theirs[0][0] - theirs[1][0]:.1f}"])
    return table(["memory, loss", "epochs of stages 1 + 2", *CAUSES, "poster, last (%)"], rows)


def cross_task_shares():
    """What the step from few images and -CTF to all images and +CTF consists of: by the loss first, or
    by the images first."""
    def cells(one, other):
        """The differences of two (loss, memory): on the digits, CIFAR-100 twice, and the poster."""
        ours = [load(f"digits_bal_ft_{loss}_{memory.replace('growing', 'growing20')}") for loss, memory in (one, other)]
        cifar = [load(f"cifar100_bal_ft_{loss}_{memory}") for loss, memory in (one, other)]
        columns, names = dict((m, c) for m, _, c, _ in CIFAR_MEMORIES), {loss: name for loss, name, _ in LOSSES}
        theirs = [poster(names[loss], columns[memory])[0] for loss, memory in (one, other)]
        return [paired(ours[1], ours[0], CAUSES["last (%)"]),
                *(f"{CAUSES[key](cifar[0][0]) - CAUSES[key](cifar[1][0]):+.1f}" for key in list(CAUSES)[:2]),
                f"{theirs[0] - theirs[1]:+.1f}"]
    few, every = "growing", "joint"
    return table(["what changes", "digits, last", "CIFAR-100, last", "CIFAR-100, task inference", "poster, last"], [
        ["the loss, with 20 per class", *cells(("all", few), ("own", few))],
        ["the loss, with all images", *cells(("all", every), ("own", every))],
        ["all images in place of 20 per class, -CTF", *cells(("own", every), ("own", few))],
        ["all images in place of 20 per class, +CTF", *cells(("all", every), ("all", few))],
        ["both", *cells(("all", every), ("own", few))]])


def cross_task_published():
    rows = measured("published")["cross_task"]
    memories = ("20", "10", "5", "2", "all")
    return table(["tasks", "loss", *[f"{m} per class" if m != "all" else "all images" for m in memories]], [
        [row["tasks"], row["loss"], *[f"{row[m][0]:g} ± {row[m][1]:g}" for m in memories]] for row in rows],
        left=2)


def inference():
    """Every method on the digits: is the task found, and the class within it? From the last confusion
    matrix, so that it holds for every run."""
    rows = []
    # (Not of the frozen backbone, which has no memory.)
    for label, _, name in [("finetune", "", "finetune"), ("replay", "", "replay"), *METHODS[:-1]]:
        runs, shares = load(f"digits_{name}"), []
        for run in runs:
            task = np.repeat(np.arange(len(run["increments"])), run["increments"])
            confusion = np.array(run["confusion"])
            shares.append(100 * confusion[task[:, None] == task].sum() / confusion.sum())
        rows.append([label, mean_std([run["last_accuracy"] for run in runs]), mean_std(shares)])
    return table(["method", "last (%)", "task inference (%)"], rows)


# iTAML's four numbers: label, name in the files.
FOUR = [("base", "base"), *((f"{name} ({p})", f"{name.replace(' ', '_')}_{p}")
                            for name in ("continuum", "task accuracy") for p in (1, 5, 20)), ("oracle", "oracle")]


def itaml_rows(t):
    """(label, what gives the number after task t of a run) of the four, and of one beside the oracle: the
    task is told, and the network is not adapted."""
    return [*((name, lambda run, key=key: run[key][t]) for name, key in FOUR),
            ("task told, no adaptation", lambda run: class_weighted(run["task_aware_matrix"][t], run["increments"]))]


def itaml():
    """The four numbers after the last task, for both outer steps, and their difference."""
    paper, released = (load(f"digits_itaml_{meta}") for meta in ("paper", "released"))
    return table(["digits", "`--meta paper`", "`--meta released`", "released minus paper, seed by seed"], [
        [name, *(mean_std([number(run) for run in runs]) for runs in (paper, released)), paired(paper, released, number)]
        for name, number in itaml_rows(-1)])


def itaml_by_seed():
    """What adaptation and more images bring, and how far base is from WA: last accuracies."""
    number, rows = dict(itaml_rows(-1)), []
    for label, one, other in (("oracle minus task told, no adaptation", "oracle", "task told, no adaptation"),
                              ("continuum (1) minus base", "continuum (1)", "base"),
                              ("continuum (20) minus continuum (1)", "continuum (20)", "continuum (1)"),
                              ("oracle minus continuum (20)", "oracle", "continuum (20)")):
        rows.append([label, *(paired(runs, runs, number[one], subtract=number[other]) for runs in (
            load("digits_itaml_paper"), load("digits_itaml_released")))])
    rows.append(["base minus WA", *(paired(load("digits_wa"), load(f"digits_itaml_{meta}"), CAUSES["last (%)"])
                                    for meta in ("paper", "released"))])
    return table(["difference, seed by seed (points)", "`--meta paper`", "`--meta released`"], rows)


def itaml_cifar100():
    """The four numbers on CIFAR-100, after the first task, which both outer steps share, and after the second."""
    paper, released = (load(f"cifar100_itaml_{meta}")[0] for meta in ("paper", "released"))
    columns = [[f"{number(run):.1f}" for _, number in itaml_rows(t)]
               for run, t in ((paper, 0), (paper, 1), (released, 1))]
    return table(["CIFAR-100", "10 classes", "20 classes, `--meta paper`", "20 classes, `--meta released`"], [
        [name, *cells] for (name, _), *cells in zip(itaml_rows(0), *columns)])


def itaml_adaptation():
    """The oracle on CIFAR-100 after two tasks with other learning rates of the adaptation."""
    rows = [measured(f"adaptation_cifar100_itaml_{meta}_seed0")["rows"] for meta in ("paper", "released")]
    return table(["learning rate of the adaptation", "`--meta paper`", "`--meta released`"], [
        [f"{paper['rate']:g}", f"{paper['oracle']:.1f}", f"{released['oracle']:.1f}"] for paper, released in zip(*rows)])


def itaml_published():
    rows = measured("published")["itaml"]
    return table(["data", "tasks", "p", "accuracy (%)", "measure"], [
        [row["data"], row["tasks"], row["p"], f"{row['last']:.1f}", row["measure"]] for row in rows], left=2)


def der():
    """The ablations of DER on the digits."""
    return summary_table([("DER", "", "digits_der"),
                          ("without the auxiliary head", "--lambda_aux 0", "digits_der_no_aux"),
                          ("without the second stage", "--num_epochs_ft 0", "digits_der_one_stage")])


def der_published():
    rows = measured("published")["der"]
    return table(["CIFAR-100", "backbone", "pruned", "source", "average (%)", "last (%)"], [
        [row["protocol"], row["backbone"], row["pruned"], row["source"], f"{row['average']:.1f}",
         f"{row['last']:.1f}" if "last" in row else ""] for row in rows], left=4)


# The classifiers of a frozen backbone: name, label, flags.
HEADS = [("means", "class means", ""), ("bare", "ridge, no random layer", "--head ridge --projection 0"),
         ("ridge", "ridge on random features", "--head ridge")]
# A frozen backbone on the digits: name of the group, label, flags.
FROZEN = [*((f"frozen_{name}", label, f"--adapt {flags}".rstrip()) for name, label, flags in HEADS),
          ("frozen_untrained_means", "untrained network, class means", ""),
          ("frozen_untrained", "untrained network, ridge", "--head ridge")]
# Where it is compared with WA: label, group, WA's group.
FROZEN_PROTOCOLS = [("4 + 2 + 2 + 2", "frozen_ridge", "wa"), ("4 + 1 + 1 + 1 + 1 + 1 + 1", "frozen_one", "wa_one"),
                    ("5 even, then 5 odd", "frozen_even", "wa_even")]


def frozen():
    """Both heads on a trained first task, and on a network that nobody trained."""
    return summary_table([("WA, 30 exemplars", "", "digits_wa"), *((label, flags, f"digits_{name}")
                                                                   for name, label, flags in FROZEN)])


def frozen_by_seed():
    return of_digits(*((f"{label} minus WA", name, "wa") for name, label, _ in FROZEN),
                     ("ridge on random features minus ridge, no random layer", "frozen_ridge", "frozen_bare"),
                     *((f"{label}: ridge minus WA", name, wa) for label, name, wa in FROZEN_PROTOCOLS[1:]),
                     ("5 even, then 5 odd: class means minus WA", "frozen_even_means", "wa_even"))


def frozen_clip():
    """A network that was pre-trained on half of the classes, with ALTA's tasks: frozen, or with ALTA on top."""
    alta = "digits_alta_oritext_mlp2cprompt_oriimg"
    rows = [("ALTA", "200 features", alta), ("ALTA, all classes at once", "", "digits_alta_joint"),
            *((label, "none", f"digits_frozen_clip_{name}") for name, label, _ in HEADS)]
    return table(["tiny CLIP, frozen", "what is kept", *(title for _, title in SUMMARY)], [
        ["zero-shot, from the names", "", "", mean_std(measured("alta")["seeds"]["zero_shot"]), ""],
        *(summary((label, kept), load(group)) for label, kept, group in rows)], left=2)


def frozen_when():
    """Protocol by protocol, what each way costs and gives. Seconds of one run, the median."""
    ways = [way for label, name, wa in FROZEN_PROTOCOLS
            for way in ((label, "freeze", "none", name), (label, "train (WA)", "30", wa))]
    rows = []
    for *way, name in [*ways, ("none: the network is not trained", "freeze at once", "none", "frozen_untrained")]:
        runs = load(f"digits_{name}")
        rows.append([*way, f"{np.median([run['seconds'] for run in runs]):.0f}",
                     *(mean_std([run[key] for run in runs]) for key, _ in SUMMARY[:2])])
    return table(["classes: the first task, then the others", "what", "images kept", "seconds",
                  "average (%)", "last (%)"], rows, left=3)


def frozen_cifar100():
    """CIFAR-100 with a network that was trained on the first 50 classes, for 60 epochs. The first task's training
    was done once: its minutes are in a row of their own."""
    first = load("cifar100_first_60")[0]
    rows = [["the first task's training", f"{first['seconds'] / 60:.0f}", f"{first['acc1s'][0]:.1f}"] + [""] * 6]
    for name, label, *_ in [*HEADS, ("one", "the same, one class at a time")]:
        run = load(f"cifar100_frozen_{name}_60")[0]
        shown = run["acc1s"][::(len(run["acc1s"]) - 1) // 5]  # after 50, 60, ... classes
        rows.append([label, f"{(run['seconds'] - first['seconds']) / 60:.0f}",
                     *(f"{a:.1f}" for a in (*shown, run["average_incremental_accuracy"]))])
    classes = np.cumsum(first["increments"])
    return table(["CIFAR-100", "minutes", *(f"{n} classes" for n in classes), "average"], rows)


def frozen_published():
    rows = measured("published")["frozen"]
    return table(["CIFAR-100", "backbone", "trained on", "source", "last (%)"], [
        [row["what"], row["backbone"], row["trained on"], row["source"], f"{row['last']:.1f}"] for row in rows],
        left=4)


# ALTA on the digits: name of the group, label, flags.
CLIP_RUNS = [("sgd", "lower bound: ALTA without a memory", "--memory_size 0"),
             *((name, label, f"--clip_method {name}") for name, label in (
                 ("mlp", "adapter"), ("resmlp", "adapter, added to the image"),
                 ("sprompt", "one context"), ("cprompt", "a context for each task"),
                 ("cprompt_oriprompt", "… and the written prompt"),
                 ("cprompt_mlp", "contexts and adapter, one cosine"),
                 ("cprompt_resmlp", "… added to the image"),
                 ("oriclip2cprompt_mlp", "two cosines, not crossed"))),
             ("oritext_mlp2cprompt_oriimg", "ALTA: two cosines, crossed", ""),
             ("constant", "ALTA, rate as released", "--schedule constant"),
             ("all", "ALTA, classes to come compete", "--columns all"),
             ("joint", "upper bound: ALTA, all classes at once",
              "--memory_size 0 --num_bases 10 --num_epochs 100")]


def alta():
    untrained = measured("alta")["seeds"]["zero_shot"]  # of the same ten seeds
    return summary_table([(label, flags, f"digits_alta_{name}") for name, label, flags in CLIP_RUNS],
                         head=("what learns", "flags"),
                         above=[["nothing: zero-shot", "", "", mean_std(untrained), ""]])


def alta_speed():
    found = measured("alta")
    return table(["prompts of one step in the last of ten tasks", "seconds", "against the first"], [
        [row["what"], f"{row['seconds']:.2f}", f"{found['prompts'][0]['seconds'] / row['seconds']:.1f} ×"]
        for row in found["prompts"]])


def ranks():
    """What the ranks would replay together if each chose exemplars from its own augmented images."""
    found = measured("ranks_cifar100")
    counts = list(found["rows"][0]["different_images"])
    names = {"none": "crop and flip"}
    rows = [[names.get(row["aa"], "crop, flip and RandAugment"), f"{100 * row['shared_by_two']:.0f} %",
             *[f"{row['different_images'][n]:.0f}" for n in counts]] for row in found["rows"]]
    rows.append(["none: clean images, as here", "100 %", *[found["m"]] * len(counts)])
    return table(["augmentation", "shared by two ranks",
                  *[f"images kept by {n} rank" + "s" * (n != "1") for n in counts]], rows)


def speed():
    found = measured("speed")["compute"]
    return table(["compute alone", "images per second", "against the first", "forward", "backward",
                  "optimizer"], [
        [row["what"], f"{row['images_per_second']:.0f}",
         f"{row['images_per_second'] / found[0]['images_per_second']:.2f} ×",
         *[f"{100 * row[part] / sum(row[p] for p in ('forward', 'backward', 'optimizer')):.0f} %"
           for part in ("forward", "backward", "optimizer")]] for row in found])


def loading():
    return table(["`--aa`", "`--num_workers`", "images per second"], [
        [f"`{row['aa']}`", row["num_workers"], f"{row['images_per_second']:.0f}"]
        for row in measured("speed")["loading"]], left=2)


def processes():
    found = measured("speed")["launches"]
    return table(["processes", "threads of each", "images per second", "against the first"], [
        [row["processes"], row["threads"], f"{row['images_per_second']:.0f}",
         f"{row['images_per_second'] / found[0]['images_per_second']:.2f} ×"] for row in found], left=2)


TABLES = {f.__name__: f for f in (
    loop, settings, presets, digits, digits_by_seed, orders, orders_by_seed, cifar100, cifar100_60,
    epochs, validation, more_epochs, memory, memory_by_seed, distillation, clipping, ideas, matrix, two_averages, wa_paper, awareness,
    awareness_cifar100, compared, compared_by_seed, published, runs, ranks, speed, loading,
    processes, methods, cifar100_methods, aanets, base_50, cross_task, cross_task_by_seed,
    cross_task_shares, cross_task_validation, cross_task_validation_by_seed, cross_task_cifar100,
    cross_task_published, inference, itaml, itaml_by_seed, itaml_cifar100, itaml_adaptation,
    itaml_published, alta,
    ideas_by_seed, icarl_by_seed, lucir_by_seed, podnet_by_seed, aanets_by_seed, alta_by_seed,
    der_by_seed, alta_speed, der, der_published, frozen, frozen_by_seed, frozen_clip, frozen_when,
    frozen_cifar100, frozen_published)}


def value(name, key):
    """One number of a measurement, or its mean over the runs of a group: `digits_wa gammas.0`."""
    found = load(name) or [measured(name)]
    if key == "cumulative_forgetting":  # follows from another entry
        return np.mean([cumulative_forgetting(run["cumulative_matrix"]) for run in found])
    for part in key.split("."):
        found = [item[int(part) if part.lstrip("-").isdigit() else part] for item in found]
    return np.mean(found)


def unbroken(text):
    """With no-break spaces in 90.3 ± 2.7 and (3 of 10), so that no narrow column cuts them."""
    return re.sub(r"(?<=\d) (±|of) (?=\d)", "\u00a0\\1\u00a0", text)


def fill(text):
    """The text with each of its tables and numbers written anew."""
    text = re.sub(r"(<!-- table (\w+) -->\n)(?:[^\n]+\n)*?(<!-- end -->)",
                  lambda match: match[1] + unbroken(TABLES[match[2]]()) + "\n" + match[3], text)
    return re.sub(r"(<!-- value (\S+) (\S+) -->)(\d+\.?(\d*))(<!-- end -->)",
                  lambda m: f"{m[1]}{value(m[2], m[3]):.{len(m[5])}f}{m[6]}", text)


def main():
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    for path in TEXTS:
        path.write_text(fill(path.read_text()))


if __name__ == "__main__":
    main()
