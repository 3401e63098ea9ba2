"""What the README shows: its commands run, its table is what results/ says, its example of a variant trains."""

import json
import re
import shlex
import subprocess
import sys

import pytest

from conftest import ROOT, TINY
from moco import checkpoint
from moco.run import read_log

README = (ROOT / "README.md").read_text()
PAGES = {page.name: page.read_text() for page in (ROOT / "docs").glob("*.md")}
BLOCKS = [
    block.replace("\\\n", " ")
    for page in (README, PAGES["options.md"])
    for block in re.findall(r"^```\n(.*?)^```$", page, re.S | re.M)
]
COMMANDS = [line.strip() for block in BLOCKS for line in block.splitlines() if "python main_" in line]
SMALL = "-a resnet20 --image-size 8 -b 8 --epochs 1 --moco-k 32"


def test_commands(run, folder, tmp_path):
    """Each as it stands, but for a small network, small data and one epoch."""
    assert len(COMMANDS) == 4
    data = folder(train=8, val=4)
    for command in COMMANDS:
        words = command[command.index("main_") :].split()
        script, rest = words[0], shlex.split(" ".join(words[1:]))
        assert rest.pop() == "data/"
        small = SMALL if script != "main_lincls.py" else "-a resnet20 -b 8 --epochs 1"
        if "--pretrained" in rest:
            rest[rest.index("--pretrained") + 1] = str(tmp_path / "checkpoint_0000.pth.tar")
        done = run(script, *[shlex.quote(word) for word in rest], small, "--output-dir", tmp_path, data)
        assert done.status == 0, done.err
    assert "result: top1=" in done.out


def test_every_option_of_the_table_exists(run):
    named = set(re.findall(r"`(--[a-z-]+)", PAGES["options.md"])) - {"--help"}
    assert len(named) > 12
    help_ = run("main_moco_out.py", "--help").out + run("main_lincls.py", "--help").out
    assert all(name in help_ for name in named), [name for name in named if name not in help_]


@pytest.mark.parametrize("script", ["moco", "moco_in", "moco_out", "moco_suploss", "supcon", "ce", "lincls"])
def test_help(script, run):
    done = run(f"main_{script}.py", "--help")
    assert done.status == 0 and "--output-dir" in done.out and "python main_" in done.out


def test_reference_options_have_their_defaults(run):
    for script, values in (
        ("main_moco_out.py", "--epochs 1000,-b 256,--lr 0.03,--momentum 0.9,--wd 0.0001,-j 8,-p 10,--warm-up 5"),
        ("main_moco_out.py", "--moco-dim 128,--moco-k 65536,--moco-m 0.99,--moco-t 0.07,--save-freq 200"),
        ("main_lincls.py", "--epochs 100,--lr 30.0,-b 256,--wd 0.0"),
    ):
        text = " ".join(run(script, "--help").out.split())
        for value in values.split(","):
            name, default = value.split()
            assert re.search(rf"(?<![\w-]){name}[ ,].*?default: {re.escape(default)}\)", text), value


def test_the_example_of_a_variant(run, tmp_path):
    example = re.search(r"```python\n(# main_\w+\.py\n.*?)```", README, re.S)[1]
    assert len(example.splitlines()) < 20
    script = tmp_path / "main_variant.py"
    script.write_text(example)
    done = run(script, TINY, "--epochs 1 --moco-k 40 --moco-dim 8 --output-dir", tmp_path)
    assert done.status == 0 and "QueueOnly" in done.out, done.err


