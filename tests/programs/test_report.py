"""The tables and figures are what results/ says."""

import json

from helpers import PAGES, README, copied_pages, refused


def test_the_tables_are_what_results_say(run):
    assert run("scripts/report.py", "--check").status == 0


def on_file(row, pretrain=None, linear=None, **changes):
    """A results file of a run of two epochs, with some options of its programs."""
    curve = [dict(epoch=e, loss=5.0 - e, lr=0.1, seconds=60.0, knn=40.0 if e else None) for e in range(2)]
    points = dict(x=[0.5, 1.5], y=[2.0, 3.0], label=[0, 1], classes=["cat", "dog"])
    numbers = dict(seed=0, images=50_000, epochs=2, pretrain_seconds=120.0, linear_seconds=30.0)
    scores = dict(top1=61.4, top5=95.0, best_top1=62.0, best_top5=96.0, knn=40.0)
    where = dict(hardware=dict(name="cpu2", device="Some CPU", cores=2), arch="resnet20", dataset="cifar10")
    pretrain = dict(aug_plus=True, views="batched", precision="bf16", lr=0.1, moco_t=0.2) | (pretrain or {})
    options = dict(pretrain=pretrain, linear=linear or dict(lr=0.1))
    work = dict(commands=["python main_moco.py data/"], options=options, curve=curve, embedding=points)
    work |= dict(weights=dict(file="pretrained/some.pth.tar"))
    return {"row": row, **numbers, **scores, **where, **work, **changes}


def test_nonsense_in_results_is_named(run, tmp_path):
    for content in ("{", json.dumps(on_file("MoCo v2"))[:-5], "7"):
        (tmp_path / "bad-seed0.json").write_text(content)
        done = run("scripts/report.py", "--check --results", tmp_path)
        assert done.status == 1 and len(done.err.splitlines()) == 1, done.err
        assert "bad-seed0.json' cannot be read" in done.err, done.err
    (tmp_path / "bad-seed0.json").write_text("{}")
    refused(run("scripts/report.py", "--check --results", tmp_path), 1, "bad-seed0.json' is not a run's file")


def test_a_report_of_two_methods(run, tmp_path):
    pages = copied_pages(tmp_path)
    words = ["--results", tmp_path, "--pages", pages]
    for name, seed in (("MoCo v2", 0), ("MoCo v2", 1), ("SupContrast", 0)):
        content = on_file(name, seed=seed, top1=61.4 + seed)
        if name == "SupContrast":  # it ended on another machine
            content["options"]["pretrain"]["precision"] = "fp32"
            content["commands"] = ["python main_supcon.py --precision bf16 data/"]
        (tmp_path / f"{name}-seed{seed}.json").write_text(json.dumps(content))
    (tmp_path / "labels").mkdir()
    for labels in (25, 400):
        content = on_file("MoCo v2", pretrain=dict(labels_per_class=labels))
        (tmp_path / "labels" / f"{labels}.json").write_text(json.dumps(content))
    done = run("scripts/report.py", *words, "--check")
    assert done.status == 1 and "make report" in done.err
    again = tmp_path / "labels/again.json"
    again.write_text(json.dumps(content))
    done = run("scripts/report.py", *words, "--check")
    assert done.status == 1 and "a second run of MoCo v2 with 400 labels" in done.err
    again.unlink()
    (pages / "README.md").write_text(README.replace("<!-- end of rows -->", ""))
    done = run("scripts/report.py", *words)
    assert done.status == 1 and "no page" in done.err and "markers of rows" in done.err
    (pages / "README.md").write_text(README)
    done = run("scripts/report.py", *words)
    assert done.status == 0, done.err
    text = (pages / "docs/results.md").read_text()
    assert "| MoCo v2 | 61.4 (40.0) | 61.4 (40.0) |" in text and (tmp_path / "labels.png").exists()
    both = "2 | 40.0 ± 0.0 | 61.9 ± 0.7 / 95.0 ± 0.0"
    assert f"| MoCo v2 | cifar10 | resnet20 | 2 | 8 | `--aug-plus`, bf16, `--lr 0.1`, `--moco-t 0.2` | {both}" in text
    # Two epochs are 12 passes of an encoder.
    assert "| SupContrast | cifar10 | resnet20 | 2 | 12 | `--aug-plus`, bf16, then fp32, " in text
    line = f"| MoCo v2 | resnet20 | cifar10 | 2 | 8 | `--aug-plus`, bf16, `--lr 0.1`, `--moco-t 0.2` | {both}"
    assert line in (pages / "README.md").read_text()
    for name in ("curves", "embeddings"):
        assert f"results/{name}.png" in README + PAGES["results.md"]
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert run("scripts/report.py", *words, "--check").status == 0


