"""The chapters against the code: what they quote, run, link to and claim must be so.

Each rule is a function from a text (and its place) to a list of complaints. One test applies all
rules to all texts; another shows that each rule complains about a broken text.
"""
import ast
import doctest
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, kill_after, read_results, run_file
from PIL import Image
from test_resume import log_lines, same_model

import utils
from tutorial.methods import lucir, podnet
from tutorial.tools import figures, grow, hold_out, keep, reproduce, shapes, tables, use
from tutorial.tools.reproduce import GROUPS, apply, blocks

TEXTS = tables.TEXTS
CHAPTERS = sorted((ROOT / "tutorial").glob("[0-9]*.md"))
SOURCES = [*ROOT.glob("*.py"), *(ROOT / "tutorial").rglob("*.py")]
LAUNCHER = {"--nproc_per_node", "--nnodes", "--node_rank", "--rdzv_backend", "--rdzv_endpoint",
            "--max-restarts", "--standalone", "--nodes", "--ntasks-per-node", "--gpus-per-node",
            "--cpus-per-task"}


# ---- the rules -----------------------------------------------------------------------------

def excerpts(text, path):
    """Python is quoted verbatim from one source file; a line `...` skips lines of it."""
    def found(pieces, source):
        place = 0
        for piece in pieces:
            place = source.find("\n" + piece, place)
            if place < 0:
                return False
            place += len(piece)
        return True
    sources = ["\n" + source.read_text() for source in SOURCES]
    for language in re.findall(r"(?m)^```(.*)\n(?:(?!```).*\n)*```$", text):
        if language not in ("python", "pycon", "bash", "diff", "math", "bibtex", ""):
            yield f"a block in {language}: python is quoted, pycon run, bash parsed"
    for block in blocks(text, "python"):
        pieces = [piece for piece in re.split(r"(?m)^\s*\.\.\.\n", block) if piece]
        if not pieces or not any(found(pieces, source) for source in sources):
            yield f"not in any source file: {block[:60]!r}"


def demos(text, path):
    """Python sessions give the results that they show."""
    test = doctest.DocTestParser().get_doctest(
        "\n".join(blocks(text, "pycon")), {}, path.name, str(path), 0)
    said = []
    state = torch.get_rng_state()
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    torch.set_rng_state(state)
    return said


def commands(text, path):
    """The flags of every command exist, and those of template.py have good values."""
    for line in "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines():
        line = line.split("#")[0].replace("$seed", "0")
        for part in re.split(r";|&&|\bdo\b", line):
            words = shlex.split(part)
            ours = [i for i, word in enumerate(words)
                    if word.endswith(".py") or word.startswith("tutorial.")]
            if words and words[0] not in ("python", "torchrun", "srun", "pytest", "pip", "cp", "for",
                                          "done") and "=" not in words[0]:
                yield f"what is {words[0]}?"
            if not ours or words[0] == "cp":
                continue
            name, flags = words[ours[0]], words[ours[0] + 1:]
            launcher = [word.split("=")[0] for word in words[:ours[0]] if word.startswith("--")]
            yield from (f"{flag} is no flag of torchrun" for flag in launcher if flag not in LAUNCHER)
            if name in ("template.py", "mine.py"):
                try:
                    utils.get_parser().parse_args(flags)
                except SystemExit:
                    yield f"does not parse: {part}"
                continue
            file = ROOT / (name if name.endswith(".py") else name.replace(".", "/") + ".py")
            if not file.exists():
                yield f"no file for {name}"
                continue
            source = file.read_text()
            if "def get_parser(" not in source:
                yield from (f"{flag} is no flag of {name}" for flag in flags
                            if flag.startswith("--") and f'"{flag.split("=")[0]}"' not in source)
                continue
            try:
                importlib.import_module(name).get_parser().parse_args(flags)
            except SystemExit:
                yield f"does not parse: {part}"


def flags(text, path):
    """Every flag that a text mentions exists somewhere."""
    sources = "".join(source.read_text() for source in [*SOURCES, ROOT / "tests/benchmark.py"])
    known = set(re.findall(r'"(--[a-z]\w+)"', sources))
    known |= {f"--no-{name}" for name in re.findall(r'"--(\w+)", action=argparse.Boolean', sources)}
    for flag in sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - known - LAUNCHER - {"--help"}):
        yield f"unknown flag {flag}"


def links(text, path):
    """Files exist; [`Name.part`](file.py) is in that file; pictures are small and described."""
    for image, label, target in re.findall(r"(!?)\[([^\]]*)\]\(((?:[^()\s]|\([^()]*\))+)\)", text):
        if target.startswith("http"):
            continue
        file = path.parent / target.split("#")[0]
        if not file.exists():
            yield f"no file {target}"
        elif image and (not label or file.stat().st_size > 200_000):
            yield f"picture {target}: no description, or above 200 kB"
        elif target.endswith(".py") and not image:
            name = label.strip("`")
            tree = ast.parse(file.read_text())
            names = {file.name}
            for node in ast.walk(tree):
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                    names.add(node.name)
                    names |= {f"{node.name}.{child.name}" for child in node.body
                              if isinstance(child, (ast.ClassDef, ast.FunctionDef))}
            if label.startswith("`") and name not in names and Path(name).name != file.name:
                yield f"no {name} in {target}"


def filled(text, path):
    """Every table and number that comes from a file is the one that tables.py writes."""
    try:
        if tables.fill(text) != text:
            yield "python -m tutorial.tools.tables would change it"
    except (KeyError, ValueError, IndexError, OSError) as error:
        yield f"cannot be filled in: {error!r}"
    marks = re.findall(r"<!-- (?:table|value) .*? -->", text)
    done = re.findall(r"<!-- table \w+ -->\n\| |<!-- value \S+ \S+ -->\d", text)
    if len(done) != len(marks):
        yield "a table or a value is empty or badly marked"
    if re.search(r"(?m)^ *<!-- value", text):
        yield "a value begins a line: Markdown would end the paragraph there"


def spread(text, path):
    """What is measured over seeds (mean ± deviation) stands in a table from the files."""
    for line in re.sub(r"<!-- table.*?<!-- end -->", "", text, flags=re.S).splitlines():
        if re.search(r"\d\s*±\s*\d", line):
            yield f"a measured number outside of the filled tables: {line[:60]}"


