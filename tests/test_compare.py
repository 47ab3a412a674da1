"""tutorial/tools/compare.py against numbers worked out here, and what it must refuse."""
import json
import re

import numpy as np
import pytest

from tutorial.tools import compare, tables
from tutorial.tools.reproduce import ROOT, load

RUN = dict(  # what compare reads of a results.json
    method="mine", increments=[2, 1], class_order=[2, 0, 1], class_names=["c", "a", "b"],
    confusion=[[5, 0, 0], [1, 4, 0], [0, 0, 6]], finished=True, world_size=1, device="cpu",
    versions={"trainer": "2"})
ARGS = dict(data_set="digits", data_path="data", class_order="default", sync_bn=True, lambda_kd=0.4,
            no_align=False, crop=None, output_dir="x", num_workers=0)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(folder, seed, flags…, key=value…): a results.json as of a run; the last accuracy and
    forgetting differ by seed. `without`: flags that the run does not know."""
    monkeypatch.chdir(tmp_path)

    def make(folder, seed, last=None, without=(), flags={}, **changes):
        last = 80.0 + seed if last is None else last
        args = {**ARGS, "output_dir": folder, **flags, "seed": seed}
        run = {**RUN, "acc1s": [90.0 + seed ** 2, last], "last_accuracy": last,
               "average_incremental_accuracy": (90.0 + seed ** 2 + last) / 2,
               "forgetting": 30 - 2.0 * seed ** 2, **changes}
        run["args"] = {name: args[name] for name in args if name not in without}
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "results.json").write_text(json.dumps(run))
    return make


@pytest.fixture
def say(monkeypatch, capsys):
    """say(arguments…): what compare prints."""
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["compare", *arguments])
        compare.main()
        said = capsys.readouterr()
        assert said.err == ""
        return said.out
    return run


@pytest.fixture
def refuse(monkeypatch, capsys):
    """refuse(arguments…): the one line that compare leaves."""
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["compare", *arguments])
        with pytest.raises(SystemExit) as end:
            compare.main()
        said = capsys.readouterr()
        assert end.value.code == 2 and said.out == "" and re.fullmatch("error: .*\n", said.err)
        return said.err
    return run


def cells(said, name):
    """The cells of each row of this name, table by table."""
    return [[cell.strip() for cell in line.split("|")[2:-1]] for line in said.splitlines()
            if line.startswith(f"| {name} |")]


def test_means_and_differences_seed_by_seed(write, say):
    first, second = {0: 70.0, 1: 75.5, 2: 81.0, 5: 60.0}, {1: 74.0, 2: 86.0, 0: 79.5, 7: 10.0}
    for seed in first:
        write(f"a{seed}", seed, first[seed])
    for seed in second:  # another order, and a seed that the others lack
        write(f"b{seed}", seed, second[seed], forgetting=20.0 + seed, flags={"lambda_kd": "dynamic"})
    said = say("one=a*", "two=b*")
    means, = cells(said, "one")
    last = list(first.values())
    average = [(90 + seed ** 2 + last) / 2 for seed, last in first.items()]
    forgetting = [30 - 2 * seed ** 2 for seed in first]
    assert means == ["4", *(f"{np.mean(x):.1f} ± {np.std(x) * (4 / 3) ** 0.5:.1f}"
                            for x in (average, last, forgetting))]
    gained = cells(said, "two")[1]
    d = np.array([79.5 - 70.0, 74.0 - 75.5, 86.0 - 81.0])
    error = (((d - d.mean()) ** 2).sum() / 2 / 3) ** 0.5
    assert gained[1] == f"+{d.mean():.1f} ± {error:.1f} (2 of 3)"
    assert gained[0] == f"+{d.mean() / 2:.1f} ± {error / 2:.1f} (2 of 3)"
    # Less is better: 20, 21, 22 against 30, 28, 22, where the last is a tie.
    assert gained[2] == f"-5.7 ± {np.std([-10, -7, 0]) / 2 ** 0.5:.1f} (2 of 3)"
    assert "| minus one |" in said and said.endswith("differ in\n- --lambda_kd 0.4 / dynamic\n")


def test_one_run_no_common_seed_and_one_row(write, say):
    write("a0", 0)
    write("a1", 1)
    write("b1", 1, last=80.0)
    write("c7", 7)
    said = say("a=a*", "b=b1", "c=c7/results.json")
    assert cells(said, "b") == [["1", "85.5", "80.0", "28.0"],
                                ["-0.5 (0 of 1)", "-1.0 (0 of 1)", "+0.0 (0 of 1)"]]
    assert cells(said, "c")[1] == ["no common seeds", "", ""]
    assert said.endswith("differ in\n- no flag\n")
    said = say("a=a0", "a=a1")  # two patterns, and nothing to compare with
    assert cells(said, "a") == [["2", "85.5 ± 0.7", "80.5 ± 0.7", "29.0 ± 1.4"]]
    assert "minus" not in said and "differ" not in said


def test_patterns_without_a_name_make_a_row_for_each_setting(write, say, tmp_path):
    for seed in range(3):
        # What may differ within a row: the folder, the workers, the machine's copy of the digits.
        write(f"x{seed}", seed, flags={"num_workers": seed, "data_path": f"disk{seed}"})
        write(f"y{seed}", seed, flags={"no_align": True})
        write(f"z{seed}", seed, flags={"lambda_kd": 0, "own": 3}, method="other")
    (tmp_path / "x.txt").write_text("reproduce leaves such a file beside its folders")
    said = say("x*", "[yz]*")
    assert [line.split("|")[1].strip() for line in said.splitlines() if re.match(r"\| \w.* \| 3 ", line)] \
        == ["mine", "mine --no_align", "other"]
    assert said.endswith("\n- method mine / mine / other\n- --lambda_kd 0.4 / 0.4 / 0\n"
                         "- --no_align false / true / false\n")  # not --own, which is `other`'s alone
    said = say("z*", "WA=x*")
    assert cells(said, "other")[0][0] == "3" and "| minus other |" in said
    write("z9", 9, flags={"lambda_kd": 0}, method="other")  # made before the flag was there
    assert [len(cells(say("z*"), name)) for name in ("other --own 3", "other")] == [1, 2]


def test_class_orders_from_the_seed_may_differ(write, say):
    for seed, order in enumerate(([0, 1, 2], [1, 2, 0])):
        names = ["abc"[c] for c in order]
        images = [[5, 6, 5][c] for c in order]  # the same test images, in the order of learning
        for folder, kd in (("a", 0.4), ("b", 0.1)):
            write(f"{folder}{seed}", seed, class_order=order, class_names=names,
                  confusion=np.diag(images).tolist(), flags={"class_order": "seed", "lambda_kd": kd})
    assert cells(say("a=a*", "b=b*"), "b")[0][0] == "2"


def test_several_processes_and_other_versions_are_named(write, say):
    write("a0", 0)
    write("b0", 0, world_size=2, versions={})
    assert say("a=a0", "b=b0").endswith("in\n- trainer 2 / 1\n- processes 1 / 2\n")
    write("a0", 0, device="NVIDIA")  # where BatchNorm sees the whole batch
    write("b0", 0, device="NVIDIA", world_size=2)
    assert say("a=a0", "b=b0").endswith("in\n- no flag\n")


NAMED, BARE, APART = ["a=[ab]*"], ["[ab]*"], ["a=a*", "b=b*"]


# Runs of seeds 0 and 1, where the second does not go with the first; words of the message.
@pytest.mark.parametrize("changes, ways, words", [
    (dict(flags={"lambda_kd": "dynamic", "no_align": True}), [NAMED],
     "a: a0 and b1 --lambda_kd 0.4 / dynamic, --no_align false / true NAME="),
    (dict(without=["lambda_kd"]), [NAMED], "a: a0 and b1 --lambda_kd 0.4 / -"),
    (dict(method="other"), [NAMED], "a: a0 and b1 method mine / other"),
    (dict(versions={"trainer": "3"}), [NAMED], "a: a0 and b1 trainer 2 / 3"),
    (dict(world_size=2), [NAMED], "a: a0 and b1 processes 1 / 2"),
    (dict(seed=0), [NAMED, BARE], "a0 and b1 seed 0 leave one out"),
    (dict(flags={"data_set": "cifar100"}), [NAMED, BARE, APART], "a0 and b1 data sets"),
    (dict(increments=[1, 2]), [NAMED, BARE, APART], "a0 and b1 increments"),
    (dict(confusion=[[4, 0, 0], [0, 5, 0], [0, 0, 6]]), [NAMED, BARE, APART], "a0 and b1 test images"),
    (dict(class_names=["c", "a", "d"]), [NAMED, BARE, APART], "a0 and b1 test images"),
    (dict(class_order=[0, 1, 2]), [NAMED, BARE, APART], "a0 and b1 class orders"),
    (dict(flags={"class_order": "seed"}), [NAMED, BARE, APART], "a0 and b1 class orders"),
    (dict(finished=False, acc1s=[90.0]), [NAMED, BARE, APART], "b1 (1 of 2 tasks) --resume"),
    (dict(last_accuracy=None), [NAMED, BARE, APART], "b1/results.json TypeError"),
    (dict(increments=None), [NAMED, BARE, APART], "b1/results.json TypeError"),
    (dict(without=["data_set"]), [NAMED, BARE, APART], "b1/results.json KeyError('data_set')")])
def test_runs_that_do_not_go_together(write, refuse, say, changes, ways, words):
    write("a0", 0)
    write("b1", **{"seed": 1, **changes})
    for way in (NAMED, BARE, APART):
        if way in ways:
            said = refuse(*way)
            assert all(word in said for word in words.split()), said
        else:  # two rows
            assert "| minus " in say(*way)


def test_a_folder_of_images_is_a_setting(write, refuse):
    for seed in range(2):
        write(f"a{seed}", seed, flags={"data_set": "image_folder", "data_path": f"images{seed}"})
    assert "--data_path images0 / images1" in refuse("a=a*")


@pytest.mark.parametrize("arguments, words", [
    (["a=q*"], "a=q* matches no folder"), (["q*"], "q* matches"), (["a="], "a= matches"),
    (["="], "= matches"), ([""], " matches"), (["a0/x=*"], "a0/x=* matches"),
    (["a=a0/log.jsonl"], "matches no"), ([], "--help"), (["a0", "--seeds", "1"], "--seeds"),
    (["a=a0", "c=*"], "bare holds no results.json"), (["a=torn"], "torn/results.json JSONDecodeError"),
    (["list"], "list/results.json"), (["a=folder"], "folder/results.json"),
    (["a0", "--picture", "nowhere/x.png"], "--picture nowhere/x.png"),
    (["a0", "--picture", "x.docx"], "--picture x.docx"), (["a0", "--picture", "bare"], "--picture")])
def test_what_is_no_run_or_no_picture(write, refuse, tmp_path, arguments, words):
    write("a0", 0)
    (tmp_path / "a0/log.jsonl").write_text("{}")
    whole = (tmp_path / "a0/results.json").read_text()
    for folder, text in (("bare", None), ("torn", whole[:-9]), ("list", f"[{whole}]")):
        (tmp_path / folder).mkdir()
        if text:
            (tmp_path / folder / "results.json").write_text(text)
    (tmp_path / "folder/results.json").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    said = refuse(*arguments)
    assert all(word in said for word in words.split()), said
    assert sorted(tmp_path.rglob("*")) == before


def test_the_picture_and_its_band(write, say, tmp_path):
    curves = {"a": [[90, 80], [80, 70], [100, 81]], "b": [[70, 60], [74, 50], [72, 49]], "c": [[50, 40]]}
    for name in curves:
        for seed, acc1s in enumerate(curves[name]):
            write(f"{name}{seed}", seed, acc1s=acc1s, flags={"lambda_kd": name})
    rows = compare.collect([f"{name}=./{name}?" for name in curves])
    figure = compare.draw(rows)
    axes, = figure.axes
    assert [text.get_text() for text in figure.legends[0].texts] \
        == ["a (3 runs)", "b (3 runs)", "c (1 run)"]
    assert len({line.get_color() for line in axes.lines}) == 3
    for name, line, band in zip(curves, axes.lines, axes.collections):
        found, n = np.array(curves[name], float), len(curves[name])
        mean = found.sum(axis=0) / n
        spread = (((found - mean) ** 2).sum(axis=0) / max(n - 1, 1)) ** 0.5
        assert np.allclose(line.get_xydata(), np.stack([[2, 3], mean], axis=1))
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(6)}
        assert corners == {(x, y.round(6)) for x, m, s in zip((2, 3), mean, spread) for y in (m - s, m + s)}
    assert "(%)" in axes.get_ylabel() and "classes" in axes.get_xlabel()
    assert "one standard deviation" in axes.get_title()
    for name in ("picture.png", "plain"):
        assert say("a?", "--picture", name).endswith(f"\nPicture: {name}\n")
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_many_rows_differ_in_colour_or_line(write):
    for i in range(12):
        write(f"a{i}", 0, flags={"lambda_kd": i / 100})
    axes, = compare.draw(compare.collect(["a*"])).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 12


def test_the_example_of_chapter_9_is_what_the_recorded_runs_give(say, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, group in tables.COMPARED:
        for run in load(f"digits_{group}"):
            folder = tmp_path / f"runs/{name}_seed{run['args']['seed']}"
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps(run))
    chapter = (ROOT / "tutorial/09_evaluation.md").read_text().replace("\\\n", " ")
    typed, = re.findall(r"(?m)^python -m tutorial.tools.compare (.*)$", chapter)
    said = say(*typed.replace('"', "").split())
    quoted = re.findall(r"<!-- table compared\w* -->\n((?:\|.*\n)+)", chapter)
    assert len(quoted) == 2 and all(part in tables.unbroken(said) for part in quoted)
    for line in said.split("differ in\n")[1].split("\n\n")[0].splitlines():
        assert f"`{line[2:]}`" in chapter
    assert (tmp_path / "compare.png").exists()
