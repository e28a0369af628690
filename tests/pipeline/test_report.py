"""`cachequant report`: its numbers are those of its images, and a real browser shows the page."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from base64 import b64decode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cachequant as cq
from cachequant.cli import main
from cachequant.config import RunConfig
from cachequant.errors import UserError
from cachequant.evaluation.html import views_block, write_page
from cachequant.evaluation.paired import psnr
from cachequant.models.cost import step_macs
from cachequant.pipeline.context import Context
from cachequant.pipeline.first_calls import evaluation_macs, first_call, first_calls
from cachequant.pipeline.report import Subject, write_plan_report
from cachequant.pipeline.sample import draw
from cachequant.pipeline.stages import Stages
from cachequant.types import Correction

Configure = Callable[..., RunConfig]


@pytest.fixture
def run(weights_file: Path, configure: Configure, tmp_path: Path) -> Path:
    """A run folder with two plans of the toy model, the one of "best" newer."""
    pipe = cq.load_pipeline(weights_file, "cpu")
    for method in ("paper", "best"):
        config = configure(f"model.path={weights_file}", f"method={method}", "schedule.fallback=false")
        stages = Stages.at(Context.of(pipe, config), tmp_path / "run", quiet=True)
        stages.save_plan()
    return tmp_path / "run"


def test_rows_are_the_plan_in_its_parts_and_its_neighbours(run: Path, weights_file: Path, tmp_path: Path) -> None:
    rows = {row.name: row for row in write_plan_report(run, tmp_path / "page.html", count=3, device="cpu")}
    assert list(rows) == ["full", "cache alone", "cache corrected", "uncorrected", "cachequant", "paper"]
    plan = next(iter(Subject.at(run).plans.values()))
    pipe = cq.load_pipeline(weights_file, "cpu")
    context = Context.of(pipe, replace(plan.config, sample=replace(plan.config.sample, batch_size=3)))
    seeds = [90_000, 90_001, 90_002]
    exact = draw(context, None, seeds, "test").images
    for name, used in (("cachequant", plan), ("uncorrected", replace(plan, correction=Correction()))):
        expected = float(psnr(draw(context, used, seeds, "test").images, exact, 1.0).mean())
        assert rows[name].psnr == pytest.approx(expected, rel=1e-6)
    assert rows["full"].full_step_share == 1 and rows["cachequant"].full_step_share == 0.5
    assert rows["full"].bytes == rows["cache alone"].bytes > 2 * rows["uncorrected"].bytes
    assert rows["full"].macs > rows["cachequant"].macs == rows["cache alone"].macs


def test_the_page_has_every_part_and_nothing_from_outside(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = run / "note.json"
    assert main(["report", str(run), "--count", "2", "--device", "cpu", "--json", str(note)]) == 0
    record = json.loads(note.read_text())
    assert record["page"] == str(run / "report.html") and len(record["rows"]) == 6
    assert "wrote" in capsys.readouterr().out
    text = (run / "report.html").read_text()
    for heading in ("Images", "Schedule and errors", "What runs where", "Layers by backend", "How it was made"):
        assert f"<h2>{heading}</h2>" in text
    assert "Error of the cached feature at each step on calibration data" in text
    plan = next(iter(Subject.at(run).plans.values()))
    assert plan.quant is not None
    assert all(f'<th scope="row">{name}</th>' in text for name in plan.quant.layers)
    assert (
        plan.identity.weights in text and "calibration.seed" in text and plan.provenance["parents"]["calibrate"] in text
    )
    assert set(re.findall(r"(?:src|href)=\"(\w+:)", text)) == {"data:"}
    for source in re.findall(r'src="data:image/png;base64,([^"]+)"', text):
        Image.open(io.BytesIO(b64decode(source))).verify()


def test_a_plan_on_its_own_says_what_it_lacks(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(next(run.glob("plan-best-*")), alone)
    rows = write_plan_report(alone, tmp_path / "page.html", count=2, device="cpu")
    assert [row.name for row in rows] == ["full", "cache alone", "cache corrected", "uncorrected", "cachequant"]
    text = (tmp_path / "page.html").read_text()
    assert "stage outputs of this plan are not beside it" in text and "on calibration data" not in text


def test_a_plan_inside_a_run_finds_its_stages(run: Path) -> None:
    assert Subject.at(next(run.glob("plan-best-*"))).stages == run


def test_images_of_any_size_are_shown_at_a_fitting_one() -> None:
    from cachequant.pipeline.report_page import TILE, _tiles

    for size in (8, 32, 96, 192, 200, 512):
        tiles = _tiles(torch.rand(2, 3, size, size))
        assert TILE // 2 <= tiles.shape[-1] <= TILE
    assert _tiles(torch.full((1, 3, 512, 512), 0.25)).unique().tolist() == [0.25]


def test_the_first_evaluation_is_one_call_of_one_image(pipe: Any, configure: Configure) -> None:
    calls = first_calls(Context.of(pipe, configure()))
    assert len(calls) == 1 and len(calls[0].x) == 1 and calls[0].opens
    assert cq.api.find(pipe) is None and "forward" not in vars(pipe.unet)  # type: ignore[attr-defined]


def test_the_first_call_of_a_batch_is_had_without_evaluating_it(pipe: Any, configure: Configure) -> None:
    pipe.unet.conv_in.register_forward_pre_hook(lambda *_: pytest.fail("it was evaluated"))
    call = first_call(Context.of(pipe, configure("sample.batch_size=3", "sample.seed=7")))
    assert call.x.shape == (3, 1, 16, 16) and call.opens
    noise = [torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8, 9)]
    assert torch.equal(call.x, torch.cat(noise))


def test_an_evaluation_costs_what_its_step_costs(pipe: Any, configure: Configure) -> None:
    context = Context.of(pipe, configure())
    alone = step_macs(context.adapter, torch.zeros(1, 1, 16, 16), torch.tensor(5), {})
    assert evaluation_macs(context) == alone and alone[0] > alone[1] > 0


def test_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no plan in"):
        Subject.at(tmp_path / "absent")
    assert main(["report", str(run), "--count", "0"]) == 2
    (run / "file").write_text("")
    assert main(["report", str(run), "--count", "1", "--device", "cpu", "--out", str(run / "file" / "x.html")]) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 2 and "expected 1 or more images" in errors[0] and "cannot make folder" in errors[1]


# In a real browser.


@pytest.fixture(scope="session")
def browser() -> str:
    """Chromium, or a browser of its kind."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no chromium here: apt install chromium")
    return found


