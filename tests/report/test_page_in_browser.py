import pytest

from vflora.report import write_page

FRAMES, FPS = 24, 12
ALL = "[...document.querySelectorAll('video')]"
SHOWN = f"{ALL}.filter(v => v.readyState >= 2 && v.offsetParent)"
# Frame i of every test video is grey 8 * i, so a pixel says which frame is on the screen.
FRAMES_ON_SCREEN = f"""{ALL}.map(v => {{
  const canvas = Object.assign(document.createElement('canvas'), {{width: 64, height: 48}});
  const context = canvas.getContext('2d');
  context.drawImage(v, 0, 0, 64, 48);
  return Math.round(context.getImageData(32, 40, 1, 1).data[0] / 8);
}})"""


@pytest.fixture(scope="module")
def page(tmp_path_factory, make_comparison):
    folder = tmp_path_factory.mktemp("page")
    return write_page(make_comparison(folder, notice="Small models, trained in a small world."), folder)


@pytest.fixture
def desktop(browser, page):
    browser.open(page, width=1280, height=2600, prefers_reduced_motion="reduce")
    browser.wait(f"{SHOWN}.length === 9")
    return browser


def wait_for_frame(browser, frame):
    # The page leaves a video alone that is within a quarter of a frame of the frame's middle.
    at = f"Math.abs(v.currentTime - {(frame + 0.5) / FPS}) < {0.26 / FPS}"
    browser.wait(f"{ALL}.every(v => v.readyState >= 2 && !v.seeking && v.paused && {at})")


def wait_for_picture(browser, frame):
    # A video may know its time before the picture of that time is on the screen.
    browser.wait(f"{FRAMES_ON_SCREEN}.every(shown => shown === {frame})")


def scrub_to(browser, frame):
    browser.evaluate(
        f"(s => {{ s.value = {frame}; s.dispatchEvent(new Event('input', {{bubbles: true}})); }})"
        "(document.getElementById('scrub'))"
    )
    wait_for_frame(browser, frame)


def test_every_video_decodes_and_the_page_asks_nobody_and_complains_about_nothing(desktop):
    sizes = desktop.evaluate(f"{ALL}.map(v => [v.videoWidth, v.videoHeight, v.duration, v.error])")
    assert sizes == [[320, 240, FRAMES / FPS, None]] * 9
    assert desktop.complaints == []
    assert {url.split(":")[0] for url in desktop.requests} <= {"file", "data", "blob"}
    assert sum(url.startswith("file:") for url in desktop.requests) == 1


@pytest.mark.parametrize("frame", [0, 1, 11, 23])
def test_one_scrubber_shows_the_same_frame_in_every_video(desktop, frame):
    scrub_to(desktop, frame)
    wait_for_picture(desktop, frame)
    desktop.wait(f"document.getElementById('place').value === '{frame + 1} / {FRAMES}'")


def test_one_button_plays_and_pauses_all_of_them_together(desktop):
    assert desktop.evaluate(f"{ALL}.every(v => v.paused)")
    desktop.click("#play")
    times = f"{ALL}.map(v => v.currentTime)"
    desktop.wait(
        f"{ALL}.every(v => !v.paused && v.currentTime > 0.3) && Math.max(...{times}) - Math.min(...{times}) < 0.2"
    )
    assert desktop.evaluate("document.getElementById('play').getAttribute('aria-label')") == "Pause"
    desktop.click("#play")
    desktop.wait(f"{ALL}.every(v => v.paused && !v.seeking)")  # the place was written in the same tick
    place = int(desktop.evaluate("document.getElementById('place').value").split(" / ")[0]) - 1
    wait_for_frame(desktop, place)
    wait_for_picture(desktop, place)
    assert desktop.complaints == []


def test_the_loop_starts_again_after_the_last_frame(desktop):
    scrub_to(desktop, 22)
    desktop.click("#play")
    desktop.wait(f"{ALL}.every(v => !v.paused && v.currentTime > 0.1 && v.currentTime < 1.0)")


def test_the_speed_slows_all_of_them(desktop):
    desktop.evaluate(
        "(s => { s.value = '0.25'; s.dispatchEvent(new Event('change')); })(document.getElementById('speed'))"
    )
    desktop.click("#play")
    desktop.wait(f"{ALL}.every(v => !v.paused && v.playbackRate === 0.25)")


def test_the_arrow_keys_step_a_frame_and_wrap(desktop):
    scrub_to(desktop, 5)
    for key, frame in (("ArrowRight", 6), ("ArrowLeft", 5)):
        desktop.evaluate(f"document.body.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}', bubbles: true}}))")
        desktop.wait(f"document.getElementById('place').value === '{frame + 1} / {FRAMES}'")


