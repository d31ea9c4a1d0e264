"""The image is built without a Docker engine and works as it will in a pod: not as root, with a read-only root.

Needs root and Debian's buildah and debootstrap. Base and layers are kept in the temporary folder for the next run.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
HERE = Path(tempfile.gettempdir()) / "ccsr-image"
MISSING = [name for name in ("buildah", "debootstrap") if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING) or os.geteuid() != 0, reason=f"needs root and {MISSING or 'no more'}"),
]
# Everything but three folders of a pod's is read-only.
INSIDE = """
mount --bind "$1" "$1"
mount -o remount,bind,ro "$1"
mount --rbind /dev "$1/dev"
for folder in tmp home/ccsr dev/shm; do mount -t tmpfs -o mode=1777 tmpfs "$1/$folder"; done
mount -t proc proc "$1/proc"
ip link set lo up
root=$1; shift
exec chroot --userspec=1000:1000 "$root" "$@"
"""


def buildah(*words: object) -> str:
    command = ["buildah", "--root", str(HERE / "storage"), "--runroot", str(HERE / "run"), *map(str, words)]
    # The builds' network is this machine's, and nothing but chroot separates them from it.
    environment = os.environ | {"BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "overlay"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def base() -> str:
    """The Dockerfile's base as far as its steps need it: Debian with its Python, from which no compiler came."""
    if "localhost/base" not in buildah("images", "--format", "{{.Name}}"):
        packages = "--include=python3,python3-pip,python-is-python3,ca-certificates,openssl"
        root = HERE / "root"
        shutil.rmtree(root, ignore_errors=True)
        command = ["debootstrap", "--variant=minbase", packages, "bookworm", str(root)]  # its own mirror
        subprocess.run(command, check=True, capture_output=True)
        for file in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
            file.unlink()
        container = buildah("from", "scratch").strip()
        buildah("add", "--quiet", container, root, "/")
        buildah("commit", "--quiet", "--rm", container, "base")
        shutil.rmtree(root)
    return "localhost/base"


@pytest.fixture(scope="module")
def image() -> str:
    """The Dockerfile's image; wheels and certificates of this machine are mounted for the build alone."""
    HERE.mkdir(parents=True, exist_ok=True)
    wheels = [path for path in os.environ.get("PIP_FIND_LINKS", "").split() if path.startswith("/")]
    (HERE / "pip.conf").write_text("[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n")
    with (HERE / "pip.conf").open("a") as settings:
        settings.writelines(f"find-links = {path}\n" for path in wheels[:1])
    mounts = [f"{HERE}/pip.conf:/etc/pip.conf:ro", *(f"{path}:{path}:ro" for path in ("/etc/ssl/certs", *wheels[:1]))]
    volumes = [word for mount in mounts for word in ("--volume", mount)]
    buildah("bud", "--layers", "--format", "oci", "--from", base(), *volumes, "--tag", "ccsr:test", ".")
    return "localhost/ccsr:test"


@pytest.fixture
def run(image: str) -> "Callable[..., subprocess.CompletedProcess[str]]":
    """Run a command in the image."""
    container = buildah("from", image).strip()
    root = buildah("mount", container).strip()
    variables = json.loads(buildah("inspect", image))["OCIv1"]["config"]["Env"]

    def call(*words: str) -> "subprocess.CompletedProcess[str]":
        unshared = ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "bash", "-ec", INSIDE, "-", root]
        inside = ["env", "-i", "-C", "/home/ccsr", "HOME=/home/ccsr", *variables, *words]
        return subprocess.run([*unshared, *inside], capture_output=True, text=True, timeout=500, check=False)

    yield call
    buildah("umount", container)
    buildah("rm", container)


def test_the_image_works_without_root_and_without_writing_to_itself(run, photos_in_image: str) -> None:
    help_text = run("ccsr", "--help")
    assert help_text.returncode == 0, help_text.stderr
    assert "shard" in help_text.stdout

    touched = run(
        "sh", "-c", "id -u; touch /opt/ccsr/file; touch /etc/file; touch /tmp/file /home/ccsr/file && echo yes"
    )
    assert touched.stdout.splitlines() == ["1000", "yes"]
    assert touched.stderr.count("Read-only file system") == 2

    compilers = run("sh", "-c", "command -v gcc cc g++ clang make ninja-build")
    assert compilers.stdout == ""

    doctor = run("ccsr", "doctor")
    assert "fail" not in doctor.stdout, doctor.stdout + doctor.stderr
    assert "ok    versions" in doctor.stdout

    # Ray gives a node 30 seconds to start, which is short on a busy machine.
    shard = "for attempt in 1 2 3; do ccsr shard -c /tmp/shard.yaml && break; done"
    job = run("sh", "-c", f"{photos_in_image} && {shard} && ccsr verify /tmp/set")
    assert job.returncode == 0, job.stdout + job.stderr


def test_the_image_has_the_pinned_libraries_and_no_others(run) -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    listed = json.loads(run("pip", "list", "--format=json", "--path", "/usr/local/lib/python3.11/dist-packages").stdout)
    found = {one["name"].lower().replace("_", "-"): one["version"].partition("+")[0] for one in listed}
    assert found.pop("ccsr-cluster")
    # A CUDA build of torch brings its own libraries, which it pins itself.
    expected = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    extra = {name for name in found if name.startswith(("nvidia-", "triton", "cuda-"))} - expected.keys()
    assert {name: found[name] for name in found.keys() - extra} == expected


@pytest.fixture
def photos_in_image() -> str:
    """Shell words that make photographs and a shard config in /tmp, with the image's own libraries."""
    program = (
        "import numpy, pathlib; from PIL import Image; pathlib.Path('/tmp/photos').mkdir(); "
        "[Image.fromarray(numpy.random.default_rng(n).integers(0, 255, (160, 160, 3), dtype='uint8'))"
        ".save(f'/tmp/photos/{n}.png') for n in range(3)]"
    )
    config = (
        "{job: shard, output: /tmp/set, seed: 0, sources: [{kind: folder, name: noise, path: /tmp/photos}], "
        "crop: {kind: center, size_px: 128}, degradation: bicubic, samples_per_shard: 2}"
    )
    return f'python -c "{program}" && echo "{config}" > /tmp/shard.yaml'
