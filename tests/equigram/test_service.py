"""The service as people meet it: a process of its own, real Ray, the commands, the page in a browser, and kills."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from numpy.testing import assert_array_equal
from playwright.sync_api import Page, expect, sync_playwright

from equigram import Client, Job
from equigram.api.cluster import LocalCluster
from equigram.errors import ConflictError, JobCancelledError, JobNotFoundError
from equigram.run import run
from equigram.spec import JobSpec
from equigram.store import GramStore

PATIENCE = 120.0
Command = Callable[..., subprocess.CompletedProcess[str]]


class Service:
    """A service in a process of its own, at the same place whenever it is started."""

    def __init__(self, folder: Path) -> None:
        self.root, self.data = folder / "root", folder / "data"
        self.data.mkdir()
        self._state, self._log = folder / "state", folder / "service.log"
        self._process: subprocess.Popen[str] | None = None
        self.url, self._port = "", 0

    def start(self) -> None:
        command = [sys.executable, "-m", "equigram.cli", "serve", str(self.root), "--port", str(self._port)]
        command += ["--cpus", "2", "--read", str(self.data)]
        environment = os.environ | {"XDG_STATE_HOME": str(self._state), "COLUMNS": "200"}
        with self._log.open("a") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        match = re.search(r"at (http://127\.0\.0\.1:(\d+))", said)
        assert match, f"{said}{self._log.read_text()}"
        self.url, self._port = match[1], int(match[2])

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        assert self._process is not None
        self._process.send_signal(how)
        code = self._process.wait(timeout=PATIENCE)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while httpx.get(f"{self.url}/readyz").status_code != 200:
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.1)

    def end_cluster(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_STATE_HOME", str(self._state))
            LocalCluster(str(self.root)).stop()

    def cluster_processes(self) -> list[psutil.Process]:
        """The processes of Ray, drivers and workers."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RAY_AUTH_TOKEN_PATH", "").startswith(str(self._state)):
                    found.append(process)
        return found

    def driver(self, job: str) -> psutil.Process:
        """The driver of a job."""
        for process in self.cluster_processes():
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if "equigram.api.drive" in command and job in command:
                    return process
        pytest.fail(f"{job} has no driver")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    one = Service(tmp_path_factory.mktemp("service"))
    one.start()
    one.wait_until_ready()
    yield one
    one.stop()
    one.end_cluster()
    deadline = time.monotonic() + PATIENCE
    while one.cluster_processes():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.url) as one:
        yield one