def test_the_chosen_scale_changes_headline_and_table(desktop):
    before = desktop.evaluate(
        "[document.querySelector('.figures').innerText, document.querySelector('tbody').innerText]"
    )
    desktop.evaluate(
        "(s => { s.value = '1'; s.dispatchEvent(new Event('change')); })(document.getElementById('scale'))"
    )
    after = desktop.evaluate(
        "[document.querySelector('.figures').innerText, document.querySelector('tbody').innerText]"
    )
    assert "90 %" in before[0]
    assert "60 %" in after[0]
    assert before[1] != after[1]
    assert "scale 1.0" in desktop.evaluate("document.querySelector('.head').innerText")


def test_the_command_can_be_copied(desktop):
    desktop.click("#copy")
    desktop.wait("document.getElementById('copy').textContent === 'Copied'")
    assert desktop.evaluate("getSelection().toString()") == "vflora compare --seeds 1"


def test_it_plays_by_itself_unless_the_reader_asked_for_less_motion(browser, page):
    browser.open(page, width=1280, height=900, prefers_reduced_motion="no-preference")
    browser.wait(f"{SHOWN}.length > 0 && {SHOWN}.every(v => !v.paused && v.currentTime > 0.2)")
    browser.open(page, width=1280, height=900, prefers_reduced_motion="reduce")
    browser.wait(f"{SHOWN}.length > 0")
    assert browser.evaluate(f"{SHOWN}.every(v => v.paused)")


def test_videos_out_of_sight_are_not_decoded_until_they_come_near(browser, page):
    browser.open(page, width=1280, height=300, prefers_reduced_motion="reduce")
    last = "[...document.querySelectorAll('video')].at(-1)"
    assert browser.evaluate(f"{last}.src") == ""
    browser.evaluate(f"{last}.scrollIntoView()")
    browser.wait(f"{last}.readyState >= 2")


def test_on_a_phone_base_and_one_scale_stand_side_by_side_and_nothing_sticks_out(browser, page):
    browser.open(page, width=390, height=2600, prefers_reduced_motion="reduce")
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
    shown = (
        "[...document.querySelectorAll('.row')].map(r => [...r.querySelectorAll('.clip')].filter(c => c.offsetParent))"
    )
    assert browser.evaluate(f"{shown}.map(c => c.map(f => f.dataset.scale))") == [["0", "0.5"]] * 3
    browser.evaluate(
        "(s => { s.value = '1'; s.dispatchEvent(new Event('change')); })(document.getElementById('scale'))"
    )
    assert browser.evaluate(f"{shown}.map(c => c.map(f => f.dataset.scale))") == [["0", "1"]] * 3
    tops = browser.evaluate(f"{shown}[0].map(f => f.getBoundingClientRect().top)")
    assert tops[0] == tops[1]
    browser.wait("[...document.querySelectorAll('.clip.focus video')].slice(0, 2).every(v => v.readyState >= 2)")
    assert browser.complaints == []


def test_on_a_tablet_no_caption_runs_into_the_next(browser, tmp_path, make_comparison):
    wide = write_page(make_comparison(tmp_path, gains=(("Momo", 0.5),), scales=(0.5, 1.0)), tmp_path)
    browser.open(wide, width=740, height=900, prefers_reduced_motion="reduce")
    browser.evaluate("void document.querySelector('.clips').style.setProperty('--columns', 5)")
    parts = "[...f.children].map(e => e.getBoundingClientRect())"
    inside = f"{parts}.every(b => b.right <= f.parentNode.getBoundingClientRect().right + 0.5)"
    assert browser.evaluate(f"[...document.querySelectorAll('figcaption')].every(f => {inside})")
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


def contrast(browser, selector):
    """WCAG contrast between an element's text and the page."""
    measure = """(selector => {
          const light = element => {
            const canvas = document.createElement('canvas').getContext('2d');
            canvas.fillStyle = element;
            canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255)
              .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const text = light(getComputedStyle(document.querySelector(selector)).color);
          const paper = light(getComputedStyle(document.body).backgroundColor);
          return (Math.max(text, paper) + 0.05) / (Math.min(text, paper) + 0.05);
        })"""
    return browser.evaluate(f"{measure}({selector!r})")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_both_be_read(browser, page, scheme):
    browser.open(page, width=1280, height=900, prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(20, 19, 18)") == (scheme == "dark")
    for selector in ("h1", ".lede", ".seed", ".badge.gain", ".badge.loss", ".note"):
        assert contrast(browser, selector) >= 4.5, selector
