"""The article's claims: the list of ablations, the runner that resumes, the page, and the paper's cumulative shares."""

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from training.ablations.claims import PARTS, Claim, verdict
from training.ablations.loss_shares import cumulative_share, loss_of_each, share_of_hardest
from training.ablations.page import scenario_table, write_page
from training.ablations.runs import ABLATIONS, Result, append_result, read_results, run_ablations
from training.arguments import build_parser
from training.coco import load_coco
from training.loss.losses import focal_loss_sum
from training.optimiser import learning_rate
from training.presets import PRESETS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures to train on and three to validate, each with one bright rectangle."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "annotations").mkdir()
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
        images, annotations = [], []
        for index in range(3):
            pixels = np.random.default_rng(index).integers(0, 90, (64, 80, 3), dtype=np.uint8)
            pixels[10:40, 20:60] = 220
            cv2.imwrite(str(folder / "images" / split / f"{index}.png"), pixels)
            images.append({"id": index, "file_name": f"{index}.png", "height": 64, "width": 80})
            box = {"id": index + 1, "image_id": index, "bbox": [20, 10, 40, 30], "area": 1200, "iscrowd": 0}
            annotations.append(box | {"category_id": 1 + index % 2})
        content = {
            "images": images, "annotations": annotations,
            "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
        }  # fmt: skip
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


def test_the_command_and_its_flag_keep_their_old_names() -> None:
    old = build_parser().parse_args(["article", "--data", "d", "--out", "o", "--rows", "top", "rough"])
    new = build_parser().parse_args(["ablations", "--data", "d", "--out", "o", "--only", "top", "rough"])
    assert vars(old) == vars(new)
    assert (new.command, new.only) == ("ablations", ["top", "rough"])
    assert PRESETS["article"] == PRESETS["ablation"]


def result(name: str, *, ap: float = 0.2, failure: str = "") -> Result:
    figures = {} if failure else {"AP": ap, "AP50": 0.4}
    return Result(name, 400, failure, figures, 3, 0.01, 2.0, "a machine", "abc")


def test_every_ablation_has_a_name_of_its_own_and_changes_only_what_there_is() -> None:
    assert len({ablation.name for ablation in ABLATIONS}) == len(ABLATIONS)
    for ablation in ABLATIONS:
        config = ablation.config(None)
        changed = {name: value for part in (config, config.model, config.model.anchors, config.loss, config.optimiser,
                                            config.detection) for name, value in vars(part).items()}  # fmt: skip
        assert {name: changed[name] for name in ablation.values} == dict(ablation.values)
        assert (config == PRESETS["ablation"]) == (not ablation.values)


def test_the_ablations_with_bare_sgd_keep_their_learning_rate() -> None:
    [sgd] = [ablation.config(None) for ablation in ABLATIONS if ablation.name == "sgd"]
    assert {
        learning_rate(sgd.optimiser, step, steps=sgd.steps, batch_size=sgd.batch_size) for step in range(sgd.steps)
    } == {0.005}  # 0.01 is for twice the images


def test_every_ablation_but_the_repeated_one_is_in_the_page_and_claims_compare_ablations_that_exist() -> None:
    names = {ablation.name for ablation in ABLATIONS}
    assert {name for part in PARTS for name in part.ablations} == names - {"baseline-again"}
    assert {name for part in PARTS for claim in part.claims for name in (claim.better, claim.worse)} <= names


@pytest.mark.slow
def test_ablations_run_once_then_are_skipped_and_the_page_says_what_was_not_run(data: Path, tmp_path: Path) -> None:
    def run(*names: str) -> list[Result]:
        return run_ablations(data, tmp_path / "out", names=names, steps=1, device="cpu", workers=0, commit="abc")

    run("baseline")
    first = (tmp_path / "out" / "results.jsonl").read_text()
    results = run("baseline", "image-pyramid")
    assert [each.name for each in results] == ["baseline", "image-pyramid"]
    assert (tmp_path / "out" / "results.jsonl").read_text().startswith(first)
    assert all(each.num_pictures == 3 and each.seconds_per_picture > 0 for each in results)
    with pytest.raises(ValueError, match="another --out"):
        run_ablations(data, tmp_path / "out", names=["baseline"], steps=2, device="cpu", workers=0, commit="abc")

    write_page(tmp_path / "out", tmp_path / "page", load_coco(data, "val", class_agnostic=True))
    page = (tmp_path / "page" / "ablations.md").read_text()
    assert f"2 of {len(ABLATIONS)} ablations were run" in page
    assert "| `rpn` | region proposal network on P2 to P6 | not run |" in page
    plots = {file.name for file in (tmp_path / "page" / "figures").iterdir()}
    assert plots == {"shares.png", "prior.png", "pyramids.png"}
    assert "| baseline | 1 |" in (tmp_path / "out" / "log.md").read_text()