def equations(text, path):
    """Equations stand in ```math blocks, or in $`...`$ where Markdown would read \\ or _ as its own;
    no macro is used that GitHub does not draw."""
    for macro in re.findall(r"\\(?:def|newcommand|operatorname|label|ref|bm|mathds)\b", text):
        yield f"{macro} is not drawn everywhere"
    plain = re.sub(r"```.*?```|\$`[^`]*`\$|`[^`]*`", "", text, flags=re.S)
    if plain.count("$") % 2 or "$$" in plain:
        yield "an odd number of $, or $$ in place of a math block"
    for inside in re.findall(r"\$([^$]*)\$", plain):
        if re.search(r"[\\_]", inside):
            yield f"${inside}$ needs $`...`$"


RULES = [excerpts, demos, commands, flags, links, filled, spread, equations]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_text(path):
    text = path.read_text()
    assert [complaint for rule in RULES for complaint in rule(text, path)] == []


BROKEN = {
    excerpts: ["```python\nloss = F.cross_entropy(logits, labels)\n```\n",
               "```python\n        self.model.train()\n    ...\nimport torch\n```\n",  # wrong order
               "```python\n...\n```\n", "```py\nimport torch\n```\n"],
    demos: ["```pycon\n>>> 1 + 1\n3\n```\n", "```pycon\n>>> import no_such_module\n```\n"],
    commands: ["```bash\npython template.py --epochs 3\n```\n",
               "```bash\npython template.py --lr -1\n```\n",
               "```bash\ntorchrun --gpus=2 template.py\n```\n",
               "```bash\npython -m tutorial.no_such_file\n```\n",
               "```bash\npyhton template.py\n```\n",
               "```bash\npython -m tutorial.tools.measure speed --lr 0.1\n```\n",
               "```bash\npython -m tutorial.tools.grow --model x --increment -3\n```\n",
               "```bash\npython -m tutorial.tools.figures --seeds runs/x\n```\n",
               "```bash\npython -m tutorial.tools.reproduce digits_wa --processes 2\n```\n",
               "```bash\npython -m tutorial.methods.wa_variants\n```\n",
               "```bash\nfor seed in 0 1; do python template.py --seeds $seed; done\n```\n"],
    flags: ["use `--no_such_flag` for that"],
    links: ["[x](no_such_file.md)", "[`CilModel.no_such_method`](../template.py)",
            "![](img/stages.png)", "![x](img/no_such_picture.png)"],
    filled: ["<!-- table digits -->\n| 99.9 |\n<!-- end -->\n", "<!-- table no_such -->\n<!-- end -->\n",
             "<!-- table digits -->\n<!-- end -->\n",
             "<!-- value digits_wa last_accuracy -->12.3<!-- end -->",
             f"WA:\n{tables.fill('<!-- value digits_wa last_accuracy -->0.0<!-- end -->')}",
             "<!-- value digits_wa last_accuracy --><!-- end -->",
             "<!-- value digits_wa no_such_key -->12.3<!-- end -->",
             "<!-- value no_such_group last_accuracy -->12.3<!-- end -->"],
    spread: ["WA reaches 99.9 ± 0.1."],
    equations: ["one $ only", r"$`\operatorname{argmax}`$", "$$x$$", r"$\theta$", "$w_c$"],
}


@pytest.mark.parametrize("rule, text", [(rule, text) for rule in RULES for text in BROKEN[rule]])
def test_each_rule_sees_a_broken_text(rule, text):
    assert list(rule(text, CHAPTERS[0]))


# ---- the tutorial as a whole ---------------------------------------------------------------

def test_the_map_leads_to_every_chapter_and_each_to_the_next():
    overview = (ROOT / "tutorial/README.md").read_text()
    assert len(CHAPTERS) == 23
    for number, (chapter, following) in enumerate(zip(CHAPTERS, [*CHAPTERS[1:], None]), 1):
        text = chapter.read_text()
        title = re.match(r"# (\d+)\. (.+)\n", text)
        assert int(title[1]) == number and f"[{title[2]}]({chapter.name})" in overview
        assert "## Objective\n" in text
        if following:
            assert re.search(rf"^Next: \[.+\]\({re.escape(following.name)}\)", text, re.M)
    assert "(tutorial/README.md)" in (ROOT / "README.md").read_text()


def test_every_chapter_ends_with_a_summary_and_questions():
    for chapter in CHAPTERS:
        text = chapter.read_text()
        assert re.findall(r"(?m)^## (.+)$", text)[-2:] == ["Summary", "Check yourself"], chapter.name
        summary, questions = re.split(r"(?m)^## Summary$|^## Check yourself$", text)[1:]
        assert 3 <= len(re.findall("(?m)^- ", summary)) <= 5, chapter.name
        # GitHub folds only what is closed, and draws Markdown only after a blank line.
        folded = re.findall(r"(?ms)^<details><summary>(\d)\. .+?</summary>\n\n.+?\n</details>$", questions)
        assert folded == [str(number) for number in range(1, len(folded) + 1)], chapter.name
        assert 2 <= len(folded) <= 4 and questions.count("<details>") == len(folded), chapter.name


def test_chapters_of_methods_have_the_fixed_headings():
    for chapter in CHAPTERS[14:]:
        assert re.findall(r"(?m)^## (.+)$", chapter.read_text()) == [
            "Objective", "Idea", "Equation", "What changes in the template", "Run it", "Result",
            "Where we differ from the paper and its code", "Summary", "Check yourself"], chapter.name


def test_every_picture_is_drawn_from_the_files_and_used(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "IMAGES", tmp_path)
    monkeypatch.setattr("sys.argv", ["figures"])
    figures.main()
    drawn = {path.name for path in tmp_path.iterdir()}
    drawn |= {f"{draw.__name__[5:]}.png" for draw in figures.PICTURES_OF_CIFAR}  # need the data
    assert drawn == {path.name for path in (ROOT / "tutorial/img").iterdir()}
    everything = "".join(path.read_text() for path in TEXTS)
    assert all(f"img/{name}" in everything for name in drawn)
    for path in tmp_path.iterdir():  # and the committed picture is the one that is drawn now
        with Image.open(path) as new, Image.open(ROOT / "tutorial/img" / path.name) as old:
            if new.info["Software"] == old.info["Software"]:  # the same matplotlib
                assert np.array_equal(np.asarray(new), np.asarray(old)), path.name