def test_measured_and_published_side_by_side(run, tmp_path):
    """ResNet-50 comes first, with what is published of its method."""
    import results

    pages = copied_pages(tmp_path)

    def write_result(name, key, top1, pretrain=None, **changes):
        row = results.ROWS[key]
        common = dict(arch="resnet50", epochs=row.epochs, dataset=row.dataset)
        content = on_file(row.name, pretrain, **common | changes) | (dict(top1=top1) if top1 else {})
        if not top1:
            del content["top1"], content["top5"], content["options"]["linear"]
        (tmp_path / f"{name}.json").write_text(json.dumps(content))

    write_result("in-seed0", "in-200", 95.0)
    write_result("in-seed1", "in-200", 95.2, seed=1)
    write_result("in-lr-seed0", "in-200", 90.0, dict(lr=0.5))
    write_result("out-seed0", "out-1000", 94.0, epochs=300)
    write_result("own-seed0", "own", 94.4, dict(aug_plus=False, aug_mild=True))
    write_result("own-t-seed3", "own", None, dict(moco_t=0.5), epochs=60, seed=3)
    write_result("suploss-seed0", "suploss-cifar100", 70.5)
    write_result("ce-seed0", "ce", None, classifier_top1=94.5, classifier_top5=99.9)
    write_result("ce-100-seed0", "ce", 94.8, classifier_top1=94.7, classifier_top5=99.9, epochs=100)
    assert run("scripts/report.py", "--results", tmp_path, "--pages", pages).status == 0
    first = (pages / "README.md").read_text().split("<!-- end of rows -->")[0]
    label_in, options = "MoCo v2 + SupContrast_In", "bf16, `--lr 0.1`, `--moco-t 0.2`"
    both = "2 | 40.0 ± 0.0 | 95.1 ± 0.1 / 95.0 ± 0.0"
    every = "95.4 / 99.9 (200 epochs); 96.1 / 99.8 (1000 epochs)"
    for line in (
        f"| {label_in} | resnet50 | cifar10 | 200 | 800 | `--aug-plus`, {options} | {both} | 95.4 / 99.9 |",
        f"| {label_in} | resnet50 | cifar10 | 200 | 800 | `--aug-plus`, {options.replace('0.1', '0.5')} | 1 | 40.0 | 90.0 / 95.0 |",
        f"| MoCo v2 + SupContrast_Out | resnet50 | cifar10 | 300 | 1200 | `--aug-plus`, {options} | 1 | 40.0 | 94.0 / 95.0 | 96.1 ",
        f"| {label_in}, own recipe | resnet50 | cifar10 | 100 | 400 | `--aug-mild`, {options} | 1 | 40.0 | 94.4 / 95.0 | {every} |",
        f"| {label_in}, own recipe | resnet50 | cifar10 | 60 | 240 | `--aug-plus`, {options.replace('0.2', '0.5')} | 1 | 40.0 | kNN only |",
        f"| MoCo v2 + SupContrast_Suploss | resnet50 | cifar100 | 1000 | 4000 | `--aug-plus`, {options} | 1 | 40.0 | 70.5 / 95.0 |",
        "| (own classifier: 94.5 / 99.9) | 95.0 / - |",
        "| 94.8 / 95.0 (own classifier: 94.7 / 99.9) | 95.0 / - (500 epochs) |",
    ):
        assert first.count(line) == 1, line


def test_small_rows_have_weights(run, tmp_path):
    pages = copied_pages(tmp_path)
    for name, epochs in (("Out", 60), ("In", 20)):
        content = on_file(f"MoCo v2 + SupContrast_{name}", epochs=epochs)
        if name == "In":
            del content["weights"]
        (tmp_path / f"{name}-seed0.json").write_text(json.dumps(content))
    assert run("scripts/report.py", "--results", tmp_path, "--pages", pages).status == 0
    text = (pages / "README.md").read_text().split("<!-- end of rows -->")[0]
    assert "| MoCo v2 + SupContrast_Out | resnet20 | cifar10 | 60 |" in text
    assert "| MoCo v2 + SupContrast_In | resnet20 |" not in text  # its weights are not in pretrained/