def test_an_ablation_whose_model_was_not_trained_and_an_unknown_one_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the model of top"):
        run_ablations(data, tmp_path, names=["top-image-pyramid"], steps=1, device="cpu", workers=0, commit="")
    with pytest.raises(ValueError, match="no ablation sideways; there are baseline,"):
        run_ablations(data, tmp_path, names=["sideways"], device="cpu", workers=0, commit="")


def test_results_survive_the_way_through_their_file(tmp_path: Path) -> None:
    written = [result("baseline"), result("sgd-no-prior", failure="step 3: not a number")]
    for each in written:
        append_result(tmp_path, each)
    assert read_results(tmp_path) == written


CLAIM = Claim("a beats b", "baseline", "balanced", "AP", "A reason.")


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ([], "not run: balanced"),
        ([result("balanced", ap=0.1)], r"\*\*confirmed\*\*: AP 0.200 against 0.100, one seed each"),
        ([result("balanced", ap=0.3)], r"\*\*not confirmed\*\*: AP 0.200 against 0.300. A reason."),
        ([result("balanced", ap=0.19), result("baseline-again", ap=0.22)], "not significant"),
        ([result("balanced", ap=0.1), result("baseline-again", ap=0.22)], r"\*\*confirmed\*\*"),
        ([result("balanced", failure="step 3")], r"\*\*confirmed\*\*: balanced diverged"),
    ],
)
def test_a_verdict_follows_from_the_figures_and_from_what_chance_does(others: list[Result], says: str) -> None:
    import re

    results = {each.name: each for each in [result("baseline"), *others]}
    assert re.match(says, verdict(CLAIM, results, {}))


def test_the_scenarios_are_the_articles_with_its_slips_mended() -> None:
    lines = [line for line in scenario_table().splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[1:] for row in cells] == [
        ["0.9", "0.10536", "0.0002634", "400", "0.0007902", "133"],
        ["0.1", "2.30259", "0.46627", "5", "1.3988", "2"],
        ["0.99", "0.01005", "2.5126e-07", "40,000", "7.5378e-07", "13,333"],
    ]


def test_the_shares_rise_to_1_and_a_greater_gamma_leaves_less_to_easy_examples() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 3 - 4
    plain, focal = (cumulative_share(loss_of_each(logits, foreground=False, gamma=gamma)) for gamma in (0.0, 2.0))
    for shares in (plain, focal):
        assert shares[-1].item() == pytest.approx(1.0)
        assert (shares.diff() >= 0).all()
    assert (focal[:-1] < plain[:-1]).all()
    assert share_of_hardest(focal, 0.1) > share_of_hardest(plain, 0.1)
    assert share_of_hardest(plain, 1.0) == 1.0


def test_equal_examples_share_the_loss_equally() -> None:
    shares = cumulative_share(torch.full((4,), 0.7))
    assert shares.tolist() == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert math.isclose(share_of_hardest(shares, 0.25), 0.25)


@pytest.mark.parametrize("foreground", [True, False])
def test_the_losses_of_all_examples_are_together_the_loss_that_trains(foreground: bool) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)).double() * 5
    rows = torch.arange(50 if foreground else 0)
    expected = focal_loss_sum(
        logits[:, None], (rows, torch.zeros_like(rows)), torch.zeros(50, dtype=torch.bool), alpha=-1, gamma=2
    )
    assert loss_of_each(logits, foreground=foreground, gamma=2).sum().item() == pytest.approx(expected.item())
