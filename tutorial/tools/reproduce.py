"""Every run behind the text: its list, and the way to make it again.

    python -m tutorial.tools.reproduce                          # the list
    python -m tutorial.tools.reproduce digits_wa --seeds 0 1    # two runs of a group
    python -m tutorial.tools.reproduce 'digits_*' --jobs 2      # all seeds of many groups
    python -m tutorial.tools.reproduce digits_wa --record       # and into tutorial/results/

A run leaves its files in runs/reproduce/<group>_seed<k> and its output beside it, in a .txt. It is
compared with the recorded run of the same seed. The command can be killed and started again: a
finished run is only compared (to make it again, remove its folder), an unfinished one continued.
"""
import argparse
import fnmatch
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import re
import runpy
import signal
import statistics
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tutorial/results"
RUNS = Path("runs/reproduce")

TEN, ONE = range(10), range(1)
CIFAR = "--data_set cifar100 --amp bf16"
FIVE = f"{CIFAR} --aa none --num_epochs 5"
TWENTY = f"{CIFAR} --aa none --num_epochs 20"
SIXTY = f"{CIFAR} --aa none --num_epochs 60"
TINY = "--lr 0.002 --visual tiny"
EVEN = "--num_bases 5 --increment 5 --class_order tutorial/results/even_first.txt"
# The groups of runs: name -> (program, flags, seeds). A program is template.py, a file of
# tutorial/methods without its .py, or a changed template. A new group needs a line here, and its
# runs are made with --record.
GROUPS = {
    "cifar100_aanets_lucir": ("aanets", f"{CIFAR} --num_epochs 20", ONE),
    "cifar100_bal_ft_all_growing": ("bal_ft", f"{CIFAR} --num_epochs 20 --patience 0", ONE),
    "cifar100_bal_ft_all_joint": (
        "bal_ft", f"{CIFAR} --num_epochs 6 --num_epochs_ft 4 --patience 0 --validation seen "
        "--upper_bound joint", ONE),
    "cifar100_bal_ft_own_growing": (
        "bal_ft", f"{CIFAR} --num_epochs 20 --patience 0 --loss own", ONE),
    "cifar100_bal_ft_own_joint": (
        "bal_ft", f"{CIFAR} --num_epochs 6 --num_epochs_ft 4 --patience 0 --validation seen "
        "--upper_bound joint --loss own", ONE),
    "cifar100_der": ("der", TWENTY, ONE),
    "cifar100_finetune": ("template.py", f"{TWENTY} --memory_size 0 --lambda_kd 0 --no_align", ONE),
    "cifar100_finetune_60": (
        "template.py", f"{SIXTY} --memory_size 0 --lambda_kd 0 --no_align", ONE),
    "cifar100_first_60": ("template.py", f"{SIXTY} --stop_after_task 1", ONE),
    "cifar100_frozen_bare_60": ("frozen", f"{SIXTY} --adapt --head ridge --projection 0", ONE),
    "cifar100_frozen_means_60": ("frozen", f"{SIXTY} --adapt", ONE),
    "cifar100_frozen_one_60": (
        "frozen", f"{SIXTY} --adapt --head ridge --increment 1 --ridge 0.01", ONE),
    "cifar100_frozen_ridge_60": ("frozen", f"{SIXTY} --adapt --head ridge", ONE),
    "cifar100_icarl": ("icarl", f"{CIFAR} --num_epochs 20", ONE),
    "cifar100_itaml_paper": ("itaml", f"{CIFAR} --num_epochs 25 --stop_after_task 2", ONE),
    "cifar100_itaml_released": (
        "itaml", f"{CIFAR} --num_epochs 25 --stop_after_task 2 --meta released", ONE),
    "cifar100_lucir": ("lucir", f"{CIFAR} --num_epochs 20", ONE),
    "cifar100_lucir_60": ("lucir", SIXTY, ONE),
    "cifar100_podnet": ("podnet", f"{CIFAR} --num_epochs 20", ONE),
    "cifar100_podnet_60": ("podnet", SIXTY, ONE),
    "cifar100_replay": ("template.py", f"{TWENTY} --lambda_kd 0 --no_align", ONE),
    "cifar100_replay_5": ("template.py", f"{FIVE} --lambda_kd 0 --no_align", ONE),
    "cifar100_replay_60": ("template.py", f"{SIXTY} --lambda_kd 0 --no_align", ONE),
    "cifar100_replay_align_60": ("template.py", f"{SIXTY} --lambda_kd 0", ONE),
    "cifar100_replay_kd": ("template.py", f"{TWENTY} --no_align", ONE),
    "cifar100_replay_kd_60": ("template.py", f"{SIXTY} --no_align", ONE),
    "cifar100_unscaled_60": (
        "wa_variants", f"{SIXTY} --variant unscaled --stop_after_task 2", ONE),
    "cifar100_wa": ("template.py", TWENTY, ONE),
    "cifar100_wa_5": ("template.py", FIVE, ONE),
    "cifar100_wa_60": ("template.py", SIXTY, ONE),
    "digits_aanets_free": ("aanets", "--branch_1 free --fusion_lr 0", TEN),
    "digits_aanets_half": ("aanets", "--fusion_lr 0", TEN),
    "digits_aanets_lucir": ("aanets", "", TEN),
    "digits_aanets_single": ("aanets", "--branch_mode single --branch_1 free", TEN),
    "digits_alta_all": ("alta", f"{TINY} --columns all", TEN),
    "digits_alta_constant": ("alta", "--lr 1e-5 --visual tiny --schedule constant", TEN),
    "digits_alta_cprompt": ("alta", f"{TINY} --clip_method cprompt", TEN),
    "digits_alta_cprompt_mlp": ("alta", f"{TINY} --clip_method cprompt_mlp", TEN),
    "digits_alta_cprompt_oriprompt": ("alta", f"{TINY} --clip_method cprompt_oriprompt", TEN),
    "digits_alta_cprompt_resmlp": ("alta", f"{TINY} --clip_method cprompt_resmlp", TEN),
    "digits_alta_joint": (
        "alta", f"{TINY} --num_bases 10 --memory_size 0 --num_epochs 100", TEN),
    "digits_alta_mlp": ("alta", f"{TINY} --clip_method mlp", TEN),
    "digits_alta_oriclip2cprompt_mlp": ("alta", f"{TINY} --clip_method oriclip2cprompt_mlp", TEN),
    "digits_alta_oritext_mlp2cprompt_oriimg": ("alta", TINY, TEN),
    "digits_alta_resmlp": ("alta", f"{TINY} --clip_method resmlp", TEN),
    "digits_alta_sgd": ("alta", f"{TINY} --memory_size 0", TEN),
    "digits_alta_sprompt": ("alta", f"{TINY} --clip_method sprompt", TEN),
    "digits_bal_ft_all_fixed": ("bal_ft", "--validation seen", TEN),
    "digits_bal_ft_all_growing": ("bal_ft", "--validation seen --fixed_memory", TEN),
    "digits_bal_ft_all_growing20": (
        "bal_ft", "--validation seen --fixed_memory --memory_size 200", TEN),
    "digits_bal_ft_all_joint": ("bal_ft", "--validation seen --upper_bound joint", TEN),
    "digits_bal_ft_all_validate_new": ("bal_ft", "--fixed_memory --patience 3", TEN),
    "digits_bal_ft_all_validate_seen": (
        "bal_ft", "--validation seen --fixed_memory --patience 3", TEN),
    "digits_bal_ft_own_fixed": ("bal_ft", "--validation seen --loss own", TEN),
    "digits_bal_ft_own_growing": ("bal_ft", "--validation seen --loss own --fixed_memory", TEN),
    "digits_bal_ft_own_growing20": (
        "bal_ft", "--validation seen --loss own --fixed_memory --memory_size 200", TEN),
    "digits_bal_ft_own_joint": ("bal_ft", "--validation seen --loss own --upper_bound joint", TEN),
    "digits_bal_ft_own_validate_new": ("bal_ft", "--loss own --fixed_memory --patience 3", TEN),
    "digits_bal_ft_own_validate_seen": (
        "bal_ft", "--validation seen --loss own --fixed_memory --patience 3", TEN),
    "digits_balanced": ("balanced.py", "--no_align", TEN),
    "digits_clipped": ("wa_variants", "--variant clipped", TEN),
    "digits_cluster": ("template.py", "--herding_method cluster", TEN),
    "digits_der": ("der", "", TEN),
    "digits_der_no_aux": ("der", "--lambda_aux 0", TEN),
    "digits_der_one_stage": ("der", "--num_epochs_ft 0", TEN),
    "digits_dynamic": ("template.py", "--lambda_kd dynamic", TEN),
    "digits_entropy": ("template.py", "--herding_method entropy", TEN),
    "digits_feature": ("feature_kd", "", TEN),
    "digits_finetune": ("template.py", "--memory_size 0 --lambda_kd 0 --no_align", TEN),
    "digits_fixed": ("template.py", "--fixed_memory", TEN),
    "digits_frozen_bare": ("frozen", "--adapt --head ridge --projection 0", TEN),
    "digits_frozen_clip_bare": ("frozen_clip", "--head ridge --projection 0", TEN),
    "digits_frozen_clip_means": ("frozen_clip", "", TEN),
    "digits_frozen_clip_ridge": ("frozen_clip", "--head ridge", TEN),
    "digits_frozen_even": ("frozen", f"--adapt --head ridge {EVEN}", TEN),
    "digits_frozen_even_means": ("frozen", f"--adapt {EVEN}", TEN),
    "digits_frozen_means": ("frozen", "--adapt", TEN),
    "digits_frozen_one": ("frozen", "--adapt --head ridge --increment 1", TEN),
    "digits_frozen_ridge": ("frozen", "--adapt --head ridge", TEN),
    "digits_frozen_untrained": ("frozen", "--head ridge", TEN),
    "digits_frozen_untrained_means": ("frozen", "", TEN),
    "digits_hardest": ("hardest.py", "", TEN),
    "digits_icarl": ("icarl", "", TEN),
    "digits_itaml_paper": ("itaml", "", TEN),
    "digits_itaml_released": ("itaml", "--meta released", TEN),
    "digits_joint": ("template.py", "--num_bases 10", TEN),
    "digits_lucir": ("lucir", "", TEN),
    "digits_orders_finetune": (
        "template.py", "--memory_size 0 --lambda_kd 0 --no_align --class_order seed", TEN),
    "digits_orders_replay": ("template.py", "--lambda_kd 0 --no_align --class_order seed", TEN),
    "digits_orders_replay_align": ("template.py", "--lambda_kd 0 --class_order seed", TEN),
    "digits_orders_replay_kd": ("template.py", "--no_align --class_order seed", TEN),
    "digits_orders_wa": ("template.py", "--class_order seed", TEN),
    "digits_podnet": ("podnet", "", TEN),
    "digits_random": ("template.py", "--herding_method random", TEN),
    "digits_replay": ("template.py", "--lambda_kd 0 --no_align", TEN),
    "digits_replay_align": ("template.py", "--lambda_kd 0", TEN),
    "digits_replay_kd": ("template.py", "--no_align", TEN),
    "digits_t2": ("wa_variants", "--variant t_squared", TEN),
    "digits_tiny": ("tiny.py", "--backbone tinynet", TEN),
    "digits_unscaled_dynamic": (
        "wa_variants", "--variant unscaled --lambda_kd dynamic", TEN),
    "digits_wa": ("template.py", "", TEN),
    "digits_wa_even": ("template.py", EVEN, TEN),
    "digits_wa_one": ("template.py", "--increment 1", TEN),
    "validation_05": ("template.py", f"{TWENTY} --stop_after_task 2 --lambda_kd 0.5", ONE),
    "validation_067": ("template.py", f"{TWENTY} --stop_after_task 3 --lambda_kd 0.67", ONE),
    "validation_dynamic": ("template.py", f"{TWENTY} --stop_after_task 3 --lambda_kd dynamic", ONE),
    "validation_replay_align": ("template.py", f"{TWENTY} --stop_after_task 2 --lambda_kd 0", ONE),
    "validation_survey": ("wa_variants", f"{TWENTY} --stop_after_task 3 --variant survey", ONE),
    "validation_unscaled_05": (
        "wa_variants", f"{TWENTY} --stop_after_task 2 --variant unscaled --lambda_kd 0.5", ONE),
    "validation_unscaled_dynamic": (
        "wa_variants", f"{TWENTY} --stop_after_task 2 --variant unscaled --lambda_kd dynamic", ONE),
}
# The changed templates: template.py with the changes of this section of chapter 13.
CHANGED = {"balanced.py": "### 1.", "hardest.py": "### 2.", "tiny.py": "### 3."}
# Its recipes, of which no runs are recorded: likewise.
RECIPES = {"sampler.py": "### A balanced sampler", "two_fits.py": "### A second fit",
           "bic.py": "### A correction"}