# Arguments that say where and how a run was made, or what ALTA found there.
OF_THE_MACHINE = {"data_path", "num_workers", "output_dir", "plots", "device", "clip", "clip_weights",
                  "stop_after_task"}


def test_every_group_is_in_the_list_and_its_command_gives_the_arguments_of_its_runs():
    assert {path.stem for path in reproduce.RESULTS.glob("*.jsonl")} == set(GROUPS)
    for name, (program, flags, seeds) in GROUPS.items():
        own = not program.endswith(".py")
        module = importlib.import_module(f"tutorial.methods.{program}") if own else utils
        args = module.get_parser().parse_args(flags.split())
        args = utils.fill_in(args)
        runs = reproduce.load(name)
        assert [run["args"]["seed"] for run in runs] == list(seeds), name
        for run in runs:
            wrong = {key for key, value in run["args"].items() if value != getattr(args, key, None)}
            assert wrong <= {"seed", *OF_THE_MACHINE}, name
            last = args.stop_after_task or len(run["increments"])
            assert len(run["acc1s"]) == last, name
            assert run["finished"] == (last == len(run["increments"])), name
            if not own:
                assert run["method"] == ("WA" if program == "template.py" else program[:-3]), name


def test_pictures_with_data(tmp_path, image_folder):
    folder = image_folder(("fox", "wolf"), train=8, size=32)
    for draw in figures.PICTURES_OF_CIFAR:
        draw(folder).savefig(tmp_path / "picture.png")
        assert np.asarray(Image.open(tmp_path / "picture.png")).std() > 10


def test_results_files_tell_nothing_about_a_machine():
    for path in (ROOT / "tutorial/results").glob("*.json*"):
        assert not re.search(r'"(/|[A-Z]:\\)', path.read_text()), path.name


# ---- making the runs again -------------------------------------------------------------------