def pictures(count: int, size: int, seed: int = 0) -> tuple[Any, Any]:
    """Noisy stripes whose width tells the class."""
    rng, labels = np.random.default_rng(seed), np.arange(count) % 3
    stripes = 80 * (np.arange(size) // (labels[:, None] + 1) % 2)
    return (stripes[:, None, :] + rng.integers(0, 120, (count, size, size))).astype(np.uint8), labels


def fields(service: Service, name: str, count: int, **gram: Any) -> dict[str, Any]:
    """A job on noisy stripes, in tiles that take some hundredths of a second."""
    path = service.data / f"{count}.npz"
    if not path.exists():
        (x, y), (x_test, y_test) = pictures(count, size=12), pictures(12, size=12, seed=1)
        np.savez(path, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return {
        "store": name,
        "data": {"train": str(path)},
        "network": {"depth": 3},
        "gram": {"groups": ["C1", "C4"], "tile": 8, **gram},
    }


def until(done: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def page() -> Iterator[Page]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no browser here; `make browser` installs Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1100, "height": 800})
        context.set_default_timeout(PATIENCE * 1000)
        expect.set_options(timeout=PATIENCE * 1000)
        one, errors = context.new_page(), list[str]()
        one.on("pageerror", lambda error: errors.append(str(error)))
        yield one
        assert not errors
        browser.close()


def test_a_job_is_watched_in_a_browser_while_worker_driver_and_service_are_killed(
    service: Service, client: Client, page: Page, equigram: Command, tmp_path: Path
) -> None:
    job = fields(service, "watched", 160)
    (tmp_path / "job.yaml").write_text(str(job), encoding="utf-8")
    submitted = equigram(tmp_path, "submit", "job.yaml", "--no-upload", "--server", service.url)
    assert (submitted.returncode, submitted.stdout) == (0, "watched\n"), submitted.stderr

    page.goto(service.url)
    page.get_by_test_id("job-row").filter(has_text="watched").get_by_role("link").click()
    expect(page.locator("#job-state")).to_have_attribute("data-state", "running")
    stored = page.locator("#count-stored")
    expect(stored).to_have_text(re.compile(r"[1-9]"))  # the map fills up

    def count() -> int:
        return int(stored.inner_text().replace(",", ""))

    worker = next(one for one in client.job("watched").detail.workers if one.lost is None)
    os.kill(int(worker.place.rsplit(" ", 1)[1]), signal.SIGKILL)
    expect(page.get_by_test_id("worker-row").filter(has_text="killed")).to_have_count(1)
    before = count()
    until(lambda: count() > before, "no tiles after a worker was killed")

    service.stop(signal.SIGKILL)
    expect(page.locator("#connection")).to_contain_text("lost")
    service.driver("watched").kill()  # while nobody looks
    service.start()
    expect(page.locator("#connection")).not_to_contain_text("lost")

    watched = equigram(tmp_path, "watch", "watched", "--server", service.url)
    assert watched.returncode == 0, watched.stderr
    expect(page.locator("#job-state")).to_have_attribute("data-state", "done")
    expect(page.locator("#count-missing")).to_have_text("0")
    expect(page.get_by_test_id("score-row").first).to_contain_text("%")
    expect(page.get_by_test_id("figure")).to_have_count(9)
    first = page.get_by_test_id("prediction").first.locator("img")
    until(lambda: first.evaluate("image => image.naturalWidth") >= 96, "no picture of a test image")
    until(lambda: page.locator("#matrix-window").inner_text(), "no picture of the matrix")

    assert client.job("watched").detail.attempt == 2  # another driver went on
    spec = JobSpec.parse({**job, "store": str(tmp_path / "run"), "resources": {"workers": 0}})
    alone, theirs = run(spec).store, GramStore.open(str(service.root / "watched"))
    for group, kernel in alone.matrices:
        assert_array_equal(theirs.matrix("gram", group, kernel), alone.matrix("gram", group, kernel))


def test_images_are_uploaded_and_results_fetched_as_they_are_in_the_store(
    service: Service, client: Client, equigram: Command, tmp_path: Path
) -> None:
    x, y = pictures(20, size=8)
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, x_test=x[:6], y_test=y[:6])
    gram = {"groups": ["C4"], "tile": 8}
    job = {"store": "mine", "data": {"train": "mine.npz"}, "network": {"depth": 1}, "gram": gram}
    (tmp_path / "job.yaml").write_text(str(job), encoding="utf-8")
    done = equigram(tmp_path, "submit", "job.yaml", "--wait", "--server", service.url)
    assert done.returncode == 0, done.stderr
    assert "mine is done: accuracy" in done.stderr
    fetched = equigram(tmp_path, "fetch", "mine", "--gram", "--server", service.url)
    assert fetched.returncode == 0, fetched.stderr
    store = GramStore.open(str(service.root / "mine"))
    assert_array_equal(np.load(tmp_path / "mine/gram-C4-ntk.npy"), store.matrix("gram", "C4", "ntk"))
    assert {Path(path).suffix for path in fetched.stdout.split()} == {".json", ".csv", ".png", ".svg", ".npy"}
    matrix = client.job("mine").gram("C4", "ntk")
    assert_array_equal(matrix[3:9, -2:], store.matrix("gram", "C4", "ntk")[3:9, -2:])
    listed = equigram(tmp_path, "jobs", "--server", service.url)
    assert "mine" in listed.stdout


