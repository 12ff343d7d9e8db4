"""Makes a folder of tests/compat: a run that is stopped in its second stage, and the metrics of one that is not.

    python3 tests/compat/make.py BINARY FOLDER

BINARY is that of the commit whose promise is kept: recipes and runs made by it are read, go on, generate and score in every later
version. The recipe reads `a/`, a copy of tests/golden/a, by relative paths, so that the run can stand anywhere.
"""

import pathlib, shutil, signal, subprocess, sys, time

binary, folder = pathlib.Path(sys.argv[1]).resolve(), pathlib.Path(sys.argv[2])
here = pathlib.Path(__file__).parent
golden, work = here.parent / "golden" / "a", folder / "work"
work.mkdir(parents=True)
for part in ("model", "data", "images"):
    shutil.copytree(golden / part, work / "a" / part)
recipe = (here / "recipe.toml").read_text()
(work / "recipe.toml").write_text(recipe)
(folder / "recipe.toml").write_text(recipe)
train = [binary, "train", "recipe.toml"]
subprocess.run(train, cwd=work, check=True)
shutil.copy(work / "run" / "metrics.jsonl", folder / "whole.jsonl")
shutil.rmtree(work / "run")
run = subprocess.Popen(train, cwd=work)
metrics = work / "run" / "metrics.jsonl"
while not (metrics.exists() and '{"stage":"sft","step":5,' in metrics.read_text()):
    time.sleep(0.0005)
run.send_signal(signal.SIGTERM)
assert run.wait() == 75, "it was over before it was stopped: try again"
shutil.move(work / "run", folder / "run")
(folder / "run" / ".lock").unlink()
shutil.rmtree(work)
