"""From a checkpoint to features and other formats."""

import os
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision import models
from torchvision.transforms import functional as tv

import extract
import main_lincls
import moco
from helpers import TINY_FOLDER, foreign, refused
from moco import augment, batches, checkpoint, datasets, encoders, evaluate, inference
from processes import PYTHON, ROOT, start


def test_features_are_those_of_the_linear_evaluation(trained):
    data, last, best = trained
    split = datasets.load("imagefolder", data, False)
    for path in (last, best):
        encoder, preprocess = moco.load_encoder(path)
        assert not encoder.training
        saved = checkpoint.load(path)
        frozen = encoders.build("resnet20")(num_classes=1)
        checkpoint.load_encoder(frozen, checkpoint.encoder_weights(saved, path), path)
        options = saved["options"]
        centre = augment.Centre(12, options["mean"], options["std"])
        ((images, _),) = batches.Centres(split, centre, 64, torch.device("cpu"))
        wanted = evaluate.frozen(frozen)(images)
        with torch.no_grad():
            mine = torch.stack([preprocess(Image.open(file)) for file in split.paths])
            features = encoder(mine)
        std = torch.tensor(options["std"]).view(3, 1, 1)
        assert ((mine - images).abs() * std).max() <= 1 / 255 + 1e-6
        assert features.shape == (10, 64) and features.dtype == torch.float32
        assert (encoder(images) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_preprocess_takes_any_image(trained):
    _, preprocess = moco.load_encoder(trained[1])
    for mode, size in (("L", (40, 20)), ("RGBA", (20, 50)), ("P", (12, 12)), ("CMYK", (9, 9))):
        made = preprocess(Image.new(mode, size))
        assert made.shape == (3, 12, 12) and made.is_contiguous()
    image = Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 40).convert("RGB")
    small = tv.center_crop(tv.resize(image, 14), [12, 12])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in datasets.CIFAR10)
    assert ((preprocess(image) * std + mean) - tv.to_tensor(small)).abs().max() < 2 / 255


def test_extract(run, trained, folder, tmp_path):
    data, last, _ = trained
    out = tmp_path / "features.npz"
    done = run("scripts/extract.py", last, data, "--out", out, "--picture", tmp_path / "sheet.png")
    assert done.status == 0, done.err
    found = np.load(out)
    encoder, preprocess = moco.load_encoder(last)
    with torch.no_grad():
        wanted = encoder(torch.stack([preprocess(Image.open(data / path)) for path in found["paths"]]))
    assert np.allclose(found["features"], wanted, rtol=1e-4, atol=1e-5) and found["features"].dtype == np.float32
    assert found["labels"].tolist() == [0] * 5 + [1] * 5 and found["paths"][0] == "val/cat/0.png"
    assert Image.open(tmp_path / "sheet.png").size == (9 * 66 + 8, 10 * 66)
    done = run("scripts/extract.py", last, data / "train", "--out", out, "--force")  # any folder of images
    found = np.load(out)
    assert len(found["features"]) == 16 and set(found["labels"]) == {-1} and "dog/7.png" in found["paths"]
    assert run("scripts/extract.py", last, "--dataset digits --split val --out", out, "--force").status == 0
    assert len(np.load(out)["labels"]) == datasets.VALIDATION_DIGITS

    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/train").symlink_to(data / "train")  # without val/, those that its run has held out
    held = torch.load(last, weights_only=True)
    held["options"]["holdout"] = 2
    torch.save(held, tmp_path / "held.pth.tar")
    assert (
        run("scripts/extract.py", tmp_path / "held.pth.tar", tmp_path / "photos", "--out", out, "--force").status == 0
    )
    assert [path[-9:] for path in np.load(out)["paths"]] == ["cat/6.png", "cat/7.png", "dog/6.png", "dog/7.png"]

    refused(run("scripts/extract.py", last, data, "--out", out), 2, "exists")
    words = ("--split train --out", out, "--force")
    refused(run("scripts/extract.py", last, data / "train", *words), 2, "--split train", "has no train/")
    (tmp_path / "empty").mkdir()
    refused(run("scripts/extract.py", last, tmp_path / "empty", "--out", out, "--force"), 2, "no image")
    refused(run("scripts/extract.py", last, tmp_path / "none", "--out", out, "--force"), 2, "does not exist")
    refused(run("scripts/extract.py", last, data, "--out", tmp_path / "no/f.npz"), 2, "there is no folder")
    torch.save({"state_dict": {"module.weight": torch.zeros(1)}}, tmp_path / "other.pth.tar")
    refused(run("scripts/extract.py", tmp_path / "other.pth.tar", data, "--out", tmp_path / "f.npz"), 1, "no ResNet")