def test_the_example_does_not_depend_on_the_number_of_processes(tmp_path):
    """Few images have a label, so few queries have a positive, and not as many on each process."""
    script = tmp_path / "main_variant.py"
    script.write_text(re.search(r"```python\n(# main_\w+\.py\n.*?)```", README, re.S)[1])
    words = [*TINY.split(), "--epochs", "1", "--moco-k", "40", "--moco-dim", "8", "--labels-per-class", "8"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    launcher += ["--rdzv-endpoint=localhost:0"]
    losses = []
    for launch, splits in (([], "2"), (launcher, "1")):
        out = tmp_path / splits
        command = [sys.executable, *launch, str(script), *words, "--bn-splits", splits, "--output-dir", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        losses.append(float(read_log(out / "log.csv")[-1]["loss"]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_tables_are_what_results_say(run):
    assert run("scripts/report.py", "--check").status == 0


def on_file(row, pretrain=None, linear=None, **changes):
    """What results/ holds of a run of two epochs, with some options of its programs."""
    curve = [dict(epoch=e, loss=5.0 - e, lr=0.1, seconds=60.0, knn=40.0 if e else None) for e in range(2)]
    points = dict(x=[0.5, 1.5], y=[2.0, 3.0], label=[0, 1], classes=["cat", "dog"])
    numbers = dict(seed=0, images=50_000, epochs=2, pretrain_seconds=120.0, linear_seconds=30.0)
    scores = dict(top1=61.4, top5=95.0, best_top1=62.0, best_top5=96.0, knn=40.0)
    where = dict(hardware=dict(name="cpu2", device="Some CPU", cores=2), arch="resnet20", dataset="cifar10")
    pretrain = dict(aug_plus=True, views="batched", precision="bf16", moco_t=0.2) | (pretrain or {})
    options = dict(pretrain=pretrain, linear=linear or dict(lr=0.1))
    work = dict(commands=["python main_moco.py data/"], options=options, curve=curve, embedding=points)
    return {"row": row, **numbers, **scores, **where, **work, **changes}


def copied_pages(place):
    """README.md and docs/ in a folder of their own."""
    for name, text in {"README.md": README, **{f"docs/{name}": text for name, text in PAGES.items()}}.items():
        path = place / "pages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return place / "pages"


def test_links_lead_somewhere():
    for folder, text in [(ROOT, README), *((ROOT / "docs", text) for text in PAGES.values())]:
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert link.startswith("https://") or (folder / link).exists(), link


def test_nonsense_in_results_is_named(run, tmp_path):
    good = on_file("MoCo v2")
    cases = [
        ("{", "cannot be read"),
        ("[]", "'row'"),
        (json.dumps(good)[:-5], "cannot be read"),
        ("7", "cannot be read"),
    ]
    cases += [
        (json.dumps({**good, name: value}), f"'{name}' is missing or wrong")
        for name, value in [
            ("row", "MoCo v3"),
            ("row", ["MoCo v2"]),
            ("top1", "61.4"),
            ("seed", None),
            ("options", ["lr"]),
            ("hardware", "Some CPU"),
            ("curve", 7),
        ]
    ]
    cases += [(json.dumps({"views_ratio": 5}), "'hardware'")]
    for content, says in cases:
        (tmp_path / "bad.json").write_text(content)
        done = run("scripts/report.py", "--check --results", tmp_path)
        assert done.status == 1 and "bad.json" in done.err and len(done.err.splitlines()) == 1, done.err
        assert says in done.err, done.err


def test_a_report_of_two_methods(run, tmp_path):
    pages = copied_pages(tmp_path)
    words = ["--results", tmp_path, "--pages", pages]
    for name, seed in (("MoCo v2", 0), ("MoCo v2", 1), ("SupContrast", 0)):
        content = on_file(name, seed=seed, top1=61.4 + seed)
        (tmp_path / f"{name}-{seed}.json").write_text(json.dumps(content))
    (tmp_path / "labels").mkdir()
    for labels in (25, 400):
        content = on_file("MoCo v2", pretrain=dict(labels_per_class=labels))
        (tmp_path / "labels" / f"{labels}.json").write_text(json.dumps(content))
    done = run("scripts/report.py", *words, "--check")
    assert done.status == 1 and "make report" in done.err
    (pages / "README.md").write_text(README.replace("<!-- end of rows -->", ""))
    done = run("scripts/report.py", *words)
    assert done.status == 1 and "no page" in done.err and "markers of rows" in done.err
    (pages / "README.md").write_text(README)
    done = run("scripts/report.py", *words)
    assert done.status == 0, done.err
    text = (pages / "docs/results.md").read_text()
    assert "| MoCo v2 | 61.4 (40.0) | 61.4 (40.0) |" in text and (tmp_path / "labels.png").exists()
    both = "40.0 ± 0.0 (2 seeds) | 61.9 ± 0.7 (2 seeds) / 95.0 ± 0.0 (2 seeds)"
    assert f"| MoCo v2 | cifar10 | resnet20 | 2 | 8 | `--aug-plus`, bf16 | {both}" in text
    assert "| SupContrast | cifar10 | resnet20 | 2 | 12 |" in text  # epochs, and passes of an encoder
    assert f"| MoCo v2 | resnet20 | cifar10 | 2 | 8 | `--aug-plus`, bf16 | {both}" in (pages / "README.md").read_text()
    for name in ("curves", "embeddings"):
        assert f"results/{name}.png" in README + PAGES["results.md"]
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert run("scripts/report.py", *words, "--check").status == 0


def test_measured_and_published_side_by_side(run, tmp_path):
    """ResNet-50 comes first, with what is published of its method; what differs from its row is said."""
    import results

    pages = copied_pages(tmp_path)

    def written(number, key, top1, pretrain=None, linear=None, **changes):
        row = results.ROWS[key]
        given = {program: dict(options) for program, options in results.recipe(row).items()}
        given["pretrain"] |= dict(precision="bf16", output_dir="elsewhere", workers=3) | (pretrain or {})
        given["linear"] |= linear or {}
        scores = dict(top1=top1) if top1 else {}
        common = dict(arch=given["pretrain"]["arch"], epochs=row.epochs, dataset=row.dataset)
        content = on_file(row.name, **common | changes, options=given) | scores
        if not top1:
            del content["top1"], content["top5"], content["options"]["linear"]
        (tmp_path / f"{number}.json").write_text(json.dumps(content))

    written(1, "in-200", 95.0, dict(knn_freq=10))
    written(2, "in-200", 95.2, seed=1)
    written(3, "in-200", 90.0, dict(lr=0.5, mlp=False), dict(weight_decay=1e-6))
    written(4, "out-1000", 94.0, epochs=300)
    written(5, "own", 94.4, dict(arch="resnet50"), arch="resnet50", predictions="results/predictions.npz")
    written(6, "own", None, dict(arch="resnet50", moco_t=0.2), arch="resnet50", epochs=60, seed=3)
    written(7, "suploss-cifar100", 70.5)
    written(8, "ce", None, classifier_top1=94.5, classifier_top5=99.9)
    written(9, "ce", 94.8, classifier_top1=94.7, classifier_top5=99.9, epochs=100)
    assert run("scripts/report.py", "--results", tmp_path, "--pages", pages).status == 0
    first = (pages / "README.md").read_text().split("<!-- end of rows -->")[0]
    label_in, views = "MoCo v2 + SupContrast_In", "`--aug-plus`, bf16"
    both = "40.0 ± 0.0 (2 seeds) | 95.1 ± 0.1 (2 seeds) / 95.0 ± 0.0 (2 seeds)"
    every = "95.4 / 99.9 (200 epochs); 96.1 / 99.8 (1000 epochs)"
    for line in (
        f"| {label_in} | resnet50 | cifar10 | 200 | 800 | {views} | {both} | 95.4 / 99.9 |",
        f"| {label_in} | resnet50 | cifar10 | 200 | 800 | {views}, `--lr 0.5`, no `--mlp`, linear: `--wd 1e-06` | 40.0 | 90.0 / 95.0 |",
        f"| MoCo v2 + SupContrast_Out | resnet50 | cifar10 | 300 | 1200 | {views} | 40.0 | 94.0 / 95.0 | 96.1 / 99.9 (1000 ",
        f"| {label_in}, own recipe | resnet50 | cifar10 | 100 | 400 | `--aug-mild`, bf16 | 40.0 | 94.4 / 95.0 | {every} |",
        f"| {label_in}, own recipe | resnet50 | cifar10 | 60 | 240 | `--aug-mild`, bf16, `--moco-t 0.2` | 40.0 | kNN only |",
        "| MoCo v2 + SupContrast_Suploss | resnet50 | cifar100 | 1000 | 4000 | `--aug-plus`, bf16 | 40.0 | 70.5 / 95.0 |",
        "| (own classifier: 94.5 / 99.9) | 95.0 / - |",
        "| 94.8 / 95.0 (own classifier: 94.7 / 99.9) | 95.0 / - (500 epochs) |",
    ):
        assert line in first, line


def test_a_small_row_says_what_sets_it_apart(run, tmp_path):
    pages = copied_pages(tmp_path)
    cases = [("Out", 60, {}), ("Out", 60, dict(moco_t=0.1)), ("Out", 60, dict(moco_k=1, workers=1)), ("In", 20, {})]
    cases += [("In", 40, dict(aug_plus=False, aug_mild=True))]
    for number, (name, epochs, options) in enumerate(cases):
        content = on_file(
            f"MoCo v2 + SupContrast_{name}", pretrain=dict(moco_k=4096, workers=8) | options, epochs=epochs
        )
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
    assert run("scripts/report.py", "--results", tmp_path, "--pages", pages).status == 0
    text = (pages / "README.md").read_text().split("<!-- end of rows -->")[0]
    start = "| MoCo v2 + SupContrast_Out | resnet20 | cifar10 | 60 | 240 | `--aug-plus`, bf16"
    for options in ("4096`, `--moco-t 0.2", "4096`, `--moco-t 0.1", "1`, `--moco-t 0.2"):
        assert f"{start}, `--moco-k {options}` | 40.0" in text
    assert "| MoCo v2 + SupContrast_In | resnet20 | cifar10 | 20 |" not in text  # a third of the longest
    assert "| MoCo v2 + SupContrast_In | resnet20 | cifar10 | 40 | 160 | `--aug-mild`, bf16 |" in text


def test_rows_and_recipes(run):
    """The commands that reproduce the table, against its specification."""
    done = run("scripts/reproduce.py", "--print")
    lines = done.out.splitlines()
    assert len(lines) == 28
    moco = [line for line in lines if line.startswith("python main_moco")]
    assert [re.search(r"main_(\w+)\.py .*--epochs (\d+)", line).groups() for line in moco] == [
        ("moco", "200"),
        ("moco_in", "200"),
        ("moco", "1000"),
        ("moco_in", "1000"),
        ("moco_out", "1000"),
        ("moco_suploss", "1000"),
        ("moco_in", "100"),
        ("moco_proto", "100"),
        ("moco_out", "1000"),
        ("moco_suploss", "1000"),
    ]
    assert sum("--dataset cifar100" in line for line in lines) == 8
    for line in moco[:6] + moco[8:]:
        assert "-a resnet50 --lr 0.12 -b 256 --moco-k 4096 --mlp --moco-t 0.2 --aug-plus --cos" in line
    small = run("scripts/reproduce.py", "--small --print").out.splitlines()
    assert [line.split()[1] for line in small if "lincls" not in line] == [
        f"main_{name}.py" for name in ("ce", "supcon", "moco", "moco_in", "moco_out", "moco_suploss")
    ]
    for line in small:
        assert "-a resnet20" in line and "-b 256" in line
        same = "--lr 0.1 -b 256 --epochs 10" if "lincls" in line else "--epochs 60 -b 256 --aug-plus --warm-up 1"
        assert same in line
    files = [*(ROOT / "results").glob("*-resnet20-60ep-seed*.json"), *(ROOT / "results").glob("own-*.json")]
    for path in files:  # what is on file is what is said to be
        row = re.split("-cpu|-h100|-h200", path.name)[0]
        result = json.loads(path.read_text())
        length = f"--epochs {result['epochs']}" if row == "own" else ""  # of which there are shorter runs, too
        lines = run("scripts/reproduce.py", "--small --print", row, length).out.splitlines()
        for mine, line in zip(result["commands"], lines, strict=row != "ce"):  # which had one command then
            wanted = line.split(" --seed ")[0].split(" --pretrained ")[0]
            assert mine.startswith(wanted + " "), path.name
    for key, script in (("ce", "ce"), ("supcon", "supcon"), ("moco", "moco"), ("out", "moco_out")):
        knn = {
            path.stem.split("-")[1]: float(read_log(path)[-1]["knn"])
            for path in (ROOT / "results/lr").glob(f"{key}-*.csv")
        }
        (line,) = [line for line in small if f"main_{script}.py" in line]
        assert f"--lr {max(knn, key=knn.get)} " in line
        assert all(f"{value:.1f}" in PAGES["results.md"] for value in knn.values())
    refused = run("scripts/reproduce.py", "in-300 data/")
    assert refused.status == 2 and "unknown row 'in-300'" in refused.err


def test_a_row_scaled_down(run, tmp_path):
    where = f"--runs {tmp_path}/runs --results {tmp_path}/results"
    small = "--dataset digits --image-size 8 -b 32 --moco-k 64 --warm-up 1 --knn-freq 2"
    words = ["in-200 -a resnet20 --epochs 2 --per-class 16 --name tiny", where, f"--pretrain '{small}'"]
    words.append("--linear '--dataset digits --epochs 2 -b 32'")
    obstacle = tmp_path / "runs/in-200-tiny-seed0/linear_last.pth.tar.tmp"
    obstacle.mkdir(parents=True)
    assert "main_lincls.py ended with status 1; the same" in run("scripts/reproduce.py", *words).err
    (path,) = (tmp_path / "results").iterdir()
    cut = json.loads(path.read_text())  # a run that ends here has a file, too
    assert "top1" not in cut and cut["knn"] > 0 and len(cut["curve"]) == 2 and list(cut["options"]) == ["pretrain"]
    pages = copied_pages(tmp_path)
    assert run("scripts/report.py", "--results", tmp_path / "results", "--pages", pages).status == 0
    assert f"| {cut['knn']:.1f} | kNN only |" in (pages / "docs/results.md").read_text()

    obstacle.rmdir()
    done = run("scripts/reproduce.py", *words)
    assert done.status == 0, done.err
    other = run("scripts/reproduce.py", *words[:2], f"--pretrain '{small} --lr 0.6'", "--linear '--dataset digits'")
    assert other.status == 2 and "begun with other options" in other.err
    for more, says in (("--dataset digits --moco-k 0", "ended with status 2"), ("", "'nowhere' does not exist")):
        wrong = run("scripts/reproduce.py", "in-200", where, f"nowhere --name wrong --pretrain '{more}'")
        assert wrong.status in (1, 2) and says in wrong.err and "goes on" not in wrong.err
        assert not (tmp_path / "runs/in-200-wrong-seed0/begun.json").exists()
    result = json.loads(path.read_text())
    assert (result["row"], result["images"], result["epochs"]) == ("MoCo v2 + SupContrast_In", 160, 2)
    assert len(result["curve"]) == 2 and len(result["commands"]) == 2 and 0 <= result["top1"] <= 100
    for program, name in (("pretrain", "checkpoint_last.pth.tar"), ("linear", "linear_last.pth.tar")):
        saved = checkpoint.load(tmp_path / "runs/in-200-tiny-seed0" / name)["options"]
        assert result["options"][program] == saved
    assert result["options"]["pretrain"]["moco_k"] == 64 and result["options"]["linear"]["epochs"] == 2
    scores = [float(row["top1"]) for row in read_log(tmp_path / "runs/in-200-tiny-seed0/linear.csv")]
    assert (result["top1"], result["best_top1"]) == (scores[-1], max(scores))
    needed = "commit hardware versions seed arch dataset batch_size pretrain_seconds linear_seconds knn measured"
    assert not set(needed.split()) - set(result)

    assert result["cpu_seconds"] > cut["cpu_seconds"] > 0.5  # of both programs, over restarts


def test_a_run_goes_on_with_the_commands_that_it_was_begun_with(tmp_path):
    import reproduce
    from moco.errors import UsageError

    assert reproduce.begin(tmp_path, ["python a"])["commands"] == ["python a"]
    begun = reproduce.begin(tmp_path, ["python a", "python b"])  # cross entropy, before it had a linear evaluation
    assert begun["commands"] == ["python a", "python b"] and begun["cpu_seconds"] == 0
    with pytest.raises(UsageError, match="begun with other options"):
        reproduce.begin(tmp_path, ["python b"])


def test_the_bench_measures_the_loop(run, tmp_path):
    import bench
    import report

    speed, clock = bench.loop("-a", "resnet20", "-b", "16", "--steps", "3")
    assert speed > 0 and len(clock) == 3 + 1
    out = tmp_path / "bench.json"
    assert run("scripts/bench.py", "--quick -a resnet20 -b 8 --rounds 1 --out", out).status == 0
    figures = json.loads(out.read_text())
    assert all(figures[name] > 0 for name in report.FIGURES) and figures["folder_crops_per_core"] > 0
    assert run("scripts/bench.py", "-a resnet20 -b 8 --profile", tmp_path / "trace.json").status == 0
    assert "traceEvents" in json.loads((tmp_path / "trace.json").read_text())