@pytest.fixture
def again(tmp_path, monkeypatch, capsys):
    """again(arguments…): what the command says and its exit code, with short groups of runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path)
    for name, program, flags in (("small", "template.py", ""), ("changed", "balanced.py", "--no_align"),
                                 ("stopped", "template.py", "--stop_after_task=1"),
                                 ("bad", "template.py", "--batch_size=9999")):
        monkeypatch.setitem(GROUPS, name, (program, f"{' '.join(SHORT)} {flags}", range(2)))

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["reproduce", *arguments])
        with pytest.raises(SystemExit) as end:
            reproduce.main()
            raise SystemExit(0)
        return end.value.code, capsys.readouterr()
    return run


def test_the_list_names_every_run(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["reproduce"])
    reproduce.main()
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(GROUPS)
    line = next(line for line in lines if line.startswith("digits_replay_kd "))
    assert re.search(r"  0 to 9 .*  python template.py --no_align$", line)
    versions = {line.split()[0]: line.split(" python ")[0].split()[-1] for line in lines}
    # These are the first edition's, until they are made again.
    first = {f"cifar100_{name}" for name in (
        "aanets_lucir", "bal_ft_all_growing", "bal_ft_all_joint", "bal_ft_own_growing",
        "bal_ft_own_joint", "icarl", "lucir", "podnet")}
    assert versions == {name: "1" if name in first else utils.VERSION for name in GROUPS}


def test_runs_are_made_recorded_and_compared(again, tmp_path):
    code, said = again("changed", "--seeds", "1", "--record")
    assert code == 0 and re.match(r"1/1 changed seed 1: new, \d.*, recorded \(0 min left\)\n", said.out)
    code, said = again("chang*", "--jobs", "2", "--record")
    assert "changed seed 1: finished before, equal, recorded\n1/1 changed seed 0: new" in said.out
    runs = reproduce.load("changed")
    assert [run["args"]["seed"] for run in runs] == [0, 1]
    assert all(run["method"] == "balanced" and run["args"]["output_dir"] is None for run in runs)
    assert not re.search(r'"(/|[A-Z]:\\)', (tmp_path / "changed.jsonl").read_text())
    old = runs[0]["accuracy_matrix"][1][0]
    runs[0]["accuracy_matrix"][1][0] = 12.5
    (tmp_path / "changed.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    code, said = again("changed")
    assert f"seed 0: finished before, differs in 1 of 6 cells: (2, 1) 12.50 -> {old:.2f}\n" in said.out
    assert "seed 1: finished before, equal\n" in said.out


def test_an_unfinished_run_is_continued(again, tmp_path, monkeypatch):
    assert "stopped seed 0: FAILED" in again("stopped", "--seeds", "0")[1].out  # it is not finished
    log = tmp_path / "runs/reproduce/stopped_seed0/log.jsonl"
    before = log.read_text().splitlines()
    monkeypatch.setitem(GROUPS, "stopped", GROUPS["small"])
    code, said = again("stopped", "--seeds", "0")
    assert code == 0 and "new, " in said.out
    assert log.read_text().splitlines()[:len(before)] == before and len(before) == 2  # with seconds


def test_a_failing_run_is_named_and_the_others_go_on(again):
    code, said = again("bad", "small", "--seeds", "0")
    assert code == "1 of 2 runs failed: their output is in runs/reproduce/*.txt"
    assert "bad seed 0: FAILED: error: digits has" in said.out and "small seed 0: new" in said.out


@pytest.mark.parametrize("arguments, message", [
    (["no_such*"], "no_such* is no group"), (["small", "--jobs=0"], "--jobs 0"),
    (["small", "--seeds", "x"], "invalid int value"), (["small", "--processes=2"], "--processes")])
def test_a_bad_name_or_flag_is_one_line(again, arguments, message):
    code, said = again(*arguments)
    assert code == 2 and re.fullmatch("error: .*\n", said.err) and message in said.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_or_a_kill_leaves_no_run_behind(tmp_path, number):
    command = subprocess.Popen([sys.executable, "-m", "tutorial.tools.reproduce", "digits_finetune",
                                "--seeds=0"], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                               # A runner in the background ignores SIGINT, and hands that down.
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                               start_new_session=True)
    run = tmp_path / "runs/reproduce/digits_finetune_seed0"
    try:
        while not (run / "log.jsonl").exists():
            assert command.poll() is None
            time.sleep(0.1)
        if number == signal.SIGINT:  # the keyboard's goes to the children, too
            os.killpg(command.pid, number)
            assert command.stderr.readline() == "stopped: the same command goes on from here\n"
    finally:
        command.kill()
    assert command.stderr.read() == ""  # until the last process that may write there is gone
    filelock.FileLock(run / ".lock").acquire(timeout=5)  # the run held it


# ---- the programs of the tutorial -----------------------------------------------------------

@pytest.mark.parametrize("name", [name for name in GROUPS if GROUPS[name][0] in reproduce.CHANGED])
def test_the_changes_of_chapter_13_run(tmp_path, launch, name):
    program, flags, _ = GROUPS[name]
    source = reproduce.changed_template(program)
    assert source != (ROOT / "template.py").read_text()
    (tmp_path / program).write_text(source)
    started = launch(function=run_file, arguments=(tmp_path, program, [
        *SHORT, *flags.split(), "--output_dir=out"]), processes=2)
    assert started.wait() == [0, 0], started.stderr()
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert f"{results['method']}.py" == program
    assert results["finished"] and len(results["acc1s"]) == 3


def run_recipe(folder, program, flags, die_after=None):
    """A run of a changed template, or until rank 0 has logged so many epochs: there it is killed."""
    if die_after:
        kill_after(die_after)
    run_file(folder, program, flags)


# A recipe, its flags, the stages of its tasks, and an epoch, counted from the run's first, to be
# killed after: in the second task, where there are two stages in the second one.
@pytest.mark.parametrize("program, flags, stages, epoch", [
    ("sampler.py", [], {1}, 3), ("two_fits.py", ["--no_align", "--num_epochs=4", "--batch_size=32"], {1, 2}, 9),
    ("bic.py", ["--no_align", "--lambda_kd=dynamic"], {1, 2}, 5)])
def test_the_recipes_of_chapter_13_run_and_can_be_resumed(tmp_path, launch, program, flags, stages, epoch):
    (tmp_path / program).write_text(reproduce.changed_template(program))

    def run(folder, *more, die_after=None):
        started = launch(function=run_recipe, processes=2, arguments=(tmp_path, program, [
            *SHORT, "--batch_size=16", *flags, f"--output_dir={folder}", *more], die_after))
        return started.wait(), started.stderr()
    assert run("whole")[0] == [0, 0]
    assert run("again", die_after=epoch)[0][0] == -signal.SIGKILL
    codes, said = run("again", "--resume")
    assert codes == [0, 0], said
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert read_results(again) == read_results(whole) and same_model(again, whole)
    assert log_lines(again) == log_lines(whole)
    assert {line["stage"] for line in log_lines(whole)} == stages
    assert read_results(whole)["finished"] and read_results(whole)["method"] == program[:-3]
    if program == "bic.py":  # the first task's correction has nothing to correct
        weights = torch.load(whole / "model.pt", weights_only=True)["state_dict"]
        first, *later = [x for name, x in weights.items() if name.startswith("fc.bic")]
        assert first.tolist() == [1, 0] and len(later) == 2
        assert all((x - first).abs().min() > 1e-5 for x in later)


@pytest.mark.parametrize("program", reproduce.RECIPES)
def test_a_recipe_is_at_most_15_changed_lines(program):
    text = (ROOT / "tutorial/13_make_it_yours.md").read_text()
    section = text.split(f"\n{reproduce.RECIPES[program]}")[1].split("\n##")[0]
    lines = [line for block in blocks(section, "diff") for line in block.splitlines()]
    assert 1 < sum(line[0] in "+-" for line in lines) <= 15
    assert all(len(line) <= 101 for line in reproduce.changed_template(program).splitlines())


def changed_module(program, folder):
    """A changed template as a module, with the trainer of a second task of four and two classes."""
    from test_methods import images_of
    (folder / program).write_text(reproduce.changed_template(program))
    spec = importlib.util.spec_from_file_location(program[:-3], folder / program)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    args = utils.setup(utils.get_parser().parse_args(["--memory_size=60"]))
    trainer = module.CilTrainer(args)
    for trainer.nb_new, trainer.known_classes in ((4, 0), (2, 4)):
        trainer.expand_model(trainer.nb_new, None)
    old, new = (images_of(classes, args, each) for classes, each in ((range(4), 12), ((4, 5), 80)))
    trainer.exemplars = [old.select(old.y == c) for c in range(4)]
    return trainer, new.join(trainer.exemplars)


def test_the_recipes_do_what_they_say(tmp_path):
    sampler, images = changed_module("sampler.py", tmp_path)
    loader = sampler.make_loader(images)
    drawn = [images.y[loader.sampler.draw()[0]] for loader.sampler.seed in range(30)]
    shares = np.bincount(np.concatenate(drawn)) / sum(map(len, drawn))
    assert shares == pytest.approx([1 / 6] * 6, abs=0.02)  # of 12 or 80 images

    two, images = changed_module("two_fits.py", tmp_path)
    fits = []
    two.fit = lambda images, parameters, epochs, lr: fits.append(
        (np.bincount(images.y).tolist(), epochs, [p.requires_grad for p in two.model.backbone.parameters()]))
    two.train_task(images)
    assert [fit[:2] for fit in fits] == [([12] * 4 + [80] * 2, 40), ([10] * 6, 20)]
    assert all(fits[0][2]) and not any(fits[1][2])

    bic, images = changed_module("bic.py", tmp_path)
    fits, corrections = [], bic.model.fc.bic
    bic.fit = lambda images, parameters, epochs, lr: fits.append(
        (images, list(parameters), [p.requires_grad for p in corrections]))
    bic.train_task(images)
    (rest, _, resting), (held, (newest,), learning) = fits
    assert np.bincount(held.y).tolist() == [2] * 6 and len(rest) + len(held) == len(images)
    both = [{(y, x.numpy().tobytes()) for x, y in zip(part.x, part.y)} for part in (held, rest)]
    assert not both[0] & both[1]
    assert resting == [False, False] and learning == [False, True] and newest is corrections[1]
    features = torch.randn(5, 64)
    with torch.no_grad():
        plain = bic.model.fc(features)
        corrections[1].copy_(torch.tensor([0.5, -2.0]))
        torch.testing.assert_close(bic.model.fc(features), torch.cat(
            [plain[:, :4], 0.5 * plain[:, 4:] - 2], dim=1))


def test_the_log_of_a_run_for_tensorboard(tmp_path, finish, monkeypatch, capsys):
    from tutorial.tools import board
    finish(*SHORT, "--output_dir=run")
    text = (tmp_path / "run/log.jsonl").read_text()
    found = list(board.scalars(text + '{"task": 1, "tor'))  # the trainer is just writing
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(found) == sum(map(len, lines)) and found[-1][2] == len(lines) == 6
    losses = [(value, step) for name, value, step in found if name == "loss"]
    assert losses == [(line["loss"], step) for step, line in enumerate(lines, 1)]
    own = list(board.scalars('{"loss": 1.5, "rates": [0.1, 0.2], "note": "x"}\n'))
    assert own == [("loss", 1.5, 1)]

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if not installed
    for arguments, message in ((["run"], "pip install tensorboard"), ([], "runs")):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["board", *arguments])
        with pytest.raises(SystemExit) as end:
            board.main()
        assert end.value.code == 2 and re.fullmatch(f"error: .*{message}.*\n", capsys.readouterr().err)


def test_tensorboard_reads_what_board_writes(tmp_path, monkeypatch, capsys):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tutorial.tools import board
    (tmp_path / "log.jsonl").write_text('{"task": 1, "loss": 0.5}\n{"task": 1, "loss": 0.25}\n')
    for _ in range(2):  # the second call replaces what the first has written
        monkeypatch.setattr("sys.argv", ["board", str(tmp_path)])
        board.main()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    monkeypatch.setattr("sys.argv", ["board", str(tmp_path / "no_such")])
    with pytest.raises(SystemExit):
        board.main()
    assert re.fullmatch("error: .*no_such.*log.jsonl\n", capsys.readouterr().err)


def test_a_diff_that_does_not_fit_is_one_line(capsys):
    with pytest.raises(SystemExit):
        apply("-        no such line\n+        x\n", (ROOT / "template.py").read_text())
    assert re.fullmatch("error: .* does not fit .*\n", capsys.readouterr().err)


def test_feature_kd_runs_and_its_loss_is_its_formula(tmp_path, launch):
    started = launch(function=run_file, arguments=(
        ROOT, "tutorial.methods.feature_kd", [*SHORT, "--feature_weight=2", "--output_dir=out"]))
    assert started.wait() == [0], started.stderr()
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["method"] == "FeatureKD" and results["args"]["feature_weight"] == 2

    from tutorial.methods.feature_kd import FeatureKD
    args = utils.setup(utils.get_parser().parse_args([]))
    args.feature_weight = 2.0
    trainer = FeatureKD(args)
    trainer.model.fc.expand(4)
    trainer.teacher = utils.frozen_copy(trainer.model, args)
    trainer.parallel_model = trainer.model.eval()
    for weight in trainer.model.backbone.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    images, targets = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    loss, logits = trainer.compute_loss(images, targets)
    with torch.no_grad():
        a, b = (model(images)[1].double().numpy() for model in (trainer.model, trainer.teacher))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    shifted = logits.detach().double() - logits.detach().double().logsumexp(1, keepdim=True)
    expected = -shifted[range(6), targets].mean() + 2 * (1 - cosine).mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-4)


def test_shapes_are_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shapes.write("data/shapes")
    said = capsys.readouterr().out
    assert said in (ROOT / "tutorial/14_use_the_model.md").read_text()
    shapes.write("again")
    pictures = {path.relative_to("again"): path.read_bytes() for path in Path("again").rglob("*.png")}
    assert all(Path("data/shapes", path).read_bytes() == data for path, data in pictures.items())
    counts = {}
    for path in pictures:
        month, split, shape, _ = path.parts
        counts.setdefault((month, split), {}).setdefault(shape, 0)
        counts[month, split][shape] += 1
        if month == "now" and split == "test":  # next month they are tested again
            assert pictures[Path("next_month", *path.parts[1:])] == pictures[path]
    old, new = set(shapes.SHAPES) - set(shapes.NEW), set(shapes.NEW)
    assert len(old) == 6 and len(new) == 2
    assert counts == {
        ("now", "train"): dict.fromkeys(old, 40), ("now", "test"): dict.fromkeys(old, 20),
        ("next_month", "train"): dict.fromkeys(new, 40),
        ("next_month", "test"): dict.fromkeys(old | new, 20)}
    assert len(set(pictures.values())) == 8 * 60  # no picture twice
    for path in pictures:
        with Image.open(Path("again", path)) as image:
            assert image.size == (32, 32) and image.mode == "RGB" and np.asarray(image).std() > 10
    with pytest.raises(SystemExit):
        shapes.write("again")
    assert capsys.readouterr().err == "error: again is not empty: name a new folder\n"


def test_exemplars_are_kept(tmp_path, image_folder, monkeypatch, capsys):
    folder = image_folder(("red", "blue"), train=3)
    monkeypatch.chdir(tmp_path)
    (folder / "train/red/more").mkdir()
    (folder / "train/red/more/0.png").write_bytes(b"another of this name")
    listing = {"red": ["images/train/red/0.png", "images/train/red/more/0.png"],
               "blue": ["images/train/blue/2.png"]}
    Path("exemplars.json").write_text(json.dumps(listing))
    keep.keep("exemplars.json", "kept")
    assert capsys.readouterr().out == "kept/train: 3 exemplars of blue, red\n"
    for name, paths in listing.items():
        assert [path.read_bytes() for path in sorted(Path("kept/train", name).iterdir())] == [
            Path(path).read_bytes() for path in paths]

    def refused(target):
        with pytest.raises(SystemExit):
            keep.keep("exemplars.json", target)
        return capsys.readouterr().err

    assert refused("kept") == ("error: kept/train/red is there already: name a folder without the "
                               "old classes\n")
    assert "not a folder that can be written" in refused("exemplars.json")
    Path(listing["blue"][0]).unlink()
    assert "images/train/blue/2.png, which exemplars.json names, is not there" in refused("new")
    assert not Path("new").exists()
    for text in ("[]", "{", '{"red": 3}', '{"red": [3]}'):
        Path("exemplars.json").write_text(text)
        assert re.fullmatch("error: exemplars.json is no exemplars.json .*\n", refused("new"))


def test_a_tenth_of_the_training_images_is_held_out(tmp_path, image_folder, launch, capsys):
    source = image_folder(("red", "blue"), train=20)
    started = launch(function=run_file, arguments=(
        ROOT, "tutorial.tools.hold_out", [str(source), str(tmp_path / "new")]))
    assert started.wait() == [0], started.stderr()
    for name in ("red", "blue"):
        parts = {part: [path.read_bytes() for path in sorted((tmp_path / "new" / part / name).iterdir())]
                 for part in ("train", "test")}
        images = [path.read_bytes() for path in sorted((source / "train" / name).iterdir())]
        assert parts == {"train": images[:9] + images[10:19], "test": [images[9], images[19]]}

    def make(data_path, folder, data_set="image_folder"):
        hold_out.hold_out(SimpleNamespace(data_path=data_path, data_set=data_set), folder)

    make("data", tmp_path / "digits", "digits")
    assert "1217 images to train with, 130 held out" in capsys.readouterr().out
    (x, y), _ = utils.load_digits()
    with Image.open(sorted((tmp_path / "digits/test/7").iterdir())[0]) as image:
        assert np.array_equal(image, x[np.flatnonzero(y == 7)[9]])
    small = image_folder(("red",), train=9, name="small")
    for path, folder, words in ((source, tmp_path / "new", "is there already"),
                                (small, tmp_path / "few", "class red has fewer than ten"),
                                (tmp_path, tmp_path / "few", "has no folder train"),
                                (source, source / "train/red/0.png/x", "not a folder that can be")):
        with pytest.raises(SystemExit):
            make(path, folder)
        assert words in capsys.readouterr().err


def test_held_out_classes_keep_their_numbers(tmp_path, monkeypatch):
    """Fashion-MNIST begins with a T-shirt/top, and ends with an Ankle boot."""
    x, y = np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3), np.arange(20) // 10
    monkeypatch.setattr(utils, "load_data", lambda args: ([(x, y), (x, y)], ["T-shirt/top", "Ankle boot"]))
    hold_out.hold_out(SimpleNamespace(), tmp_path / "new")
    splits, names = utils.load_folder(SimpleNamespace(data_path=tmp_path / "new", data_set="image_folder"))
    assert names == ["0000 T-shirt or top", "0001 Ankle boot"]
    for path, label in zip(*splits[0]):
        with Image.open(path) as image:
            assert np.asarray(image)[0, 0, 0] // 10 == label


def test_the_commands_of_chapter_14_run(tmp_path, launch):
    """All of them, one after the other, but with short training."""
    text = "\n".join(blocks((ROOT / "tutorial/14_use_the_model.md").read_text(), "bash"))
    for line in filter(None, text.replace("\\\n", " ").splitlines()):
        words = shlex.split(line)
        place = next(i for i, word in enumerate(words) if word.endswith(".py") or "tutorial." in word)
        name, arguments = words[place], words[place + 1:]
        if name.split(".")[-1] in ("py", "grow"):
            arguments += ["--num_epochs=1", "--num_workers=0", "--no_plots"]
        started = launch(function=run_file, arguments=(ROOT, name, arguments),
                         processes=2 if "--nproc_per_node=2" in words else 1)
        assert set(started.wait()) == {0}, (line, started.stderr())
        if name == "tutorial.tools.use":  # as many lines as the chapter shows
            assert [said.split(": ")[0] for said in started.stdout().splitlines()] == arguments[1:]
    assert (tmp_path / "runs/shapes_grown/model.pt").exists()


@pytest.fixture
def small_run(tmp_path, image_folder, finish):
    """A run over three of four classes of a folder: (folder of images, run directory)."""
    whole = image_folder()  # red, green, blue, grey
    shutil.copytree(whole, tmp_path / "three", ignore=shutil.ignore_patterns("grey"))
    flags = ["--data_set=image_folder", f"--data_path={tmp_path / 'three'}", "--input_size=16",
             "--backbone=resnet20", "--num_bases=2", "--increment=1", "--num_epochs=12",
             "--batch_size=8", "--memory_size=12", "--num_workers=0", "--no_plots"]
    finish(*flags, "--output_dir=old")
    return whole, tmp_path / "old"


def test_a_trained_model_classifies_and_grows(small_run, launch, tmp_path):
    from tutorial.tools.use import classify, load
    whole, old = small_run
    model, transform, names = load(old / "model.pt")
    assert sorted(names) == ["blue", "green", "red"]
    results = json.loads((old / "results.json").read_text())
    hits = [classify(model, transform, names, Image.open(path))[0] == path.parent.name
            for path in (tmp_path / "three/test").rglob("*.png")]
    assert 100 * np.mean(hits) == pytest.approx(results["last_accuracy"])  # as in the run itself

    picture = next((whole / "test/red").iterdir())
    said = launch(function=run_file, arguments=(ROOT, "tutorial.tools.use", [str(old / "model.pt"), str(picture)]))
    assert said.wait() == [0] and re.fullmatch(r".*\.png: (red|green|blue) \(\d+ %\)\n", said.stdout())

    for step in ("--stop_after_task=1", "--resume"):  # stopped before anything was trained
        grown = launch(function=run_file, processes=2, arguments=(ROOT, "tutorial.tools.grow", [
            f"--model={old / 'model.pt'}", f"--data_path={whole}", "--increment=1", "--num_epochs=2",
            "--batch_size=8", "--memory_size=12", "--num_workers=0", "--no_plots",
            "--output_dir=new", step]))
        assert grown.wait() == [0, 0], grown.stderr()
        assert bool((tmp_path / "new/log.jsonl").read_text()) == (step == "--resume")
    new = json.loads((tmp_path / "new/results.json").read_text())
    assert new["class_names"] == [*results["class_names"], "grey"] and new["increments"] == [3, 1]
    assert new["acc1s"][0] == pytest.approx(results["last_accuracy"])  # loaded, not trained
    saved = torch.load(tmp_path / "new/model.pt", weights_only=True)
    heads = [v for name, v in saved["state_dict"].items() if "heads" in name and "weight" in name]
    assert [len(head) for head in heads] == [3, 1]
    model, transform, names = load(tmp_path / "new/model.pt")  # the result can be used again
    assert names == new["class_names"] and classify(model, transform, names, Image.open(picture))

    kept = json.loads((old / "exemplars.json").read_text())
    assert set(kept) == {"red", "green", "blue"} and all(len(paths) == 4 for paths in kept.values())
    assert all(Path(path).exists() for paths in kept.values() for path in paths)


def test_growing_from_the_exemplars_alone(small_run, launch, tmp_path):
    """One of each old class, fewer than a batch, which the 12 of the new class must fill."""
    whole, old = small_run
    for name in ("red", "green", "blue"):
        shutil.rmtree(whole / "train" / name)
    keep.keep(old / "exemplars.json", whole)
    for path in whole.glob("train/*/[1-9]_*"):
        path.unlink()

    def grown(*flags):
        started = launch(function=run_file, arguments=(ROOT, "tutorial.tools.grow", [
            f"--model={old / 'model.pt'}", f"--data_path={whole}", "--increment=1", "--num_epochs=2",
            "--memory_size=12", "--num_workers=0", "--no_plots", "--output_dir=new", *flags]))
        return started.wait(), started.stderr()

    code, said = grown("--batch_size=13")
    assert code == [2] and "--batch_size 13 is more than the 12 images of the smallest" in said
    assert grown("--batch_size=8", "--stop_after_task=1") == ([0], "")
    (tmp_path / "new/model.pt").unlink()  # as if killed there
    assert grown("--batch_size=8", "--resume") == ([0], "")
    results = json.loads((tmp_path / "new/results.json").read_text())
    assert results["finished"] and results["increments"] == [3, 1]
    kept = json.loads((tmp_path / "new/exemplars.json").read_text())
    assert {name: len(paths) for name, paths in kept.items()} == dict(red=1, green=1, blue=1, grey=3)


OWN_MODEL = '''
import torch, utils
from template import CilModel, CilTrainer, main
from tutorial.tools.grow import GrownWA, get_parser, grow

class OneLayer(torch.nn.Module):
    """No heads: the rows of the old classes are copied into a larger layer."""
    def __init__(self, width):
        super().__init__()
        self.layer = torch.nn.Linear(width, 0)
    def expand(self, nb_classes):
        old = self.layer
        self.layer = torch.nn.Linear(old.in_features, old.out_features + nb_classes)
        self.layer.weight.data[:old.out_features] = old.weight.data
    def forward(self, features):
        return self.layer(features)

class OwnModel(CilModel):
    def __init__(self, backbone):
        super().__init__(backbone)
        self.fc = OneLayer(backbone.num_features)
    def forward(self, images):
        return *super().forward(images), "and more"

class Own(CilTrainer):
    model_class = OwnModel
    def compute_loss(self, images, targets):
        logits, _, _ = self.parallel_model(images)
        return torch.nn.functional.cross_entropy(logits, targets), logits

class GrownOwn(GrownWA, Own):
    pass

if __name__ == "__main__":
    import sys
    if "--model" in sys.argv:
        grow(get_parser().parse_args(), GrownOwn)
    else:
        main(utils.get_parser().parse_args(), Own)
'''
# What the help of grow.py shows.
GROWN_LUCIR = textwrap.dedent(grow.__doc__.split("In a file of your own:\n")[1])


@pytest.mark.parametrize("program, text, classes", [
    ("own.py", OWN_MODEL, lambda: __import__("own").OwnModel),
    ("tutorial.methods.lucir", GROWN_LUCIR, lambda: lucir.LUCIRModel),
    ("tutorial.methods.podnet", GROWN_LUCIR.replace("lucir", "podnet").replace("LUCIR", "PODNet"),
     lambda: podnet.PODModel)])
def test_another_network_is_used_and_grows(tmp_path, image_folder, launch, monkeypatch, program, text,
                                           classes):
    (tmp_path / "own.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    whole = image_folder()
    shutil.copytree(whole, tmp_path / "three", ignore=shutil.ignore_patterns("grey"))
    flags = ["--increment=1", "--num_epochs=4", "--batch_size=8", "--memory_size=12",
             "--num_workers=0", "--no_plots", "--no_align"]

    def run(name, *more):
        started = launch(function=run_file, arguments=(
            ROOT if name.startswith("tutorial.") else tmp_path, name, [*flags, *more]))
        assert started.wait() == [0], started.stderr()

    def answers(path):  # as in the run itself?
        model, transform, names = use.load(path / "model.pt", classes())
        results = json.loads((path / "results.json").read_text())
        files = [file for file in (whole / "test").rglob("*.png") if file.parent.name in names]
        hits = [use.classify(model, transform, names, Image.open(file))[0] == file.parent.name
                for file in files]
        assert 100 * np.mean(hits) == pytest.approx(results["last_accuracy"])
        return results

    run(program, "--data_set=image_folder", f"--data_path={tmp_path / 'three'}", "--num_bases=1",
        "--input_size=16", "--backbone=resnet20", "--output_dir=old")
    old = answers(tmp_path / "old")
    run("own.py", "--model", str(tmp_path / "old/model.pt"), f"--data_path={whole}", "--output_dir=new")
    new = answers(tmp_path / "new")
    assert new["method"].startswith("Grown") and new["increments"] == [3, 1]
    assert new["acc1s"][0] == pytest.approx(old["last_accuracy"])  # loaded, not trained


@pytest.mark.parametrize("module, arguments, message", [
    ("tutorial.tools.use", ["no_such.pt", "x.png"], "no_such.pt is no model.pt"),
    ("tutorial.tools.keep", ["no_such.json", "x"], "no_such.json is no exemplars.json"),
    ("tutorial.tools.shapes", [__file__], "not a folder that can be written"),
    ("tutorial.tools.shapes", [], "folder"),
    ("tutorial.tools.grow", ["--model=no_such.pt", "--data_path=."], "--model no_such.pt"),
    ("tutorial.tools.grow", ["--data_path=."], "--model")])
def test_bad_input_of_the_programs_is_one_line(launch, module, arguments, message):
    started = launch(function=run_file, arguments=(ROOT, module, arguments))
    assert started.wait() == [2]
    assert message in started.stderr() and started.stderr().count("\n") == 1


def test_the_model_of_another_network_is_one_line(small_run, launch, tmp_path):
    """Such as LUCIR's, whose heads have no bias."""
    whole, old = small_run
    saved = torch.load(old / "model.pt", weights_only=True)
    for name in [name for name in saved["state_dict"] if name.startswith("fc.") and name.endswith("bias")]:
        del saved["state_dict"][name]
    torch.save(saved, tmp_path / "other.pt")
    for arguments in (("tutorial.tools.use", ["other.pt", str(next((whole / "test/red").iterdir()))]),
                      ("tutorial.tools.grow", ["--model=other.pt", f"--data_path={whole}", "--increment=1",
                                         "--batch_size=8", "--memory_size=12", "--num_workers=0"])):
        started = launch(function=run_file, arguments=(ROOT, *arguments))
        assert started.wait() == [2] and "other.pt holds no CilModel" in started.stderr()
        assert started.stderr().count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_growing_needs_all_old_classes(small_run, launch, tmp_path):
    whole, old = small_run

    def said(*flags):
        started = launch(function=run_file, arguments=(ROOT, "tutorial.tools.grow", [
            f"--model={old / 'model.pt'}", "--increment=1", *flags]))
        assert started.wait() == [2] and started.stderr().count("\n") == 1
        return started.stderr()

    assert "holds no new class" in said(f"--data_path={tmp_path / 'three'}")
    assert "leave them out" in said(f"--data_path={whole}", "--num_bases=2")
    shutil.rmtree(whole / "train/red")
    assert "lacks the old classes ['red']" in said(f"--data_path={whole}")


