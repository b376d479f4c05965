"""The oldest trainers that the callbacks are tested in, and the refusal of older ones."""

from __future__ import annotations

from importlib.metadata import version

__all__ = ["OLDEST", "check_version"]

OLDEST = {"lightning": "2.6", "transformers": "5.12", "trl": "1.16"}
"""As pyproject.toml has them; a test holds them equal."""


def check_version(owner: str, package: str, extra: str) -> None:
    """Refuse an older version of a package than the one that the callback was tested in.

    Args:
        owner: Name used in the error.
        package: A key of :data:`OLDEST`.
        extra: The extra of onlinesel that installs a newer one.

    Raises:
        ImportError: The installed version is older.
    """
    from packaging.version import Version  # all of them need it; torch alone does not

    found = version(package)
    if Version(found) < Version(OLDEST[package]):
        raise ImportError(
            f"{owner}: {package} must be {OLDEST[package]} or newer, got {found}. "
            f'Run pip install --upgrade "onlinesel[{extra}]".'
        )