def test_classes_that_look_like_formulas_can_be_drawn(tmp_path):
    import picture

    (name,) = picture.drawable(["cost $5_$6"])
    figure = Figure()
    figure.suptitle(name)
    figure.savefig(tmp_path / "figure.png")


def test_a_class_whose_name_begins_with_an_underscore_is_in_the_legend():
    import picture

    axes = Figure().subplots()
    picture.scatter(axes, np.zeros((2, 2)), np.arange(2), picture.drawable(["_background_", "fox"]))
    assert axes.get_legend_handles_labels()[1] == [r"$\_$background_", "fox"]


def test_export(run, trained, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    from safetensors.torch import load_file

    _, last, best = trained
    network, _, classes = inference.load(best)
    assert classes == ["cat", "dog"]
    for suffix, source in (("pth", last), ("pth", best), ("safetensors", best), ("onnx", best)):
        done = run("scripts/export.py", source, tmp_path / f"e.{suffix}", "--force")
        assert done.status == 0, done.err
        assert float(done.out.split("batch of 7: ")[1]) < 1e-4  # ONNX: of batch 1 as well
    for state in (torch.load(tmp_path / "e.pth", weights_only=True), load_file(tmp_path / "e.safetensors")):
        network.load_state_dict(state)
    images = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(str(tmp_path / "e.onnx"), providers=["CPUExecutionProvider"])
    features, logits = session.run(["features", "logits"], {"images": images.numpy()})
    with torch.no_grad():
        assert np.allclose(features, moco.load_encoder(best)[0](images), rtol=1e-4, atol=1e-5)
        assert np.allclose(logits, inference.load(best)[0](images), rtol=1e-4, atol=1e-5)
    refused(run("scripts/export.py", last, tmp_path / "e.pth"), 2, "exists")
    refused(run("scripts/export.py", last, tmp_path / "e.h5"), 2, "suffix", ".onnx")
    refused(run("scripts/export.py", last, tmp_path / "no/e.pth"), 2, "there is no folder")


def test_export_to_torchvision_and_timm(run, tmp_path):
    timm = pytest.importorskip("timm")
    from safetensors.torch import load_file

    words = "-a resnet18 --stem imagenet --dataset digits --image-size 32 --per-class 2 -b 16 --epochs 1 --moco-k 16"
    assert run("main_moco.py", words, "--output-dir", tmp_path).status == 0
    last = tmp_path / "checkpoint_last.pth.tar"
    assert run("scripts/export.py", last, tmp_path / "e.safetensors").status == 0
    state = load_file(tmp_path / "e.safetensors")
    encoder, _ = moco.load_encoder(last)
    theirs, tvs = timm.create_model("resnet18", num_classes=0), models.resnet18()
    tvs.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    for other in (theirs, tvs):
        other.load_state_dict(state, strict=True)
        with torch.no_grad():
            assert torch.allclose(other.eval()(images), encoder(images), rtol=1e-4, atol=1e-5)


def test_the_worst_classes_and_the_picture(run, trained, tmp_path):
    counts = torch.tensor([[8, 5, 0], [10, 10, 0]])
    assert main_lincls.worst_classes(counts, ["cat", "dog", "fox"]) == "worst classes: dog 50.0, cat 80.0"
    saved = checkpoint.load(tmp_path / "linear_last.pth.tar")
    assert saved["confusion"].sum(1).tolist() == [5, 5]
    done = run("scripts/picture.py", tmp_path)
    assert done.status == 0 and Image.open(tmp_path / "picture.png").width > 1500, done.err


def test_a_picture_of_a_classifier_of_other_classes(run, trained, tmp_path):
    args = ["--dataset digits --per-class 2 -b 8 --epochs 1 --pretrained", trained[1], "--output-dir", tmp_path]
    assert run("main_lincls.py", *args).status == 0
    done = run("scripts/picture.py", tmp_path)
    assert done.status == 0, done.err


def test_a_picture_of_other_images(run, trained, folder, tmp_path):
    """Of the folder that is named, not of the data set on which the encoder was trained."""
    import picture

    data = folder("other", train=3, val=3, classes=("fox", "hen", "owl"))
    words = "--dataset digits -a resnet20 --image-size 12 --per-class 2 -b 8 --epochs 1 --moco-k 16 --output-dir"
    assert run("main_moco_in.py", words, tmp_path).status == 0
    points, labels, classes = picture.embedding(tmp_path, str(data))
    assert classes == ["fox", "hen", "owl"] and labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 and len(points) == 9
    assert len(picture.embedding(tmp_path)[0]) == datasets.VALIDATION_DIGITS
    refused(run("scripts/picture.py", tmp_path, tmp_path / "absent"), 2, "absent' does not exist")


def test_names_that_stdout_cannot_encode(trained, run, folder, tmp_path):
    name = os.fsdecode(b"caf\xe9")
    data = folder("odd", train=4, val=4, classes=(name, "dog"))
    places = ["--pretrained", str(trained[1]), "--output-dir", str(tmp_path), str(data)]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    linear = start("main_lincls.py", "-b 4 --epochs 1", *places, launcher=PYTHON, env=ascii_only)
    out = linear.communicate()[0]
    assert linear.returncode == 0 and "result: top1=" in out and "worst classes: " in out, out
    words = "-a resnet20 --image-size 12 -b 4 --epochs 1 --moco-k 16 --output-dir"
    assert run("main_moco_in.py", words, tmp_path / "run", data).status == 0
    done = run("scripts/picture.py", tmp_path / "run")
    assert done.status == 0, done.err


def test_a_folder_with_only_val(run, trained, folder, tmp_path):
    """It is evaluated; its classes are the checkpoint's, even where some have no folder."""
    data, last, best = trained
    whole = run("main_lincls.py", "-e --resume", best, data).out
    shutil.copytree(data / "val", tmp_path / "alone/val")
    alone = tmp_path / "alone"
    assert run("main_lincls.py", "-e --resume", best, alone).out.splitlines()[-1] == whole.splitlines()[-1]
    assert run("scripts/extract.py", last, alone, "--out", tmp_path / "alone.npz").status == 0
    assert np.load(tmp_path / "alone.npz")["labels"].tolist() == [0] * 5 + [1] * 5
    assert run("scripts/picture.py", tmp_path, alone).status == 0
    held_out = torch.load(last, weights_only=True)
    held_out["options"]["holdout"] = 2
    (tmp_path / "held_out").mkdir()
    torch.save(held_out, tmp_path / "held_out/checkpoint_last.pth.tar")
    assert run("scripts/picture.py", tmp_path / "held_out", alone).status == 0
    shutil.rmtree(alone / "val/cat")
    split = datasets.load("imagefolder", alone, False, classes=["cat", "dog"])
    assert split.labels.tolist() == [1] * 5 and split.classes == ["cat", "dog"]
    assert run("main_lincls.py", "-e --resume", best, alone).status == 0
    assert run("scripts/picture.py", tmp_path, alone).status == 0
    for path in list((alone / "val/dog").iterdir())[1:]:
        path.unlink()
    refused(run("scripts/picture.py", tmp_path, alone), 2, "one validation image")
    os.rename(alone / "val/dog", alone / "val/wolf")
    refused(run("main_lincls.py", "-e --resume", best, alone), 2, "not trained on", "wolf")
    refused(run("main_moco.py", TINY_FOLDER, "--output-dir", tmp_path / "o", alone), 2, "has no train/ folder")


def test_names_of_outputs(run, trained, tmp_path, monkeypatch):
    data, last, _ = trained
    refused(
        run("scripts/extract.py", last, data, "--out", tmp_path / "f.npz", "--picture", tmp_path / "sheet"), 2, "suffix"
    )
    refused(run("scripts/picture.py", tmp_path, "--out", tmp_path / "p.xyz"), 2, "suffix", ".png")
    refused(run("scripts/picture.py", tmp_path, "--out", tmp_path / "a1"), 2, "suffix")
    same = tmp_path / "same.png"
    refused(run("scripts/extract.py", last, data, "--out", same, "--picture", same), 2, "need a name each")
    assert not (tmp_path / "f.npz").exists() and not same.exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.DS_Store").touch()
    refused(run("scripts/extract.py", last, tmp_path / "empty", "--out", tmp_path / "f.npz"), 2, "contains no images")
    saved = torch.load(last, weights_only=True)
    saved["options"]["data"] = "data"
    torch.save(saved, tmp_path / "elsewhere.pth.tar")
    os.replace(tmp_path / "elsewhere.pth.tar", last)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    refused(run("scripts/picture.py", tmp_path), 2, "data folder 'data' does not exist")


def test_skipped_pictures_are_counted(run, trained, folder, tmp_path):
    data, last, _ = trained
    for name in ("a.gif", "b.GIF", "c.avif", "d.jfif", "readme.txt"):
        (data / "train/cat" / name).touch()
    done = run("main_moco.py", TINY_FOLDER, "--output-dir", tmp_path / "out", data)
    assert done.status == 0 and f"note: skipped in '{data / 'train'}': 1 .avif, 2 .gif, 1 .jfif" in done.out, done.out
    done = run("scripts/extract.py", last, data / "train/cat", "--out", tmp_path / "cat.npz")
    assert done.status == 0 and "1 .avif, 2 .gif, 1 .jfif" in done.out


def test_a_plain_folder_with_a_subfolder_train(run, trained, tmp_path):
    """A plain folder may have a subfolder train/."""
    _, last, _ = trained
    for name in ("train/1.png", "car/2.png", "3.png"):
        (tmp_path / "photos" / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / "photos" / name)
    (tmp_path / "album").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "album/4.png")
    (tmp_path / "photos/linked").symlink_to(tmp_path / "album")
    words = ["scripts/extract.py", last, tmp_path / "photos", "--out", tmp_path / "photos.npz"]
    done = run(*words)
    names = {"train/1.png", "car/2.png", "3.png", "linked/4.png"}
    assert done.status == 0 and set(np.load(words[-1])["paths"]) == names, done.err
    (tmp_path / "photos/train/red").mkdir()
    (tmp_path / "photos/train/1.png").rename(tmp_path / "photos/train/red/1.png")
    refused(run(*words, "--force"), 2, "neither val/ nor test/")
    assert run(*words, "--force --dataset folder").status == 0
    assert set(np.load(words[-1])["paths"]) == names - {"train/1.png"} | {"train/red/1.png"}