# Importing torch, timm and continuum takes seconds. A fork server does it once; every run is a
# fresh fork of it. Where there is none (Windows), each run imports for itself.
FORKS = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if FORKS else "spawn")
CONTEXT.set_forkserver_preload(["template", "continuum"])


def fail(message):
    """End with one line on stderr and exit code 2."""
    import utils  # takes seconds, and neither the list nor the tables need it
    utils.fail(message)


# ---------------------------------------------------------------------------------------------
# What is recorded
# ---------------------------------------------------------------------------------------------

def load(name):
    """The recorded runs of a group, in the order of their seeds; none if there is no such file."""
    file = RESULTS / f"{name}.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def recorded(name, seed):
    """The recorded run of a seed, or None."""
    return next((run for run in load(name) if run["args"]["seed"] == seed), None)


def record(name, seed, results):
    """Put a finished run into the file of its group, in place of the run of the same seed."""
    # Nothing about this machine.
    results["args"].update(output_dir=None, data_path="data", num_workers=None, resume=False)
    runs = {run["args"]["seed"]: run for run in load(name)} | {seed: results}
    file = RESULTS / f"{name}.jsonl"
    part = file.with_suffix(".part")
    part.write_text("".join(json.dumps(run) + "\n" for _, run in sorted(runs.items())))
    part.replace(file)