def test_measurements_of_a_run(small_run, tmp_path, monkeypatch):
    from tutorial.tools import measure
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    mine = SimpleNamespace(run=small_run[1], data_path=None)
    measure.norms(mine)
    found = json.loads((tmp_path / "norms_image_folder.json").read_text())
    after, before = np.array(found["after"]), np.array(found["before"])
    assert after[:2] == pytest.approx(before[:2])
    assert after[2:].mean() == pytest.approx(after[:2].mean(), rel=1e-3)  # what alignment is for
    assert before[2] * found["gamma"] == pytest.approx(after[2], rel=1e-3)

    measure.border(mine)
    found = json.loads((tmp_path / "border_old.json").read_text())
    args, results, model, (_, test) = measure.load_run(mine)
    head = model.fc.heads[-1]
    before = head.weight / results["gammas"][-1]
    clean = [[data[i, None] for i in range(len(data))] for data in (test.images(0), test.images(1))]
    for row in found["rows"][::8]:
        head.weight.data = row["factor"] * before
        right = [100 * np.mean([model(image[None])[0].argmax() == label for image, label in images])
                 for images in clean]
        assert [row["old"], row["new"]] == pytest.approx(right, abs=1e-3)
    head.weight.data = before
    logits = torch.cat([model(image[None])[0] for image, _ in clean[0]])
    parts = found["logits_of_old_images"]
    assert parts["old_products"] + parts["old_biases"] == pytest.approx(
        logits[:, :-1].mean().item(), abs=1e-3)
    assert parts["new_products"] + parts["new_biases"] == pytest.approx(
        logits[:, -1].mean().item(), abs=1e-3)

    measure.exemplars(mine, draws=20)
    found = json.loads((tmp_path / "exemplars_image_folder.json").read_text())
    for distances in found["distance"].values():  # all images of the class: exactly its mean
        assert len(distances) == found["images"] == 12 and distances[-1] == pytest.approx(0, abs=1e-4)
    assert found["distance"]["herding"][3] <= found["distance"]["random"][3]

    measure.ranks(mine, m=4, processes=2)
    found = json.loads((tmp_path / "ranks_image_folder.json").read_text())
    for row in found["rows"]:
        union = row["different_images"]["2"]
        assert row["different_images"]["1"] == 4 and union == pytest.approx(8 - 4 * row["shared_by_two"])


