"""`python -m service detect`: files in, COCO results and drawings out."""

import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.detector import Detector
from model.image import decode_image
from model.tiles import Tiling
from service.__main__ import main
from tests.support.serving import picture
from tests.support.tiny_model import write_tiny_model


@pytest.fixture
def model(tmp_path: Path) -> str:
    write_tiny_model(tmp_path / "tiny.onnx")
    return str(tmp_path / "tiny.onnx")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    (folder / "000042.png").write_bytes(picture(120, 90))
    (folder / "deep" / "cat.jpg").write_bytes(picture(64, 200, (0, 250, 90), "JPEG"))
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_results_are_coco_json_and_equal_the_detector_s(tmp_path: Path, model: str, folder: Path) -> None:
    out = tmp_path / "out" / "results.json"
    assert main(["detect", str(folder), "--model", model, "--out", str(out), "--score-threshold", "0.3"]) == 0
    results = json.loads(out.read_text())
    assert {result["image_id"] for result in results} == {42, "cat.jpg"}
    expected = Detector(Path(model)).detect(decode_image(picture(120, 90)), score_threshold=0.3)
    of_first = [result for result in results if result["image_id"] == 42]
    assert len(of_first) == len(expected) > 0
    for result, box, score, label in zip(of_first, expected.boxes, expected.scores, expected.labels, strict=True):
        xmin, ymin, xmax, ymax = box.tolist()
        assert result["bbox"] == pytest.approx([xmin, ymin, xmax - xmin, ymax - ymin], abs=1e-3)
        assert (result["score"], result["category_id"]) == (pytest.approx(score, abs=1e-6), label)
    assert [path.name for path in out.parent.iterdir()] == ["results.json"], "no temporary file is left"


def test_tiles_find_more(tmp_path: Path, model: str, folder: Path) -> None:
    out = tmp_path / "results.json"
    picture_file = folder / "000042.png"
    assert (
        main(["detect", str(picture_file), "--model", model, "--out", str(out), "--tile", "64", "--overlap", "0.5"])
        == 0
    )
    expected = Detector(Path(model)).detect(decode_image(picture_file.read_bytes()), tiling=Tiling(64, 0.5))
    boxes = [result["bbox"][:2] for result in json.loads(out.read_text())]
    np.testing.assert_allclose(boxes, expected.boxes[:, :2], atol=1e-3)


@pytest.mark.parametrize("flags", [("--overlap", "0.5"), ("--tile", "63"), ("--tile", "64", "--overlap", "1")])
def test_tiles_that_cannot_be_are_one_line(model: str, folder: Path, flags: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["detect", str(folder), "--model", model, *flags])
    assert exited.value.code == 2


def test_without_out_the_results_go_to_standard_output(
    model: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["detect", str(folder / "000042.png"), "--model", model]) == 0
    assert json.loads(capsys.readouterr().out)


def test_drawings_keep_the_names_and_the_sizes(tmp_path: Path, model: str, folder: Path) -> None:
    drawn = tmp_path / "drawn"
    assert main(["detect", str(folder), "--model", model, "--draw", str(drawn), "--out", str(tmp_path / "r.json")]) == 0
    with Image.open(drawn / "000042.png.png") as first, Image.open(drawn / "deep" / "cat.jpg") as second:
        assert (first.size, second.size, second.format) == ((120, 90), (64, 200), "JPEG")


