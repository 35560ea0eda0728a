import http.client
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from vflora.cli import main
from vflora.errors import UserError
from vflora.previews import find_previews
from vflora.run_log import RunLog
from vflora.watch.server import WatchConfig, open_server


@pytest.fixture
def run_folder(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "fox")
    return tmp_path / "fox"


@contextmanager
def serving(config):
    """Serves in the background, at an address that it gives."""
    with open_server(config) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


@pytest.fixture
def place(run_folder):
    """Host and port of a server of the run."""
    with serving(WatchConfig(run_folder, port=0)) as server:
        yield server.server_address[:2]


@pytest.fixture
def ask(place):
    """Asks a server of the run exactly what is typed, as a client that normalises nothing."""

    def ask(path, method="GET", **headers):
        connection = http.client.HTTPConnection(*place, timeout=30)
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, answer.headers, body

    return ask


def _has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def files(page):
    return re.findall(r'(?:src|href)="(/file/[0-9a-f]+)"', page.decode())


def test_the_page_links_the_newest_clips_and_their_pictures_and_they_are_served_whole(ask, run_folder):
    status, headers, page = ask("/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    newest = find_previews(run_folder, 4)
    wanted = {path.read_bytes() for preview in newest for path in (preview.picture, preview.video)}
    served = {ask(address)[2] for address in files(page)}
    assert served == wanted
    assert len(served) == 4


def test_a_player_may_ask_for_a_part_of_a_clip(ask, run_folder):
    address = next(a for a in files(ask("/")[2]) if ask(a)[1]["Content-Type"] == "video/mp4")
    whole = ask(address)[2]
    for asked, first, last in (("bytes=0-", 0, len(whole)), ("bytes=10-19", 10, 20), ("bytes=-7", -7, len(whole))):
        status, headers, part = ask(address, Range=asked)
        assert (status, part) == (206, whole[first:last])
        assert headers["Content-Range"].endswith(f"/{len(whole)}")
    assert ask(address, Range=f"bytes={len(whole)}-")[0] == 416
    status, headers, body = ask(address, "HEAD")
    assert (status, int(headers["Content-Length"]), body) == (200, len(whole), b"")


def test_a_browser_that_hangs_up_leaves_no_word_in_the_terminal(ask, place, capsys):
    before = {*threading.enumerate()}  # those of other tests may wait for their browsers for ever
    clip = next(address for address in files(ask("/")[2]) if ask(address)[1]["Content-Type"] == "video/mp4")
    for path in ("/", "/state", clip, "/nothing"):
        browser = socket.create_connection(place)
        browser.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * 100)
        browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # at once, without a farewell
        browser.close()
    assert ask("/")[0] == 200  # and so the others were let in before
    for thread in {*threading.enumerate()} - before:
        thread.join(30)
    assert capsys.readouterr().err == ""


def test_a_comparison_in_the_folder_of_the_run_can_be_opened_from_the_page(run_folder, ask):
    page = run_folder / "comparison" / "index.html"
    page.parent.mkdir()
    page.write_text("<!doctype html><title>whole</title>")
    assert b"Comparisons" not in ask("/")[2]  # without its numbers it is some other page
    (page.parent / "index.json").write_text("{}")
    address = re.search(r'href="(/file/[0-9a-f]+)" target="_blank" rel="noopener">comparison<', ask("/")[2].decode())
    status, headers, body = ask(address.group(1))
    assert (status, body) == (200, page.read_bytes())
    assert headers["Content-Type"].startswith("text/html")


@pytest.mark.parametrize(
    "path",
    [
        "/../config.yaml",
        "/config.yaml",
        "/file/../../config.yaml",
        "/file/%2e%2e%2fconfig.yaml",
        "/file/" + "0" * 32,
        "//etc/passwd",
        "/previews/step-000004.json",
        "/state/../../metrics.jsonl",
    ],
)
def test_nothing_is_served_that_the_page_did_not_link(ask, path):
    ask("/")
    status, _, body = ask(path)
    assert status == 404
    assert b"pipeline_dir" not in body


def test_a_name_that_only_points_here_is_refused(ask):
    """A page elsewhere can give 127.0.0.1 a name of its own; what it asks then carries that name."""
    assert ask("/", Host="evil.example:8765")[0] == 403
    assert ask("/state", Host="127.0.0.1.evil.example")[0] == 403
    for host in ("localhost:1", "127.0.0.1", "[::1]:8765"):
        assert ask("/", Host=host)[0] == 200


def test_the_state_says_what_changed_and_nothing_when_nothing_did(ask, run_folder):
    first = json.loads(ask("/state")[2])
    assert ask(f"/state?mark={first['mark']}")[0] == 204
    log = RunLog(run_folder, "none", start_step=4, config={})
    log.scalars(5, {"loss/distill": 0.5, "seconds/step": 1.0})
    log.close()
    status, _, body = ask(f"/state?mark={first['mark']}")
    assert status == 200
    changed = {name for name, mark in json.loads(body)["marks"].items() if mark != first["marks"][name]}
    assert {"figures", "plots"} <= changed
    assert "previews" not in changed


def test_an_earlier_validation_can_be_asked_for_and_an_unknown_one_gives_the_newest(ask):
    def shown(query):
        parts = json.loads(ask(f"/state?step={query}")[2])["parts"]
        return set(re.findall(r"at step (\d+)", parts["previews"]))

    assert shown("2") == {"2"}
    assert shown("") == shown("3") == shown("../2") == {"4"}


def test_names_from_data_are_escaped(run_folder, ask):
    index = run_folder / "previews" / "step-000004.json"
    samples = [sample | {"character": "<script>", "prompt": '"><img>'} for sample in json.loads(index.read_text())]
    index.write_text(json.dumps(samples))
    page = ask("/")[2].decode()
    assert page.count("<h3>&lt;script&gt;</h3>") == 2
    assert page.count("&#34;&gt;&lt;img&gt;") == 2
    assert page.count("<script>") == 1  # its own


def test_a_port_that_is_taken_is_named_with_the_fix(run_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="choose another with --port"):
            open_server(WatchConfig(run_folder, port=taken.getsockname()[1]))
    with pytest.raises(UserError, match="check --host"):
        open_server(WatchConfig(run_folder, port=0, host="192.0.2.1"))


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("::", "localhost")])
def test_an_ipv6_address_can_be_served_at(run_folder, host, shown):
    with serving(WatchConfig(run_folder, port=0, host=host)) as server:
        port = server.server_address[1]
        assert server.address == f"http://{shown}:{port}/"
        connection = http.client.HTTPConnection("::1", port, timeout=30)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()


def test_a_folder_without_a_run_is_refused_by_the_command(tmp_path, capsys):
    assert main(["watch", str(tmp_path)]) == 2
    assert "give the --output_dir of a training run" in capsys.readouterr().err


def test_the_command_serves_until_ctrl_c_and_says_where(run_folder):
    command = [sys.executable, "-m", "vflora.cli", "watch", str(run_folder), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        line = process.stderr.readline()
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", line).group(1))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 0, rest
    assert "no longer watching" in rest
