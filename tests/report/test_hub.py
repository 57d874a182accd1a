"""Uploads to a stand-in for the hub: every file arrives byte for byte, and a refusal is one line that loses nothing."""

from __future__ import annotations

import socket

import huggingface_hub
import pytest

from bora_pyro.errors import InputError
from bora_pyro.report.hub import check_repo_id, push_folder
from tests.hub_stand_in import TOKEN, hub_stand_in

# the hub's client still calls its HTTP library in an old way, for LFS
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub():
    with hub_stand_in() as server:
        yield server


@pytest.fixture
def by_lfs(monkeypatch):
    """Large files by LFS, the hub's older protocol: the newer one talks to a store of its own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture
def folder(tmp_path):
    files = {
        "README.md": b"---\ntags:\n- lora\n---\n# x\n",
        "ada/adapter_config.json": b"{}",
        "ada/adapter_model.safetensors": bytes(range(256)) * 40,
    }
    for name, content in files.items():
        (tmp_path / "export" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "export" / name).write_bytes(content)
    return tmp_path / "export"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("by_lfs")
def test_files_arrive_as_they_are(hub, folder):
    before = contents(folder)
    address = push_folder(folder, "ada/speeches", private=True, endpoint=hub.url, token=TOKEN)
    assert address == f"{hub.url}/ada/speeches"
    assert hub.repositories == {"ada/speeches": before}
    assert len(hub.objects) == 1
    assert hub.created[0]["visibility"] == "private"
    assert contents(folder) == before


def test_small_files_go_with_the_commit(hub, folder):
    hub.large = ()
    push_folder(folder, "ada/speeches", endpoint=hub.url, token=TOKEN)
    assert hub.repositories == {"ada/speeches": contents(folder)}
    assert not hub.objects
    assert hub.created[0].get("visibility") != "private"


def test_a_repository_that_is_there_is_added_to(hub, folder):
    hub.large = ()
    hub.repositories["ada/speeches"] = {"LICENSE": b"mine", "README.md": b"old"}
    push_folder(folder, "ada/speeches", endpoint=hub.url, token=TOKEN)
    assert hub.repositories["ada/speeches"] == {"LICENSE": b"mine"} | contents(folder)


@pytest.mark.usefixtures("by_lfs")
@pytest.mark.parametrize(
    ("refuse", "token", "message"),
    [
        ({}, "hf_wrong", r"the hub answers 401 .*; log in with `hf auth login`, or set HF_TOKEN\."),
        ({"/api/": 403}, TOKEN, r"the hub answers 403 .*; use a token that may write there\."),
        ({"/api/repos": 400}, TOKEN, "the hub answers 400 .*; see its answer"),
        ({"/api/models/ada/speeches/preupload": 404}, TOKEN, "the hub answers 404"),
        ({"/api/models/ada/speeches/commit": 413}, TOKEN, "the hub answers 413"),
        ({"/ada/speeches.git": 422}, TOKEN, "the hub answers 422"),
    ],
)
def test_what_the_hub_refuses(hub, folder, refuse, token, message):
    hub.refuse, before = refuse, contents(folder)
    with pytest.raises(InputError, match=message) as caught:
        push_folder(folder, "ada/speeches", endpoint=hub.url, token=token)
    said = str(caught.value)
    assert said.startswith("ada/speeches was not sent: ")
    assert said.endswith(f"{folder} is complete: `hf upload ada/speeches {folder}` sends it later")
    assert "\n" not in said
    assert contents(folder) == before


def test_no_hub_at_all(folder):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(
        InputError, match=r"was not sent: the hub cannot be reached \(.*\); check the network and HF_ENDPOINT"
    ) as caught:
        push_folder(folder, "ada/speeches", endpoint=address, token=TOKEN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["speeches", "a/b/c", "a/..", "a b/c", "/x", "x/", "", "a/" + "x" * 100])
def test_names_that_are_none(name):
    with pytest.raises(InputError, match="is not a valid repository name on the hub; give USER/NAME"):
        check_repo_id(name)
    check_repo_id("ada/speeches-2.0")
