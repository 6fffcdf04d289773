"""The package's own exceptions: what a caller can cause and may want to catch.

Every message names the thing, its value and the remedy, so that the commands
can print it as their one line. An exception that is not an `ActionClipError`
is a bug of ours.
"""


def short(value: object) -> str:
    """Return a value as a message quotes it: on one line, and no longer than one reads."""
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:77] + "...")
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class ActionClipError(Exception):
    """Base of every error that the package raises on purpose."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: str) -> str:
    """Escape control characters and undecodable bytes, so that text cannot steer a terminal."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in text
    )


class InputError(ActionClipError, ValueError):
    """An argument, a label list, a template or an option is wrong."""


class VideoError(ActionClipError, ValueError):
    """A video cannot be used.

    Attributes:
        path: the video as the caller named it.
        reason: one short word for programs, such as `missing` or `no-video-stream`.
        message: one sentence for people, without the path.
    """

    def __init__(self, path: str, reason: str, message: str) -> None:
        super().__init__(path, reason, message)
        self.path = path
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return one_line(f"{self.path}: {self.reason}: {self.message}")


class WeightsError(ActionClipError, RuntimeError):
    """A weight file is damaged, unsafe, of an unknown format or not for this model."""


class DownloadError(WeightsError):
    """A published weight file could not be fetched or did not match its checksum."""


class OutputError(ActionClipError):
    """A file cannot be written: no space, no permission, no folder."""


class TrainingError(ActionClipError, RuntimeError):
    """A training run cannot go on: a loss is not finite, or its files do not fit."""


class TooManyBadError(ActionClipError, RuntimeError):
    """More videos of the data cannot be used than the caller allows."""


class MissingExtraError(ActionClipError, ImportError):
    """An optional dependency is needed that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs {package}: pip install 'actionclip[{extra}]'")
