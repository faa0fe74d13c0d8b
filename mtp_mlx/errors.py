"""The errors a user can meet.

    MTPError
    ├── CheckpointError   a folder, a config or a weight file is not what it should be
    ├── PairError         target and drafter do not fit each other
    ├── RequestError      a prompt or an option that cannot be served
    ├── GroupError        another machine that computes a part of the same model is gone
    └── BusyError         too many requests at a time; the same one may be served later

Each message is one line: what was given, what fits, what to do. The command line prints it and exits with 1.
"""


class MTPError(Exception):
    """Root of every error that a user may act on."""


class CheckpointError(MTPError):
    """A checkpoint is missing, damaged or of an architecture we do not have."""


class PairError(MTPError):
    """The drafter was made for another target."""


class RequestError(MTPError, ValueError):
    """A request asks for something that cannot be done. A ValueError as well, as in mlx-lm."""


class GroupError(MTPError):
    """Another machine of the group does not answer any more."""


class BusyError(MTPError):
    """Nothing is wrong with the request, but it cannot be served now."""