def look(browser: str, page: Path, *options: str) -> str:
    """Run the browser on a page, without a network: what it printed; its log must be clean."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run([*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Refused to" in line]
    assert not complaints, complaints
    return done.stdout


def screenshot(browser: str, page: Path, height: int) -> np.ndarray:
    """[H, W, 3] of the page at a width of 1200."""
    shot = page.with_suffix(".png")
    look(browser, page, f"--window-size=1200,{height}", f"--screenshot={shot}")
    return np.asarray(Image.open(shot).convert("RGB"))


def share_of(pixels: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((np.abs(pixels.astype(int) - colour).max(axis=2) < 8).mean())


def solid(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (300, 200), colour).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.slow
def test_a_browser_shows_the_chosen_view_and_only_that(browser: str, tmp_path: Path) -> None:
    red, blue = (210, 20, 30), (20, 40, 220)
    page = tmp_path / "views.html"
    write_page(page, "Views", [views_block("Look", {"one": ("first", solid(red)), "two": ("second", solid(blue))})])
    first = screenshot(browser, page, 600)
    text = page.read_text()
    other = text.replace('class="view-0" checked', 'class="view-0"').replace(
        'class="view-1"', 'class="view-1" checked', 1
    )
    page.write_text(other)
    second = screenshot(browser, page, 600)
    area = 300 * 200 / (1200 * 600)
    assert share_of(first, red) == pytest.approx(area, rel=0.05) and share_of(first, blue) == 0
    assert share_of(second, blue) == pytest.approx(area, rel=0.05) and share_of(second, red) == 0


@pytest.mark.slow
def test_a_browser_shows_the_whole_report(browser: str, run: Path) -> None:
    """Every figure is drawn where its heading is: the page is as long as its pictures are high, and they are not blank."""
    page = run / "report.html"
    write_plan_report(run, page, count=2, device="cpu")
    dom = look(browser, page, "--dump-dom")
    assert dom.count("<img") == 6 and dom.rstrip().endswith("</html>")
    pixels = screenshot(browser, page, 4000)
    background = pixels[5, 5]
    rows = (np.abs(pixels.astype(int) - background).max(axis=2) > 30).any(axis=1)  # lines with anything on them
    assert rows.nonzero()[0][-1] > 2500  # five figures, one above the other
    assert share_of(pixels, (0xD5, 0x5E, 0x00)) > 0 and share_of(pixels, (0x00, 0x72, 0xB2)) > 0  # curves of two plans
