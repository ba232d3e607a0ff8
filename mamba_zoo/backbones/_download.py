"""Where published weights come from: an address, a hub repository or a file, each ending in a whole local file."""

from __future__ import annotations

import http.client
import os
import posixpath
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

from timm.models import PretrainedCfg
from timm.models._hub import get_cache_dir, hf_split

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_CHUNK = 1 << 18
_TIMEOUT = 30.0


def published_file(name: str, cfg: PretrainedCfg, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The local file with the weights that `cfg` points to; downloaded once, then taken from the cache.

    Args:
        name: Model name, for messages and for the folder in the cache.
        cfg: What timm's registry knows: `file`, `hf_hub_id` with `hf_hub_filename`, or `url`, in this order.
        cache_dir: Folder for downloads; timm's cache if None.

    Raises:
        ValueError: no address is known, or `file` is an empty path.
        ConnectionError: the address cannot be reached, or the download ended early.
    """
    if cfg.file == "":
        raise ValueError(
            f'file="" in the configuration of {name} is no file; leave it out to load the published weights'
        )
    if cfg.file:
        return _chosen(Path(cfg.file)) if cfg.source == "local-dir" else Path(cfg.file)
    if cfg.hf_hub_id:
        return _from_hub(name, cfg, cache_dir)
    if not cfg.url:
        where = f" (source: {cfg.origin_url})" if cfg.origin_url else ""
        raise ValueError(
            f"pretrained=True: no address is known from which the weights of {name} can be downloaded directly{where}; "
            f"`mamba-zoo info {name}` tells what is known. Pass the file as checkpoint_path="
        )
    url, filename = cfg.url if isinstance(cfg.url, tuple) else (cfg.url, _basename(cfg.url))
    # Many projects call their file best.pth or model.pth, so each model has a folder of its own.
    folder = Path(cache_dir) if cache_dir else Path(get_cache_dir(os.path.join("mamba_zoo", name)))
    target = folder / filename
    if not target.exists():
        try:
            _download(url, target)
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it holds the connection
            raise _unreachable(name, url, filename, error) from error
    return target


def _basename(url: str) -> str:
    return urllib.parse.unquote(posixpath.basename(urllib.parse.urlparse(url).path))


def _unreachable(name: str, address: str, filename: str, error: Exception) -> ConnectionError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ConnectionError(
        f"the weights of {name} cannot be downloaded from {address} ({reason}). "
        f"Get {filename} from there by other means and pass checkpoint_path=<that file>"
    )


def _from_hub(name: str, cfg: PretrainedCfg, cache_dir: str | os.PathLike[str] | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    folder = None if cache_dir is None else Path(cache_dir)
    repo, revision = hf_split(str(cfg.hf_hub_id))
    filename, failure = "", Exception()
    for filename in (cfg.hf_hub_filename,) if cfg.hf_hub_filename else _HUB_FILES:
        try:
            return Path(hf_hub_download(repo, filename, revision=revision, cache_dir=folder))
        except Exception as error:  # the hub client raises several unrelated families of errors
            failure = error
            if isinstance(error, LocalEntryNotFoundError) or not isinstance(error, EntryNotFoundError):
                break  # not reached at all, so the next file would not be either
    raise _unreachable(name, f"https://huggingface.co/{repo}", filename, failure) from failure


def _chosen(folder: Path) -> Path:
    """The weights in a folder that timm exported."""
    for name in _HUB_FILES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds none of {', '.join(_HUB_FILES)}; give the file as checkpoint_path=")


def _download(url: str, target: Path) -> None:
    """Fetch `url` into `target` whole or not at all, with a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
    request = urllib.request.Request(url, headers={"User-Agent": "mamba_zoo"})
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as reply, part.open("xb") as file:
            size = int(length) if (length := reply.headers.get("Content-Length")) else None
            with Progress(*columns, console=Console(stderr=True)) as progress:
                task = progress.add_task(target.name, total=size)
                while chunk := reply.read(_CHUNK):
                    file.write(chunk)
                    progress.advance(task, len(chunk))
            file.flush()
            os.fsync(file.fileno())
            # A dropped connection reads as the end of the file, so the length is the only sign of it.
            if size is not None and file.tell() != size:
                raise ConnectionError(f"the connection ended after {file.tell()} of {size} bytes")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