def test_an_unreadable_file_is_named_and_counted_and_the_others_are_done(
    tmp_path: Path, model: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.png").write_bytes(picture()[:50])
    out = tmp_path / "results.json"
    assert main(["detect", str(folder), "--model", model, "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "broken.png: " in said and "1 of 3 files could not be read" in said
    assert {result["image_id"] for result in json.loads(out.read_text())} == {42, "cat.jpg"}


@pytest.mark.parametrize("name", ["a.jfif", "b.JPE", "c.dib", "d.apng", "no ending at all", "photo.download"])
def test_a_picture_is_known_by_its_ending_or_its_first_bytes(
    name: str, tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(picture(kind="JPEG"))
    assert main(["detect", str(tmp_path / "in"), "--model", model]) == 0
    said = capsys.readouterr()
    assert {result["image_id"] for result in json.loads(said.out)} == {name}
    assert "left out" not in said.err


def test_other_files_are_left_out_and_counted_by_what_they_are(
    tmp_path: Path, model: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(12))
    (folder / "more.txt").write_text("no picture either")
    (folder / "manual").write_bytes(b"%PDF-1.7")
    (folder / "Makefile").write_text("all:")
    assert main(["detect", str(folder), "--model", model, "--out", str(tmp_path / "r.json")]) == 0
    said = capsys.readouterr().err
    assert "5 files were left out: 2 × .txt, 1 × HEIC, 1 × no ending, 1 × PDF\n" in said


def test_a_folder_without_pictures_says_what_it_has(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(12))
    with pytest.raises(SystemExit):
        main(["detect", str(tmp_path / "in"), "--model", model])
    assert "has no images (JPEG, PNG, WEBP, BMP, TIFF, GIF, AVIF), but 1 × HEIC" in capsys.readouterr().err


def test_what_cannot_be_done_is_one_line_and_code_2(
    tmp_path: Path, model: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "deep" / "42.jpg").write_bytes(picture(kind="JPEG"))
    (tmp_path / "empty").mkdir()
    for arguments, says in (
        ([str(tmp_path / "none.png")], "does not exist"),
        ([str(tmp_path / "empty")], "has no images"),
        ([str(folder)], "same image_id 42"),
        ([str(folder / "000042.png"), "--model", str(folder / "notes.txt")], "notes.txt"),
        ([str(folder / "000042.png"), "--score-threshold", "2"], "--score-threshold"),
        ([str(folder / "000042.png"), "--port", "1"], "unrecognized arguments"),
        ([], "required"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["detect", "--model", model, *arguments] if "--model" not in arguments else ["detect", *arguments])
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and says in error


def keeps_its_files(folder: Path, *arguments: str) -> str:
    """Run what must be refused: code 2, one line, which is returned, and every file as it was."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    said = io.StringIO()
    with pytest.raises(SystemExit) as exit_, contextlib.redirect_stderr(said):
        main(["detect", *arguments])
    assert exit_.value.code == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert said.getvalue().count("\n") == 1
    return said.getvalue()


def test_no_output_replaces_an_input(tmp_path: Path, model: str, folder: Path) -> None:
    hard, soft, mirror = tmp_path / "hard.json", tmp_path / "soft.json", tmp_path / "mirror"
    hard.hardlink_to(folder / "000042.png")
    soft.symlink_to(folder / "deep" / "cat.jpg")
    mirror.symlink_to(folder)
    (folder / "000042.png.png").write_bytes(picture(30, 30))
    for outputs in (
        ["--draw", str(folder)],
        ["--draw", str(mirror)],
        ["--draw", str(folder / "deep" / "..")],
        ["--out", str(folder / "deep" / "cat.jpg")],
        ["--out", str(hard)],
        ["--out", str(soft)],
        ["--out", model],
    ):
        said = keeps_its_files(tmp_path, str(folder), "--model", model, *outputs)
        assert "is one of the files that are read: write elsewhere" in said
    said = keeps_its_files(tmp_path, str(folder / "000042.png"), "--out", str(folder / "000042.png"), "--model", model)
    assert "is one of the files that are read" in said


def test_outputs_are_files_and_not_each_other(tmp_path: Path, model: str, folder: Path) -> None:
    arguments = (str(folder / "deep" / "cat.jpg"), "--model", model)
    assert "not a regular file" in keeps_its_files(tmp_path, *arguments, "--out", str(folder))
    assert "not a regular file" in keeps_its_files(tmp_path, *arguments, "--out", "/dev/null")
    twice = ("--draw", str(tmp_path / "d"), "--out", str(tmp_path / "d" / "cat.jpg"))
    assert "would be written twice" in keeps_its_files(tmp_path, *arguments, *twice)


def test_a_device_or_a_pipe_or_a_giant_is_not_read_and_the_others_are(
    tmp_path: Path, model: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with (tmp_path / "giant.bmp").open("wb") as giant:
        giant.truncate(10**12)
    out = tmp_path / "results.json"
    strange = ["/dev/zero", str(tmp_path / "pipe.jpg"), str(tmp_path / "giant.bmp")]
    arguments = ["--model", model, "--out", str(out), "--max-image-pixels", "100000"]
    assert main(["detect", *strange, str(folder), *arguments]) == 1
    said = capsys.readouterr().err
    assert said.count("it is no regular file") == 2 and said.count("it has more than 67908864 bytes") == 1
    assert "3 of 5 files could not be read or drawn" in said
    assert {result["image_id"] for result in json.loads(out.read_text())} == {42, "cat.jpg"}


def test_a_drawing_that_cannot_be_written_or_a_bug_costs_no_other_file(
    tmp_path: Path, model: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = folder / "long.jpg"
    long.write_bytes(picture(500, 8, kind="JPEG"))
    monkeypatch.setattr("service.drawing.MAX_JPEG_SIDE", 400)
    out, decode = tmp_path / "results.json", decode_image

    def sometimes(data: bytes, **options: int) -> object:
        pixels = decode(data, **options)
        if pixels.shape[:2] == (200, 64):
            raise RuntimeError("a bug")
        return pixels

    monkeypatch.setattr("service.detect.decode_image", sometimes)
    assert main(["detect", str(folder), "--model", model, "--out", str(out), "--draw", str(tmp_path / "d")]) == 1
    said = capsys.readouterr().err
    assert "cat.jpg: RuntimeError('a bug')" in said and "long.jpg: a JPEG's sides are at most 400" in said
    assert {result["image_id"] for result in json.loads(out.read_text())} == {42, "long.jpg"}
    assert (tmp_path / "d" / "000042.png.png").exists()


def test_control_characters_in_names_are_shown_as_text(
    tmp_path: Path, model: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2Jred\u202e\n\udcff.png"
    (folder / evil).write_bytes(b"no picture")
    assert main(["detect", str(folder), "--model", model, "--out", str(tmp_path / "results.json")]) == 1
    said = capsys.readouterr().err
    assert "\\x1b[2Jred\\u202e\\n\\udcff.png: " in said and "\x1b" not in said
    (folder / "one\x1b.png.\x1b[0m").write_bytes(b"x")
    for arguments in ([str(folder / "\x1b[31mnone")], [str(folder), "--\x1b"]):
        said = keeps_its_files(tmp_path, *arguments, "--model", model)
        assert "\\x1b" in said and "\x1b" not in said
