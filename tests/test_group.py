"""Which machines a command runs on."""

from collections.abc import Iterator
from unittest import mock

import pytest
from conftest import program

from mtp_mlx.cli.group import join, refuse_group
from mtp_mlx.errors import GroupError, RequestError


class Group:
    """The second of two machines."""

    def rank(self) -> int:
        return 1

    def size(self) -> int:
        return 2


@pytest.fixture
def launched() -> Iterator[None]:
    with mock.patch("mlx.core.distributed.init", lambda strict, backend: Group()):
        yield


def test_without_mlx_launch_there_is_one_machine() -> None:
    assert join() is None
    refuse_group()


def test_a_backend_that_is_not_there_is_an_error() -> None:
    with pytest.raises(RequestError, match=r"--backend ring cannot be used here .* start this with mlx.launch"):
        join("ring")
    with pytest.raises(RequestError, match="--backend token-ring is not one of any, ring, jaccl"):
        join("token-ring")


def test_machines_that_do_not_find_each_other_are_told_so() -> None:
    error = RuntimeError("[ring] Couldn't connect (error: 111)")
    with (
        mock.patch("mlx.core.distributed.init", side_effect=error),
        pytest.raises(GroupError, match=r"have not found each other \(\[ring\] Couldn't connect.*start all of them"),
    ):
        join()


@pytest.mark.parametrize("command", [["chat"], ["serve", "--port", "0"], ["bench"], ["verify"]], ids=lambda c: c[0])
def test_other_commands_refuse_several_machines(command: list[str], launched: None) -> None:
    done = program(*command, "--model", "demo")
    assert done.returncode == 1 and done.stdout == ""
    assert "this command runs on one machine, and mlx.launch has started it as rank 1 of 2" in done.stderr


@pytest.mark.parametrize("prompt", [["-"], []], ids=["dash", "nothing"])
def test_a_prompt_on_standard_input_is_refused(prompt: list[str], launched: None) -> None:
    done = program("generate", *prompt, stdin=b"def f():")
    assert done.returncode == 1 and "mlx.launch never ends standard input" in done.stderr


def test_an_adapter_is_refused(launched: None) -> None:
    done = program("generate", "x", "--adapter", "folder")
    assert done.returncode == 1 and "--adapter folder cannot be put onto a part of a target" in done.stderr