def test_deep_images_are_refused_by_preprocess(trained):
    _, preprocess = moco.load_encoder(trained[1])
    for mode in ("I", "F", "I;16"):
        with pytest.raises(ValueError, match="more than 8 bits"):
            preprocess(Image.new(mode, (20, 20)))
    assert "ValueError" in moco.load_encoder.__doc__ and "ValueError" in (ROOT / "docs/use.md").read_text()


def test_the_sdist_has_what_the_tests_need(tmp_path):
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    files = [name for name in files.stdout.splitlines() if (ROOT / name).is_file()]
    for name in files:
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "src" / name)
    build = "import setuptools.build_meta as b; print(b.build_sdist('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "src", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "src" / done.stdout.splitlines()[-1]) as archive:
        archived = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in files if not name.startswith(".")} <= archived


def test_weights_from_elsewhere_in_every_script(run, trained, tmp_path):
    """What export.py writes is read back, too."""
    data, last, best = trained
    path, _ = foreign(tmp_path, "torchvision")
    digits = "--dataset digits --image-size 8 -b 16"
    assert run("scripts/export.py", path, tmp_path / "back.safetensors").status == 0
    for source in (path, tmp_path / "back.safetensors"):
        assert run("scripts/extract.py", source, data, "--out", tmp_path / f"{source.stem}.npz").status == 0
        out = tmp_path / source.stem
        done = run("main_lincls.py", digits, "--per-class 4 --epochs 1 --pretrained", source, "--output-dir", out)
        assert done.status == 0 and "on resnet18 from" in done.out, done.err
    both = [np.load(tmp_path / f"{name}.npz")["features"] for name in ("theirs", "back")]
    assert np.array_equal(*both)
    encoder, _ = moco.load_encoder(last)
    images = torch.randn(2, 3, 12, 12)
    for suffix in ("pth", "safetensors"):
        assert run("scripts/export.py", last, tmp_path / f"e.{suffix}").status == 0
        assert torch.equal(moco.load_encoder(tmp_path / f"e.{suffix}")[0](images), encoder(images))
    assert run("scripts/export.py", best, tmp_path / "classifier.pth").status == 0
    network, _, classes = inference.load(tmp_path / "classifier.pth")
    assert classes == ["0", "1"] and torch.equal(network(images), inference.load(best)[0](images))