def test_the_adaptation_of_a_finished_run_is_that_of_the_run(tmp_path, launch, monkeypatch):
    from tutorial.tools import measure
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    started = launch(function=run_file, arguments=(ROOT, "tutorial.methods.itaml", [
        *SHORT, "--memory_size=120", "--output_dir=out", "--stop_after_task=2"]))
    assert started.wait() == [0], started.stderr()
    measure.adaptation(SimpleNamespace(run=tmp_path / "out", data_path=None))
    rows = json.loads((tmp_path / "adaptation_out.json").read_text())["rows"]
    before = json.loads((tmp_path / "out/results.json").read_text())["oracle"]
    assert rows[0] == {"rate": 1e-3, "oracle": pytest.approx(before[-1], abs=1e-3)}
    assert rows[-1]["rate"] == 0 and rows[-1]["oracle"] != rows[0]["oracle"]


def test_the_variants_of_wa_do_what_they_say(tmp_path, launch):
    from template import CilTrainer
    from tutorial.methods.wa_variants import SurveyWA, TSquaredWA, UnscaledWA
    started = launch(function=run_file, arguments=(ROOT, "tutorial.methods.wa_variants", [
        *SHORT, "--variant=clipped", "--output_dir=out"]))
    assert started.wait() == [0], started.stderr()
    weights = torch.load(tmp_path / "out/model.pt", weights_only=True)["state_dict"]
    heads = [weight for name, weight in weights.items() if "heads" in name and "weight" in name]
    assert len(heads) == 3 and all((head >= 0).all() and (head == 0).any() for head in heads)

    args = utils.setup(utils.get_parser().parse_args(["--temperature=3"]))
    trainer = TSquaredWA(args)
    trainer.model.fc.expand(4)
    trainer.teacher, trainer.known_classes = utils.frozen_copy(trainer.model, args), 4
    trainer.model.fc.expand(2)
    trainer.parallel_model = trainer.model.eval()
    for weight in trainer.model.backbone.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    images, targets = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 5])

    def loss(Trainer):
        one = Trainer(args)
        vars(one).update(vars(trainer))
        return one.compute_loss(images, targets)[0].item()

    squared, survey, plain = loss(TSquaredWA), loss(SurveyWA), loss(CilTrainer)
    args.lambda_kd, fixed = 0, args.lambda_kd
    ce = loss(CilTrainer)
    kd = (plain - (1 - fixed) * ce) / fixed
    assert squared == pytest.approx((1 - fixed) * ce + 9 * fixed * kd, rel=1e-4)
    assert survey == pytest.approx(ce + 2 * kd, rel=1e-4)
    args.lambda_kd = "dynamic"  # 4 of 6 classes are known: 2 / 3
    assert loss(UnscaledWA) == pytest.approx(ce + 2 * kd, rel=1e-4)