def test_the_page_fits_a_phone_and_works_with_the_keyboard(service: Service, client: Client, page: Page) -> None:
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in (360, 1100):
            page.set_viewport_size({"width": width, "height": 700})
            for place in ("#/", "#/jobs/mine"):
                page.goto(f"{service.url}/{place}")
                expect(page.locator("#page-heading")).to_be_visible()
                assert page.evaluate("document.documentElement.scrollWidth") <= width
    text = page.locator("#tile-text")

    def moved() -> bool:
        page.locator("#gram-tiles").press("ArrowRight")
        page.wait_for_timeout(300)
        return "stored" in text.inner_text()

    until(moved, "the cursor does not move over the tiles")
    page.locator("#delete-job").press("Enter")
    expect(page.locator("#delete-dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#delete-dialog")).not_to_be_visible()
    page.locator("#delete-job").press("Enter")
    page.locator("#delete-confirm").press("Enter")
    until(lambda: not (service.root / "mine").exists(), "the job was not deleted")
    with pytest.raises(JobNotFoundError):
        client.job("mine")


def test_jobs_share_the_workers_wait_fail_stop_and_go_on(
    service: Service, client: Client, equigram: Command, tmp_path: Path
) -> None:
    first, second = (client.submit(fields(service, f"shared{number}", 100)) for number in range(2))
    wrong = client.submit(fields(service, "wrong", 16) | {"data": {"train": str(service.data / "nothing.npz")}})

    def computes(job: Job) -> bool:
        counts = job.refresh().detail.counts
        return counts is not None and counts.finished > 2

    until(lambda: computes(first), "the first job does not compute")
    driver = service.driver("shared0")
    driver.suspend()  # it cannot end before it is cancelled
    until(lambda: computes(second), "two jobs do not run at the same time")
    assert wrong.refresh().state == "queued"
    assert first.refresh().detail.share == second.detail.share == 0.5
    assert equigram(tmp_path, "cancel", "shared0", "--server", service.url).returncode == 0
    with contextlib.suppress(psutil.NoSuchProcess):  # killed, where it took longer than Ray waits
        driver.resume()
    with pytest.raises(JobCancelledError):
        first.wait(timeout=PATIENCE)
    assert equigram(tmp_path, "watch", "shared0", "--server", service.url).returncode == 3
    driver.wait(timeout=PATIENCE)
    failed = equigram(tmp_path, "watch", "wrong", "--server", service.url)
    assert failed.returncode == 1
    assert "nothing.npz does not exist" in failed.stderr
    assert "error: " in equigram(tmp_path, "logs", "wrong", "--server", service.url).stdout
    counts = first.refresh().detail.counts
    assert counts is not None
    assert counts.finished < counts.tiles
    first.resume()
    second.wait(timeout=PATIENCE)
    first.wait(timeout=PATIENCE)
    assert (first.detail.state, first.detail.attempt) == ("done", 2)
    with pytest.raises(ConflictError, match="shared0 is done, and only a queued or running job can be cancelled"):
        first.cancel()


def test_a_second_service_for_the_same_root_is_refused(service: Service, equigram: Command, tmp_path: Path) -> None:
    refused = equigram(tmp_path, "serve", service.root, "--port", "0")
    assert refused.returncode == 2
    assert f"another service serves {service.root}" in refused.stderr


def test_only_loopback_hears_ray_and_the_service(service: Service) -> None:
    pids = {process.pid for process in service.cluster_processes()}
    assert len(pids) > 5
    heard = [one for one in psutil.net_connections("inet") if one.status == psutil.CONN_LISTEN and one.pid in pids]
    assert heard
    assert {getattr(one.laddr, "ip", "").removeprefix("::ffff:") for one in heard} <= {"127.0.0.1", "::1"}


def test_a_service_that_is_told_to_stop_stops_and_leaves_the_cluster(service: Service) -> None:
    before = {process.pid for process in service.cluster_processes()}
    with httpx.stream("GET", f"{service.url}/jobs/watched/events", timeout=PATIENCE) as watching:
        lines = watching.iter_lines()
        next(lines)
        began = time.monotonic()
        assert service.stop() == 143
        assert time.monotonic() - began < 20
    assert before & {process.pid for process in service.cluster_processes()}
    service.start()
    service.wait_until_ready()