def test_a_last_layer_of_another_shape_is_left_out(tmp_path):
    """As main_lincls.py does: one without bias, one of another width, and a module that torch.compile has wrapped."""
    path, network = foreign(tmp_path, "torchvision")
    images, whole = torch.randn(2, 3, 64, 64), torch.load(path, weights_only=True)
    without_bias = {name: value for name, value in whole.items() if name != "fc.bias"}
    wider = whole | {"fc.weight": torch.zeros(7, 5)}
    wrapped = {f"_orig_mod.{name}": value for name, value in whole.items()}
    for state, classes in ((without_bias, None), (wider, None), (wrapped, [str(label) for label in range(7)])):
        torch.save(state, path)
        assert inference.load(path)[2] == classes
        with torch.no_grad():
            assert torch.equal(moco.load_encoder(path)[0](images), network.eval()(images))


def test_extract_prints_retrieval(run, trained, tmp_path):
    data, last, _ = trained
    done = run("scripts/extract.py", last, data, "--out", tmp_path / "f.npz")
    found = np.load(tmp_path / "f.npz")
    features = torch.nn.functional.normalize(torch.from_numpy(found["features"]), dim=1)
    wanted = extract.retrieval(features, torch.from_numpy(found["labels"]))
    assert "recall@1 {:.2f}, recall@5 {:.2f}, MAP@R {:.2f}".format(*wanted) in done.out
    done = run("scripts/extract.py", last, data / "val", "--out", tmp_path / "f.npz", "--force")
    assert done.status == 0 and "MAP@R" not in done.out, done.err