def command(name):
    """What to type for a run of this group; --seed and --output_dir come on top."""
    program, flags, _ = GROUPS[name]
    start = program if program.endswith(".py") else f"-m tutorial.methods.{program}"
    text = f"python {start} {flags}".rstrip()
    if program in CHANGED:
        text += f"  # template.py with change {CHANGED[program].strip('# .')} of chapter 13"
    return text


def listing():
    """(name, command, seeds, minutes of the median run, trainer's version) of each group."""
    for name, (_, _, seeds) in GROUPS.items():
        runs = load(name)
        minutes = statistics.median([run["seconds"] for run in runs] or [0]) / 60
        versions = sorted({run["versions"].get("trainer", "1") for run in runs})
        span = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])
        yield name, command(name), span, f"{minutes:.1f}", ", ".join(versions) or "not recorded"


def compare(old, new):
    """Says "equal", or in which cells of the accuracy matrix a run differs from the recorded."""
    if old is None:
        return f"new, {new['average_incremental_accuracy']:.2f} % in the average"
    old, new = old["accuracy_matrix"], new["accuracy_matrix"]
    if len(old) != len(new):
        return f"differs: {len(new)} tasks, recorded are {len(old)}"
    cells = [f"({t}, {u}) {a:.2f} -> {b:.2f}" for t, rows in enumerate(zip(old, new), 1)
             for u, (a, b) in enumerate(zip(*rows), 1) if abs(a - b) > 1e-3]  # some are rounded
    if cells:
        return f"differs in {len(cells)} of {sum(map(len, old))} cells: {', '.join(cells)}"
    return "equal"


