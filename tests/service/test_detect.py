"""`python -m service detect`: files in, COCO results and drawings out."""

import json
from pathlib import Path

import pytest
from PIL import Image

from model.detector import Detector
from model.image import decode_image
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