def test_extract_takes_the_data_set_of_the_checkpoint(run, trained, tmp_path, monkeypatch):
    """A folder may have both CIFAR-10 and CIFAR-100."""
    saved, loaded = torch.load(trained[1], weights_only=True), []
    saved["options"]["dataset"] = "cifar100"
    torch.save(saved, tmp_path / "cifar100.pth.tar")
    for name in ("cifar-10-batches-py", "cifar-100-python"):
        (tmp_path / "both" / name).mkdir(parents=True)
    monkeypatch.setattr(datasets, "load", lambda name, *rest, **how: loaded.append(name) or sys.exit(7))
    words = ["scripts/extract.py", tmp_path / "cifar100.pth.tar", tmp_path / "both", "--out", tmp_path / "f.npz"]
    assert run(*words).status == 7 and run(*words, "--dataset cifar10").status == 7
    assert loaded == ["cifar100", "cifar10"]


def test_the_projector(run, trained, tmp_path):
    """What TensorBoard reads: a table of features, one of class and path, and the thumbnails on one sheet."""
    data, last, _ = trained
    os.rename(data / "val/dog/0.png", data / "val/dog/a\tb.png")
    words = ["scripts/extract.py", last, data, "--out", tmp_path / "f.npz", "--force --projector", tmp_path / "look"]
    done = run(*words)
    assert done.status == 0 and f"tensorboard --logdir {tmp_path / 'look'}" in done.out, done.err
    found = np.load(tmp_path / "f.npz")
    place = tmp_path / "look/00000/default"
    table = np.loadtxt(place / "tensors.tsv", delimiter="\t")
    assert np.allclose(table, found["features"], rtol=1e-4, atol=1e-5)
    rows = [line.split("\t") for line in (place / "metadata.tsv").read_text().splitlines()]
    assert rows[0] == ["class", "path"] and rows[1] == ["cat", "val/cat/0.png"] and len(rows) == 11
    assert sorted(rows[6:])[-1] == ["dog", r"val/dog/a\tb.png"]
    assert Image.open(place / "sprite.png").size == (4 * 32, 4 * 32)
    assert "00000/default" in (tmp_path / "look/projector_config.pbtxt").read_text()
    refused(run(*words), 2, "look' exists")


def test_the_sheet_shows_the_nearest_images():
    """By cosine: the second image is the nearest of the first, though the third has the larger product."""
    import extract

    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    split = datasets.Split(torch.zeros(3).long(), ["a"], colours[:, :, None, None].expand(3, 3, 8, 8).contiguous())
    features = np.array([[1, 0], [0.9, 0.1], [9, 9]], np.float32)
    page = extract.sheet(split, features, neighbours=2)
    place = extract.THUMBNAIL + 2
    row = [page.getpixel((column * place + 8 * (column > 0) + 9, 9)) for column in range(3)]
    assert row == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_the_confusion_matrix_is_in_percent_of_a_class():
    import picture

    axes = Figure().subplots()
    picture.matrix(axes, torch.tensor([[3, 1], [0, 8]]), ["cat", "dog"])
    assert [text.get_text() for text in axes.texts] == ["75", "25", "0", "100"]