# ---------------------------------------------------------------------------------------------
# The changed templates
# ---------------------------------------------------------------------------------------------

def blocks(text, language):
    """The blocks of code in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def apply(diff, source):
    """The source with a diff block applied; its context and `-` lines must occur exactly once."""
    lines = diff.splitlines()
    before = "".join(line[1:] + "\n" for line in lines if line[0] in " -")
    after = "".join(line[1:] + "\n" for line in lines if line[0] in " +")
    if source.count(before) != 1:
        fail(f"a change of chapter 13 does not fit template.py any more: {before!r}")
    return source.replace(before, after)


def changed_template(program):
    """The source of template.py with the changes that a section of chapter 13 shows."""
    text = (ROOT / "tutorial/13_make_it_yours.md").read_text()
    sections = re.split(r"(?m)^(?=##)", text)
    start = (CHANGED | RECIPES)[program]
    section = next(part for part in sections if part.startswith(start))
    source = (ROOT / "template.py").read_text()
    for diff in blocks(section, "diff"):
        source = apply(diff, source)
    return source


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------

def end_with_parent():
    """End this process when the one that started it is gone, however that ended."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def child(program, arguments, folder, output):
    """What `python PROGRAM ARGUMENTS` does, in a process of its own."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # at once, but with what exits clean up
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch
    torch.set_num_threads(1)  # where a server of processes was there before OMP_NUM_THREADS
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__")


def data_path(name, given):
    """The groups validation_* are tested on a part of the training images (tools/hold_out.py)."""
    return f"{given.data_path}_val" if name.startswith("validation_") else given.data_path


def start(name, seed, given, copies):
    """Start, or continue, a run; returns its process."""
    program, flags, _ = GROUPS[name]
    if program.endswith(".py"):
        program = (copies if program in CHANGED else ROOT) / program
    else:
        program = f"tutorial.methods.{program}"
    arguments = [*flags.split(), f"--seed={seed}", f"--output_dir={RUNS}/{name}_seed{seed}",
                 "--resume", "--no_plots", f"--data_path={data_path(name, given)}",
                 f"--device={given.device}"]
    output = RUNS / f"{name}_seed{seed}.txt"
    output.write_text("")
    process = CONTEXT.Process(target=child, args=(
        str(program), arguments, os.getcwd(), str(output)))
    process.start()
    return process


def result(name, seed):
    """What a finished run left; None before its end."""
    file = RUNS / f"{name}_seed{seed}/results.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    last = re.search(r"--stop_after_task (\d+)", GROUPS[name][1])  # some groups go no further
    whole = found.get("finished") or last and len(found.get("acc1s", [])) == int(last[1])
    return found if whole else None


def settle(name, seed, given):
    """Compare a finished run with the recorded one, and record it if asked to. Returns a text."""
    results = result(name, seed)
    if results is None:
        said = (RUNS / f"{name}_seed{seed}.txt").read_text(errors="replace").strip()
        return f"FAILED: {(said or 'no output').splitlines()[-1]}"
    text = compare(recorded(name, seed), results)
    if given.record:
        record(name, seed, results)
        text += ", recorded"
    return text


def expected(name, seed):
    """Seconds of this run as recorded, or of the group's other seeds, or a minute."""
    runs = [run for run in (recorded(name, seed), *load(name)) if run]
    return runs[0]["seconds"] if runs else 60.0


