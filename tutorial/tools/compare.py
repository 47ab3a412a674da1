"""Compares settings over their seeds: means, differences seed by seed, and a picture.

    python -m tutorial.tools.compare "wa=runs/wa_seed*" "mine=runs/mine_seed*"
    python -m tutorial.tools.compare "runs/*" --picture compare.png

NAME=PATTERN puts the runs in these folders into one row. (Repeat NAME= for a second pattern.) A
pattern without a name makes a row for each setting that it finds, named by its method and flags.
The differences are to the first row. Runs that cannot be compared are refused.
"""
import glob
import json
import re
from pathlib import Path

import utils
from tutorial.tools.figures import draw_curves
from tutorial.tools.tables import BLUE, GREEN, GREY, ORANGE, PINK, RED, SUMMARY, gains, means

COLOURS = [GREEN, RED, BLUE, ORANGE, PINK, GREY]
STYLES = ["-", "--", ":"]  # for more rows than colours


def get_setting(run):
    """What makes a run another experiment, but for its seed: {name in the output: value}."""
    args, other = run["args"], {"seed", *utils.MAY_DIFFER}
    if args["data_set"] in ("digits", *utils.PACKAGES):  # the same images in every folder
        other.add("data_path")
    setting = {"method": run["method"], "trainer": run["versions"].get("trainer", "1")}
    if run["device"] == "cpu" or not args["sync_bn"]:  # BatchNorm sees each process's images alone
        setting["processes"] = run["world_size"]
    return setting | {f"--{name}": args[name] for name in args if name not in other}


def get_tasks(run):
    """What all runs must have in common, for their accuracies to measure the same thing."""
    from_seed = run["args"]["class_order"] == "seed"
    return {"data sets": run["args"]["data_set"], "increments": run["increments"],
            "test images": sorted(zip(run["class_names"], map(sum, run["confusion"]))),
            "class orders": "from the seed" if from_seed else run["class_order"]}


def read(path):
    """The results of a finished run, with what tells it from others."""
    file = path if path.name == "results.json" else path / "results.json"
    try:
        run = json.loads(file.read_text())
        run.update(folder=file.parent, seed=run["args"]["seed"], setting=get_setting(run),
                   tasks=get_tasks(run), **{key: float(run[key]) for key, _ in SUMMARY})
        done, tasks = len(run["acc1s"]), len(run["increments"])
        if run["finished"]:
            return run
    except FileNotFoundError:
        utils.fail(f"{path} holds no results.json, so no run has ended a task there: leave it out")
    except Exception as error:
        utils.fail(f"{file} is no results.json of this trainer ({error!r}): make the run again, or "
                   "leave it out")
    utils.fail(f"{file.parent} is not finished ({done} of {tasks} tasks): the same command with "
               "--resume goes on, or leave it out")


def differing(runs):
    """The names of what differs between the settings of these runs. A flag that only some of the
    methods have does not count by that alone."""
    settings, names = [run["setting"] for run in runs], []
    for name in dict.fromkeys(name for setting in settings for name in setting):
        methods = {setting["method"] for setting in settings if name in setting}
        values = [setting.get(name) for setting in settings if setting["method"] in methods]
        names += [name] * any(value != values[0] for value in values)
    return names


def describe(runs):
    """What differs, with the value of each run: ["--lambda_kd 0.4 / dynamic", ...]."""
    def value(run, name):
        found = run["setting"].get(name, "-")  # (a flag that this method does not have)
        return found if isinstance(found, str) else json.dumps(found)
    return [f"{name} {' / '.join(value(run, name) for run in runs)}" for name in differing(runs)]


def collect(arguments):
    """The rows of the comparison, in the order of the arguments: [(name, runs), ...]."""
    rows = []
    for argument in arguments:  # (a = after a / belongs to the path)
        name, pattern = re.fullmatch("(?:([^=/]+)=)?(.*)", argument, re.S).groups()
        paths = [path for path in map(Path, sorted(glob.glob(pattern)))
                 if path.is_dir() or path.name == "results.json"]
        if not paths:
            utils.fail(f"{argument} matches no folder: name those of --output_dir, such as "
                       "'wa=runs/wa_seed*'")
        for run in map(read, paths):
            row = next((runs for other, runs in rows if other == name
                        and (name or not differing([runs[0], run]))), None)
            if row is None:
                rows.append((name, row := []))
            row.append(run)
    firsts = [runs[0] for _, runs in rows]
    return [(name or title(runs[0], firsts), runs) for name, runs in rows]


def title(run, others):
    """The method, and what tells this run from the others of the same method, as it is typed."""
    words = [run["method"]]
    for name in differing([other for other in others if other["method"] == run["method"]]):
        value = run["setting"].get(name)
        if value is not None and value is not False:
            words.append(name if value is True else f"{name} {value}")
    return " ".join(words)


def check(rows):
    """Refuse what cannot be compared."""
    one = rows[0][1][0]
    for name, runs in rows:
        folders = {}
        for run in runs:
            here = run["folder"]
            for key, value in run["tasks"].items():
                if value != one["tasks"][key]:
                    utils.fail(f"{one['folder']} and {here} have different {key}: only runs of the "
                               "same tasks can be compared, so leave one out")
            if differing([runs[0], run]):
                found = ", ".join(describe([runs[0], run]))
                utils.fail(f"{name}: {runs[0]['folder']} and {here} differ in {found}: give each "
                           "setting a NAME= of its own")
            if run["seed"] in folders:
                utils.fail(f"{name}: {folders[run['seed']]} and {here} are both of seed "
                           f"{run['seed']}: leave one out")
            folders[run["seed"]] = here


def draw(rows):
    """Accuracy on all classes so far after each task, a line for each row."""
    one, lines = rows[0][1][0], []
    for i, (name, runs) in enumerate(rows):
        label = f"{name} ({len(runs)} run{'s' * (len(runs) > 1)})"
        style = STYLES[i // len(COLOURS) % len(STYLES)]
        lines.append((label, runs, COLOURS[i % len(COLOURS)], style))
    figure, _ = draw_curves(lines, f"{one['args']['data_set']}, {len(one['increments'])} tasks; "
                            "band: ± one standard deviation")
    figure.set_size_inches(7, 3.7 + 0.24 * len(rows))  # a line for each, since names may be long
    figure.legend(loc="outside lower center", fontsize=10)
    return figure


def get_parser():
    parser = utils.Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="NAME=PATTERN", help="a row: the runs in these "
                        "folders, such as 'wa=runs/wa_seed*'; without NAME= a row for each setting")
    parser.add_argument("--picture", help="a file to draw the accuracy after each task into (none)")
    return parser


def main():
    given = get_parser().parse_args()
    rows = collect(given.runs)
    check(rows)
    if given.picture:
        try:
            suffix = Path(given.picture).suffix[1:]
            draw(rows).savefig(given.picture, format=suffix or "png")
        except (OSError, ValueError) as error:
            utils.fail(f"--picture {given.picture} could not be written ({error})")
    print(f"Mean ± standard deviation:\n\n{means(rows)}")
    if len(rows) > 1:
        print("\nDifference seed by seed, mean ± its standard error (seeds won):\n")
        print(gains(rows))
        found = describe([runs[0] for _, runs in rows]) or ["no flag"]
        print("\nThe rows, in this order, differ in", *found, sep="\n- ")
    if given.picture:
        print(f"\nPicture: {given.picture}")


if __name__ == "__main__":
    main()
