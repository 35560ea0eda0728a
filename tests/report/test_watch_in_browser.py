import json
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch

from vflora.previews import PreviewSample, find_previews, step_folder, write_index, write_preview
from vflora.run_log import RunLog
from vflora.watch.server import WatchConfig, open_server

PLAYING = "[...document.querySelectorAll('video')]"
SHOWN_STEP = "document.querySelector('.figures dd').textContent"


@pytest.fixture
def served(trained_run, tmp_path):
    """A real run, copied while it had four of its hundred steps, and the address that it is served at."""
    folder = tmp_path / "fox"
    shutil.copytree(trained_run, folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("max_train_steps: 4", "max_train_steps: 100"))
    with open_server(WatchConfig(folder, port=0, refresh_s=0.1)) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield folder, server.address
        server.shutdown()


def open_page(browser, address, width=1280, **media):
    browser.open(address, width=width, height=900, **{"prefers_reduced_motion": "no-preference"} | media)
    browser.wait(f"{PLAYING}.length === 2 && {PLAYING}.every(v => v.readyState >= 2)")


def grow(folder, step, **numbers):
    """Goes on with the run as training does: one more line of its log."""
    log = RunLog(folder, "none", start_step=step - 1, config={})
    log.scalars(step, {"loss/distill": 0.1 * step, "loss/identity": 0.2, "seconds/step": 2.0} | numbers)
    log.close()


def validate(folder, step):
    """Leaves the clips that a validation leaves."""
    samples = []
    for preview in find_previews(folder, 4):
        video = torch.linspace(-1, 1, 9)[None, :, None, None].expand(3, 9, 32, 32)
        picture = torch.zeros(3, 64, 64, dtype=torch.uint8)
        write_preview(step_folder(folder, step), preview.sample.name, picture, video, -video)
        samples.append(PreviewSample(preview.sample.name, "purple newt", "a purple newt hops"))
    write_index(step_folder(folder, step), samples)


def test_it_shows_numbers_clips_and_pictures_asks_nobody_else_and_complains_about_nothing(browser, served):
    folder, address = served
    open_page(browser, address)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ratio = next(row["val/motion_ratio"] for row in reversed(rows) if "val/motion_ratio" in row)
    figures = browser.evaluate("document.querySelector('.figures').innerText")
    assert "of 100" in figures
    assert f"{100 * ratio:.0f} %" in figures
    assert browser.evaluate(f"{PLAYING}.map(v => [v.videoWidth, v.videoHeight, v.error])") == [[64, 32, None]] * 2
    assert browser.evaluate("[...document.images].map(i => i.naturalWidth)") == [64, 64]
    captions = browser.evaluate("[...document.querySelectorAll('.plots b')].map(b => b.textContent)")
    for plot in ("Distillation loss.", "Identity loss.", "Motion ratio.", "Teacher deviation."):
        assert plot in captions
    assert browser.evaluate("document.querySelectorAll('.split i').length") >= 4
    browser.wait(f"{PLAYING}.every(v => !v.paused)")
    assert browser.complaints == []
    assert all(url.startswith((address, "data:")) for url in browser.requests)


def test_it_grows_with_the_run_without_a_reload_and_without_disturbing_the_clips(browser, served):
    folder, address = served
    open_page(browser, address)
    browser.evaluate(f"void (window.kept = {PLAYING})")
    left = browser.evaluate("document.querySelectorAll('.figures dd')[2].textContent")
    grow(folder, 50)
    browser.wait(f"{SHOWN_STEP} === '50'")
    assert browser.evaluate("document.querySelectorAll('.figures dd')[2].textContent") != left
    assert browser.evaluate(f"{PLAYING}.every((v, i) => v === kept[i])")

    validate(folder, 60)
    browser.wait("document.querySelector('.preview h3')?.textContent === 'purple newt'")
    browser.wait(f"{PLAYING}.length === 2 && {PLAYING}.every(v => v.readyState >= 2 && !v.paused)")
    grow(folder, 100)
    browser.wait("document.querySelector('.eyebrow').textContent === 'Done'")
    assert browser.evaluate("document.querySelector('[role=progressbar]').getAttribute('aria-valuenow')") == "100"
    assert browser.complaints == []


def test_earlier_validations_can_be_looked_at_and_stay_while_the_run_goes_on(browser, served):
    folder, address = served
    open_page(browser, address)
    browser.evaluate(
        "(s => { s.value = '2'; s.dispatchEvent(new Event('change', {bubbles: true})); })"
        "(document.getElementById('step'))"
    )
    at_step_2 = f"{PLAYING}.length === 2 && {PLAYING}.every(v => v.ariaLabel.includes('step 2:'))"
    browser.wait(at_step_2)
    grow(folder, 7)
    browser.wait(f"{SHOWN_STEP} === '7'")
    assert browser.evaluate(at_step_2)


def test_one_control_stops_and_moves_all_clips(browser, served):
    _, address = served
    open_page(browser, address)
    browser.wait(f"{PLAYING}.every(v => !v.paused)")
    browser.click("#toggle")
    browser.wait(f"{PLAYING}.every(v => v.paused)")
    browser.evaluate(
        "(s => { s.value = 500; s.dispatchEvent(new Event('input', {bubbles: true})); })"
        "(document.getElementById('scrub'))"
    )
    browser.wait(f"{PLAYING}.every(v => !v.seeking && Math.abs(v.currentTime - v.duration / 2) < 0.02)")
    browser.click("#toggle")
    browser.wait(f"{PLAYING}.every(v => !v.paused)")


@pytest.mark.parametrize(("scheme", "paper"), [("light", "rgb(251, 250, 247)"), ("dark", "rgb(20, 19, 18)")])
def test_on_a_phone_nothing_sticks_out_in_light_and_dark(browser, served, scheme, paper):
    _, address = served
    open_page(browser, address, width=390, prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == paper
    assert browser.evaluate(f"{PLAYING}.every(v => v.paused)")
    assert browser.complaints == []


def test_it_says_when_nobody_answers_any_more(browser, trained_run):
    command = [sys.executable, "-m", "vflora.cli", "watch", str(trained_run), "--port", "0", "--refresh_s", "0.1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        open_page(browser, re.search(r"http://\S+", process.stderr.readline()).group())
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
    browser.wait("document.body.classList.contains('lost')")
    assert browser.evaluate("document.querySelectorAll('video').length") == 2