def make(jobs, given, copies):
    """Make the runs, the longest first, so that all end together. Returns how many failed."""
    seconds = {job: expected(*job) for job in jobs}
    waiting, running, failed = sorted(jobs, key=seconds.get, reverse=True), {}, 0
    try:
        while waiting or running:
            while waiting and len(running) < given.jobs:
                job = waiting.pop(0)
                running[start(*job, given, copies)] = job
            multiprocessing.connection.wait([process.sentinel for process in running])
            for process in [process for process in running if not process.is_alive()]:
                name, seed = running.pop(process)
                failed += result(name, seed) is None
                left = [seconds[job] for job in (*waiting, *running.values())]
                minutes = max(sum(left) / given.jobs, *left, 0) / 60
                print(f"{len(jobs) - len(left)}/{len(jobs)} {name} seed {seed}: "
                      f"{settle(name, seed, given)} ({minutes:.0f} min left)", flush=True)
    finally:
        for process in running:
            process.terminate()
            process.join()
    return failed


def parse():
    """The command line, with the patterns of names resolved."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail
    parser.add_argument("names", nargs="*", help="groups, or patterns such as 'digits_*'")
    parser.add_argument("--seeds", nargs="+", type=int, help="(all of the group)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (1)")
    parser.add_argument("--data_path", default="data", help="folder with CIFAR-100 (data); "
                        "validation_* read FOLDER_val, which tutorial.tools.hold_out makes")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"],
                        help="(cpu, as recorded)")
    parser.add_argument("--record", action="store_true", help="replace the recorded runs")
    given = parser.parse_args()
    found = {name: fnmatch.filter(GROUPS, name) for name in given.names}
    for name in found:
        if not found[name]:
            fail(f"{name} is no group of runs: without a name, all are listed")
    if given.jobs < 1:
        fail(f"--jobs {given.jobs}: at least one")
    given.names = [name for name in GROUPS if any(name in names for names in found.values())]
    given.seeds = given.seeds and sorted(set(given.seeds))
    return given


def main():
    given = parse()
    if not given.names:
        heads = ("group", "command", "seeds", "minutes", "trainer")
        for name, typed, seeds, minutes, version in [heads, *listing()]:
            print(f"{name:40}{seeds:8}{minutes:>8}  {version:9}{typed}")
        return
    RUNS.mkdir(parents=True, exist_ok=True)
    jobs = [(name, seed) for name in given.names for seed in given.seeds or GROUPS[name][2]]
    todo = [job for job in jobs if result(*job) is None]
    for name, seed in [job for job in jobs if job not in todo]:
        print(f"{name} seed {seed}: finished before, {settle(name, seed, given)}")
    os.environ["OMP_NUM_THREADS"] = "1"  # of each run
    if FORKS:  # neither the server nor its forks hear Ctrl-C: it is this process that ends them
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
        multiprocessing.forkserver.ensure_running()
        signal.signal(signal.SIGINT, heard)
    with tempfile.TemporaryDirectory() as folder:
        copies = Path(folder)  # the runs of a changed template go by the name of its file
        for program in CHANGED.keys() & {GROUPS[name][0] for name, _ in todo}:
            (copies / program).write_text(changed_template(program))
        try:
            failed = make(todo, given, copies)
        except KeyboardInterrupt:
            sys.exit("stopped: the same command goes on from here")
    if failed:
        sys.exit(f"{failed} of {len(todo)} runs failed: their output is in {RUNS}/*.txt")


if __name__ == "__main__":
    main()
