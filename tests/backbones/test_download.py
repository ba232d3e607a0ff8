"""Published weights come from their address whole or not at all."""

import http.server
import os
import threading

import huggingface_hub
import pytest
import timm
import torch

from mamba_zoo.backbones import _download

from .toy import assert_holds


class Handler(http.server.BaseHTTPRequestHandler):
    files: dict[str, bytes] = {}  # noqa: RUF012 - shared with the test
    asked: list[str] = []  # noqa: RUF012
    cut = False

    def do_GET(self):
        self.asked.append(self.path)
        body = self.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.cut else body)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server(file, monkeypatch):
    monkeypatch.setattr(Handler, "files", {"/%23v2cls/w.pth": file.read_bytes()})
    monkeypatch.setattr(Handler, "asked", [])
    monkeypatch.setattr(Handler, "cut", False)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}/%23v2cls/w.pth"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(_download, "get_cache_dir", lambda child="": str(tmp_path / "cache" / child))
    return tmp_path / "cache" / "mamba_zoo" / "toy_small"


def published(url, **kwargs):
    return timm.create_model("toy_small", pretrained=True, pretrained_cfg_overlay={"url": url}, **kwargs)


def test_pretrained_downloads_once_and_shows_progress(server, cache, weights, capsys):
    assert_holds(published(server), weights)
    assert "w.pth" in capsys.readouterr().err
    assert_holds(published(server, num_classes=2), weights, but=["head."])
    assert Handler.asked == ["/%23v2cls/w.pth"]
    assert os.listdir(cache) == ["w.pth"]


def test_pretrained_is_as_strict_as_a_file(server, cache, weights):
    del weights["norm.bias"]
    cache.mkdir(parents=True)
    torch.save(weights, cache / "w.pth")
    with pytest.raises(ValueError, match="not in it"):
        published(server)


def test_a_connection_that_ends_early_leaves_nothing(server, cache, monkeypatch):
    monkeypatch.setattr(Handler, "cut", True)
    with pytest.raises(ConnectionError, match=r"the connection ended after \d+ of \d+ bytes.*w\.pth.*checkpoint_path="):
        published(server)
    assert os.listdir(cache) == []


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/w.pth", "missing"])
def test_an_address_that_does_not_answer_is_named(address, server, cache):
    address = server.replace("w.pth", "gone.pth") if address == "missing" else address
    with pytest.raises(
        ConnectionError, match=rf"toy_small cannot be downloaded from {address}.*checkpoint_path="
    ) as caught:
        published(address)
    assert address.rpartition("/")[2] in str(caught.value)
    assert not list(cache.glob("*"))


def test_the_hub_is_asked_for_the_published_file(file, weights, monkeypatch):
    asked = []

    def download(repo, filename, revision=None, cache_dir=None):
        asked.append((repo, filename, revision))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    overlay = {"hf_hub_id": "hustvl/Vim@main", "hf_hub_filename": "vim.pth"}
    model = timm.create_model("toy_small", pretrained=True, pretrained_cfg_overlay=overlay)
    assert_holds(model, weights)
    assert asked == [("hustvl/Vim", "vim.pth", "main")]

    def offline(*args, **kwargs):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ConnectionError, match=r"huggingface\.co/hustvl/Vim \(no network\).*Get vim\.pth"):
        timm.create_model("toy_small", pretrained=True, pretrained_cfg_overlay=overlay)


@pytest.mark.usefixtures("_toys")
def test_no_address():
    with pytest.raises(ValueError, match=r"no address is known .*checkpoint_path="):
        published(None)


def test_a_folder_exported_by_timm_loads_again(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vmamba_mini", num_classes=3)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    for ours, theirs in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds none of model\.safetensors"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
