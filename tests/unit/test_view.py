"""`ccsr view`: what its server shows and refuses, and the keyboard in a real browser."""

import base64
import http.client
import io
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from result_folder import noisy, photographs, write_result
from typer.testing import CliRunner

from evaluation.report.page import read_map, write_report
from evaluation.results import load_result
from infra.errors import CcsrError
from infra.files.publish import upload_folder
from infra.imaging.images import encode_png
from infra.imaging.pixels import StabilityAccumulator, coloured
from infra.mlflow.tracking import TrackingConfig
from pipelines.cli.main import app
from pipelines.view import Album, album_of, reply, serve


def album(place: Path, source: str | None = None) -> Album:
    return album_of(str(place), place, TrackingConfig(), source)


@contextmanager
def serving(shown: Album) -> Iterator[int]:
    with serve(shown, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def get(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest("GET", path, skip_host=True)
    connection.putheader("Host", f"{host}:{port}")
    connection.endheaders()
    reply = connection.getresponse()
    data = reply.read()
    connection.close()
    return reply.status, reply.headers["Content-Type"], data


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("result")
    return write_result(
        folder, photographs(3), {"bicubic": (1, noisy(0)), "ccsr": (3, noisy(9)), "<b>": (2, noisy(20))}
    )


def restored(folder: Path, runs: int) -> Path:
    """As `ccsr restore` writes it, of two pictures."""
    (folder / "in" / "sub").mkdir(parents=True)
    run = {"job": "restore", "config": {"num_runs": runs, "format": "tiff"}}
    for place, name in enumerate(("a", "sub/b")):
        (folder / "in" / f"{name}.png").write_bytes(encode_png(np.full((8, 8, 3), place, np.uint8)))
        for number in range(runs):
            out = folder / "out" / (f"runs/{number:02d}" if runs > 1 else "") / f"{name}.tif"
            out.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((32, 32, 3), 50 * place + 10 * number, np.uint8)).save(out)
    (folder / "out" / "run.json").write_text(json.dumps(run))
    return folder / "out"


def test_an_evaluations_pages_and_pictures(result: Path) -> None:
    found = load_result(result)
    with serving(album(result)) as port:
        status, kind, data = get(port, "/")
        text = data.decode()
        assert (status, kind) == (200, "text/html; charset=utf-8")
        addresses = re.findall(r'<img src="(/0/\d+)" alt="([^"]+)"', text)
        runs = [f"ccsr run 0{n}" for n in range(3)] + ["ccsr stability map"]
        others = ["&lt;b&gt; run 00", "&lt;b&gt; run 01", "&lt;b&gt; stability map"]
        assert [name for _, name in addresses] == ["LR", "HR", "bicubic only run", *runs, *others]
        assert 'data-start="3"' in text, "the first stochastic method's run"
        key = re.search(r"<h3>(\w+)</h3>", text)[1]
        by_name = {name: get(port, address) for address, name in addresses}
        assert {kind for _, kind, _ in by_name.values()} == {"image/png"}
        assert by_name["ccsr run 02"][2] == Path(found.picture("ccsr", key, 2)).read_bytes()
        expected = coloured(read_map(found.picture("ccsr", key)))
        np.testing.assert_array_equal(pixels(by_name["ccsr stability map"][2]), expected)
        keys = {re.search(r"<h3>(\w+)</h3>", get(port, f"/{n}")[2].decode())[1] for n in range(3)}
        assert keys == {"img0", "img1", "img2"}
        assert b'href="/2">previous' in data


def test_a_result_on_s3_is_shown_as_a_local_one(result: Path, s3: str, tmp_path: Path) -> None:
    upload_folder(result, f"{s3}/result", last="run.json")
    there = album_of(f"{s3}/result", tmp_path, TrackingConfig())
    assert there.keys == album(result).keys
    for path in ("/0/3", "/2/6"):
        assert reply(there, path) == reply(album(result), path)


@pytest.mark.parametrize("runs", [1, 3])
def test_a_restorations_runs_beside_their_inputs(tmp_path: Path, runs: int) -> None:
    out = restored(tmp_path, runs)
    shown = album(out, f"{tmp_path}/in")
    assert shown.keys == ["a.tif", "sub/b.tif"]
    with serving(shown) as port:
        names = re.findall(r'<img src="/1/\d+" alt="([^"]+)"', get(port, "/1")[2].decode())
        expected = [f"run 0{n}" for n in range(runs)] + ["stability map"] * (runs > 1)
        assert names == ["LR", *expected]
        assert pixels(get(port, "/1/0")[2]).max() == 1
        assert pixels(get(port, f"/1/{runs}")[2]).max() == 50 + 10 * (runs - 1), "a TIFF comes as PNG"
        if runs > 1:
            stability = StabilityAccumulator(crop_border=0)
            for number in range(runs):
                stability.add(np.full((32, 32, 3), 10 * number, np.uint8))
            np.testing.assert_array_equal(pixels(get(port, "/0/4")[2]), coloured(stability.map()))
    assert len(album(out).columns(0)) == 1, "without INPUT the results alone"


def test_nothing_but_the_pictures_can_be_read(result: Path) -> None:
    paths = ["/3", "/-1", "/0/99", "/0/0/0", "/run.json", "/../run.json", "/%2e%2e/run.json", "/0/../../run.json"]
    paths += ["//etc/passwd", "/0/٣", "/" + "9" * 5000, "/0?x=/etc/passwd", "http://127.0.0.1/0"]
    with serving(album(result)) as port:
        for path in paths:
            path = path.encode().decode("latin-1") if path.isascii() else "/0/%D9%A3"
            assert get(port, path)[0] == 404, path
        assert get(port, "/0", "attacker.example")[0] == 403
        assert get(port, "/0", "localhost")[0] == 200


def test_a_picture_that_is_gone_is_named(tmp_path: Path) -> None:
    out = restored(tmp_path, 1)
    with serving(album(out)) as port:
        (out / "a.tif").unlink()
        status, _, data = get(port, "/0/0")
        assert status == 404
        assert data.count(b"\n") == 2
        assert b"a.tif" in data


def test_what_cannot_be_shown_is_three_lines(tmp_path: Path, result: Path) -> None:
    for folder, run in (("train", {"job": "train"}), ("empty", {"job": "restore", "config": {"num_runs": 1}})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run.json").write_text(json.dumps(run))
    with serving(album(result)) as port:
        for arguments, what in (
            ([f"{tmp_path}/train"], "output of ccsr train"),
            ([f"{tmp_path}/empty"], "no pictures here"),
            ([f"{tmp_path}/none"], "no such file"),
            ([str(result), "--input", str(tmp_path)], "an evaluation holds its inputs"),
            ([str(result), "--port", str(port)], "cannot listen"),
        ):
            error = CliRunner().invoke(app, ["view", *arguments]).exception
            assert isinstance(error, CcsrError), error
            assert what in str(error)
            assert str(error).count("\n") == 2


def test_ctrl_c_ends_it_after_it_said_where(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", interrupted)
    done = CliRunner().invoke(app, ["view", str(result), "--port", "0"])
    assert done.exit_code == 0, done.exception
    assert re.fullmatch(r"3 images: http://127\.0\.0\.1:\d+/ \(Ctrl-C ends\)\n", done.output)


class Browser:
    """Headless Chromium by its DevTools protocol over two pipes: JSON messages that end with a zero byte."""

    def __init__(self, chromium: str, folder: Path) -> None:
        theirs, self._out = os.pipe()
        self._in, answers = os.pipe()
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={folder}",
        ]
        quoted = " ".join(f"'{word}'" for word in (chromium, *options, "--window-size=1200,800", "about:blank"))
        self._process = subprocess.Popen(
            ["bash", "-c", f"exec {quoted} 3<&{theirs} 4>&{answers}"],
            pass_fds=(theirs, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(answers)
        self._number, self._rest, self._session = 0, b"", {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                part = os.read(self._in, 1 << 20)
                assert part, "Chromium ended"
                self._rest += part
            answer, _, self._rest = self._rest.partition(b"\0")
            found = json.loads(answer)
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]

    def value(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def until(self, script: str) -> None:
        deadline = time.monotonic() + 60
        while not self.value(script):
            assert time.monotonic() < deadline, script
            time.sleep(0.05)

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.until(f"location.href == {address!r} && document.readyState == 'complete'")

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self.call("Browser.close")
        self._process.wait(30)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_the_keyboard_flicks_through_runs_and_images_in_a_browser(result: Path, tmp_path: Path) -> None:
    browser = Browser(shutil.which("chromium"), tmp_path / "profile")
    right = 'document.querySelectorAll(".slider img")[1]'
    try:
        with serving(album(result)) as port:
            browser.open(f"http://127.0.0.1:{port}/")
            browser.until("[...document.images].every(image => image.complete && image.naturalWidth)")
            assert browser.value(f"{right}.alt") == "ccsr run 00"
            browser.press("ArrowRight")
            assert browser.value(f"{right}.alt") == "ccsr run 01"
            assert browser.value(f"new URL({right}.src).pathname") == "/0/4"
            browser.press("ArrowLeft")
            browser.press("ArrowLeft")
            assert browser.value(f"{right}.alt") == "bicubic only run"
            for _ in range(4):
                browser.press("ArrowRight")
            assert browser.value(f"{right}.alt") == "ccsr stability map"
            browser.press("ArrowDown")
            browser.until("location.pathname == '/1' && document.readyState == 'complete'")
            assert browser.value(f"{right}.alt") == "ccsr stability map", "the next image shows the same picture"
            browser.press("ArrowUp")
            browser.until("location.pathname == '/0' && document.readyState == 'complete'")
            browser.value("const s = document.querySelector('.slider input'); s.value = 20; s.oninput({target: s})")
            assert browser.value("document.querySelector('.slider').style.getPropertyValue('--x')") == "20%"
            browser.until("[...document.images].every(image => image.complete && image.naturalWidth)")
            browser.screenshot(tmp_path / "view.png")
        browser.open(f"file://{write_report(result, str(tmp_path / 'report.html'))}")
        assert browser.value("document.querySelectorAll('section').length") == 3
        assert browser.value(f"{right}.alt").startswith("ccsr best")
        browser.screenshot(tmp_path / "report.png")
    finally:
        browser.close()
