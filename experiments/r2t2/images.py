"""Images as tables store them: encoded in the cell, as base64, or as the path of a file."""

import base64
import binascii
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from experiments.cli import UserError


class UnreadableImageError(UserError):
    """An image that is not there or cannot be decoded."""


class EncodedImage(NamedTuple):
    """An image as it was stored."""

    content: bytes | Path
    where: str  # the row it belongs to

    def pixels(self) -> np.ndarray:
        """Decodes the image: RGB, uint8 [height, width, 3].

        Raises:
          UnreadableImageError: it is not there or cannot be decoded.
        """
        try:
            with PIL.Image.open(io.BytesIO(self.encoded())) as image:
                return np.array(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
            file = f", {self.content}," if isinstance(self.content, Path) else ""
            raise UnreadableImageError(
                f"image: that of {self.where}{file} cannot be decoded; mend it, or set skip_unreadable=True."
            ) from None

    def encoded(self) -> bytes:
        """Returns the bytes as they were stored.

        Raises:
          UnreadableImageError: there is no such file.
        """
        if isinstance(self.content, bytes):
            return self.content
        try:
            return self.content.read_bytes()
        except OSError as error:
            raise UnreadableImageError(
                f"image: that of {self.where}, {self.content}, cannot be read ({error.strerror}); set images= to the "
                "folder in which paths begin, or skip_unreadable=True."
            ) from None


def encoded_image(value: Any, where: str, folder: Path) -> EncodedImage:
    """Finds the image in a cell.

    Args:
      value: encoded bytes, a {bytes, path} struct, a path, base64 (also as a data: address), or a list of one of these.
      where: the row, for messages.
      folder: where relative paths begin.

    Raises:
      UnreadableImageError: the cell holds no image, or several.
    """
    values = value if isinstance(value, list | tuple) else [value]
    found = [one for one in values if one]
    if len(found) != 1:
        raise UnreadableImageError(
            f"image: {where} has {len(found) or 'no'} images instead of one; mend the row, or set skip_unreadable=True."
        )
    one = found[0]
    if isinstance(one, Mapping):
        one = one.get("bytes") or one.get("path")
    if isinstance(one, str):
        one = _from_text(one, folder)
    if not isinstance(one, bytes | Path):
        raise UnreadableImageError(
            f"image: {where} holds neither image, path nor base64; set columns={{'image': ...}} to one that does."
        )
    return EncodedImage(one, where)


def _from_text(text: str, folder: Path) -> bytes | Path | None:
    """A path or base64, which has no dots; None if it is neither."""
    if not text.startswith("data:") and "." in text:
        return folder / text
    try:
        return base64.b64decode("".join(text.rpartition(",")[2].split()), validate=True)
    except binascii.Error:
        return None
