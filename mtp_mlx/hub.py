"""From a name to files: a folder as it is, a demo, or a hub id, downloaded whole or read from afar in parts."""

import json as json_format
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_session, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from mtp_mlx.checkpoint import Header
from mtp_mlx.errors import CheckpointError

DEMO = "demo"
DEMOS = {DEMO: Path(__file__).parent / "demo", "demo-qwen": Path(__file__).parent / "demo_qwen"}
TENSORS = ".safetensors"
FILES = ["*.json", "*.safetensors", "*.jinja", "*.model"]


def find(name: str) -> Path:
    """The folder of a model given as folder, hub id or demo; what is not on disk yet is downloaded."""
    if name in DEMOS:
        return DEMOS[name]
    if not name:
        raise CheckpointError(f"the name of a model is empty; give a folder, a hub id, {' or '.join(DEMOS)}")
    try:
        path = Path(name).expanduser()
        if path.exists() or not is_hub_id(name):
            return path
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{name[:200]} cannot be opened: {first_line(error)}") from error
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{name} is neither a folder here nor a model that the hub would give ({first_line(error)}); check "
            "the name, your connection and, for a gated model, that you are logged in"
        ) from error


def is_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 2 and all(parts) and not name.startswith((".", "/", "~")) and not name.endswith(TENSORS)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Remote:
    """A repository on the hub, at one commit, of which parts are read without downloading the rest."""

    repo: str
    commit: str
    files: dict[str, int]  # name -> bytes

    @classmethod
    def open(cls, repo: str) -> "Remote":
        """Raises CheckpointError for a repository that is not there or not open to the user."""
        info = HfApi().model_info(repo, files_metadata=True)
        assert info.sha is not None
        return cls(repo, info.sha, {file.rfilename: file.size or 0 for file in info.siblings or []})

    def read(self, file: str, begin: int, end: int) -> bytes:
        """Bytes begin .. end-1 of a file."""
        url = hf_hub_url(self.repo, file, revision=self.commit)
        headers: dict[str, Any] = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"}
        response = get_session().get(url, headers=headers, follow_redirects=True)
        hf_raise_for_status(response)
        return bytes(response.content)

    def json(self, file: str) -> dict[str, Any]:
        """The object in a JSON file."""
        content = json_format.loads(self.read(file, 0, self.files[file]))
        assert isinstance(content, dict)
        return content

    def header(self, file: str) -> Header:
        """The header of a weight file."""
        length = self.read(file, 0, 8)
        return Header.parse(length, self.read(file, 8, 8 + int.from_bytes(length, "little")))
