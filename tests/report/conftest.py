import json
import os
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vflora.evaluate import VideoScores, identity_scores, motion_scores
from vflora.report import Clip, Comparison, Row
from vflora.video_io import write_mp4

FRAMES, FPS = 24, 12


def coded_video(frames=FRAMES, tint=0, size=(48, 64), step=2):
    """Frame i is grey 8 * i all over, but for a square that moves `step` pixels a frame: a picture knows its frame."""
    video = np.empty((frames, *size, 3), np.uint8)
    for i in range(frames):
        video[i] = 8 * i
        x = min(size[1] - 10, 2 + step * i)
        video[i, 4:12, x : x + 8] = (200, 60 + tint, 40)
    return video


@pytest.fixture(scope="session")
def film(tmp_path_factory):
    """A coded video as a real mp4, encoded once for all tests, and its motion."""
    folder = tmp_path_factory.mktemp("films")

    @cache
    def make(tint, step):
        video = coded_video(tint=tint, step=step)
        motion = motion_scores(torch.from_numpy(video).permute(3, 0, 1, 2).float() / 127.5 - 1)
        return write_mp4(folder / f"{tint}-{step}.mp4", video, FPS), motion

    return make


@pytest.fixture(scope="session")
def make_comparison(film):
    """Builds a comparison of real mp4s and real scores; gains per character decide who is best and worst."""

    def make(folder, gains=(("Momo", 0.5), ("Zig", -0.2), ("Pip", 0.2)), scales=(0.5, 1.0), **options):
        rows = []
        for number, (character, gain) in enumerate(gains):
            clips = []
            for scale in (0.0, *scales):
                encoded, motion = film(tint=10 * number, step=2 if scale < 1 else 1)
                (folder / "videos").mkdir(exist_ok=True)
                angles = torch.linspace(0, 1.0 - gain * scale, FRAMES)
                identity = identity_scores(torch.stack([angles.cos(), angles.sin()], -1), torch.tensor([1.0, 0.0]))
                clips.append(
                    Clip(
                        scale=scale,
                        path=Path(shutil.copyfile(encoded, folder / "videos" / f"{number}-{scale:g}.mp4")),
                        scores=VideoScores(identity, motion),
                        motion_ratio=(1.0, 0.9, 0.6)[len(clips)],
                        deviation=0.01 * scale,
                        deviation_by_sigma={"0.50-0.75": 0.01 * scale},
                    )
                )
            (folder / "pictures").mkdir(exist_ok=True)
            picture = folder / "pictures" / f"{number}.png"
            Image.fromarray(coded_video(1)[0]).save(picture)
            rows.append(Row(character, f"{character} hops <fast> & far", number, picture, tuple(clips)))
        facts = {"judge": "SigLIP", "settings": {"Frames": FRAMES}, "command": "vflora compare --seeds 1", "fps": FPS}
        return Comparison(**{"title": "Small creatures", "rows": tuple(rows)} | facts | options)

    return make


# A headless Chromium, driven through its debugging pipe: no port, no driver, no package.
COMMAND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-pipe --autoplay-policy=no-user-gesture-required"
)


class Browser:
    """One page in one browser; keeps everything that the page complains about or asks the network for."""

    def __init__(self, profile: Path):
        down_read, down_write = os.pipe()
        up_read, up_write = os.pipe()
        # Chromium reads commands from descriptor 3 and answers on 4.
        plumbing = f'exec "$0" "$@" 3<&{down_read} 4>&{up_write}'
        self.process = subprocess.Popen(
            ["bash", "-c", plumbing, COMMAND, *QUIET.split(), f"--user-data-dir={profile}"],
            pass_fds=(down_read, up_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(down_read)
        os.close(up_write)
        self._to, self._from = os.fdopen(down_write, "wb", 0), os.fdopen(up_read, "rb")
        self._rest, self._count, self._session = b"", 0, None
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters):
        """Sends one command and returns its result; events that come before it are kept."""
        self._send(method, parameters)
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _send(self, method: str, parameters: dict) -> None:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")

    def _receive(self) -> dict:
        while b"\0" not in self._rest:
            chunk = self._from.read1(1 << 20)
            assert chunk, "the browser is gone"
            self._rest += chunk
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict) -> None:
        kind, values = event.get("method"), event.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(values["exceptionDetails"])[:400])
        elif kind == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.complaints.append(values["entry"]["text"])
        elif kind == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(values["args"])[:400])
        elif kind == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"][:120])

    def open(self, page: Path | str, *, width: int, height: int, **media: str) -> None:
        """Opens a file or an address at a window size, with media features such as prefers_color_scheme."""
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        # The page before must be gone: one that asks a server which its test has closed complains at any moment.
        self.leave()
        self.complaints.clear()
        self.requests.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        self.wait("document.readyState === 'complete'")

    def leave(self) -> None:
        """Leaves the page for an empty one."""
        self.call("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank' && document.readyState === 'complete'")

    def evaluate(self, expression: str):
        """Returns the value of a JavaScript expression; a promise is awaited."""
        result = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 15.0) -> None:
        """Waits until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < end, f"still not true: {condition}"
            time.sleep(0.03)

    def click(self, selector: str) -> None:
        """Presses and releases the mouse in the middle of an element."""
        box = f"document.querySelector({selector!r}).getBoundingClientRect()"
        self.evaluate(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        x, y = self.evaluate(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def close(self) -> None:
        """Ends the browser and waits for it."""
        self._session = None
        self._send("Browser.close", {})
        while self._from.read1(1 << 20):  # whether it answers before it goes is up to the browser
            pass
        self.process.wait(timeout=60)
        self._to.close()
        self._from.close()


@pytest.fixture(scope="session")
def opened_browser(tmp_path_factory):
    if COMMAND is None:
        assert "CI" not in os.environ, "the page has to be tested in a browser: install chromium"
        pytest.skip("chromium is not installed, so the page is not tested in a browser")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def browser(opened_browser):
    """The browser, on an empty page when a module is done: a page of films would play them beside all later tests."""
    yield opened_browser
    opened_browser.leave()
